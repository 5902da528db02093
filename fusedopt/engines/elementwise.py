"""Entries that are stepped together, each by its engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..protocol import OptimizerLike
from ..step.entry import Entry
from ..step.gate import Gate
from ..step.hyper import Hyper
from ..step.live import Live
from .kernel_step import KernelStep
from .reference import ReferenceStep


class ElementwiseStep:
    """One update of some entries, in which every element is stepped by itself.

    Args:
        optimizer: whose entries they are.
        entries: the entries.
        live: their tensors, in the same order.
        n_hyper: how many numbers of a group are the class's.

    Attributes:
        exchanges: whether ranks bring each other anything beside what the gate asks: no element needs others.
    """

    exchanges = False

    def __init__(self, optimizer: OptimizerLike, entries: Sequence[Entry], live: Live, n_hyper: int) -> None:
        in_kernels = [entry.kernels for entry in entries]
        self._reference = None if all(in_kernels) else ReferenceStep(entries, live)
        self._kernels = KernelStep(optimizer, entries, live, n_hyper) if any(in_kernels) else None

    @property
    def has_kernels(self) -> bool:
        """Whether kernels step any of the entries."""
        return self._kernels is not None

    @property
    def device(self) -> torch.device:
        """Where it is decided whether the step is taken."""
        return torch.device("cpu") if self._kernels is None else self._kernels.device

    def is_current(self) -> bool:
        """Whether the kernels can be launched as they are, on the stream that is current."""
        return self._kernels is None or self._kernels.is_current()

    def compile(self, unscale: bool, reads_gradients: bool) -> None:
        """Compile what a step launches. CompileError where that cannot be; nothing has been written then."""
        if self._kernels is not None:
            self._kernels.compile(unscale, reads_gradients)

    def run(self, optimizer: OptimizerLike, live: Live, hyper: Hyper, gate: Gate) -> None:
        """Step every entry that has a gradient, if the gate lets the step pass."""
        if self._reference is not None and gate.reads_gradients:
            self._reference.read_gradients(live, gate)
        if self._kernels is not None:
            self._kernels.run(live, hyper, gate)
        gate.ask_ranks()
        if self._reference is not None:
            self._reference.run(optimizer, live, hyper, gate)

    def describe(self) -> Any:
        """What the kernels have been told, for comparison."""
        return None if self._kernels is None else self._kernels.describe()
