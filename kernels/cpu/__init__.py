"""Twins of the generic kernels for a CPU, file by file, and what compiles them with the rules: numba, into object code.

What is compiled are plain functions. Names in capitals are constants, as Triton's `tl.constexpr`: `specialize` puts
them in, unrolls `static_range` over them and leaves out what they make idle. Tensors are addresses, as in the tables.
A kernel gets the address of its arguments and the number of its program; what it calls must not raise.

Imports numba, llvmlite, numpy and the device functions of `fusedopt.kernels`, which it reads; never Triton itself.
"""

TAKEN = 32  # where among a kernel's arguments it counts the programs that have been taken: on a cache line of its own
