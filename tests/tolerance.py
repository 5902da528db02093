"""How far a result may lie from the oracle's, in ULP at the scale of its magnitude bound (see `oracle`)."""

from __future__ import annotations

import numpy as np
import torch

from oracle import Array, Bounded, exact

# 16-bit results are computed in fp32 and rounded once, so half an ULP of the stored type is all that is lost.
ULPS = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}


def ulp(scale: Array, dtype: torch.dtype) -> Array:
    """The distance of two neighbours in `dtype` at this scale; that of its subnormals below the normal numbers."""
    finfo = torch.finfo(dtype)
    _, exponent = np.frexp(np.asarray(scale, dtype=np.longdouble))
    _, least = np.frexp(finfo.tiny)
    return np.ldexp(np.longdouble(finfo.eps), np.maximum(exponent, least) - 1)


def overflow(dtype: torch.dtype) -> np.longdouble:
    """The least number that rounds to infinity."""
    largest = np.longdouble(torch.finfo(dtype).max)
    return largest + ulp(largest, dtype) / 2


def assert_close(actual: torch.Tensor, expected: Bounded, dtype: torch.dtype | None = None, what: str = "") -> None:
    """Every element within `ULPS` of `expected`, measured at its bound.

    A result beyond the range of `dtype` must be infinite; one so near that the tolerance reaches over it may be. Where
    NaN or infinity is expected, it must be that.
    """
    dtype = dtype or (actual.dtype.to_real() if actual.is_complex() else actual.dtype)
    got, value = exact(actual), np.broadcast_to(expected.value, np.shape(expected.value)).reshape(-1)
    assert got.shape == value.shape, f"{what}: {got.size} elements instead of {value.size}"
    finite = np.isfinite(value)
    assert np.isfinite(expected.bound.reshape(-1)[finite]).all(), f"{what}: no bound, so nothing would be checked"

    with np.errstate(invalid="ignore", over="ignore"):
        unit = ulp(np.where(finite, expected.bound.reshape(-1), 0), dtype)
        tolerance = ULPS[dtype] * unit
        error = np.abs(got - value)
        near = error <= tolerance
        may_overflow = finite & (np.abs(value) + tolerance >= overflow(dtype))
        right = np.where(np.isinf(got) & may_overflow, np.sign(got) == np.sign(value), near)
        right = np.where(np.isnan(value), np.isnan(got), np.where(np.isinf(value), got == value, right))
    if right.all():
        return
    wrong = np.flatnonzero(~right)
    worst = wrong[np.argmax(np.nan_to_num(error[wrong] / unit[wrong], nan=np.inf))]
    raise AssertionError(
        f"{what}: {len(wrong)} of {got.size} elements are wrong, the worst is element {worst}: "
        f"{float(got[worst])!r} instead of {float(value[worst])!r}, off by {float(error[worst] / unit[worst]):.3g} ULP "
        f"of {dtype} at {float(expected.bound.reshape(-1)[worst]):.3g}; {ULPS[dtype]} are allowed"
    )
