"""The hyperparameters of every group as float64 numbers, re-read at each step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .options import check_group, option

Group = dict[str, Any]
Number = float | Tensor

_ABSENT = object()


class Hyper:
    """One row of numbers a group, in the order of the class's `hyperparameters`; pairs such as `betas` take two places.

    The last number of a row is the `ema_decay`, 0 where there is no average. What is one for all groups stands beside
    the rows. A number may be a one-element tensor. Only its identity is compared, never its value, which may be on a
    device. The `options` have no place in a row, but a change of one counts as a change. What is `optional` a group may
    lack.
    """

    def __init__(
        self, names: Sequence[str], options: Sequence[str], defaults: Mapping[str, Any], optional: Mapping[str, Any]
    ) -> None:
        self._defaults = {name: optional[name] if name in optional else defaults[name] for name in names}
        self._places = {name: places_of(value) for name, value in self._defaults.items()}
        self._read = _getter(tuple(name for name in (*names, *options) if name not in optional))
        self._optional = tuple(optional)
        self._has_no_optional = frozenset(optional).isdisjoint
        self._values: list[Any] = []
        self._optional_values: list[Any] | None = None
        self._volatile = True
        self.rows: list[tuple[Number, ...]] = []
        self.max_grad_norm: float | None = None
        self.skip_nonfinite = False
        self.version = 0  # grows when a number may have changed

    @property
    def count(self) -> int:
        """How many numbers of a row are the class's."""
        return count_numbers(self._defaults.values())

    def refresh(self, groups: Sequence[Group]) -> bool:
        """Read the groups again; True if something may have changed since the last call."""
        values = list(chain.from_iterable(map(self._read, groups)))
        optional: list[Any] = []
        if not all(map(self._has_no_optional, groups)):
            optional = [group.get(name, _ABSENT) for group in groups for name in self._optional]
        same_options = self._optional_values is not None and _same(optional, self._optional_values)
        if not self._volatile and same_options and _same(values, self._values):
            return False
        if not same_options:
            for index in range(len(groups)):
                check_group(groups, index)
        self.rows = [self._row(index, group) for index, group in enumerate(groups)]
        self.max_grad_norm = option(groups[0], "max_grad_norm") if groups else None
        self.skip_nonfinite = bool(groups and option(groups[0], "skip_nonfinite"))
        self._values, self._optional_values = values, optional
        self._volatile = not all(map(_immutable, chain(values, optional)))
        self.version += 1
        return True

    def _row(self, index: int, group: Group) -> tuple[Number, ...]:
        row: list[Number] = []
        for name, places in self._places.items():
            value = group.get(name, self._defaults[name])
            if places_of(value) != places:
                wanted = f"{places} numbers" if places else "one number"
                raise ValueError(f"{name} of group {index} must be {wanted}, but it is {value!r}")
            row += [_number(number, name, index) for number in (value if places else (value,))]
        return (*row, float(option(group, "ema_decay") or 0.0))


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(values) == len(others) and all(map(is_, values, others))


def count_numbers(values: Iterable[Any]) -> int:
    """How many numbers these hyperparameters hold."""
    return sum(places_of(value) or 1 for value in values)


def places_of(value: Any) -> int:
    """How many numbers a hyperparameter holds; 0 for a single one that is not in a sequence."""
    return len(value) if isinstance(value, (tuple, list)) else 0


def _getter(names: tuple[str, ...]) -> Callable[[Group], tuple[Any, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda group: tuple(group[name] for name in names)


def is_number(value: Any) -> bool:
    """Whether a value is a number, of Python's or numpy's."""
    return hasattr(value, "__float__") and not isinstance(value, Tensor)


def _immutable(value: Any) -> bool:
    return (
        value is None
        or value is _ABSENT
        or isinstance(value, (bool, int, float, str, torch.dtype))
        or (type(value) is tuple and all(map(_immutable, value)))
    )


def _number(value: Any, name: str, index: int) -> Number:
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f"{name} of group {index} must be a number, but it is {value!r}")
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} of group {index} must be 1-element")
    return float(value) if value.device.type == "cpu" else value
