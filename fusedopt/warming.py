"""Compiling ahead of the first step."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .engines.choice import engine, refuse, why_not
from .engines.compiled import CompileError
from .engines.kernel_step import signature_of
from .engines.signature import Signature
from .engines.tables import Item, Tables
from .matrices.batches import direction_dtype
from .matrices.step import descent_of, direction_of
from .optimizer import FusedOptimizer
from .step import graphs
from .step.entry import Entry, entries_of, param_name, state_of
from .step.gate import Gate
from .step.hyper import Hyper
from .step.sharding import local, local_grads
from .storage.precision import state_dtype
from .storage.quantized_tensor import Decoded
from .storage.states import create_states


def warmup(optimizer: FusedOptimizer) -> None:
    """Compile the kernels that the steps of an optimizer will launch, so that the first one does not wait for them.

    Launches each of them once, with nothing to do: no parameter and no state is read, written or created. What has been
    compiled is kept on disk, so this takes seconds only once on a machine. Without parameters that kernels step, on a
    GPU or on the CPU, nothing happens.

    Where a parameter has no gradient yet, its gradients are expected in the parameter's dtype, and none if it requires
    none. What turns up only later (another dtype, an option switched on) is compiled when it is there.

    Args:
        optimizer: any optimizer of this package, made and, if it is to be, loaded.

    Raises:
        TypeError: it is another object.
        RuntimeError: a CUDA graph is being captured; with ``backend="compiled"``, a rule cannot be compiled.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"warmup compiles for the optimizers of fusedopt, but this is a {torch.typename(optimizer)}")
    if graphs.is_capturing():
        raise RuntimeError("warmup within the capture of a CUDA graph, which would replay it: call it before")
    hyper = Hyper(optimizer)
    hyper.refresh(optimizer.param_groups)
    for (device, engine_name, is_second), items in _signatures(optimizer).items():
        tables = Tables(optimizer, list(items.values()), hyper.count, device, engine_name)
        try:
            _launch(tables, Gate(hyper).after() if is_second else Gate(hyper), hyper)
            if not is_second:  # GradScaler may come or not
                _launch(tables, Gate(hyper, torch.ones((), device=device)), hyper)
        except CompileError as why:
            refuse(optimizer, why)


def _launch(tables: Tables, gate: Gate, hyper: Hyper) -> None:
    """Launch all kernels of a step without a gradient."""
    tables.read([0] * len(tables.positions), hyper, gate)
    if gate.reads_gradients:
        for _, partials in tables.sum_squares():
            gate.add(partials)
    tables.step(gate)


def _signatures(optimizer: FusedOptimizer) -> dict[tuple[torch.device, str, bool], dict[Signature, Item]]:
    """For each device and engine, what distinguishes kernels, each with one element that is nowhere: it is not read.

    Those of a second update, as matrices have, are apart.
    """
    found: dict[tuple[torch.device, str, bool], dict[Signature, Item]] = {}
    nowhere = (0,) * (3 + len(optimizer.states)), (0,) * (1 + len(optimizer.scalar_states))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = local_grads(params, partial(param_name, optimizer))
    entries = entries_of(optimizer, grads, {}, partial(engine, optimizer))
    for entry, param in zip(entries, params, strict=True):
        if not entry.kernels or why_not(entry.engine, param) is not None:
            continue
        if entry.grad_meta is None and not param.requires_grad:
            continue
        entry.grad_meta = entry.grad_meta or (param.dtype,)
        states = dict(state_of(optimizer, param))
        if any(states.get(name) is None for name in entry.state_names):
            # Of one element, since only their dtypes matter. On the device: a subclass may look at the values.
            small = torch.zeros((1,) * param.dim(), dtype=param.dtype, device=local(param).device)
            create_states(optimizer, small, states, optimizer.param_groups[entry.group])
        group = optimizer.param_groups[entry.group]
        for name in optimizer.states:  # as the step converts them
            code = entry.codes.get(name)
            if code is not None or isinstance(local(states.get(name, param)), Decoded):
                states[name] = torch.empty(0, dtype=code or state_dtype(param, group))
        for is_second, (update, dtype) in enumerate(_updates(optimizer, entry, param)):
            signature = signature_of(optimizer, update, dtype, states)
            item = Item(entry.index, entry.group, signature, 1, entry.index, 0, *nowhere)
            found.setdefault((param.device, entry.engine, bool(is_second)), {}).setdefault(signature, item)
    return found


def _updates(optimizer: FusedOptimizer, entry: Entry, param: Tensor) -> list[tuple[Entry, torch.dtype]]:
    """The updates of a step, and the dtype of what each writes in place of the parameter."""
    if optimizer.product(optimizer.param_groups[entry.group]) is None:
        return [(entry, param.dtype)]
    direction = torch.empty(0, dtype=direction_dtype(param.dtype))
    return [
        (direction_of(optimizer, entry), direction.dtype),
        (descent_of(optimizer, entry, direction), param.dtype),
    ]
