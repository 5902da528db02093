"""Steps that compute nothing: the functions by which kernels start do nothing, and are counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fusedopt.engines import threads


@contextmanager
def emptied_kernels(*, ours: bool = True) -> Iterator[Counter[str]]:
    """Within the context no step of torch.optim computes anything, nor one of fusedopt if it is to be `ours` too."""
    calls: Counter[str] = Counter()

    def empty(name: str) -> Callable[..., Any]:
        def nothing(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return args[0] if args else None  # a list of tensors is what a foreach function returns

        return nothing

    hollow = ModuleType("torch")
    hollow.__dict__.update(vars(torch))
    for name in vars(torch):
        if name.startswith(("_fused_", "_foreach_")):
            setattr(hollow, name, empty(name))
    modules = [module for name, module in sys.modules.items() if name.startswith("torch.optim.")]
    modules = [module for module in modules if vars(module).get("torch") is torch]
    from fusedopt.engines import direct  # which imports Triton

    bound, run = direct.TritonKernel.bound, threads.run
    try:
        if ours:
            direct.TritonKernel.bound = lambda *args: empty("launch")  # type: ignore[method-assign]
            threads.run = empty("run")
        for module in modules:
            module.torch = hollow
        yield calls
    finally:
        threads.run = run
        direct.TritonKernel.bound = bound  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch
