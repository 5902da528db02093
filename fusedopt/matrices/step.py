"""A step that updates whole matrices: an element-wise update, a product, and another element-wise update."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engines.elementwise import ElementwiseStep
from ..protocol import OptimizerLike
from ..step.entry import Entry, state_picker
from ..step.gate import Gate
from ..step.hyper import Hyper, tuple_getter
from ..step.layout import dense_stride
from ..step.live import Live
from ..step.watch import meta
from ..storage.precision import NOTHING
from .batches import Batches, Matrices, Memory, Product, direction_dtype
from .exchange import Exchanges, cut_of, cuts_of


class MatrixStep:
    """Writes the direction of each matrix, orthogonalizes all directions, and takes them from the parameters.

    The first update steps what is no matrix too, so that one `prepare` serves both. It is the one that the gate is
    about. The second gets the orthogonalized directions as gradients.

    Args:
        optimizer: whose entries they are.
        entries: the entries.
        params: all parameters of the optimizer.
        live: the tensors of the entries.
        n_hyper: how many numbers of a group are the class's.
        buffers: those of all plans of the optimizer.

    Attributes:
        exchanges: whether ranks bring each other pieces of matrices.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        entries: Sequence[Entry],
        params: Sequence[Tensor],
        live: Live,
        n_hyper: int,
        buffers: MutableMapping[Hashable, Tensor],
    ) -> None:
        products = list(map(optimizer.product, optimizer.param_groups))
        self.memory = Memory(buffers)
        matrices = [
            _matrices(position, live.params[position], products[entry.group])
            for position, entry in enumerate(entries)
            if products[entry.group] is not None
        ]
        # Also of parameters without a gradient on this rank, which others may have.
        self.exchanges = any(
            cuts_of(param)
            for product, group in zip(products, optimizer.param_groups, strict=True)
            if product is not None
            for param in group["params"]
        )
        cuts = [cut_of(params[entries[each.position].index], entries[each.position].name) for each in matrices]
        self._exchanges = Exchanges(
            [(each, cut) for each, cut in zip(matrices, cuts, strict=True) if cut is not None],
            self.memory,
            entries[0].tensor if entries else 0,
        )
        whole = [each for each, cut in zip(matrices, cuts, strict=True) if cut is None]
        self._batches = Batches([*whole, *self._exchanges.owned], self.memory)
        self._exchanges.connect()
        self._positions = [each.position for each in matrices]
        self._slots = [each.slot for each in matrices]
        self._pick = tuple_getter(self._positions)

        firsts = list(entries)
        for each in matrices:
            firsts[each.position] = direction_of(optimizer, entries[each.position])
        seconds = [descent_of(optimizer, entries[each.position], each.slot) for each in matrices]
        self._rows_before = _Rows(entries, firsts)
        self._rows_after = _Rows(self._pick(entries), seconds)
        self._first = ElementwiseStep(optimizer, self._rows_before.entries, self._before(live), n_hyper)
        self._second = ElementwiseStep(optimizer, self._rows_after.entries, self._after(live), n_hyper)
        self._rows_before.are_read = self._rows_after.are_read = not all(entry.kernels for entry in entries)

    @property
    def has_kernels(self) -> bool:
        """Whether kernels step any of the entries."""
        return self._first.has_kernels

    @property
    def device(self) -> torch.device:
        """Where it is decided whether the step is taken."""
        return self._first.device

    @property
    def nbytes(self) -> int:
        """The memory that the products take beside parameters, gradients and states."""
        return self.memory.nbytes

    def is_current(self) -> bool:
        """Whether the kernels can be launched as they are, on the stream that is current."""
        return self._first.is_current() and self._second.is_current()

    def compile(self, unscale: bool, reads_gradients: bool) -> None:
        """Compile what a step launches. CompileError where that cannot be; nothing has been written then."""
        self._first.compile(unscale, reads_gradients)
        self._second.compile(False, False)

    def run(self, optimizer: OptimizerLike, live: Live, hyper: Hyper, gate: Gate) -> None:
        """Step every entry that has a gradient, if the gate lets the step pass."""
        self._first.run(optimizer, self._before(live), hyper, gate)
        if isinstance(gate.skip, float) and gate.skip:
            return
        present = None if live.complete else {at for at in self._positions if live.grads[at] is not None}
        with torch.no_grad():
            if gate.is_dry:
                self._batches.run(present)
            else:
                self._exchanges.gather()
                self._batches.run(present)
                self._exchanges.scatter()
        self._second.run(optimizer, self._after(live), hyper.without_limits(), gate.after())

    def describe(self) -> Any:
        """What the kernels have been told, for comparison."""
        return self._first.describe(), self._second.describe()

    def _before(self, live: Live) -> Live:
        """The tensors of the first update, which writes directions in place of parameters."""
        params = list(live.params)
        for position, slot in zip(self._positions, self._slots, strict=True):
            params[position] = slot
        return replace(live, params=params, rows=self._rows_before.of(live))

    def _after(self, live: Live) -> Live:
        """The tensors of the second update, to which the directions are gradients."""
        grads: Sequence[Tensor | None] = self._slots
        if not live.complete:
            given = self._pick(live.grads)
            grads = [None if grad is None else slot for grad, slot in zip(given, self._slots, strict=True)]
        return replace(live, params=self._pick(live.params), grads=grads, rows=self._rows_after.of(live))


class _Rows:
    """The states that an update reads of each of its entries.

    Args:
        whole: the entries of the plan.
        entries: the same in this update, with fewer states.
    """

    def __init__(self, whole: Sequence[Entry], entries: Sequence[Entry]) -> None:
        self.entries = [replace(entry, row=place) for place, entry in enumerate(entries)]
        self._getters = [
            (of.row, tuple_getter(list(map(of.names.index, entry.names))))
            for of, entry in zip(whole, entries, strict=True)
        ]
        self.are_read = True  # in every step: kernels have been told where they are

    def of(self, live: Live) -> list[tuple[Tensor, ...]]:
        """One row an entry."""
        return [get(live.rows[row]) for row, get in self._getters] if self.are_read else []


def direction_of(optimizer: OptimizerLike, entry: Entry) -> Entry:
    """The update of a matrix's states, which writes its direction."""
    names = tuple(name for name in entry.state_names if name in optimizer.states)
    return replace(
        entry,
        update="direction",
        begun_names=(),
        scalar_names=(),
        scalar_slots=(-1,) * len(optimizer.scalar_states),
        state_names=names,
        pick_states=state_picker(optimizer.states, names, 0),
        kept=NOTHING,
        averaged=False,
        plain=False,
    )


def descent_of(optimizer: OptimizerLike, entry: Entry, direction: Tensor) -> Entry:
    """The update of a matrix by its direction."""
    return replace(
        entry,
        update="descent",
        state_names=tuple(name for name in entry.state_names if name not in optimizer.states),
        pick_states=state_picker(optimizer.states, (), len(entry.scalar_names)),
        codes={},
        grad_meta=meta(direction),
        plain=False,
    )


def _matrices(position: int, param: Tensor, product: Product) -> Matrices:
    return Matrices(position, tuple(param.shape), dense_stride(param), direction_dtype(param.dtype), product, param)
