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
    from .plan import Entry, Live


def step(optimizer: FusedOptimizer, entries: Sequence[Entry], live: Live, hyper: Sequence[tuple[Number, ...]]) -> None:
    """Step every parameter that has a gradient and is not the kernels'."""
    numbers = [tuple(map(float, row)) for row in hyper]
    n_scalar_states = len(optimizer.scalar_states)
    computed: dict[tuple[int, tuple[float, ...]], tuple[Scalars, Scalars]] = {}
    for entry, param, grad, row in zip(entries, live.params, live.grads, live.rows, strict=True):
        if grad is None or entry.kernels:
            continue
        arranged = entry.arrange(row)
        scalar_states, states = arranged[:n_scalar_states], arranged[n_scalar_states:]
        values = tuple([1.0 if state is None else state.item() for state in scalar_states])
        key = entry.group, values
        if key not in computed:  # parameters of a group that have made as many steps share their scalars
            computed[key] = optimizer.scalars(numbers[entry.group], values)
        scalars, values = computed[key]
        for state, value in zip(scalar_states, values, strict=True):
            if state is not None:
                state.fill_(value)
        if entry.plain:
            optimizer.reference(param, grad, states, scalars)
        else:
            _widened(optimizer, param, grad, states, scalars)


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
