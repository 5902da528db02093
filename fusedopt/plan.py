"""What a step works on: which parameters, which states, which backend. Made once, kept while nothing moves.

Making a plan checks every tensor before anything is written. `Plan.gather` reads every tensor again at each step
and says whether the plan still describes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import backend, eager
from .entry import Entry, Row, check, entries_of, is_plain, is_ready, param_name, settle_states, tuple_getter
from .gate import Gate, settled_counter
from .hyper import Hyper
from .multi_tensor import KernelStep
from .options import option
from .ranks import Ranks
from .sharding import is_sharded, opened
from .watch import MetaWatch, meta

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

PRECISION = ("state_dtype", "master_weights", "kahan", "rounding", "seed")  # the options that say how states are stored


@dataclass(slots=True)
class Live:
    """The tensors of this step, one item an entry, a row for its `names`; of DTensors, what this rank holds."""

    params: list[Tensor]
    grads: list[Tensor | None]
    rows: list[Row]
    watched: list[Tensor]  # parameters and states, one after the other
    has_grad: list[bool]
    n_grads: int  # of all parameters, also of those outside the plan
    specs: list[Any]  # how each of `watched` is sharded, if any is


class Plan:
    """The entries of an optimizer and how to see that they are what they were."""

    def __init__(
        self, optimizer: FusedOptimizer, hyper: Hyper, previous: Plan | None, grads: Sequence[Tensor | None]
    ) -> None:
        params = all_params(optimizer)
        known = previous.grad_metas() if previous is not None else {}
        everything = entries_of(optimizer, grads, known)
        self.entries: list[Entry] = []
        for entry in everything:
            param, grad = params[entry.index], grads[entry.index]
            if grad is not None:
                check(optimizer, entry, param, grad)
                self.entries.append(entry)
            elif entry.grad_meta is not None and is_ready(optimizer, entry, param):
                self.entries.append(entry)
        for entry in self.entries:
            settle_states(optimizer, entry, params[entry.index], grads[entry.index])

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
        self._getters = list(map(tuple_getter, names))

        self.is_sharded = any(map(is_sharded, params))
        self._ranks = Ranks(params)
        for entry in self.entries:
            entry.part = self._ranks.part_of[entry.index]
        # Where the host decides it waits anyway; that is so on all ranks or on none.
        self._compares_ranks = backend.DEBUG or not any(entry.kernels for entry in everything)
        live = self.read(optimizer, grads)
        self._specs = live.specs
        # Sparse states and fake tensors have no address: with one of them every step makes a new plan.
        self._watchable = not any(
            tensor.layout != torch.strided or isinstance(tensor, FakeTensor) for tensor in live.watched
        )
        self._watch = MetaWatch(live.watched)
        self._had_grad: list[bool] = []
        self._grad_watch = MetaWatch([])
        for entry, param, states in zip(self.entries, live.params, live.rows, strict=True):
            entry.plain = is_plain(entry, param, states[len(entry.scalar_names) :])
        in_kernels = [entry.kernels for entry in self.entries]
        self._has_eager = not all(in_kernels)
        self._kernels = KernelStep(optimizer, self.entries, live, hyper.count) if any(in_kernels) else None
        has_addresses = self._watchable and self._kernels is not None
        self._addresses = list(map(Tensor.data_ptr, live.watched)) if has_addresses else []

    def grad_metas(self) -> dict[int, tuple[Any, ...] | None]:
        """By the id of the parameter, how its gradient last lay."""
        return {self._param_ids[entry.index]: entry.grad_meta for entry in self.entries}

    def read(self, optimizer: FusedOptimizer, local_grads: Sequence[Tensor | None] | None) -> Live:
        """The tensors of this step. KeyError or TypeError where a state is gone or no tensor any more.

        Args:
            optimizer: whose they are.
            local_grads: what this rank holds of each gradient, None where nothing is sharded.
        """
        params = all_params(optimizer)
        grads = [param.grad for param in params] if local_grads is None else list(local_grads)
        # In the order of `optimizer.state`: looking a parameter up would hash it, which torch does in Python.
        rows = [get(state) for get, state in zip(self._getters, optimizer.state.values(), strict=True)]
        has_grad = [grad is not None for grad in grads]
        n_grads = sum(has_grad)
        if len(self.entries) < len(params):
            params = [params[entry.index] for entry in self.entries]
            grads = [grads[entry.index] for entry in self.entries]
            has_grad = [has_grad[entry.index] for entry in self.entries]
        watched = [*params, *chain.from_iterable(rows)]
        specs: list[Any] = []
        if self.is_sharded:
            watched, specs = opened(watched)
            held = iter(watched)
            params = list(islice(held, len(params)))
            rows = [tuple(islice(held, len(row))) for row in rows]
        rows.append(())  # of an entry without states, at -1
        return Live(params, grads, [rows[i] for i in self._row_of], watched, has_grad, n_grads, specs)

    def gather(self, optimizer: FusedOptimizer, local_grads: Sequence[Tensor | None] | None) -> Live | None:
        """The tensors of this step if all of them are where and what the plan says, else None."""
        if (
            not self._watchable
            or optimizer.backend != self._backend
            or list(map(id, all_params(optimizer))) != self._param_ids
            or list(map(id, optimizer.state)) != self._state_ids
            or [len(group["params"]) for group in optimizer.param_groups] != self._group_sizes
        ):
            return None
        try:
            live = self.read(optimizer, local_grads)
            if not all(map(is_, live.specs, self._specs)):
                return None
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
        if gate.needs_ranks and self._ranks:
            gate.ranks = self._ranks
            if self._compares_ranks:
                self._compare_ranks(optimizer, live)
        if self._has_eager and gate.reads_gradients:
            eager.read_gradients(self.entries, live, gate)
        if self._kernels is not None:
            self._kernels.run(live, hyper, gate)
        gate.ask_ranks()
        if self._has_eager:
            eager.step(optimizer, self.entries, live, hyper.rows, gate)
        if gate.ranks is not None and not gate.decided:
            gate.decide()  # a rank without a gradient
        if self.is_sharded:  # the local tensors were written, and have counted it
            params = all_params(optimizer)
            stepped = [params[entry.index] for entry, has in zip(self.entries, live.has_grad, strict=True) if has]
            torch.autograd.graph.increment_version(stepped)

    def _compare_ranks(self, optimizer: FusedOptimizer, live: Live) -> None:
        names = [param_name(optimizer, index) for index in range(len(self._param_ids))]
        has_grad = [False] * len(names)
        for entry, has in zip(self.entries, live.has_grad, strict=True):
            has_grad[entry.index] = has
        self._ranks.check_agreement(has_grad, names)

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


def all_params(optimizer: FusedOptimizer) -> list[Tensor]:
    """The parameters of all groups."""
    return list(chain.from_iterable(map(itemgetter("params"), optimizer.param_groups)))
