"""The reference backend: one parameter after the other, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import layout
from .hyper import Number

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer
    from .plan import Entry, Row


def step(
    optimizer: FusedOptimizer, entry: Entry, param: Tensor, grad: Tensor, row: Row, hyper: tuple[Number, ...]
) -> None:
    """Step one parameter by the optimizer's reference."""
    names = dict(zip(entry.names, row, strict=True))
    scalar_states = tuple(names[name].item() if name in names else 1.0 for name in optimizer.scalar_states)
    scalars, scalar_states = optimizer.scalars(tuple(map(float, hyper)), scalar_states)
    for name, value in zip(optimizer.scalar_states, scalar_states, strict=True):
        if name in names:
            names[name].fill_(value)

    stored = (param, *(names.get(name) for name in optimizer.states))
    if entry.plain:
        optimizer.reference(param, grad, stored[1:], scalars)
        return
    # Other dtypes do their arithmetic in the dtype of the kernels' and round once.
    dtype = layout.compute_dtype(param)
    working: list[Any] = [None if tensor is None else _widen(tensor, dtype) for tensor in stored]
    optimizer.reference(working[0], _widen(grad, dtype), tuple(working[1:]), scalars)
    for tensor, work in zip(stored, working, strict=True):
        if tensor is not None and work is not None:
            _narrow(tensor, work)


def _widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return layout.as_real(tensor).to(dtype)


def _narrow(tensor: Tensor, work: Tensor) -> None:
    if layout.is_raw(tensor):
        tensor = layout.as_real(tensor)
        if tensor.data_ptr() == work.data_ptr():
            return
    elif tensor.is_complex():
        work = torch.view_as_complex(work)
    tensor.copy_(work)
