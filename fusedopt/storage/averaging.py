"""The exponential moving average of the weights, which a step updates in the same pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..options import option
from ..protocol import OptimizerLike
from .dtypes import real_dtype

EMA = "ema"
EMA_BEGUN = "ema_begun"  # 0 until the average has begun: the first time it becomes the weights themselves
_SWAPPED: set[int] = set()  # ids of the states of optimizers that are within `swapped`


def ema_dtype(param: torch.dtype) -> torch.dtype:
    """The dtype of the average: 16 bits would round every update of a slow one away."""
    if real_dtype(param).itemsize != 2:
        return param
    return torch.complex64 if param.is_complex else torch.float32


def new_ema(param: Tensor) -> Tensor:
    """With which the average begins."""
    return param.detach().to(ema_dtype(param.dtype), copy=True)


def check_not_swapped(optimizer: OptimizerLike, what: str) -> None:
    """Raise within `swapped`, also where that was entered through a wrapper, which shares its optimizer's state."""
    if id(optimizer.state) in _SWAPPED:
        raise RuntimeError(f"{what} within swap_ema: the parameters have the values of their averages there")


@contextmanager
def swapped(optimizer: OptimizerLike) -> Iterator[None]:
    """Give every parameter the value of its average, and in the end its own back, bit for bit."""
    check_not_swapped(optimizer, "swap_ema")
    groups = [group for group in optimizer.param_groups if option(group, "ema_decay") is not None]
    if not groups:
        raise RuntimeError("swap_ema needs averages: give the optimizer an ema_decay")
    params = {id(param): param for group in groups for param in group["params"]}  # a duplicate is swapped once
    with ExitStack() as swaps:  # undone in reverse order, since parameters may share memory
        for param in filter(optimizer.state.__contains__, params.values()):
            ema = optimizer.state[param].get(EMA)
            if ema is not None:
                swaps.enter_context(_exchanged(param, ema))
        _SWAPPED.add(key := id(optimizer.state))
        swaps.callback(_SWAPPED.discard, key)
        yield


@contextmanager
def _exchanged(param: Tensor, ema: Tensor) -> Iterator[None]:
    average = ema.to(param.dtype)  # the state itself, or a rounded copy; it keeps the parameter meanwhile
    _swap(param, average)
    try:
        yield
    finally:
        _swap(param, average)


@torch.no_grad()
def _swap(a: Tensor, b: Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
