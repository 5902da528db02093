"""The equations of the optimizers: the references beside torch.optim, the oracle and the book."""
