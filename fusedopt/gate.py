"""Whether a step is taken, and what its gradients are multiplied by: scaling, clipping, skipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backend

if TYPE_CHECKING:
    from .hyper import Hyper
    from .optimizer import FusedOptimizer

SKIPPED_STEPS = "skipped_steps"  # in the first param group: torch.distributed.checkpoint keeps what is in a group


class Gate:
    r"""What one step is told by ``torch.amp.GradScaler``, by its options, and by its gradients.

    .. math::
        n &= \frac{1}{s} \sqrt{\sum g^2} \\
        \text{factor} &= \frac{1}{s} \min\left(1, \frac{\text{max_grad_norm}}{n + 10^{-6}}\right)

    with the `grad_scale` :math:`s`. The step is skipped where `found_inf` is not 0, or where a gradient is not finite
    and `skip_nonfinite` is set. The sums are those of all parameters, on all devices, in float64, in which no fp32
    gradient overflows. Kernels decide on the device (`kernels/gate.py`, the twin of this), the reference on the host.
    """

    def __init__(self, optimizer: FusedOptimizer, hyper: Hyper) -> None:
        # GradScaler sets them before the step, `grad_scale` to None after `unscale_`, and deletes them afterwards.
        self.grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self.found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        self.max_grad_norm = hyper.max_grad_norm
        self.skip_nonfinite = hyper.skip_nonfinite
        self.skipped_steps: Tensor | None = None  # counts, on the device of the first of those who decide
        self.partials: list[Tensor] = []  # float64 [n, 2]: sums of squares, and how many elements were not finite
        self.grad_norm: Tensor | None = None  # float64, once it is known

    @property
    def may_skip(self) -> bool:
        """Whether the step may be skipped."""
        return self.found_inf is not None or self.skip_nonfinite

    @property
    def reads_gradients(self) -> bool:
        """Whether it takes the gradients to decide."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def is_open(self) -> bool:
        """Whether the step is taken, with the gradients as they are."""
        return self.grad_scale is None and self.found_inf is None and not self.reads_gradients

    def numbers(self) -> tuple[float, float]:
        """What the kernels know of the options."""
        return -1.0 if self.max_grad_norm is None else self.max_grad_norm, float(self.skip_nonfinite)

    @torch.no_grad()
    def add(self, grads: Iterable[tuple[str, Tensor]]) -> None:
        """Add gradients that no kernel reads, each with the name of its parameter."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for name, grad in grads:
            if type(grad).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                raise RuntimeError(
                    f"max_grad_norm and skip_nonfinite do not know the whole gradient of {name}: "
                    f"it is a {type(grad).__name__}"
                )
            by_device.setdefault(grad.device, []).append(_squares(grad))
        self.partials += [torch.stack(squares) for squares in by_device.values()]

    def partials_on(self, device: torch.device) -> Tensor:
        """The sums of all devices."""
        if len(self.partials) == 1 and self.partials[0].device == device:
            return self.partials[0]
        return torch.cat([partials.to(device, non_blocking=True) for partials in self.partials])

    def take_counter(self) -> Tensor | None:
        """The counter of skipped steps, for the first who asks: the others would count the same step."""
        counter, self.skipped_steps = self.skipped_steps, None
        return counter

    @torch.no_grad()
    def decide(self) -> tuple[bool, float]:
        """(whether the step is skipped, what the gradients are multiplied by), on the host, which waits for them."""
        scale = 1.0 if self.grad_scale is None else float(self.grad_scale)
        skip = self.found_inf is not None and float(self.found_inf) != 0
        factor = 1 / scale if scale else math.inf
        if self.partials:
            squares, not_finite = self.partials_on(self.partials[-1].device).sum(dim=0)
            grad_norm = squares.sqrt() * factor
            self.grad_norm = grad_norm if self.grad_norm is None else self.grad_norm
            skip = skip or (self.skip_nonfinite and bool(not_finite != 0))
            if self.max_grad_norm is not None:
                factor *= float((self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        counter = self.take_counter()
        if counter is not None and skip:
            counter.add_(1)
        return skip, factor


def settled_counter(optimizer: FusedOptimizer, device: torch.device) -> Tensor:
    """The counter of skipped steps in the first param group, as a 0-d int64 tensor on this device."""
    group = optimizer.param_groups[0]
    counter = group.get(SKIPPED_STEPS)
    if backend.is_capturing() and not isinstance(counter, Tensor):
        raise RuntimeError("nothing counts skipped steps yet: make a step before the capture")
    if not isinstance(counter, Tensor):
        counter = torch.tensor(int(counter or 0), device=device)
    if counter.dim() != 0 or counter.dtype != torch.int64 or counter.device != device:
        counter = counter.detach().reshape(()).to(device=device, dtype=torch.int64)
    group[SKIPPED_STEPS] = counter
    return counter


def _squares(grad: Tensor) -> Tensor:
    """[sum of squares, how many elements are not finite] of a gradient, in float64."""
    if grad.layout != torch.strided:
        grad = grad.coalesce().values()
    norm = torch.linalg.vector_norm(grad, dtype=torch.complex128 if grad.is_complex() else torch.float64)
    return torch.stack([norm.square(), (~grad.isfinite()).sum().double()])
