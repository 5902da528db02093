"""The exponential moving average of the weights, which a step updates in the same pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import real_dtype
from .options import option

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

EMA = "ema"
EMA_STEP = "ema_step"  # how often the average has been updated: the first time it becomes the weights themselves
_SWAPPED: set[int] = set()  # ids of the states of optimizers that are within `swapped`


def ema_dtype(param: torch.dtype) -> torch.dtype:
    """The dtype of the average: 16 bits would round every update of a slow one away."""
    if real_dtype(param).itemsize != 2:
        return param
    return torch.complex64 if param.is_complex else torch.float32


def new_ema(param: Tensor) -> Tensor:
    """With which the average begins."""
    return param.detach().to(ema_dtype(param.dtype), copy=True)


def check_not_swapped(optimizer: FusedOptimizer, what: str) -> None:
    """Raise within `swapped`, also where that was entered through a wrapper, which shares its optimizer's state."""
    if id(optimizer.state) in _SWAPPED:
        raise RuntimeError(f"{what} within swap_ema: the parameters have the values of their averages there")


@contextmanager
def swapped(optimizer: FusedOptimizer) -> Iterator[None]:
    """Give every parameter the value of its average, and in the end its own back, bit for bit."""
    check_not_swapped(optimizer, "swap_ema")
    if all(option(group, "ema_decay") is None for group in optimizer.param_groups):
        raise RuntimeError("swap_ema needs averages: give the optimizer an ema_decay")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    pairs = [(param, optimizer.state[param][EMA]) for param in params if EMA in optimizer.state.get(param, {})]
    kept = [None if param.dtype == ema.dtype else param.detach().clone() for param, ema in pairs]
    with torch.no_grad():
        for (param, ema), own in zip(pairs, kept, strict=True):
            _swap(param, ema) if own is None else param.copy_(ema)
    _SWAPPED.add(key := id(optimizer.state))
    try:
        yield
    finally:
        _SWAPPED.discard(key)
        with torch.no_grad():
            for (param, ema), own in zip(pairs, kept, strict=True):
                _swap(param, ema) if own is None else param.copy_(own)


def _swap(a: Tensor, b: Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
