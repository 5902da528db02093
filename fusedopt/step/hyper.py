"""The hyperparameters of every group as float64 numbers, re-read at each step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, compress
from operator import is_, is_not, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..options import KEYS, NUMBERS, SHARED, check_group, check_number, is_number, optional_keys
from ..protocol import Group, OptimizerLike

Number = float | Tensor
_NO_LIMITS = (-1.0, 0.0, math.inf)
N_LIMITS = len(_NO_LIMITS)
_NUMBERS = {KEYS[name]: name for name in NUMBERS}  # that are options
_UNKNOWN = object()
_FREE = (float, Tensor, list, tuple)  # may change without a word to the rest of the group


class Hyper:
    """One row of numbers a group, in the order of the class's `hyperparameters`; pairs such as `betas` take two places.

    The last number of a row is the `ema_decay`, 0 where there is no average. What is one for all groups stands beside
    the rows, in `limits`: `max_grad_norm`, negative where there is none; whether a step is skipped where a gradient is
    not finite; `skip_grad_norm`, infinite where there is none. A number may be a one-element tensor. Only its identity
    is compared, never its value, which may be on a device. The `options` have no place in a row, but a change of one
    counts as a change. What is `optional` a group may lack.
    """

    def __init__(self, optimizer: OptimizerLike) -> None:
        names, optional = optimizer.hyperparameters, optional_keys(optimizer)
        defaults = {**optimizer.defaults, **optional}
        self._defaults = {name: defaults[name] for name in names}
        self._choices = optimizer.choices
        self._settle = optimizer.settle_group
        self._sequences = {name: places for name, value in self._defaults.items() if (places := places_of(value))}
        self._required = tuple(name for name in (*names, *optimizer.options) if name not in optional)
        self._optional = tuple(optional)
        self._matter = {*self._required, *self._optional}
        ends = accumulate(map(count_numbers, zip(self._defaults.values(), strict=True)))
        self._ends = dict(zip(self._defaults, ends, strict=True))  # of each name's place in a row
        self._singles = {name: self._ends[name] - 1 for name in self._defaults if name not in self._sequences}
        self._sizes: list[int] = []
        # Of each group, the keys that matter and then all others; how many matter, and are kept.
        self._getters: list[Callable[[Group], tuple[Any, ...]]] = []
        self._counts: list[int] = []
        self._places: list[tuple[int, str]] = []  # group and key of each value
        self._values: list[Any] = []
        self._volatile: list[int] = []  # which of them may change within themselves
        self.rows: list[list[Number]] = []
        self._options: dict[tuple[int, str], Any] = {}  # by group and key what is no hyperparameter
        self.limits: tuple[Number, float, Number] = _NO_LIMITS
        self.on_device = False  # whether a number is a tensor on a device
        self.version = 0  # grows when a number may have changed

    @property
    def count(self) -> int:
        """How many numbers of a row are the class's."""
        return count_numbers(self._defaults.values())

    @property
    def reads_gradients(self) -> bool:
        """Whether a step takes the gradients of all parameters to decide."""
        return self.limits is not _NO_LIMITS

    @property
    def may_skip(self) -> bool:
        """Whether a step may skip itself."""
        return self.limits[1] != 0

    def without_limits(self) -> Hyper:
        """The same numbers for what a step does when it is decided that it is taken."""
        if not self.reads_gradients:
            return self
        unlimited = copy.copy(self)
        unlimited.limits = _NO_LIMITS
        return unlimited

    def refresh(self, groups: Sequence[Group]) -> set[str]:
        """Read the groups again; the keys whose values may have changed since the last call."""
        sizes = list(map(len, groups))
        if sizes != self._sizes:
            return self._begin(groups)
        try:
            values = self._read(groups)
        except KeyError:  # groups as large as before have the same keys, unless one of these is gone
            return self._begin(groups)
        if not self._volatile and all(map(is_, values, self._values)):
            return set()
        moved = list(compress(range(len(values)), map(is_not, values, self._values)))
        concerns_others = any(not isinstance(values[i], _FREE) or self._places[i][1] in self._optional for i in moved)
        if concerns_others and self._settle_all(groups):
            return self._begin(groups)
        self._values = values
        return self._take([(*self._places[i], values[i]) for i in sorted({*moved, *self._volatile})])

    def _settle_all(self, groups: Sequence[Group]) -> bool:
        """Check all groups and then complete them; whether that has changed any."""
        for index, group in enumerate(groups):
            check_group(groups, index)
            check_choices(self._choices, group, index)
        settled = [dict(group) for group in groups]  # so that an error leaves all groups as they are
        for index, group in enumerate(settled):
            self._settle(group, index)
        changed = False
        for group, new in zip(groups, settled, strict=True):
            if len(group) != len(new) or any(map(is_not, group.values(), new.values())):
                group.update(new)
                changed = True
        return changed

    def _begin(self, groups: Sequence[Group]) -> set[str]:
        """Read groups of other keys than before, of which nothing is known."""
        for group in groups:
            for name in self._required:
                group[name]  # KeyError
        self._settle_all(groups)
        self._sizes = list(map(len, groups))
        names = [[name for name in group if name in self._matter] for group in groups]
        self._getters = [
            tuple_getter([*of_group, *(name for name in group if name not in self._matter)])
            for of_group, group in zip(names, groups, strict=True)
        ]
        self._counts = list(map(len, names))
        self._places = [(index, name) for index, of_group in enumerate(names) for name in of_group]
        self._values = self._read(groups)
        self.rows = [[0.0] * (self.count + 1) for _ in groups]
        self._options = {}
        new = [
            (index, name, group.get(name, self._defaults.get(name)))
            for index, group in enumerate(groups)
            for name in (*self._required, *self._optional)
        ]
        self._take(new)
        return self._matter

    def _read(self, groups: Sequence[Group]) -> list[Any]:
        return list(
            flat([get(group)[:count] for get, count, group in zip(self._getters, self._counts, groups, strict=True)])
        )

    def _take(self, new: Sequence[tuple[int, str, Any]]) -> set[str]:
        """Put new values, each with its group and name, into their places; the names of those that are different."""
        changed = set()
        only_floats = True
        for index, name, value in new:
            place, row = self._singles.get(name), self.rows[index]
            if place is not None and type(value) is float and type(row[place]) is float:  # as a scheduler leaves it
                if row[place] != value:
                    row[place] = value
                    changed.add(name)
            else:
                only_floats = False
                if self._put(index, name, value):
                    changed.add(name)
        if self._volatile or not only_floats:
            self._volatile = [i for i, value in enumerate(self._values) if not _immutable(value)]
            self.limits = self._read_limits()
            self.on_device = any(isinstance(number, Tensor) for number in chain(flat(self.rows), self.limits))
        self.version += bool(changed)
        return changed

    def _put(self, index: int, name: str, value: Any) -> bool:
        """Whether a value that matters is another one than before."""
        if name not in self._ends:
            return self._put_option(index, name, value)
        row = self.rows[index]
        if name in self._choices:
            value = _place_of_choice(self._choices[name], value, name, index)
        if value is None and isinstance(self._defaults[name], (bool, type(None))):  # a flag that is not set
            value = False
        places = self._sequences.get(name, 0)
        if places_of(value) != places:
            wanted = f"{places} numbers" if places else "one number"
            raise ValueError(f"{name} of group {index} must be {wanted}, but it is {value!r}")
        numbers = [_number(number, name, index) for number in (value if places else (value,))]
        place = slice(self._ends[name] - len(numbers), self._ends[name])
        if all(map(_same_number, numbers, row[place])):
            return False
        row[place] = numbers
        return True

    def _put_option(self, index: int, name: str, value: Any) -> bool:
        """The same for what is no hyperparameter."""
        if name in _NUMBERS and value is not None:
            check_number(value, _NUMBERS[name], index)  # a tensor on the CPU may have changed within itself
            value = _number(value, _NUMBERS[name], index)
        elif isinstance(value, np.generic):
            value = value.item()
        if name == KEYS["ema_decay"]:
            self.rows[index][-1] = 0.0 if value is None else value
        is_known = isinstance(value, Tensor) or _immutable(value)
        is_same = is_known and _same_number(value, self._options.get((index, name), _UNKNOWN))
        self._options[index, name] = value if is_known else _UNKNOWN
        return name in self._matter and not is_same

    def _read_limits(self) -> tuple[Number, float, Number]:
        """What is one for all groups: the first has it."""
        max_grad_norm, skip_nonfinite, skip_grad_norm = (self._options.get((0, KEYS[name])) for name in SHARED)
        if max_grad_norm is None and skip_grad_norm is None and not skip_nonfinite:
            return _NO_LIMITS
        return (
            -1.0 if max_grad_norm is None else max_grad_norm,
            float(bool(skip_nonfinite) or skip_grad_norm is not None),
            math.inf if skip_grad_norm is None else skip_grad_norm,
        )


