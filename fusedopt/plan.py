"""What a step works on: which parameters, which states, which backend. Made once, kept while nothing moves.

Making a plan checks every tensor before anything is written. `Plan.gather` reads every tensor again at each step
and says whether the plan still describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import backend, eager, layout, precision
from .averaging import EMA, EMA_STEP, ema_dtype
from .backend import use_kernels, why_no_kernels
from .gate import Gate, settled_counter
from .hyper import Hyper, is_number
from .multi_tensor import KernelStep
from .options import option
from .precision import ROUNDING_STEP
from .watch import MetaWatch, meta

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

Row = tuple[Tensor, ...]

PRECISION = ("state_dtype", "master_weights", "kahan", "rounding", "seed")  # the options that say how states are stored


@dataclass(slots=True)
class Entry:
    """One parameter of a plan. Holds no tensor: a strong reference would defeat offloading and `swap_tensors`."""

    index: int  # among the parameters of all groups
    group: int
    name: str
    kernels: bool
    scalar_names: tuple[str, ...]  # the class's, then those of stochastic rounding and averaging
    state_names: tuple[str, ...]  # the class's, then `kept` and the average
    kept: str | None  # the state that holds what rounding the parameter loses
    averaged: bool
    seed: int | None  # of stochastic rounding
    scalar_slots: tuple[int, ...]  # where in a row each of the optimizer's scalar states is, -1 = left out
    pick_states: Callable[[Row], Sequence[Tensor | None]] = field(compare=False)  # from a row, None for absent ones
    grad_meta: tuple[Any, ...] | None
    plain: bool = False

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype of the gradient, now or when it was last there."""
        assert self.grad_meta is not None
        return self.grad_meta[0]

    def grad_lies_as(self, param_stride: tuple[int, ...]) -> bool:
        """Whether the kernels can read the gradient beside a parameter of these strides."""
        assert self.grad_meta is not None
        _, _, shape, stride, _, is_conj, is_neg = self.grad_meta
        return not (is_conj or is_neg) and layout.same_order(shape, stride, param_stride)

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of the parameter's state that the step reads, in the order of a gathered row."""
        return self.scalar_names + self.state_names


@dataclass(slots=True)
class Live:
    """The tensors of this step, one item an entry; a row holds the entry's `names`."""

    params: list[Tensor]
    grads: list[Tensor | None]
    rows: list[Row]
    watched: list[Tensor]  # parameters and states, one after the other
    has_grad: list[bool]
    n_grads: int  # of all parameters, also of those outside the plan


