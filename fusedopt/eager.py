"""The reference backend: one parameter after the other, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import layout
from .hyper import Number

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer, Scalars
    from .plan import Entry, Live, Row


def step(optimizer: FusedOptimizer, entries: Sequence[Entry], live: Live, hyper: Sequence[tuple[Number, ...]]) -> None:
    """Step every parameter that has a gradient and is not the kernels'."""
    advance = _Scalars(optimizer, hyper)
    reference = optimizer.reference
    for entry, param, grad, row in zip(entries, live.params, live.grads, live.rows, strict=True):
        if grad is None or entry.kernels:
            continue
        scalars = advance(entry, row) if entry.scalar_names else advance.without_states(entry.group)
        states = entry.pick_states(row)
        if entry.plain:
            reference(param, grad, states, scalars)
        else:
            _widened(optimizer, param, grad, states, scalars)


class _Scalars:
    """The scalars of one step, computed once for all parameters of a group that have made as many steps."""

    def __init__(self, optimizer: FusedOptimizer, hyper: Sequence[tuple[Number, ...]]) -> None:
        self._optimizer = optimizer
        self._hyper = [tuple(map(float, row)) for row in hyper]
        self._computed: dict[tuple[int, tuple[float, ...]], tuple[Scalars, Scalars]] = {}
        self._without: dict[int, Scalars] = {}

    def __call__(self, entry: Entry, row: Row) -> Scalars:
        """Advance the scalar states of a parameter, and return its scalars."""
        values = tuple([row[slot].item() if slot >= 0 else 1.0 for slot in entry.scalar_slots])
        key = entry.group, values
        if key not in self._computed:
            self._computed[key] = self._optimizer.scalars(self._hyper[entry.group], values)
        scalars, advanced = self._computed[key]
        for slot, old, new in zip(entry.scalar_slots, values, advanced, strict=True):
            if slot >= 0 and new != old:
                row[slot].fill_(new)
        return scalars

    def without_states(self, group: int) -> Scalars:
        """The scalars where the options call for no scalar state."""
        if group not in self._without:
            ones = (1.0,) * len(self._optimizer.scalar_states)
            self._without[group] = self._optimizer.scalars(self._hyper[group], ones)[0]
        return self._without[group]


def _widened(
    optimizer: FusedOptimizer, param: Tensor, grad: Tensor, states: Sequence[Tensor | None], scalars: Scalars
) -> None:
    """Convert what is stored in another dtype to that of the arithmetic, and round once when it is stored again."""
    dtype = layout.compute_dtype(param)
    stored = [param, *states]
    working: list[Any] = [None if tensor is None else _widen(tensor, dtype) for tensor in stored]
    optimizer.reference(working[0], _widen(grad, dtype), working[1:], scalars)
    for tensor, work in zip(stored, working, strict=True):
        if tensor is not None:
            _narrow(tensor, work)


def _widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return layout.as_real(tensor).to(dtype)


def _narrow(tensor: Tensor, work: Tensor) -> None:
    if tensor.layout == torch.strided and layout.is_raw(tensor):
        tensor = layout.as_real(tensor)
        if tensor.data_ptr() == work.data_ptr():
            return
    elif tensor.is_complex():
        work = torch.view_as_complex(work)
    tensor.copy_(work)
