"""One parameter of a plan: what it is, whether a step can take it, and its states. Nothing is written but states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..options import is_number, option
from ..protocol import Begun, Group, OptimizerLike
from ..storage import dtypes, precision
from ..storage.averaging import EMA, EMA_BEGUN, ema_dtype
from ..storage.quantized_tensor import Decoded
from ..storage.states import begun_of, check_complete, create_states, what_begins
from . import coding, graphs, layout, sharding
from .dry import is_simulated
from .hyper import tuple_getter
from .live import Row
from .watch import meta


@dataclass(slots=True)
class Entry:
    """One parameter of a plan. Holds no tensor: a strong reference would defeat offloading and `swap_tensors`."""

    index: int  # among the parameters of all groups
    tensor: int  # the same for random numbers: that of the whole optimizer, where this is a part of one
    group: int
    name: str
    engine: str  # that steps it
    begun_names: tuple[str, ...]  # the first of `scalar_names`: those that lie in no state
    scalar_names: tuple[str, ...]  # the class's, and that of averaging
    state_names: tuple[str, ...]  # the class's, then `kept` and the average
    kept: str | None  # the state that holds what rounding the parameter loses
    averaged: bool
    codes: dict[str, torch.dtype]  # of the states that are stored in 8 bits
    seed: int | None  # of stochastic rounding
    scalar_slots: tuple[int, ...]  # where in a row each of the optimizer's scalar states is, -1 = left out
    pick_states: Callable[[Row], Sequence[Tensor | None]] = field(compare=False)  # from a row, None for absent ones
    grad_meta: tuple[Any, ...] | None
    part: int = 0  # of `Ranks`: how the parameter is split
    first: int = 0  # how many elements of a sharded parameter come before those of this rank
    row: int = -1  # of its states among those of the optimizer
    plain: bool = False
    update: str = "update"  # the function of the rule that steps it, `reference` in torch

    @property
    def kernels(self) -> bool:
        """Whether kernels step it, and not the reference."""
        return self.engine != "eager"

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype of the gradient, now or when it was last there."""
        assert self.grad_meta is not None
        return self.grad_meta[0]

    def grad_lies_as(self, param_stride: tuple[int, ...]) -> bool:
        """Whether the kernels can read the gradient beside a parameter of these strides."""
        assert self.grad_meta is not None
        _, _, shape, stride, _, is_conj, is_neg, _ = self.grad_meta
        return not (is_conj or is_neg) and layout.same_order(shape, stride, param_stride)

    @property
    def names(self) -> tuple[str, ...]:
        """What the step reads beside the parameter, in the order of a gathered row."""
        return self.scalar_names + self.state_names

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of them that lie in the parameter's state."""
        return self.scalar_keys + self.state_names

    @property
    def scalar_keys(self) -> tuple[str, ...]:
        """Those of them that are one number."""
        return self.scalar_names[len(self.begun_names) :]


def state_picker(
    all_names: Sequence[str], names: Sequence[str], n_scalars: int
) -> Callable[[Row], Sequence[Tensor | None]]:
    """How to get the states that `reference` expects out of a row, which begins with scalar states."""
    if len(names) == len(all_names):
        return itemgetter(slice(n_scalars, n_scalars + len(names)))
    pick = tuple_getter([n_scalars + names.index(name) if name in names else -1 for name in all_names])
    return lambda row: pick((*row, None))


def param_name(optimizer: OptimizerLike, index: int) -> str:
    """What messages call a parameter, by its place among the parameters of all groups."""
    for group_index, group in enumerate(optimizer.param_groups):
        if index < len(group["params"]):
            return _name(optimizer, group_index, index)
        index -= len(group["params"])
    raise IndexError(index)


def _name(optimizer: OptimizerLike, group_index: int, position: int) -> str:
    first_group, first_position, _ = optimizer._origin
    name = f"parameter {first_position + position} of group {first_group + group_index}"
    names = optimizer.param_groups[group_index].get("param_names", ())
    return f"{name} ({names[position]!r})" if position < len(names) else name


def state_of(optimizer: OptimizerLike, param: Tensor) -> Any:
    """The state of a parameter, an empty one without one. A mapping may load what it is asked for as torch asks."""
    if param not in optimizer.state:
        return {}
    return optimizer.state[param]


