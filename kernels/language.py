"""Triton's language, or as much of it as lets rules be imported where Triton is not installed.

There they are compiled for the CPU, from their source.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except Exception:  # a broken installation raises more than ImportError
    triton = SimpleNamespace(jit=lambda function: SimpleNamespace(fn=function, __name__=function.__name__))
    tl = SimpleNamespace(constexpr=object())

__all__ = ["tl", "triton"]
