"""Device code of fusedopt: the generic kernels, and in `rules` what each optimizer adds.

Importing any module below this package imports Triton. Nothing here imports the rest of fusedopt.
"""
