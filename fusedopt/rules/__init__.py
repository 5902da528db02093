"""The optimizers, one a file: equations, arguments, states and reference. Their twins are in `fusedopt.kernels.rules`.

May import `FusedOptimizer` and everything below it.
"""
