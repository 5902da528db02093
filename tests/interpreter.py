"""Triton's interpreter without what it does in vain, which is most of its time where tensors are small."""

from dataclasses import replace
from functools import cache

from triton.runtime import interpreter


def hurry():
    """Leave out what no kernel can notice, in a process where kernels never run but in the interpreter."""
    # It looks for an overflow in every sum of integers, but tells of none unless `debug` is set, which it is not.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    # It makes a table of all types for each look-up.
    look_up, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = numpy_dtype

    # It replaces the functions of triton.language at every call of a device function, and puts them back after every
    # launch. Here they stay replaced.
    interpreter._patch_lang = cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None
