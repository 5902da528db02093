"""`python -m fusedopt.textbook`."""
