"""Device code of fusedopt: the two generic kernels and one rule for each optimizer.

Importing anything below this package imports Triton. Nothing here imports the rest of fusedopt.
"""