def entries_of(
    optimizer: OptimizerLike,
    grads: Sequence[Tensor | None],
    known: dict[int, tuple[Any, ...] | None],
    engine: Callable[[Group, Tensor], str],
) -> list[Entry]:
    """Every parameter of an optimizer.

    Args:
        optimizer: the optimizer.
        grads: what this rank holds of each gradient.
        known: by the id of a parameter, how its gradient last lay.
        engine: who steps a parameter of a group.
    """
    entries: list[Entry] = []
    index = 0
    for group_index, group in enumerate(optimizer.param_groups):
        seed = option(group, "seed") if precision.is_stochastic(group) else None
        averaged = option(group, "ema_decay") is not None
        used = [name for name in optimizer.scalar_states if optimizer.uses(name, group)]
        begun_names = (*filter(optimizer.begun.__contains__, used), *([EMA_BEGUN] if averaged else []))
        scalar_names = begun_names + tuple(name for name in used if name not in optimizer.begun)
        scalar_slots = tuple(
            scalar_names.index(name) if name in scalar_names else -1 for name in optimizer.scalar_states
        )
        state_names = tuple(name for name in optimizer.states if optimizer.uses(name, group))
        pick_states = state_picker(optimizer.states, state_names, len(scalar_names))
        for position, param in enumerate(group["params"]):
            name = _name(optimizer, group_index, position)
            if not isinstance(param, Tensor):
                raise TypeError(f"{name} must be a Tensor, but it is {torch.typename(param)}")
            grad = grads[index]
            grad_meta = meta(grad) if grad is not None else known.get(id(param))
            if grad is None and grad_meta is not None and grad_meta[4] != torch.strided:
                grad_meta = None  # a sparse gradient says nothing about the next one
            kept = precision.kept_state(param, group)
            entries.append(
                Entry(
                    index=index,
                    tensor=optimizer._origin[2] + index,
                    group=group_index,
                    name=name,
                    engine=engine(group, param) if grad is None or grad.layout == torch.strided else "eager",
                    begun_names=begun_names,
                    scalar_names=scalar_names,
                    state_names=(*state_names, *([] if kept is None else [kept]), *([EMA] if averaged else [])),
                    kept=kept,
                    averaged=averaged,
                    codes=coding.codes_of(optimizer, state_names, param, group),
                    seed=seed,
                    scalar_slots=scalar_slots,
                    pick_states=pick_states,
                    grad_meta=grad_meta,
                    first=0 if seed is None else sharding.first_element(param),
                )
            )
            index += 1
    return entries


def check(optimizer: OptimizerLike, entry: Entry, param: Tensor, grad: Tensor) -> None:
    """Raise for a parameter or gradient that no step can take."""
    name, whole = entry.name, param
    param = sharding.local(param)
    sharding.check_placements(whole, name)
    if param.layout != torch.strided:
        _check_sparse_param(entry, param, grad, optimizer.param_groups[entry.group])
    if grad.layout != torch.strided:
        optimizer.check_sparse(optimizer.param_groups[entry.group], name)
        if entry.seed is not None:
            raise RuntimeError(f"rounding='stochastic' does not support sparse gradients ({name} has one)")
    if entry.seed is not None and not (layout.has_own_memory(type(param)) or is_simulated(param)):
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


def _check_sparse_param(entry: Entry, param: Tensor, grad: Tensor, group: Group) -> None:
    if param.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise RuntimeError(f"{entry.name} is {param.layout}, which torch does not add: use COO or CSR")
    converted = dtypes.real_dtype(param.dtype).itemsize == 2 or precision.state_dtype(param, group) != param.dtype
    if converted and param.layout == torch.sparse_csr:
        raise RuntimeError(f"{entry.name} is CSR, which only fp32 and fp64 can be, states too: torch converts none")
    if entry.kept or entry.averaged:
        raise RuntimeError(f"{entry.name} is sparse, which master_weights, kahan and ema_decay do not support")
    if grad.layout != param.layout or grad.dense_dim() != param.dense_dim():
        raise RuntimeError(
            f"{entry.name} is {param.layout} with {param.dense_dim()} dense dimensions, "
            f"but its gradient is {grad.layout} with {grad.dense_dim()}"
        )


def check_states(optimizer: OptimizerLike, entry: Entry, param: Tensor) -> None:
    """Raise for states that are there and do not fit their parameter."""
    name = entry.name
    state = state_of(optimizer, param)
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
        if not sharding.lies_as(value, param):
            raise RuntimeError(
                f"state {state_name!r} of {name} is {sharding.place(value)}, but the parameter is "
                f"{sharding.place(param)}: load sharded states with torch.distributed.checkpoint"
            )
        fits = value.is_complex() if param.is_complex() else value.is_floating_point()
        if value.shape != param.shape or not fits:
            raise RuntimeError(
                f"state {state_name!r} of {name} is {value.dtype} of shape {tuple(value.shape)}, "
                f"but the parameter is {param.dtype} of shape {tuple(param.shape)}"
            )
    for state_name in entry.scalar_keys:
        value = state.get(state_name, 0.0)
        if not (value.numel() == 1 if isinstance(value, Tensor) else is_number(value)):
            raise RuntimeError(f"state {state_name!r} of {name} must be one number, but it is {value!r}")
    if any(state.get(key) is None for key in entry.keys):
        check_complete(optimizer, state, name)


