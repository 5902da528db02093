"""Products of batches of matrices, for rules that update whole matrices.

May import engines, step, storage and options, and the kernels within functions only: they import Triton.
"""
