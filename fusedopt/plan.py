"""What a step works on: which parameters, which states, which backend. Made once, kept while nothing moves.

Making a plan checks every tensor before anything is written. `Plan.gather` reads every tensor again at each step
and says whether the plan still describes them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import chain, islice
from operator import add, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .engines.choice import check_dtypes, check_reach, engine
from .engines.elementwise import ElementwiseStep
from .matrices.step import MatrixStep
from .options import option, takes_all_gradients
from .protocol import Begun, OptimizerLike
from .step import layout
from .step.dry import is_dry, is_simulating
from .step.entry import Entry, check, check_states, entries_of, is_plain, is_ready, param_name, settle_states
from .step.gate import Gate
from .step.hyper import Hyper, tuple_getter
from .step.live import Live, Row
from .step.ranks import Ranks
from .step.sharding import check_whole, is_sharded, opened
from .step.unscaling import GradMemory
from .step.watch import Watch, meta
from .storage.precision import is_stochastic
from .storage.quantized_tensor import Quantized
from .storage.states import begun_of, what_begins

DEBUG = os.environ.get("FUSEDOPT_DEBUG", "0") not in ("", "0")

_params_of = itemgetter("params")

PRECISION = ("state_dtype", "master_weights", "kahan", "rounding", "seed")  # the options that say how states are stored


class Plan:
    """The entries of an optimizer and how to see that they are what they were."""

    def __init__(
        self,
        optimizer: OptimizerLike,
        hyper: Hyper,
        previous: Plan | None,
        grads: Sequence[Tensor | None],
        begun: Begun,
        buffers: MutableMapping[Hashable, Tensor],
    ) -> None:
        params = all_params(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            optimizer.settle_group(dict(group), index)  # its parameters may be others than it was checked with
        if hyper.reads_gradients:
            check_whole(params, partial(param_name, optimizer))
        known = previous.grad_metas() if previous is not None else {}
        everything = entries_of(optimizer, grads, known, partial(engine, optimizer))
        self.entries: list[Entry] = []
        for entry in everything:
            param, grad = params[entry.index], grads[entry.index]
            if grad is not None:
                check(optimizer, entry, param, grad)
                if entry.kernels:
                    check_reach(entry.engine, entry.name, param, grad)
                check_states(optimizer, entry, param)
                self.entries.append(entry)
            elif entry.grad_meta is not None and is_ready(optimizer, entry, param, begun):
                self.entries.append(entry)
        for entry in self.entries:
            if entry.kernels:
                check_dtypes(optimizer, entry, params[entry.index])
        for entry in self.entries:
            settle_states(optimizer, entry, params[entry.index], grads[entry.index], begun)

        self.uses = used_states(optimizer)
        self.rounds_at_random = any(map(is_stochastic, optimizer.param_groups))
        self._backend = optimizer.backend
        self._param_ids = list(map(id, params))
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        state_ids = list(map(id, optimizer.state))
        self._state_ids = None if state_ids == self._param_ids else state_ids  # the usual order needs no second list
        row_of = {state_id: row for row, state_id in enumerate(state_ids)}
        names: list[tuple[str, ...]] = [()] * len(state_ids)
        self._begun: list[Row] = [()] * len(state_ids)  # what stands in a row before the states, and only we replace
        for entry in self.entries:
            if entry.names:
                entry.row = row_of[self._param_ids[entry.index]]
                names[entry.row] = entry.keys
                state = optimizer.state[params[entry.index]]
                self._begun[entry.row] = tuple(begun_of(optimizer, name, state, begun) for name in entry.begun_names)
        self._getters = list(map(tuple_getter, names))
        self._getter = self._getters[0] if len(set(names)) == 1 else None  # of all
        self._has_names = list(map(bool, names))
        self._has_begun = any(self._begun)
        inside = [entry.index for entry in self.entries]
        self._outside = sorted(set(range(len(params))).difference(inside))
        self._pick = tuple_getter(inside) if self._outside else tuple

        self.is_sharded = any(map(is_sharded, params))
        self._is_quantized = any(entry.codes for entry in self.entries)
        self._ranks = Ranks(params)
        for entry in self.entries:
            entry.part = self._ranks.part_of[entry.index]
        # Where the host decides it waits anyway; that is so on all ranks or on none.
        self._compares_ranks = DEBUG or not any(entry.engine == "triton" for entry in everything)
        self._is_dry = is_dry(opened(params)[0])
        self._is_simulating = is_simulating()
        live = self.read(optimizer, params, grads)
        self._specs = live.specs
        # Sparse states and fake tensors have no address: with one of them every step makes a new plan.
        self._watchable = not any(
            tensor.layout != torch.strided or isinstance(tensor, FakeTensor) for tensor in live.watched
        )
        self._grad_memory = GradMemory(self.entries)
        self._begins = [
            (entry.row, entry.names.index(what_begins(optimizer, name)))
            for entry in self.entries
            for name in entry.begun_names
        ]
        self._begun_ids = self._ids_of_begun(live)
        self._had_grad: list[bool] | None = None  # for each entry; None where all had one
        self._grad_watch: Watch | None = None
        for entry, param in zip(self.entries, live.params, strict=True):
            entry.plain = is_plain(entry, param, live.rows[entry.row][len(entry.scalar_names) :])
        self._step: ElementwiseStep | MatrixStep
        if any(optimizer.product(group) is not None for group in optimizer.param_groups):
            self._step = MatrixStep(optimizer, self.entries, params, live, hyper.count, buffers)
        else:
            self._step = ElementwiseStep(optimizer, self.entries, live, hyper.count)
        self._compiled: set[tuple[bool, bool]] = set()  # the kinds of steps for which all kernels are there
        self.device = self._step.device  # where it is decided
        # The reference works on the tensors themselves, wherever they lie.
        watched = live.watched if self._watchable else []
        self._watch = Watch(watched, addresses=self._watchable and self._step.has_kernels)
        self._coded_watch = Watch(live.coded if self._watchable else [], addresses=False)

    def grad_metas(self) -> dict[int, tuple[Any, ...] | None]:
        """By the id of the parameter, how its gradient last lay."""
        return {self._param_ids[entry.index]: entry.grad_meta for entry in self.entries}

    def read(
        self, optimizer: OptimizerLike, params: Sequence[Tensor], local_grads: Sequence[Tensor | None] | None
    ) -> Live:
        """The tensors of this step. KeyError or TypeError where a state is gone or no tensor any more.

        Args:
            optimizer: whose they are.
            params: all of its parameters.
            local_grads: what this rank holds of their gradients; None where nothing is sharded.
        """
        # In the order of `optimizer.state`: looking a parameter up would hash it, which torch does in Python.
        states = self._states(optimizer.state)
        if self._getter is not None:
            rows = list(map(self._getter, states))
        else:
            rows = [get(state) for get, state in zip(self._getters, states, strict=True)]
        params = self._pick(params)
        grads = [param.grad for param in params] if local_grads is None else self._pick(local_grads)
        watched = [*params, *chain.from_iterable(rows)]
        specs: list[Any] = []
        coded: list[Tensor] = []
        if self.is_sharded or self._is_quantized:
            watched, specs = opened(watched)
            coded = [tensor for tensor in watched if type(tensor) is Quantized]
            watched = [tensor.memory if type(tensor) is Quantized else tensor for tensor in watched]
            held = iter(watched)
            params = list(islice(held, len(params)))
            rows = [tuple(islice(held, len(row))) for row in rows]
        if self._has_begun:
            rows = list(map(add, self._begun, rows))
        rows.append(())  # of an entry without states, at -1
        return Live(params, grads, rows, watched, specs, coded)

    def _states(self, states: Mapping[Tensor, Any]) -> Iterable[Any]:
        """The states of all parameters. A mapping that loads what it is asked for is asked for what a step reads."""
        if type(states) in (dict, defaultdict):
            return states.values()
        return [states[param] if reads else None for param, reads in zip(list(states), self._has_names, strict=True)]

    def gather(self, optimizer: OptimizerLike, local_grads: Sequence[Tensor | None] | None) -> Live | None:
        """The tensors of this step if all of them are where and what the plan says, else None."""
        lists = list(map(_params_of, optimizer.param_groups))
        params = list(chain.from_iterable(lists))
        if (
            not self._watchable
            or is_simulating() != self._is_simulating
            or optimizer.backend != self._backend
            or list(map(len, lists)) != self._group_sizes
            or not self._has(params, optimizer.state)
            or (self._outside and any(params[index].grad is not None for index in self._outside))
        ):
            return None
        try:
            live = self.read(optimizer, params, local_grads)
            if not self._watch.holds(live.watched) or not self._coded_watch.holds(live.coded):
                return None
            if self.is_sharded and not all(map(is_, live.specs, self._specs)):
                return None
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return None  # a state is gone, no tensor any more, or without an address
        if self._begins and self._ids_of_begun(live) != self._begun_ids:
            return None
        if not self._grads_lie_as_known(live) or not self._step.is_current():
            return None
        return live

    def _has(self, params: Sequence[Tensor], states: Mapping[Tensor, Any]) -> bool:
        """Whether parameters and keys of states are the very ones of the plan, in its order."""
        if list(map(id, params)) != self._param_ids:
            return False
        if self._state_ids is None:
            return len(states) == len(params) and all(map(is_, params, states))
        return list(map(id, states)) == self._state_ids

    def compile(self, unscale: bool, reads_gradients: bool) -> None:
        """Compile what a step launches. CompileError where that cannot be; nothing has been written then."""
        kind = unscale, reads_gradients
        if kind not in self._compiled:
            self._step.compile(unscale, reads_gradients)
            self._compiled.add(kind)

    @property
    def engines(self) -> set[str]:
        """Who steps the parameters that the plan knows."""
        return {entry.engine for entry in self.entries}

    def run(self, optimizer: OptimizerLike, live: Live, hyper: Hyper, gate: Gate) -> None:
        """Step every parameter that has a gradient, if the gate lets the step pass."""
        gate.is_dry = self._is_dry
        if gate.needs_ranks and self._ranks and not self._is_dry:
            gate.ranks = self._ranks
        exchanges = self._step.exchanges and not self._is_dry
        if (gate.ranks is not None or exchanges) and self._compares_ranks and not gate.is_captured:
            self._compare_ranks(optimizer, live)
        shared = [] if gate.grad_scale is None or self._is_dry else self._grad_memory.part(live)
        self._step.run(optimizer, live, hyper, gate)
        for grad, copy in shared:
            layout.write_back(grad, copy)
        if gate.ranks is not None and not gate.decided:
            gate.decide()  # a rank without a gradient
        if gate.reads_gradients and gate.grad_norm is None:  # there was none to read
            gate.grad_norm = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.is_sharded:  # the local tensors were written, and have counted it
            params = all_params(optimizer)
            stepped = [
                params[entry.index] for entry, grad in zip(self.entries, live.grads, strict=True) if grad is not None
            ]
            torch.autograd.graph.increment_version(stepped)
            if gate.grad_scale is not None:
                torch.autograd.graph.increment_version([param.grad for param in stepped if param.grad is not None])

    def _compare_ranks(self, optimizer: OptimizerLike, live: Live) -> None:
        names = [param_name(optimizer, index) for index in range(len(self._param_ids))]
        has_grad = [False] * len(names)
        for entry, grad in zip(self.entries, live.grads, strict=True):
            has_grad[entry.index] = grad is not None
        self._ranks.check_agreement(has_grad, names)

    def describes_the_same(self, other: Plan) -> bool:
        """Whether two plans would step the same memory in the same way."""
        told = [plan._step.describe() for plan in (self, other)]
        addresses = [plan._watch.addresses for plan in (self, other)]
        return self.entries == other.entries and addresses[0] == addresses[1] and told[0] == told[1]

    def _ids_of_begun(self, live: Live) -> list[int]:
        """Which states the numbers tell of that say whether they have begun."""
        return [id(live.rows[row][place]) for row, place in self._begins]

    def _grads_lie_as_known(self, live: Live) -> bool:
        if self._grad_watch is not None and self._had_grad is None and self._grad_watch.holds(live.grads):
            live.complete = True
            return True
        has_grad = [grad is not None for grad in live.grads]
        live.complete = all(has_grad)
        if self._grad_watch is not None and has_grad == self._had_grad:
            return self._grad_watch.holds(live.present)
        for grad, entry in zip(live.grads, self.entries, strict=True):
            if grad is not None and (grad.layout != torch.strided or meta(grad) != entry.grad_meta):
                return False
        self._had_grad = None if live.complete else has_grad
        self._grad_watch = Watch(live.present, addresses=False)
        return True


def used_states(optimizer: OptimizerLike) -> list[tuple[Any, ...]]:
    """For each group what a plan depends on: the use of kernels and of gradients, which states, how they are stored."""
    names = (*optimizer.scalar_states, *optimizer.states)
    return [
        (
            group.get("fused") is not False,
            *(optimizer.uses(name, group) for name in names),
            *(optimizer.is_exact(name, group) for name in optimizer.states),
            *(option(group, name) for name in PRECISION),
            option(group, "ema_decay") is not None,
            takes_all_gradients(group) is not None,
            optimizer.product(group),
        )
        for group in optimizer.param_groups
    ]


def all_params(optimizer: OptimizerLike) -> list[Tensor]:
    """The parameters of all groups."""
    return list(chain.from_iterable(map(_params_of, optimizer.param_groups)))
