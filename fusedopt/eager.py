"""The reference backend: one parameter after the other, in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import layout, rounding
from .averaging import EMA, EMA_STEP
from .hyper import Number
from .precision import KAHAN_COMP, MASTER_PARAM, ROUNDING_STEP

if TYPE_CHECKING:
    from .entry import Entry, Row
    from .gate import Gate
    from .optimizer import FusedOptimizer, Scalars
    from .plan import Live


def read_gradients(entries: Sequence[Entry], live: Live, gate: Gate) -> None:
    """Tell the gate what the gradients of this backend are like."""
    grads = zip(entries, live.grads, strict=True)
    gate.add_grads([(entry.name, entry.part, grad) for entry, grad in grads if grad is not None and not entry.kernels])


def step(
    optimizer: FusedOptimizer,
    entries: Sequence[Entry],
    live: Live,
    hyper: Sequence[Sequence[Number]],
    gate: Gate,
) -> None:
    """Step every parameter that has a gradient and is not the kernels'."""
    factor = 1.0
    if not gate.is_open:
        skip, factor = gate.decide()
        if skip:
            return
    advance = _Scalars(optimizer, hyper)
    reference = optimizer.reference
    group = -1
    scalars: Scalars = ()
    with torch.inference_mode():  # a sixth less for every operation than no_grad, and nothing made here is kept
        for entry, param, grad in zip(entries, live.params, live.grads, strict=True):
            if grad is None or entry.kernels:
                continue
            row = live.rows[entry.row]
            if entry.scalar_names:
                scalars = advance(entry, row)
            elif entry.group != group:
                group, scalars = entry.group, advance.without_states(entry.group)
            if entry.plain:
                reference(param, grad if factor == 1 else grad * factor, entry.pick_states(row), scalars)
            else:
                weights = _widened(optimizer, entry, param, (grad, factor), row, scalars)
                if entry.averaged:
                    _average(entry, row, weights, float(hyper[entry.group][-1]))


class _Scalars:
    """The scalars of one step, computed once for all parameters of a group that have made as many steps."""

    def __init__(self, optimizer: FusedOptimizer, hyper: Sequence[Sequence[Number]]) -> None:
        self._optimizer = optimizer
        self._rows = hyper
        self._computed: dict[tuple[int, tuple[float, ...]], tuple[Scalars, Scalars]] = {}
        self._without: dict[int, Scalars] = {}

    def __call__(self, entry: Entry, row: Row) -> Scalars:
        """Advance the scalar states of a parameter, and return its scalars."""
        values = tuple([row[slot].item() if slot >= 0 else 1.0 for slot in entry.scalar_slots])
        key = entry.group, values
        if key not in self._computed:
            self._computed[key] = self._optimizer.scalars(self._hyper(entry.group), values)
        scalars, advanced = self._computed[key]
        for slot, old, new in zip(entry.scalar_slots, values, advanced, strict=True):
            if slot >= 0 and new != old:
                row[slot].fill_(new)
        return scalars

    def _hyper(self, group: int) -> Scalars:
        return tuple(map(float, self._rows[group][:-1]))

    def without_states(self, group: int) -> Scalars:
        """The scalars where the options call for no scalar state."""
        if group not in self._without:
            ones = (1.0,) * len(self._optimizer.scalar_states)
            self._without[group] = self._optimizer.scalars(self._hyper(group), ones)[0]
        return self._without[group]


def _widened(
    optimizer: FusedOptimizer,
    entry: Entry,
    param: Tensor,
    scaled_grad: tuple[Tensor, float],
    row: Row,
    scalars: Scalars,
) -> Tensor:
    """Convert what is stored in another dtype to that of the arithmetic, and round once when it is stored again.

    Args:
        scaled_grad: the gradient, and what it is multiplied by.

    Returns:
        The new weights, with what rounding the parameter loses if that is kept.
    """
    dtype = layout.compute_dtype(param)
    named = dict(zip(entry.names, row, strict=True))
    stored: Sequence[Any] = entry.pick_states(row)
    grad, factor = _widen(scaled_grad[0], dtype), scaled_grad[1]
    work = _widen(param, dtype)
    states: Sequence[Any] = [None if state is None else _widen(state, dtype) for state in stored]
    kept: Any = named.get(entry.kept or "")
    stored_dtype = layout.real_dtype(param.dtype)
    if entry.kept == MASTER_PARAM:
        work = rounding.with_master(work, _widen(kept, dtype), stored_dtype)
    elif entry.kept == KAHAN_COMP:
        work = rounding.with_compensation(work, _widen(kept, dtype), stored_dtype)
    optimizer.reference(work, grad if factor == 1 else grad * factor, states, scalars)
    if entry.kept == MASTER_PARAM:
        _narrow(kept, work)
    elif entry.kept == KAHAN_COMP:
        _narrow(kept, work - rounding.nearest(work, stored_dtype))

    round_ = _Rounding(entry, param, named)
    _narrow(param, work if entry.kept else round_(work, stored_dtype, 0))
    for stream, (state, value) in enumerate(zip(stored, states, strict=True), start=1):
        if state is not None:
            _narrow(state, round_(value, layout.real_dtype(state.dtype), stream))
    return work if entry.kept else _widen(param, dtype)


def _average(entry: Entry, row: Row, weights: Tensor, decay: float) -> None:
    """Move the average of a parameter towards its new weights."""
    named = dict(zip(entry.names, row, strict=True))
    ema, ema_step = named[EMA], named[EMA_STEP]
    average = _widen(ema, weights.dtype)
    average.lerp_(weights, 1 - decay if ema_step else 1.0)
    _narrow(ema, average)
    ema_step.add_(1)


class _Rounding:
    """Rounds the values of one parameter and step at random, if its group asks for that."""

    def __init__(self, entry: Entry, param: Tensor, named: Mapping[str, Tensor]) -> None:
        self._seed, self._tensor, self._first = entry.seed, entry.tensor, entry.first
        if entry.seed is None:
            return
        self._step = int(named[ROUNDING_STEP].add_(1))
        # The random numbers follow the elements in the order in which they lie.
        self._stride = layout.dense_stride(param)
        if param.is_complex():
            self._stride = (*(2 * stride for stride in self._stride), 1)
            self._first *= 2

    def __call__(self, value: Tensor, dtype: torch.dtype, stream: int) -> Tensor:
        """The value as `dtype` can hold it, where that has 16 bits."""
        if self._seed is None or dtype.itemsize != 2:
            return value
        counter = self._seed, self._tensor, self._step, stream
        random = rounding.random_bits(*counter, value.numel(), value.device, self._first)
        return rounding.stochastic(value.float(), dtype, random.as_strided(value.shape, self._stride))


def _widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return layout.as_real(tensor).to(dtype)


def _narrow(tensor: Tensor, work: Tensor) -> None:
    if work is tensor:
        return
    if tensor.layout == torch.strided and layout.is_raw(tensor):
        tensor = layout.as_real(tensor)
    elif tensor.is_complex():
        work = torch.view_as_complex(work)
    tensor.copy_(work)
