"""Arithmetic that Triton rounds differently from IEEE 754 unless told otherwise."""

from .language import tl, triton


@triton.jit
def div(x, y):
    """X / y, correctly rounded. For fp64, `/` already is."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def sqrt(x):
    """The square root, correctly rounded. For fp64, `tl.sqrt` already is."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def power(base, exponent):
    """Base ** exponent for 0 <= base and 0 < exponent, in float64 (Triton has no pow)."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def maximum(x, y):
    """The larger of the two, NaN where either is NaN, as torch.maximum."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    """The smaller of the two, NaN where either is NaN, as torch.minimum."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def signum(x):
    """-1, 0 or 1 with the sign of x, 0 for NaN, as torch.sign."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def lerp(start, end, weight):
    """From start to end, all of the way at weight 1; in torch's form."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))
