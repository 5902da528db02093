"""The reference backend: one parameter after the other, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..protocol import OptimizerLike, Scalars
from ..step import dry, layout
from ..step.entry import Entry
from ..step.gate import Gate
from ..step.hyper import Hyper, Number, tuple_getter
from ..step.live import Live, Row
from ..storage import dtypes, quantized, rounding
from ..storage.precision import KAHAN_COMP, MASTER_PARAM


class ReferenceStep:
    """The entries of a plan that the reference steps."""

    def __init__(self, entries: Sequence[Entry], live: Live) -> None:
        mine = [(position, entry) for position, entry in enumerate(entries) if not entry.kernels]
        positions, self._entries = zip(*mine, strict=True)
        self._pick = tuple_getter(positions) if len(mine) < len(entries) else tuple
        self._rounds = any(entry.seed is not None for entry in self._entries)
        self._counts_steps = any(entry.scalar_names for entry in self._entries)
        self._updates = {entry.update for entry in self._entries}
        self._version = -1  # of the numbers from which the scalars have been computed
        self._scalars: _Scalars
        # A sixth less for every operation than under no_grad. This is what torch.inference_mode() does, without its two
        # calls in Python, which take as long as stepping a small tensor. What an operation makes is of no use to
        # autograd, and here nothing is kept but by tensors that hold others: these may replace what they hold.
        kinds = {*map(type, live.watched), *map(type, live.present)}
        inference_mode: Callable[[], Any] = partial(torch._C._InferenceMode, True)
        is_plain = all(map(layout.has_own_memory, kinds)) and not any(map(_is_sparse_complex, live.present))
        self._mode = inference_mode if is_plain else torch.no_grad

    def read_gradients(self, live: Live, gate: Gate) -> None:
        """Tell the gate what the gradients are like."""
        grads = zip(self._entries, self._pick(live.grads), strict=True)
        gate.add_grads([(entry.name, entry.part, grad) for entry, grad in grads if grad is not None])

    def run(self, optimizer: OptimizerLike, live: Live, hyper: Hyper, gate: Gate) -> None:
        """Step every parameter that has a gradient, if the gate lets the step pass."""
        unscale = clip = 1.0
        if not gate.is_open:
            skip, unscale, clip = gate.decide()
            if skip:
                return
        if self._counts_steps or hyper.version != self._version or hyper.on_device:
            self._version, self._scalars = (
                hyper.version,
                _Scalars(optimizer, hyper.rows, dry.item if gate.is_dry else Tensor.item),
            )
        computed = self._scalars
        references = {update: reference_of(optimizer, update) for update in self._updates}
        no_states = (None,) * len(optimizer.states)
        rounding_step = self._rounding_step(gate) if live.present else 0
        group = -1
        scalars: Scalars = ()
        with self._mode():
            for entry, param, grad in zip(self._entries, self._pick(live.params), self._pick(live.grads), strict=True):
                if grad is None:
                    continue
                row = live.rows[entry.row]
                if entry.scalar_names:
                    scalars = computed.advance(entry, row)
                elif entry.group != group:
                    group, scalars = entry.group, computed.without_states(entry.group)
                if entry.plain:
                    weights = param
                    states = entry.pick_states(row) if entry.state_names else no_states
                    if unscale != 1:
                        layout.scale(grad, unscale)
                    references[entry.update](param, grad if clip == 1 else grad * clip, states, scalars)
                else:
                    weights = _widened(
                        references[entry.update], entry, param, (grad, unscale * clip), row, scalars, rounding_step
                    )
                    if unscale != 1:  # afterwards: the step has not seen what rounding makes of it
                        layout.scale(grad, unscale)
                if entry.averaged:
                    _average(entry, row, weights, float(hyper.rows[entry.group][-1]))

    def _rounding_step(self, gate: Gate) -> int:
        """How many steps have been rounded at random, this one included; 0 where nobody asks, and nobody waits."""
        counter, advance = gate.take_rounding_step()
        if counter is None:
            return 0
        counter.add_(advance)
        return int(dry.item(counter)) if self._rounds else 0


class _Scalars:
    """The scalars that numbers give, computed once for all parameters of a group that have made as many steps."""

    def __init__(
        self, optimizer: OptimizerLike, numbers: Sequence[Sequence[Number]], item: Callable[[Tensor], float]
    ) -> None:
        self._compute = optimizer.scalars
        self._item = item
        self._numbers = numbers
        self._ones = (1.0,) * len(optimizer.scalar_states)
        self._computed: dict[tuple[int, Scalars], tuple[Scalars, Scalars]] = {}

    def advance(self, entry: Entry, row: Row) -> Scalars:
        """Advance the scalar states of a parameter, and return its scalars."""
        values = tuple([self._item(row[slot]) if slot >= 0 else 1.0 for slot in entry.scalar_slots])
        scalars, advanced = self._of(entry.group, values)
        for slot, old, new in zip(entry.scalar_slots, values, advanced, strict=True):
            if slot >= 0 and new != old:
                row[slot].fill_(new)
        return scalars

    def without_states(self, group: int) -> Scalars:
        """The scalars where the options call for no scalar state."""
        return self._of(group, self._ones)[0]

    def _of(self, group: int, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        key = group, scalar_states
        if key not in self._computed:
            self._computed[key] = self._compute(tuple(map(float, self._numbers[group][:-1])), scalar_states)
        return self._computed[key]


def reference_of(optimizer: OptimizerLike, update: str) -> Callable[..., None]:
    """The function of a rule in plain torch: `reference` for `update`, another one by its own name."""
    function: Callable[..., None] = getattr(optimizer, "reference" if update == "update" else update)
    return function


def _widened(
    reference: Callable[..., None],
    entry: Entry,
    param: Tensor,
    scaled_grad: tuple[Tensor, float],
    row: Row,
    scalars: Scalars,
    rounding_step: int,
) -> Tensor:
    """Convert what is stored in another dtype to that of the arithmetic, and round once when it is stored again.

    Args:
        reference: what steps a parameter in plain torch.
        scaled_grad: the gradient, and what it is multiplied by.
        rounding_step: how many steps have been rounded at random, this one included.

    Returns:
        The new weights, with what rounding the parameter loses if that is kept.
    """
    dtype = dtypes.compute_dtype(param)
    named = dict(zip(entry.names, row, strict=True))
    stored: Sequence[Any] = entry.pick_states(row)
    storage = _Storage(entry, param, rounding_step)
    grad, factor = _widen(scaled_grad[0], dtype), scaled_grad[1]
    work = _widen(param, dtype)
    states: Sequence[Any] = [None if state is None else storage.read(state, dtype) for state in stored]
    kept: Any = named.get(entry.kept or "")
    stored_dtype = dtypes.real_dtype(param.dtype)
    if entry.kept == MASTER_PARAM:
        work = rounding.with_master(work, _widen(kept, dtype), stored_dtype)
    elif entry.kept == KAHAN_COMP:
        work = rounding.with_compensation(work, _widen(kept, dtype), stored_dtype)
    reference(work, grad if factor == 1 else grad * factor, states, scalars)
    if entry.kept == MASTER_PARAM:
        _narrow(kept, work)
    elif entry.kept == KAHAN_COMP:
        _narrow(kept, work - rounding.nearest(work, stored_dtype))

    if entry.kept:
        _narrow(param, work)
    else:
        storage.write(param, work, 0)
    for stream, (state, value) in enumerate(zip(stored, states, strict=True), start=1):
        if state is not None:
            storage.write(state, value, stream)
    return work if entry.kept else _widen(param, dtype)


def _average(entry: Entry, row: Row, weights: Tensor, decay: float) -> None:
    """Move the average of a parameter towards its new weights."""
    ema, ema_begun = row[-1], row[len(entry.begun_names) - 1]  # which come last among the states, and these numbers
    begun = dry.item(ema_begun)
    average = _widen(ema, weights.dtype)
    average.lerp_(weights, 1 - decay if begun else 1.0)
    _narrow(ema, average)
    if not begun:
        ema_begun.fill_(1.0)


class _Storage:
    """How one parameter and its states are stored: in 8 bits or in a dtype, rounded as its group asks."""

    def __init__(self, entry: Entry, param: Tensor, step: int) -> None:
        self._seed, self._tensor, self._first, self._step = entry.seed, entry.tensor, entry.first, step
        if entry.seed is None and not entry.codes:
            return
        # Codes and random numbers follow the elements in the order in which they lie.
        self._shape: tuple[int, ...] = param.shape
        self._stride = layout.dense_stride(param)
        if param.is_complex():
            self._shape, self._stride = (*param.shape, 2), (*(2 * stride for stride in self._stride), 1)
            self._first *= 2
        self._numel = math.prod(self._shape)

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers, in the dtype of the arithmetic."""
        if tensor.dtype not in quantized.CODES:
            return _widen(tensor, dtype)
        return quantized.decode(tensor, self._numel).as_strided(self._shape, self._stride).to(dtype)

    def write(self, tensor: Tensor, value: Tensor, stream: int) -> None:
        """Store what `read` gave and a step has changed."""
        dtype = dtypes.real_dtype(tensor.dtype)
        random = None
        if self._seed is not None and dtype.itemsize <= 2:
            counter = self._seed, self._tensor, self._step, stream
            random = rounding.random_bits(*counter, self._numel, value.device, self._first)
        if dtype in quantized.CODES:
            tensor.copy_(quantized.encode(value.float().as_strided((self._numel,), (1,)), dtype, random))
        elif random is not None:
            _narrow(tensor, rounding.stochastic(value.float(), dtype, random.as_strided(self._shape, self._stride)))
        else:
            _narrow(tensor, value)


def _is_sparse_complex(grad: Tensor) -> bool:
    """Whether torch has no view of its parts in inference mode."""
    return grad.is_sparse and grad.is_complex()


def _widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    real = layout.as_real(tensor)
    return real if real.dtype == dtype else real.to(dtype)


def _narrow(tensor: Tensor, work: Tensor) -> None:
    if work is tensor:
        return
    if tensor.layout == torch.strided and layout.is_raw(tensor):
        tensor = layout.as_real(tensor)
    elif tensor.is_complex():
        work = torch.view_as_complex(work)
    tensor.copy_(work)
