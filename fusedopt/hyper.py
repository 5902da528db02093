"""The hyperparameters of every group as float64 numbers, re-read at each step."""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

Group = dict[str, Any]
Number = float | Tensor


class Hyper:
    """One row of numbers a group, in the order of the class's `hyperparameters`; pairs such as `betas` take two places.

    A number may be a one-element tensor. Only its identity is compared, never its value, which may be on a device.
    The `options` have no place in a row, but a change of one counts as a change.
    """

    def __init__(self, names: Sequence[str], options: Sequence[str]) -> None:
        self._names = names
        self._read = _getter((*names, *options))
        self._values: list[Any] = []
        self._volatile = True
        self.rows: list[tuple[Number, ...]] = []
        self.version = 0  # grows when a number may have changed

    def refresh(self, groups: Sequence[Group]) -> bool:
        """Read the groups again; True if something may have changed since the last call."""
        values = list(chain.from_iterable(map(self._read, groups)))
        if not self._volatile and len(values) == len(self._values) and all(map(is_, values, self._values)):
            return False
        rows = [self._row(index, group) for index, group in enumerate(groups)]
        self._values, self._volatile, self.rows = values, not all(map(_immutable, values)), rows
        self.version += 1
        return True

    def _row(self, index: int, group: Group) -> tuple[Number, ...]:
        return tuple(
            _number(number, name, index)
            for name, value in zip(self._names, self._read(group), strict=False)
            for number in (value if isinstance(value, (tuple, list)) else (value,))
        )


def _getter(names: tuple[str, ...]) -> Callable[[Group], tuple[Any, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda group: tuple(group[name] for name in names)


def _immutable(value: Any) -> bool:
    return (
        value is None or isinstance(value, (bool, int, float)) or (type(value) is tuple and all(map(_immutable, value)))
    )


def _number(value: Any, name: str, index: int) -> Number:
    if not isinstance(value, Tensor):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name} of group {index} must be a number, but it is {value!r}") from None
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} of group {index} must be 1-element")
    return float(value) if value.device.type == "cpu" else value
