"""Numbers with the magnitude bound that their rounding errors are measured against, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
EPS64 = np.finfo(np.float64).eps


def exact(tensor: torch.Tensor) -> Array:
    """The elements in logical order, complex ones as their two parts."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().reshape(-1).numpy().astype(np.longdouble)


@dataclass(frozen=True)
class Bounded:
    """A value, and the scale of its rounding errors: the same formula on absolute values, but for these rules.

    Relative scales add up where both operands of a product or quotient have been rounded before; beside an exact one
    (an input, a hyperparameter) the other's stays as it is. A square so has twice the relative error of its root. An
    infinite bound says that rounding decides the value: nothing can be said about it.
    """

    value: Array
    bound: Array
    exact: bool = False
    lost: float = np.inf  # where a bound is so many times its value, the arithmetic has lost the value
    others: tuple[Array, ...] = ()  # values that are as right where rounding decides a sign, NaN elsewhere

    @staticmethod
    def of(value: Any, lost: float = np.inf) -> Bounded:
        value = np.asarray(value, dtype=np.longdouble)
        return Bounded(value, np.abs(value), exact=True, lost=lost)

    def _result(self, other: Bounded, value: Array, bound: Array) -> Bounded:
        return Bounded(value, bound, lost=min(self.lost, other.lost))

    def __neg__(self) -> Bounded:
        return replace(self, value=-self.value)

    def __abs__(self) -> Bounded:
        return replace(self, value=abs(self.value))

    def __add__(self, other: Any) -> Bounded:
        other = _bounded(other)
        return self._result(other, self.value + other.value, self.bound + other.bound)

    def __sub__(self, other: Any) -> Bounded:
        return self + -_bounded(other)

    def __mul__(self, other: Any) -> Bounded:
        other = _bounded(other)
        value = self.value * other.value
        # Not only to first order: where an operand cancels to 0, its square still has an error.
        bound = self.bound * other.bound
        return self._result(other, value, bound if self.exact or other.exact else bound + abs(value))

    def __truediv__(self, other: Any) -> Bounded:
        other = _bounded(other)
        value = self.value / other.value
        bound = (self.bound + abs(value) * other.bound) / abs(other.value)
        bound = bound - abs(value) if self.exact or other.exact else bound
        lost = other.bound > min(self.lost, other.lost) * abs(other.value)
        return self._result(other, value, np.where(lost, np.inf, bound))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Bounded:
        return _bounded(other) - self

    def __rtruediv__(self, other: Any) -> Bounded:
        return _bounded(other) / self

    def sqrt(self) -> Bounded:
        """The root halves an error, but adds its own. Without a bound the value is an exact 0."""
        value = np.sqrt(self.value)
        inherited = np.divide(self.bound, 2 * value, out=np.zeros_like(self.bound), where=self.bound > 0)
        return replace(self, value=value, bound=np.maximum(value, inherited), exact=False)

    def maximum(self, other: Any) -> Bounded:
        """The larger one's bound, or both where rounding may decide which it is."""
        other = _bounded(other)
        both = np.maximum(self.bound, other.bound)
        larger = np.where(self.value > other.value, self.bound, other.bound)
        close = abs(self.value - other.value) * min(self.lost, other.lost) <= self.bound + other.bound
        return self._result(other, np.maximum(self.value, other.value), np.where(close, both, larger))


def _bounded(number: Any) -> Bounded:
    return number if isinstance(number, Bounded) else Bounded.of(number)


def sign(number: Bounded, compute: torch.dtype) -> tuple[Array, Array]:
    """The sign, and where rounding may give another: within 4 ULP of the bound, as the tolerance is."""
    undecided = (abs(number.value) <= 4 * torch.finfo(compute).eps * number.bound) & (number.bound > 0)
    return np.sign(number.value), undecided


def power(base: float, exponent: float) -> Bounded:
    """base ** exponent in float64: an error of the exponent counts by its size."""
    value = np.longdouble(base) ** exponent
    return Bounded(value, value * (1 + abs(exponent * np.log2(np.longdouble(base)))))


def rounded(scalar: Bounded, dtype: torch.dtype) -> Bounded:
    """A number that was computed in float64 and then rounded to the dtype of the arithmetic."""
    share = EPS64 / torch.finfo(dtype).eps
    return Bounded(scalar.value, abs(scalar.value) + share * scalar.bound, exact=True)
