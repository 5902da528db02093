"""Lays the tensors of a plan out for the kernels, whatever they run on, and steps them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..protocol import OptimizerLike
from ..step import layout
from ..step.entry import Entry
from ..step.gate import Gate
from ..step.hyper import Hyper
from ..step.live import Live, Row
from ..storage import dtypes
from ..storage.averaging import EMA, EMA_BEGUN
from .signature import Signature
from .tables import Item, Tables, number_address
from .uploads import Uploads

NO_ELEMENTS = 1  # in place of the address of a gradient that is there but empty; 0 means that there is none


class KernelStep:
    """The entries of a plan that the kernels step, in as few launches as their memory allows."""

    def __init__(self, optimizer: OptimizerLike, entries: Sequence[Entry], live: Live, n_hyper: int) -> None:
        self._stand_ins: dict[int, Tensor] = {}  # of parameters with gaps: dense, filled before and read after
        self._grad_strides: dict[int, tuple[int, ...]] = {}  # of gradients that do not lie as their parameters
        items = []
        extents = []
        for position, (entry, param) in enumerate(zip(entries, live.params, strict=True)):
            if entry.kernels:
                row = live.rows[entry.row]
                items.append(self._item(optimizer, position, entry, param, row))
                grad = live.grads[position]
                reads = [] if grad is None else [layout.extent(grad)]
                extents.append(([layout.extent(tensor) for tensor in (param, *row)], reads))
        together: dict[tuple[int, torch.device, str], list[Item]] = {}
        for item, turn in zip(items, _turns(extents), strict=True):
            key = turn, live.params[item.position].device, entries[item.position].engine
            together.setdefault(key, []).append(item)
        self._tables = [
            Tables(optimizer, together[turn, device, engine], n_hyper, device, engine)
            for turn, device, engine in sorted(together, key=lambda key: key[0])
        ]
        self._uploads = [tables.uploads for tables in self._tables]

    def _item(self, optimizer: OptimizerLike, position: int, entry: Entry, param: Tensor, row: Row) -> Item:
        stride = layout.dense_stride(param)
        memory = param
        if not layout.lies_as(param, stride):
            memory = torch.empty_strided(param.shape, stride, dtype=param.dtype, device=param.device)
            self._stand_ins[position] = memory
        if not entry.grad_lies_as(stride):
            self._grad_strides[position] = stride
        named = dict(zip(entry.names, row, strict=True))
        signature = signature_of(optimizer, entry, param.dtype, named)
        scalar_states = [named.get(name) for name in (*optimizer.scalar_states, EMA_BEGUN)]
        states = [named.get(name) for name in (*optimizer.states, entry.kept or "", EMA)]
        return Item(
            position=position,
            group=entry.group,
            signature=signature,
            numel=param.numel() * (2 if param.is_complex() else 1),
            tensor=entry.tensor,
            part=entry.part,
            first=entry.first * (2 if param.is_complex() else 1),
            seed=int(np.uint64(entry.seed or 0).view(np.int64)),
            addresses=tuple(0 if tensor is None else tensor.data_ptr() for tensor in (memory, *states)),
            scalar_addresses=tuple(map(number_address, scalar_states)),
        )

    def is_current(self) -> bool:
        """Whether every table belongs to the stream that is current, or is kept for the graph that is captured."""
        return all(map(Uploads.is_current, self._uploads))

    def compile(self, unscale: bool, reads_gradients: bool) -> None:
        """Have everything that a step launches."""
        for tables in self._tables:
            tables.compile(unscale, reads_gradients)

    @property
    def device(self) -> torch.device:
        """Where the first tensors lie."""
        return self._tables[0].device

    def run(self, live: Live, hyper: Hyper, gate: Gate) -> None:
        """Step every parameter of the kernels that has a gradient, if the gate lets the step pass."""
        called = []
        for tables in self._tables:
            grads = tables.pick(live.grads)
            if self._grad_strides:
                grads = tuple(map(self._lay_grad, tables.positions, grads))
            addresses = _addresses(grads, live.complete)
            if any(addresses):
                tables.read(addresses, hyper, gate)
                called.append((tables, grads))  # which keeps gradients that have been laid out anew
        if gate.reads_gradients:
            for tables, _ in called:
                for part, partials in tables.sum_squares():
                    gate.add(partials, part)
        gate.ask_ranks()
        for tables, grads in called:
            stand_ins = self._stand_ins and self._filled_stand_ins(tables, live)
            tables.step(gate)
            if stand_ins:
                _copy_each((param, stand_in) for stand_in, param in stand_ins)
            if gate.grad_scale is not None:
                self._write_grads(tables.positions, grads, live)
            # The kernels write through raw addresses: tell autograd, as any in-place operation would. It saves
            # parameters for a backward pass; telling it of states too would cost a sixth of the step's host time.
            if live.complete and len(grads) == len(live.params):
                written = live.params
            else:
                stepped = zip(tables.positions, grads, strict=True)
                written = [live.params[position] for position, grad in stepped if grad is not None]
            torch.autograd.graph.increment_version(written)

    def _filled_stand_ins(self, tables: Tables, live: Live) -> list[tuple[Tensor, Tensor]]:
        """What stands in for parameters of these tables that have a gradient, with their values, beside them."""
        stand_ins = [
            (stand_in, live.params[position])
            for position, stand_in in self._stand_ins.items()
            if position in tables.positions and live.grads[position] is not None
        ]
        _copy_each(stand_ins)
        return stand_ins

    @torch.no_grad()
    def _lay_grad(self, position: int, grad: Tensor | None) -> Tensor | None:
        stride = self._grad_strides.get(position)
        return grad if grad is None or stride is None else layout.dense_copy(grad, stride)

    @torch.no_grad()
    def _write_grads(self, positions: Sequence[int], grads: Sequence[Tensor | None], live: Live) -> None:
        """Finish gradients that the kernels have unscaled, or left as they were: nobody here knows."""
        torch.autograd.graph.increment_version([grad for grad in grads if grad is not None])
        for position, laid in zip(positions, grads, strict=True):
            grad = live.grads[position]
            if grad is not None and laid is not None and position in self._grad_strides:
                layout.write_back(grad, laid)

    def describe(self) -> list[list[int]]:
        """The contents of the tables, for comparison; a stand-in counts for its parameter, wherever it lies."""
        names = {stand_in.data_ptr(): -1 - position for position, stand_in in self._stand_ins.items()}
        return [[names.get(value, value) for value in tables.static.tolist()] for tables in self._tables]


def signature_of(optimizer: OptimizerLike, entry: Entry, param: torch.dtype, named: Mapping[str, Tensor]) -> Signature:
    """Which kernel steps a parameter of this dtype with these states."""
    return Signature(
        dtypes.real_dtype(param),
        dtypes.real_dtype(entry.grad_dtype),
        tuple(dtypes.real_dtype(named[name].dtype) if name in entry.names else None for name in optimizer.states),
        entry.kept,
        entry.seed is not None,
        entry.averaged,
        entry.update,
    )


def _addresses(grads: Sequence[Tensor | None], complete: bool) -> list[int]:
    """Where the gradients are, 0 for one that is missing."""
    if complete:
        addresses = list(map(Tensor.data_ptr, grads))  # type: ignore[arg-type]
        if all(addresses):
            return addresses
    return [0 if grad is None else grad.data_ptr() or NO_ELEMENTS for grad in grads]


@torch.no_grad()
def _copy_each(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)


Extent = tuple[int, int]


def _turns(extents: Sequence[tuple[list[Extent], list[Extent]]]) -> list[int]:
    """When each item is stepped: after every earlier item that writes what it touches, or reads what it writes.

    Items are (extents written, extents read). All take turn 0 unless memory is shared, which a torch loop would
    step one after the other.
    """
    spans = [(*extent, i, True) for i, (writes, _) in enumerate(extents) for extent in writes if extent[0] < extent[1]]
    spans += [(*extent, i, False) for i, (_, reads) in enumerate(extents) for extent in reads if extent[0] < extent[1]]
    turns = [0] * len(extents)
    spans.sort()
    starts = np.array([span[0] for span in spans])
    ends = np.array([span[1] for span in spans])
    if len(spans) < 2 or not (starts[1:] < np.maximum.accumulate(ends)[:-1]).any():
        return turns
    conflicts: dict[int, set[int]] = {}
    active: list[tuple[int, int, int, bool]] = []
    for span in spans:
        active = [other for other in active if other[1] > span[0]]
        for other in active:
            if other[2] != span[2] and (other[3] or span[3]):
                first, second = sorted((other[2], span[2]))
                conflicts.setdefault(second, set()).add(first)
        active.append(span)
    for item in sorted(conflicts):
        turns[item] = 1 + max(turns[earlier] for earlier in conflicts[item])
    return turns
