"""Whether a step is taken, and what its gradients are multiplied by: scaling, clipping, skipping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..options import PREFIX
from ..protocol import Group
from . import graphs
from .dry import is_simulated
from .hyper import Hyper
from .layout import has_own_memory
from .ranks import Ranks


class Gate:
    r"""What one step is told by ``torch.amp.GradScaler``, by its options, and by its gradients.

    .. math::
        n &= \frac{1}{s} \sqrt{\sum g^2} \\
        \text{factor} &= \frac{1}{s} \min\left(1, \frac{\text{max_grad_norm}}{n + 10^{-6}}\right)

    with the `grad_scale` :math:`s`. The step is skipped where `found_inf` is not 0, where a gradient is not finite and
    `skip_nonfinite` or `skip_grad_norm` is set, or where :math:`n > \text{skip_grad_norm}`. The sums are those of all
    parameters, on all devices, in float64, in which no fp32 gradient overflows. Kernels decide on the device
    (`kernels/gate.py`, the twin of this), the reference on the host.
    """

    def __init__(self, hyper: Hyper, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        self.grad_scale = grad_scale
        self.found_inf: Tensor | float | None = found_inf
        self._limits = hyper.limits
        self._skips = hyper.may_skip  # by itself
        self.reads_gradients = hyper.reads_gradients  # to decide
        self.skipped_steps: Tensor | None = None  # counts, on the device of the first of those who decide
        self.rounding_step: Tensor | None = None  # counts the steps of stochastic rounding, if any group asks for it
        self.rounds = True  # whether this step is still to be counted there
        self.ranks: Ranks | None = None  # of the mesh on which parameters are sharded
        self.partials: list[Tensor] = []  # float64 [n, 2]: sums of squares, and 0 where all was finite
        self._of_shards: list[tuple[int, Tensor]] = []  # the same, with the part that `ranks` are to add up
        self.is_dry = False
        self.is_captured = False  # in a CUDA graph
        self._asked = False
        self.decided = False
        self.skip: Tensor | float | None = None  # whether the step is skipped, once that is decided
        self.grad_norm: Tensor | None = None  # float64, once it is known

    @property
    def may_skip(self) -> bool:
        """Whether the step may be skipped."""
        return self.found_inf is not None or self._skips

    @property
    def is_open(self) -> bool:
        """Whether the step is taken, with the gradients as they are."""
        return self.grad_scale is None and self.found_inf is None and not self.reads_gradients

    @property
    def needs_ranks(self) -> bool:
        """Whether the ranks that share a model must agree on something."""
        return self.reads_gradients or self.found_inf is not None

    def add(self, partials: Tensor, part: int = 0) -> None:
        """Add sums of squares, and whether something was not finite, of gradients of one part of `Ranks`."""
        if self.ranks is None:
            self.partials.append(partials)
        else:
            self._of_shards.append((part, partials))

    @torch.no_grad()
    def add_grads(self, grads: Iterable[tuple[str, int, Tensor]]) -> None:
        """Add gradients that no kernel reads, each with the name and the part of its parameter."""
        together: dict[tuple[int, torch.device], list[Tensor]] = {}
        for name, part, grad in grads:
            if not (has_own_memory(type(grad)) or is_simulated(grad)):
                raise RuntimeError(
                    f"max_grad_norm, skip_nonfinite and skip_grad_norm do not know the whole gradient of {name}: "
                    f"it is a {type(grad).__name__}"
                )
            together.setdefault((part, grad.device), []).append(grad)
        for (part, _), of_part in together.items():
            self.add(_sums(of_part), part)

    def ask_ranks(self) -> None:
        """Learn from the other ranks what they know, once."""
        if self.ranks is None or self._asked:
            return
        self._asked = True
        with torch.no_grad():
            of_all, found_inf = self.ranks.add_up(self._of_shards, self.found_inf)
        if self.reads_gradients:
            self.partials = [*(partials for part, partials in self._of_shards if part == 0), of_all]
        if self.found_inf is not None:
            self.found_inf = found_inf

    def partials_on(self, device: torch.device) -> Tensor:
        """The sums of all devices."""
        if len(self.partials) == 1 and self.partials[0].device == device:
            return self.partials[0]
        return torch.cat([partials.to(device, non_blocking=True) for partials in self.partials])

    def take_counter(self) -> Tensor | None:
        """The counter of skipped steps, for the first who asks: the others would count the same step."""
        counter, self.skipped_steps = self.skipped_steps, None
        return counter

    def take_rounding_step(self) -> tuple[Tensor | None, int]:
        """The counter of stochastic rounding, and what is to be added to it: 1 for the first who asks."""
        advance, self.rounds = int(self.rounds), False
        return self.rounding_step, advance

    @torch.no_grad()
    def decide(self) -> tuple[bool, float, float]:
        """(whether the step is skipped, 1 / grad_scale, the factor of clipping), on the host, which waits for them.

        A dry run is not skipped, nor does it know what to multiply by.
        """
        self.decided = True
        scale = 1.0 if self.grad_scale is None or self.is_dry else float(self.grad_scale)
        skip = self.found_inf is not None and not self.is_dry and float(self.found_inf) != 0
        unscale = 1 / scale if scale else math.inf
        clip = 1.0
        if self.partials:
            squares, not_finite = self.partials_on(self.partials[-1].device).sum(dim=0)
            grad_norm = squares.sqrt() * unscale
            self.grad_norm = grad_norm if self.grad_norm is None else self.grad_norm
            if self.is_dry:
                return False, 1.0, 1.0
            max_grad_norm, skip_nonfinite, skip_grad_norm = map(float, self._limits)
            skip = skip or (skip_nonfinite != 0 and bool(not_finite != 0)) or bool(grad_norm > skip_grad_norm)
            if not max_grad_norm < 0:
                clip = float((max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        counter = self.take_counter()
        if counter is not None and skip:
            counter.add_(1)
        self.skip = float(skip)
        return skip, unscale, clip

    def after(self) -> Gate:
        """The gate of what the same step does afterwards: lets pass, as it is, what this one has let pass."""
        after = copy.copy(self)
        after.grad_scale, after.found_inf = None, self.skip
        after.reads_gradients, after.rounds, after.decided = False, False, False
        after.ranks = after.skipped_steps = None
        after.partials, after._of_shards = [], []
        return after


def settled_counter(groups: Sequence[Group], key: str, counter: Tensor | int, device: torch.device) -> Tensor:
    """What counts steps as a 0-d int64 tensor on this device.

    Args:
        groups: those that save it, all of them, for a checkpoint may have them in another order. A group that has a key
            asks every checkpoint for it.
        key: by which they do.
        counter: what has counted so far, if they do not know.
        device: where the step is decided.
    """
    counts = [group.get(key, counter) for group in groups] or [counter]
    settled = counts[0]
    if not (_is_counter(settled, device) and all(count is settled for count in counts)):
        if graphs.is_capturing():
            raise RuntimeError(f"nothing counts {key.removeprefix(PREFIX)} yet: make a step before the capture")
        # Groups that were loaded, or added, have counts of their own.
        settled = torch.full((), max(map(int, counts)), dtype=torch.int64, device=device)
    for group in groups:
        group[key] = settled
    return settled


def _is_counter(value: object, device: torch.device) -> bool:
    return isinstance(value, Tensor) and (value.shape, value.dtype, value.device) == ((), torch.int64, device)


def _sums(grads: Sequence[Tensor]) -> Tensor:
    """[sum of squares, 0 if all elements are finite] of each gradient, in float64."""
    values = list(map(_values, grads))
    norms = torch.stack([torch.linalg.vector_norm(value, dtype=_wide_dtype(value)) for value in values])
    not_finite = ~norms.isfinite()  # nor is an element then: no sum of squares of fewer bits overflows in float64
    for i, value in enumerate(values):
        if value.dtype in (torch.float64, torch.complex128):
            not_finite[i] = ~value.isfinite().all()
    return torch.stack([norms.square(), not_finite.double()], dim=1)


def _values(grad: Tensor) -> Tensor:
    """The elements of a gradient that are not certainly 0."""
    if grad.layout != torch.strided:
        grad = (grad.coalesce() if grad.is_sparse else grad).values()
    return grad.float() if grad.dtype.itemsize == 1 else grad  # which torch does not promote by itself


def _wide_dtype(grad: Tensor) -> torch.dtype:
    return torch.complex128 if grad.is_complex() else torch.float64