class Plan:
    """The entries of an optimizer and how to see that they are what they were."""

    def __init__(self, optimizer: FusedOptimizer, hyper: Hyper, previous: Plan | None) -> None:
        params = _all_params(optimizer)
        known = previous.grad_metas() if previous is not None else {}
        self.entries: list[Entry] = []
        for entry in _entries(optimizer, known):
            param = params[entry.index]
            if param.grad is not None:
                _check(optimizer, entry, param)
                self.entries.append(entry)
            elif entry.grad_meta is not None and _is_ready(optimizer, entry, param):
                self.entries.append(entry)
        for entry in self.entries:
            _settle_states(optimizer, entry, params[entry.index])

        self.uses = used_states(optimizer)
        self._backend = optimizer.backend
        self._param_ids = list(map(id, params))
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._state_ids = list(map(id, optimizer.state))
        rows = {state_id: row for row, state_id in enumerate(self._state_ids)}
        names: list[tuple[str, ...]] = [()] * len(self._state_ids)
        self._row_of = []
        for entry in self.entries:
            row = rows[self._param_ids[entry.index]] if entry.names else -1
            if entry.names:
                names[row] = entry.names
            self._row_of.append(row)
        self._getters = list(map(_tuple_getter, names))

        live = self.read(optimizer)
        # Sparse states and fake tensors have no address: with one of them every step makes a new plan.
        self._watchable = not any(
            tensor.layout != torch.strided or isinstance(tensor, FakeTensor) for tensor in live.watched
        )
        self._watch = MetaWatch(live.watched)
        self._had_grad: list[bool] = []
        self._grad_watch = MetaWatch([])
        for entry, param, states in zip(self.entries, live.params, live.rows, strict=True):
            entry.plain = _is_plain(entry, param, states[len(entry.scalar_names) :])
        in_kernels = [entry.kernels for entry in self.entries]
        self._has_eager = not all(in_kernels)
        self._kernels = KernelStep(optimizer, self.entries, live, hyper.count) if any(in_kernels) else None
        has_addresses = self._watchable and self._kernels is not None
        self._addresses = list(map(Tensor.data_ptr, live.watched)) if has_addresses else []

    def grad_metas(self) -> dict[int, tuple[Any, ...] | None]:
        """By the id of the parameter, how its gradient last lay."""
        return {self._param_ids[entry.index]: entry.grad_meta for entry in self.entries}

    def read(self, optimizer: FusedOptimizer) -> Live:
        """The tensors of this step. KeyError or TypeError where a state is gone or no tensor any more."""
        params = _all_params(optimizer)
        grads = [param.grad for param in params]
        # In the order of `optimizer.state`: looking a parameter up would hash it, which torch does in Python.
        rows = [get(state) for get, state in zip(self._getters, optimizer.state.values(), strict=True)]
        has_grad = [grad is not None for grad in grads]
        n_grads = sum(has_grad)
        if len(self.entries) < len(params):
            params = [params[entry.index] for entry in self.entries]
            grads = [grads[entry.index] for entry in self.entries]
            has_grad = [has_grad[entry.index] for entry in self.entries]
        watched = [*params, *chain.from_iterable(rows)]
        rows.append(())  # of an entry without states, at -1
        return Live(params, grads, [rows[i] for i in self._row_of], watched, has_grad, n_grads)

    def gather(self, optimizer: FusedOptimizer) -> Live | None:
        """The tensors of this step if all of them are where and what the plan says, else None."""
        if (
            not self._watchable
            or optimizer.backend != self._backend
            or list(map(id, _all_params(optimizer))) != self._param_ids
            or list(map(id, optimizer.state)) != self._state_ids
            or [len(group["params"]) for group in optimizer.param_groups] != self._group_sizes
        ):
            return None
        try:
            live = self.read(optimizer)
            # The reference works on the tensors themselves, wherever they lie.
            addresses = [] if self._kernels is None else list(map(Tensor.data_ptr, live.watched))
            if addresses != self._addresses or not self._watch.holds(live.watched):
                return None
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return None  # a state is gone, no tensor any more, or without an address
        if live.n_grads != sum(live.has_grad) or not self._grads_lie_as_known(live):
            return None
        if self._kernels is not None and not self._kernels.is_current():
            return None
        return live

    @property
    def all_in_kernels(self) -> bool:
        """Whether the kernels step every parameter that the plan knows."""
        return not self._has_eager and self._kernels is not None

    def run(self, optimizer: FusedOptimizer, live: Live, hyper: Hyper, gate: Gate) -> None:
        """Step every parameter that has a gradient, if the gate lets the step pass."""
        if gate.may_skip:
            device = torch.device("cpu") if self._kernels is None else self._kernels.device
            gate.skipped_steps = settled_counter(optimizer, device)
        if self._has_eager and gate.reads_gradients:
            eager.read_gradients(self.entries, live, gate)
        if self._kernels is not None:
            self._kernels.run(live, hyper, gate)
        if self._has_eager:
            eager.step(optimizer, self.entries, live, hyper.rows, gate)

    def describes_the_same(self, other: Plan) -> bool:
        """Whether two plans would step the same memory in the same way."""
        tables = [None if plan._kernels is None else plan._kernels.describe() for plan in (self, other)]
        return self.entries == other.entries and self._addresses == other._addresses and tables[0] == tables[1]

    def _grads_lie_as_known(self, live: Live) -> bool:
        present = [grad for grad in live.grads if grad is not None]
        if live.has_grad == self._had_grad:
            return self._grad_watch.holds(present)
        for grad, entry in zip(live.grads, self.entries, strict=True):
            if grad is not None and (grad.layout != torch.strided or meta(grad) != entry.grad_meta):
                return False
        self._had_grad, self._grad_watch = live.has_grad, MetaWatch(present)
        return True


def used_states(optimizer: FusedOptimizer) -> list[tuple[Any, ...]]:
    """For each group: whether it may use the kernels, which states its options call for, how they are stored."""
    names = (*optimizer.scalar_states, *optimizer.states)
    return [
        (
            group.get("fused") is not False,
            *(optimizer.uses(name, group) for name in names),
            *(option(group, name) for name in PRECISION),
            option(group, "ema_decay") is not None,
        )
        for group in optimizer.param_groups
    ]


