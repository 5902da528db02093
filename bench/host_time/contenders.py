"""The optimizers whose host time is told, and what happens to their input between two steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import fusedopt
from fusedopt.engines.choice import numba_is_installed

from ..timing import Work

NUMEL = 256
OURS, CLIPPED, ON_CPU = "fusedopt", "fusedopt, max_grad_norm", "fusedopt, compiled"
FUSED, FOREACH = "torch fused", "torch foreach"
# What becomes of the launches of a step.
REAL, DISPATCHED, EMPTIED = "real", "dispatched", "emptied"
# What happens to the optimizer's input between two steps.
CHANGES = {
    "nothing": "nothing changes",
    "gradients": "every gradient is at another address",
    "gradients, lr": "so it is, and every group has another lr",
}


class Contender:
    """An optimizer with parameters of its own, and two sets of gradients to change between."""

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], shape: tuple[int, int], device: torch.device
    ) -> None:
        n_tensors, n_groups = shape
        self.params = [nn.Parameter(torch.randn(NUMEL, device=device)) for _ in range(n_tensors)]
        self.grads = [[torch.randn_like(param) for param in self.params] for _ in range(2)]
        self.set_grads(0)
        self.optimizer = make([{"params": self.params[i::n_groups]} for i in range(n_groups)])

    def set_grads(self, which: int) -> None:
        for param, grad in zip(self.params, self.grads[which], strict=True):
            param.grad = grad

    def work(self, change: str) -> Work:
        """A step after a change, which is not timed."""

        def prepare() -> None:
            if "gradients" in change:
                self.set_grads(int(self.params[0].grad is self.grads[0][0]))
            if "lr" in change:
                for group in self.optimizer.param_groups:
                    group["lr"] *= 0.999

        return Work(self.optimizer.step, prepare)


def makers(name: str, device: torch.device, launches: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """The optimizers of this name, from both libraries."""
    ours, theirs = getattr(fusedopt, name), getattr(torch.optim, name)
    made = {OURS: partial(ours, backend="triton"), FUSED: partial(theirs, fused=True)}
    if launches != EMPTIED:
        made[CLIPPED] = partial(ours, backend="triton", max_grad_norm=1.0)
    if launches != DISPATCHED:
        made[FOREACH] = partial(theirs, foreach=True)
    if launches == EMPTIED and numba_is_installed():
        made[ON_CPU] = partial(ours, backend="compiled")
    return made


def contenders(name: str, shape: tuple[int, int], device: torch.device, launches: str) -> dict[str, Contender]:
    """The optimizers of one name, with their states created."""
    made = {who: Contender(make, shape, device) for who, make in makers(name, device, launches).items()}
    for who, contender in made.items():
        # With empty kernels torch would stay at step 0, and foreach divide by 0. fusedopt creates its states anyway.
        if who not in (OURS, ON_CPU) or launches != EMPTIED:
            contender.optimizer.step()
    return made
