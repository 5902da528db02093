"""The device functions of each optimizer, `scalars` and `update`: the twins of `fusedopt.rules`, name by name.

May import Triton and the modules of `fusedopt.kernels`.
"""
