"""What Triton's language, and kernels/arithmetic.py, mean for one number on a CPU."""

from types import SimpleNamespace

import numpy as np
from numba import types
from numba.extending import intrinsic, overload_attribute, overload_method

from .memory import static_range, where

constexpr = "put in when a call is specialized, as a name in capitals"


def maximum(x, y, propagate_nan: constexpr = False):
    """Of a NaN and a number the number, unless NaN is to be propagated."""
    if propagate_nan:
        return where((x > y) | (x != x), x, y)
    else:
        return where((x > y) | (y != y), x, y)


def minimum(x, y, propagate_nan: constexpr = False):
    """As `maximum`."""
    if propagate_nan:
        return where((x < y) | (x != x), x, y)
    else:
        return where((x < y) | (y != y), x, y)


def clamp(x, lowest, highest, propagate_nan: constexpr = False):
    """Not below the lowest, nor above the highest."""
    return minimum(maximum(x, lowest, propagate_nan), highest, propagate_nan)


def full(shape, value, dtype):
    """A number of this dtype: one element has no shape."""
    return dtype(value)


@intrinsic
def zeros_like(typing, x):
    """0 in the dtype of x."""
    return x(x), lambda context, b, sig, args: context.get_constant(sig.return_type, 0)


def div(x, y):
    """X / y."""
    return x / y


def fma(x, y, z):
    """Rounded twice, as everything here."""
    return x * y + z


def rsqrt(x):
    """1 / √x."""
    return 1 / np.sqrt(x)


def sigmoid(x):
    """1 / (1 + e⁻ˣ)."""
    return 1 / (1 + np.exp(-x))


def static_assert(condition, message=""):
    """Checked when a function is specialized; never called."""
    raise NotImplementedError


@overload_attribute(types.Float, "shape")
def _shape(x):
    return lambda x: ()


@overload_method(types.Float, "to")
@overload_method(types.Boolean, "to")
def _to(x, dtype):
    return lambda x, dtype: dtype(x)


class _Language(SimpleNamespace):
    def __getattr__(self, name):
        raise NotImplementedError(f"tl.{name} is not known on a CPU")


LANGUAGE = _Language(
    **{function.__name__: function for function in (maximum, minimum, clamp, full, fma, rsqrt, sigmoid)},
    where=where, zeros_like=zeros_like, static_range=static_range, static_assert=static_assert,
    range=range, PropagateNan=SimpleNamespace(NONE=False, ALL=True),
    float32=np.float32, float64=np.float64,
    abs=np.abs, sqrt=np.sqrt, sqrt_rn=np.sqrt, div_rn=div, floor=np.floor, ceil=np.ceil,
    exp=np.exp, exp2=np.exp2, log=np.log, log2=np.log2, sin=np.sin, cos=np.cos, tanh=np.tanh,
)  # fmt: skip
LANGUAGE.math = LANGUAGE
ARITHMETIC = {"div": div, "sqrt": np.sqrt}  # which ask for the dtype