def check_choices(choices: Mapping[str, Sequence[str]], group: Group, index: int) -> None:
    """Raise ValueError for a hyperparameter of a group that is none of the names that it may be."""
    for name, names in choices.items():
        _place_of_choice(names, group.get(name, names[0]), name, index)


def _place_of_choice(names: Sequence[str], value: Any, name: str, index: int) -> int:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} of group {index} must be one of {', '.join(map(repr, names))}, but it is {value!r}")
    return names.index(value)


def flat(rows: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """The items of all rows."""
    return chain.from_iterable(rows)


def count_numbers(values: Iterable[Any]) -> int:
    """How many numbers these hyperparameters hold."""
    return sum(places_of(value) or 1 for value in values)


def count_scalars(optimizer: type[OptimizerLike], n_hyper: int) -> int:
    """How many scalars a rule has. The values that it is asked with do not matter."""
    n_scalar_states = len(optimizer.scalar_states)
    scalars, scalar_states = optimizer.scalars((0.5,) * n_hyper, (0.5,) * n_scalar_states)
    if len(scalar_states) != n_scalar_states:
        raise TypeError(
            f"`scalars` of {optimizer.__name__} returns {len(scalar_states)} scalar states, "
            f"but {n_scalar_states} are declared: {optimizer.scalar_states}"
        )
    return len(scalars)


def places_of(value: Any) -> int:
    """How many numbers a hyperparameter holds; 0 for a single one that is not in a sequence."""
    if isinstance(value, (float, int, str)):  # asked first, since an abstract class is asked slowly
        return 0
    is_array = isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1 and len(value) > 1
    return len(value) if is_array or isinstance(value, Sequence) else 0


def tuple_getter(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """An itemgetter that returns a tuple for any number of keys."""
    if len(keys) > 1:
        return itemgetter(*keys)
    if len(keys) == 1:
        (key,) = keys
        return lambda items: (items[key],)
    return lambda items: ()


def _immutable(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float, str, torch.dtype))
        or (type(value) is tuple and all(map(_immutable, value)))
    )


def _same_number(a: Number, b: Number) -> bool:
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)


def _number(value: Any, name: str, index: int) -> Number:
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f"{name} of group {index} must be a number, but it is {value!r}")
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} of group {index} must be 1-element")
    value = value.detach() if value.requires_grad else value  # no step is traced
    return float(value) if value.device.type == "cpu" else value
