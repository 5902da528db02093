"""How far a result may lie from the oracle's, in ULP at the scale of its magnitude bound (see `oracle`)."""

from __future__ import annotations

import numpy as np
import torch

from tests.bounded import Array, Bounded, exact

# 16-bit results are computed in fp32 and rounded once, so half an ULP of the stored type is all that is lost.
ULPS = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}


def ulp(scale: Array, dtype: torch.dtype) -> Array:
    """The distance of two neighbours in `dtype` at this scale; that of its subnormals below the normal numbers."""
    finfo = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.asarray(scale, dtype=np.longdouble), finfo.tiny))
    return np.ldexp(np.longdouble(finfo.eps), exponent - 1)


def overflow(dtype: torch.dtype) -> np.longdouble:
    """The least number that rounds to infinity."""
    largest = np.longdouble(torch.finfo(dtype).max)
    return largest + ulp(largest, dtype) / 2


def assert_close(actual: torch.Tensor, expected: Bounded, dtype: torch.dtype | None = None, what: str = "") -> None:
    """Every element within `ULPS` of `expected`, measured at its bound.

    A result beyond the range of `dtype` must be infinite; one so near that the tolerance reaches over it may be. Where
    NaN or infinity is expected, it must be that. Where rounding decides a sign, each outcome is right, for one element
    or one in a hundred. Where rounding decides (an infinite bound), all but NaN is right, and
    that may be so for one element, or one in a hundred.
    """
    dtype = dtype or (actual.dtype.to_real() if actual.is_complex() else actual.dtype)
    got, value, bound = exact(actual), expected.value.reshape(-1), expected.bound.reshape(-1)
    assert got.shape == value.shape, f"{what}: {got.size} elements instead of {value.size}"
    finite = np.isfinite(value)
    open_ended = finite & ~np.isfinite(bound)
    assert open_ended.sum() <= max(1, got.size // 100), f"{what}: {open_ended.sum()} elements cannot be checked"

    with np.errstate(invalid="ignore", over="ignore"):
        unit = ulp(np.where(finite & ~open_ended, bound, 0), dtype)
        tolerance = ULPS[dtype] * unit
        error = np.abs(got - value)
        right = np.select(
            [np.isnan(value), np.isinf(value), open_ended, np.isinf(got)],
            [
                np.isnan(got),
                got == value,
                ~np.isnan(got),
                (np.sign(got) == np.sign(value)) & (np.abs(value) + tolerance >= overflow(dtype)),
            ],
            error <= tolerance,
        )
        for other in expected.others:
            undecided = np.isfinite(other.reshape(-1)).sum()
            assert undecided <= max(1, got.size // 100), f"{what}: {undecided} signs are undecided"
            right |= np.abs(got - other.reshape(-1)) <= tolerance
    if right.all():
        return
    wrong = np.flatnonzero(~right)
    worst = wrong[np.argmax(np.nan_to_num(error[wrong] / unit[wrong], nan=np.inf))]
    raise AssertionError(
        f"{what}: {len(wrong)} of {got.size} elements are wrong, the worst is element {worst}: "
        f"{float(got[worst])!r} instead of {float(value[worst])!r}, off by {float(error[worst] / unit[worst]):.3g} ULP "
        f"of {dtype} at {float(bound[worst]):.3g}; {ULPS[dtype]} are allowed"
    )
