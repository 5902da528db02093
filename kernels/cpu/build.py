"""Compiles a kernel into object code."""

import numpy as np
from numba import cfunc, types

from . import TAKEN, gate, multi_tensor
from .memory import load, take
from .specialize import specialize

KERNELS = {"sum_squares": gate.sum_squares, "prepare": multi_tensor.prepare, "update": multi_tensor.update}


def object_code(name, constants):
    """(symbol, code) of a C function that runs all programs of a kernel, however many threads call it at once.

    It gets the address of int64: the number of programs, then the arguments.
    """
    compute = getattr(np, constants.get("COMPUTE", "float64"))
    kernel = specialize(KERNELS[name], {**constants, "COMPUTE": compute}, compute, {})
    taken = 8 * TAKEN

    def run(args):
        programs = load(args, 0, "int64")
        program = take(args + taken)
        while program < programs:
            kernel(args, program)
            program = take(args + taken)

    function = cfunc(types.void(types.int64), error_model="numpy", nogil=True)(run)
    return function._wrapper_name, function._library.serialize_using_object_code()[2][0]