def is_ready(optimizer: OptimizerLike, entry: Entry, param: Tensor, begun: Begun) -> bool:
    """Whether a parameter without a gradient, but with one before, can have its place in the plan as it is."""
    state = state_of(optimizer, param)
    held = sharding.local(param)
    if entry.grad_meta is None or entry.grad_meta[1:3] != (held.device, held.shape) or layout.overlaps_itself(held):
        return False
    if not all(isinstance(begun_of(optimizer, name, state, begun), Tensor) for name in entry.begun_names):
        return False
    states = [state.get(name) for name in entry.keys]
    return all(isinstance(value, Tensor) for value in states) and all(
        state[name].shape == param.shape and sharding.lies_as(state[name], param) for name in entry.state_names
    )


def settle_states(optimizer: OptimizerLike, entry: Entry, param: Tensor, grad: Tensor | None, begun: Begun) -> None:
    """Create the states that are missing, and bring the others where the backend reads them."""
    if not entry.names:
        return
    group = optimizer.param_groups[entry.group]
    state = optimizer.state[param]
    numbers = {name: begun_of(optimizer, name, state, begun) for name in entry.begun_names}
    if graphs.is_capturing() and not all(isinstance(number, Tensor) for number in numbers.values()):
        raise RuntimeError(f"nobody has counted the steps of {entry.name} yet: make a step before the capture")
    if any(state.get(name) is None for name in entry.keys):
        if graphs.is_capturing():
            raise RuntimeError(
                f"{entry.name} has no states yet, and a graph that creates them would do so at each replay: "
                "make a step before the capture"
            )
        create_states(optimizer, param, state, group)
    for name in entry.scalar_keys:
        state[name] = _settled_scalar(state[name], param, entry.kernels)
    if entry.kept is not None:
        state[entry.kept] = state[entry.kept].to(precision.kept_dtype(entry.kept, param.dtype))
    if entry.averaged:
        state[EMA] = state[EMA].to(ema_dtype(param.dtype))
    held_param = sharding.local(param)
    for name in entry.state_names:
        held = sharding.local(state[name])
        code = entry.codes.get(name)
        settled = held if isinstance(held, Decoded) else _settled_state(held, held_param, grad, entry.kernels)
        if isinstance(held, Decoded) or (code is not None and settled.layout == torch.strided):
            settled = coding.settled(settled, held_param, code, precision.state_dtype(param, group))
        if settled is not held:
            state[name] = sharding.like(settled, param) if sharding.is_sharded(param) else settled
    for name, number in numbers.items():
        begun[state[what_begins(optimizer, name)]] = _settled_scalar(number, param, entry.kernels)


def _settled_scalar(value: Any, param: Tensor, kernels: bool) -> Tensor:
    """A number as the 0-d tensor that torch keeps, beside the parameter for the kernels, else on the CPU."""
    device = param.device if kernels else torch.device("cpu")
    if not isinstance(value, Tensor):
        # On the CPU torch.tensor, whose value a fake tensor knows; elsewhere it would wait.
        make = torch.tensor if device.type == "cpu" else partial(torch.full, ())
        return make(float(value), dtype=dtypes.scalar_dtype(), device=device)
    if value.dim() == 0 and value.device == device and value.dtype in (torch.float32, torch.float64):
        return value
    return value.detach().reshape(()).to(device=device, dtype=dtypes.scalar_dtype())


def _settled_state(value: Tensor, param: Tensor, grad: Tensor | None, kernels: bool) -> Tensor:
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


def is_plain(entry: Entry, param: Tensor, states: Row) -> bool:
    """Whether the reference can work on the tensors themselves, in their own dtype."""
    dtype = dtypes.compute_dtype(param)
    if param.is_complex() and param.layout != torch.strided:  # has no parts, and its updates are linear
        dtype = param.dtype
    return (
        entry.seed is None
        and all(tensor.dtype == dtype and layout.is_raw(tensor) for tensor in (param, *states))
        and entry.grad_dtype == dtype
    )
