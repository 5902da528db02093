"""Triton and its language, or as much of them as lets rules be imported where Triton is not installed.

There they are compiled for the CPU, from their source.
"""

from types import ModuleType, SimpleNamespace

try:
    import triton
    import triton.language as tl
except Exception:  # a broken installation raises more than ImportError
    triton, tl = ModuleType("triton"), ModuleType("triton.language")
    triton.jit = lambda function: SimpleNamespace(fn=function, __name__=function.__name__)
    tl.constexpr = "put in when a rule is compiled"

__all__ = ["tl", "triton"]
