"""Counts what a step asks for: kernels of fusedopt, operators of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt.engines.compiled import CompiledKernels
from fusedopt.engines.tables import TritonKernels

from ..timing import Call

ALLOCATING = ("empty", "new_empty", "empty_like", "empty_strided")


class Operators(TorchDispatchMode):
    """Counts operators of torch that compute something: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten" and name not in ALLOCATING and not _is_view(func):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    return any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)


def operators(call: Call) -> int:
    """How many operators of torch compute something in a call.

    It is the second one that is counted: within such a mode torch's guards no longer hold that the first steps have
    made, so fusedopt makes a new plan.
    """
    with Operators() as mode:
        call()
        mode.counts.clear()
        call()
    return mode.counts.total()


@contextmanager
def counted_kernels() -> Iterator[Counter[str]]:
    """Within the context, the launches of kernels by optimizers that take their first step there."""
    counts: Counter[str] = Counter()
    found = [(engine, name) for engine in (CompiledKernels, TritonKernels) for name in ("prepare", "update")]
    before = [getattr(engine, name) for engine, name in found]
    for (engine, name), method in zip(found, before, strict=True):
        setattr(engine, name, _counting(method, name, counts))
    try:
        yield counts
    finally:
        for (engine, name), method in zip(found, before, strict=True):
            setattr(engine, name, method)


class _Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self._kernel, self._name, self._counts = kernel, name, counts

    def bound(self, *args: Any) -> Callable[..., None]:
        launch = self._kernel.bound(*args)

        def counted(*lasts: Any) -> None:
            self._counts[self._name] += 1
            launch(*lasts)

        return counted


def _counting(method: Callable[..., Any], name: str, counts: Counter[str]) -> Callable[..., _Counted]:
    def make(self: Any, *args: Any, **constants: Any) -> _Counted:
        return _Counted(method(self, *args, **constants), name, counts)

    return make


def kernels(make: Callable[[], torch.optim.Optimizer]) -> dict[str, int]:
    """The kernels of fusedopt that a step launches after the first one."""
    with counted_kernels() as counts:
        optimizer = make()
        optimizer.step()
        counts.clear()
        optimizer.step()
    return dict(counts)