def _all_params(optimizer: FusedOptimizer) -> list[Tensor]:
    return list(chain.from_iterable(map(itemgetter("params"), optimizer.param_groups)))


def _tuple_getter(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """An itemgetter that returns a tuple for any number of keys."""
    if len(keys) > 1:
        return itemgetter(*keys)
    if len(keys) == 1:
        (key,) = keys
        return lambda items: (items[key],)
    return lambda items: ()


def _state_picker(
    all_names: Sequence[str], names: Sequence[str], n_scalars: int
) -> Callable[[Row], Sequence[Tensor | None]]:
    """How to get the states that `reference` expects out of a row, which begins with scalar states."""
    if len(names) == len(all_names):
        return itemgetter(slice(n_scalars, n_scalars + len(names)))
    if not names:
        return lambda row: [None] * len(all_names)
    pick = _tuple_getter([n_scalars + names.index(name) if name in names else -1 for name in all_names])
    return lambda row: pick((*row, None))


def _entries(optimizer: FusedOptimizer, known: dict[int, tuple[Any, ...] | None]) -> list[Entry]:
    entries: list[Entry] = []
    index = 0
    for group_index, group in enumerate(optimizer.param_groups):
        seed = option(group, "seed") if precision.is_stochastic(group) else None
        scalar_names = tuple(name for name in optimizer.scalar_states if optimizer.uses(name, group))
        scalar_slots = tuple(
            scalar_names.index(name) if name in scalar_names else -1 for name in optimizer.scalar_states
        )
        if seed is not None:
            scalar_names += (ROUNDING_STEP,)
        averaged = option(group, "ema_decay") is not None
        if averaged:
            scalar_names += (EMA_STEP,)
        state_names = tuple(name for name in optimizer.states if optimizer.uses(name, group))
        pick_states = _state_picker(optimizer.states, state_names, len(scalar_names))
        for position, param in enumerate(group["params"]):
            name = f"parameter {position} of group {group_index}"
            if "param_names" in group and position < len(group["param_names"]):
                name += f" ({group['param_names'][position]!r})"
            if not isinstance(param, Tensor):
                raise TypeError(f"{name} must be a Tensor, but it is {torch.typename(param)}")
            grad = param.grad
            grad_meta = meta(grad) if grad is not None else known.get(id(param))
            if grad is None and grad_meta is not None and grad_meta[4] != torch.strided:
                grad_meta = None  # a sparse gradient says nothing about the next one
            kernels = use_kernels(optimizer.backend, group, param) and (grad is None or not grad.is_sparse)
            kept = precision.kept_state(param, group)
            entries.append(
                Entry(
                    index=index,
                    group=group_index,
                    name=name,
                    kernels=kernels,
                    scalar_names=scalar_names,
                    state_names=(*state_names, *([] if kept is None else [kept]), *([EMA] if averaged else [])),
                    kept=kept,
                    averaged=averaged,
                    seed=seed,
                    scalar_slots=scalar_slots,
                    pick_states=pick_states,
                    grad_meta=grad_meta,
                )
            )
            index += 1
    return entries


def _check(optimizer: FusedOptimizer, entry: Entry, param: Tensor) -> None:
    """Raise for anything that the step could not do, before it does anything."""
    grad = param.grad
    assert grad is not None
    name = entry.name
    if grad.layout != torch.strided:
        optimizer.check_sparse(optimizer.param_groups[entry.group], name)
        if entry.seed is not None:
            raise RuntimeError(f"rounding='stochastic' does not support sparse gradients ({name} has one)")
    if entry.seed is not None and type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise RuntimeError(f"rounding='stochastic' does not support {name}: it is a {type(param).__name__}")
    if grad.device != param.device:
        raise RuntimeError(f"{name} is on {param.device}, but its gradient is on {grad.device}")
    if grad.shape != param.shape:
        raise RuntimeError(f"{name} has shape {tuple(param.shape)}, but its gradient has {tuple(grad.shape)}")
    if grad.is_complex() != param.is_complex():
        raise RuntimeError(f"{name} is {param.dtype}, but its gradient is {grad.dtype}")
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(f"{name} must be of a floating-point or complex dtype, but it is {param.dtype}")
    if layout.overlaps_itself(param):
        raise RuntimeError(f"{name} is expanded: several of its elements share one place in memory")
    if entry.kernels:
        why = why_no_kernels(param, interpreted=True)
        if why is not None:
            raise RuntimeError(f"backend='triton' cannot step {name}: {why}")
        if param.numel() and not (param.data_ptr() and grad.data_ptr()):
            raise RuntimeError(f"{name} or its gradient has no memory that a kernel can reach")
    _check_states(optimizer, entry, param)


def _check_states(optimizer: FusedOptimizer, entry: Entry, param: Tensor) -> None:
    name = entry.name
    state = optimizer.state.get(param, {})
    if not isinstance(state, dict):
        raise TypeError(f"the state of {name} must be a dict, but it is {state!r}")
    for state_name in entry.state_names:
        value = state.get(state_name)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"state {state_name!r} of {name} must be a Tensor, but it is {torch.typename(value)}")
        if value.is_meta and not param.is_meta:
            raise RuntimeError(f"state {state_name!r} of {name} is on the meta device: it has no values")
        fits = value.is_complex() if param.is_complex() else value.is_floating_point()
        if value.shape != param.shape or not fits:
            raise RuntimeError(
                f"state {state_name!r} of {name} is {value.dtype} of shape {tuple(value.shape)}, "
                f"but the parameter is {param.dtype} of shape {tuple(param.shape)}"
            )
    for state_name in entry.scalar_names:
        value = state.get(state_name, 0.0)
        if not (value.numel() == 1 if isinstance(value, Tensor) else is_number(value)):
            raise RuntimeError(f"state {state_name!r} of {name} must be one number, but it is {value!r}")


