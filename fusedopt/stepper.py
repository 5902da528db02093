"""The steps of one optimizer, one after the other: what they share, and what is left when one of them fails."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import plan as plans
from .engines.choice import engine, refuse
from .engines.compiled import CompileError
from .options import ROUNDING_STEP, SKIPPED_STEPS
from .plan import Plan, all_params, used_states
from .protocol import Begun, Group, OptimizerLike
from .step import graphs
from .step.entry import param_name
from .step.gate import Gate, settled_counter
from .step.hyper import Hyper
from .step.live import Live
from .step.sharding import local_grads
from .storage.averaging import check_not_swapped
from .storage.precision import is_stochastic


class Stepper:
    """Takes the steps of one optimizer. A copy of it begins anew, but for what has been counted.

    Args:
        may_skip: whether any step could have been skipped.
        skipped_steps: how many were.
        begun: pairs of a state and the number that says whether it has begun.
        whole: of the optimizer that this one is a part of, which counts for its parts.
    """

    def __init__(
        self,
        may_skip: bool = False,
        skipped_steps: Tensor | int = 0,
        begun: Iterable[tuple[Tensor, Any]] = (),
        whole: Stepper | None = None,
    ) -> None:
        self.may_skip = may_skip
        self.skipped_steps = skipped_steps
        self.begun: Begun = WeakIdKeyDictionary(dict=None)
        for state, number in begun:
            self.begun[state] = number
        self.rounding_step: Tensor | int = 0  # how many steps have been rounded at random
        self._whole = whole
        self._buffers: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()  # for plans: see `Memory`
        self.grad_norm: Tensor | None = None
        self.plan: Plan | None = None
        self._hyper: Hyper | None = None
        self._captured: list[Plan] = []  # what graphs read, for as long as they may be replayed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.may_skip, self.skipped_steps, list(self.begun.items()))

    def __copy__(self) -> Stepper:
        copied = type(self)(self.may_skip, self.skipped_steps)
        copied.begun = self.begun  # the states are shared too
        return copied

    def forget(self) -> None:
        """Look at everything anew in the next step."""
        self.plan = self._hyper = None

    def step(self, optimizer: OptimizerLike) -> None:
        """Update every parameter that has a gradient."""
        check_not_swapped(optimizer, "step")
        groups = optimizer.param_groups
        if not groups:
            return
        hyper = self._hyper = self._hyper or Hyper(optimizer)
        n_states = len(optimizer.state)
        capturing = graphs.is_capturing()
        if capturing:
            self._check_capture(optimizer)
        try:
            changed = hyper.refresh(groups)
            # GradScaler sets them before the step, `grad_scale` to None after `unscale_`, and deletes them afterwards.
            told = vars(optimizer)
            gate = Gate(hyper, told.get("grad_scale"), told.get("found_inf"))
            gate.is_captured = capturing
            if gate.may_skip and not self.may_skip:
                self.may_skip, self.plan = True, None
            plan, live = self._planned(optimizer, hyper, changed)
            try:
                plan.compile(gate.grad_scale is not None, gate.reads_gradients)
            except CompileError as why:
                refuse(optimizer, why)
                self.plan = None
                plan, live = self._planned(optimizer, hyper, changed)
        except Exception:
            self.forget()  # whatever was new to this step is new to the next one too
            for param in list(optimizer.state)[n_states:]:
                del optimizer.state[param]
            raise
        self.plan = plan
        if capturing:  # the graph's from now on: what it has uploaded is there only when it is replayed
            self.plan = None
            self._captured.append(plan)
        if gate.may_skip:
            # GradScaler's user has asked for no key.
            saving = groups if hyper.may_skip else [group for group in groups if SKIPPED_STEPS in group]
            self.skipped_steps = settled_counter(saving, SKIPPED_STEPS, self.skipped_steps, plan.device)
            gate.skipped_steps = self.skipped_steps
        if plan.rounds_at_random and plan.entries:
            gate.rounding_step = self.settled_rounding_step(groups, plan.device)
            gate.rounds = self._whole is None
        plan.run(optimizer, live, hyper, gate)
        self.grad_norm = gate.grad_norm

    def settled_rounding_step(self, groups: Sequence[Group], device: torch.device) -> Tensor:
        """The counter of random numbers, in all groups that take some."""
        saving = list(filter(is_stochastic, groups))
        self.rounding_step = settled_counter(saving, ROUNDING_STEP, self.rounding_step, device)
        return self.rounding_step

    def engines(self, optimizer: OptimizerLike) -> set[str]:
        """Who steps the parameters."""
        if self.plan is not None:
            return self.plan.engines
        groups = optimizer.param_groups
        return {engine(optimizer, group, param) for group in groups for param in group["params"]}

    def _check_capture(self, optimizer: OptimizerLike) -> None:
        if not all(group.get("capturable", True) for group in optimizer.param_groups):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() is being captured in a CUDA graph, but capturable is False: make "
                "the optimizer with capturable=True (or set it in every param group), and make a step before the "
                "capture"
            )
        if self.engines(optimizer) != {"triton"}:
            raise RuntimeError("a step can be captured in a CUDA graph where Triton's kernels step all parameters only")

    def _planned(self, optimizer: OptimizerLike, hyper: Hyper, changed: set[str]) -> tuple[Plan, Live]:
        """The last plan if it still holds, else a new one, and the tensors of this step."""
        plan = self.plan
        # A scheduler changes the learning rate of all groups at every step, and no state depends on it.
        if plan is not None and not changed <= {"lr"} and used_states(optimizer) != plan.uses:
            plan = None
        # Once in a step, since it may take the other ranks. A plan without DTensors notices the first one itself.
        grads = _local_grads(optimizer) if self.plan is None or self.plan.is_sharded else None
        live = plan.gather(optimizer, grads) if plan is not None else None
        if plan is not None and live is not None and not plans.DEBUG:
            return plan, live
        grads = _local_grads(optimizer) if grads is None else grads
        with torch.no_grad():
            whole = self._whole or self
            fresh = Plan(optimizer, hyper, self.plan, grads, whole.begun, whole._buffers)
        if plan is not None and live is not None and not plan.describes_the_same(fresh):
            raise RuntimeError("FUSEDOPT_DEBUG: something moved since the last step and was not noticed")
        return fresh, fresh.read(optimizer, all_params(optimizer), grads)


def _local_grads(optimizer: OptimizerLike) -> list[Tensor | None]:
    return local_grads(all_params(optimizer), partial(param_name, optimizer))
