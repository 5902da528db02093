"""Products of batches of matrices, for rules that update whole matrices."""