def _is_ready(optimizer: FusedOptimizer, entry: Entry, param: Tensor) -> bool:
    """Whether a parameter without a gradient, but with one before, can have its place in the plan as it is."""
    state = optimizer.state.get(param, {})
    if entry.grad_meta is None or entry.grad_meta[1:3] != (param.device, param.shape) or layout.overlaps_itself(param):
        return False
    states = [state.get(name) for name in entry.names]
    return all(isinstance(value, Tensor) for value in states) and all(
        state[name].shape == param.shape for name in entry.state_names
    )


def _settle_states(optimizer: FusedOptimizer, entry: Entry, param: Tensor) -> None:
    """Create the states that are missing, and bring the others where the backend reads them."""
    if not entry.names:
        return
    group = optimizer.param_groups[entry.group]
    state = optimizer.state[param]
    if any(state.get(name) is None for name in entry.names):
        if backend.is_capturing():
            raise RuntimeError(
                f"{entry.name} has no states yet, and a graph that creates them would do so at each replay: "
                "make a step before the capture"
            )
        optimizer.create_states(param, state, group)
    for name in entry.scalar_names:
        state[name] = _settled_scalar(state[name], param, entry.kernels)
    if entry.kept is not None:
        state[entry.kept] = state[entry.kept].to(precision.kept_dtype(entry.kept, param.dtype))
    if entry.averaged:
        state[EMA] = state[EMA].to(ema_dtype(param.dtype))
    for name in entry.state_names:
        state[name] = _settled_state(state[name], param, entry.kernels)


def _settled_scalar(value: Any, param: Tensor, kernels: bool) -> Tensor:
    """A number as the 0-d tensor that torch keeps, beside the parameter for the kernels, else on the CPU."""
    device = param.device if kernels else torch.device("cpu")
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=layout.scalar_dtype(), device=device)
    if value.dim() == 0 and value.device == device and value.dtype in (torch.float32, torch.float64):
        return value
    return value.detach().reshape(()).to(device=device, dtype=layout.scalar_dtype())


def _settled_state(value: Tensor, param: Tensor, kernels: bool) -> Tensor:
    grad = param.grad
    if value.layout != torch.strided:
        return value.to_dense() if grad is not None and grad.layout == torch.strided else value
    if kernels:
        stride = layout.dense_stride(param)
        if value.device == param.device and layout.lies_as(value, stride):
            return value
        return layout.dense_copy(value.to(param.device), stride)
    if value.device != param.device or not layout.is_raw(value) or layout.overlaps_itself(value):
        return value.to(param.device, copy=True).resolve_conj().resolve_neg().contiguous()
    return value


def _is_plain(entry: Entry, param: Tensor, states: Row) -> bool:
    """Whether the reference can work on the tensors themselves, in their own dtype, and nothing else is to be done."""
    dtype = layout.compute_dtype(param)
    return (
        entry.seed is None
        and not entry.averaged
        and all(tensor.dtype == dtype and layout.is_raw(tensor) for tensor in (param, *states))
        and entry.grad_dtype == dtype
    )
