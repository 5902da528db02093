r"""Newton-Schulz iterations, which bring every singular value of a matrix near to 1 by products alone.

.. math::
    X_0 = \frac{G}{\max(\lVert G \rVert_F, \epsilon)}, \qquad
    X_{k+1} = a_k X_k + (b_k A + c_k A^2) X_k \quad \text{with } A = X_k X_k^T

As :math:`X^T (X X^T)^k = (X^T X)^k X^T`, a matrix with more rows than columns is multiplied from the right, by
:math:`X^T X`: nothing is transposed in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .symmetric import is_chosen, symmetric_product

Coefficients = tuple[tuple[float, float, float], ...]

QUINTIC = (3.4445, -4.7750, 2.0315)
# Amsel et al., "The Polar Express", 2025, Algorithm 1; the last one is repeated.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # against singular values that bf16 rounds to above 1, where the first polynomials explode
NAMED = {"polar_express": _POLAR_EXPRESS}


@dataclass(frozen=True)
class NewtonSchulz:
    """The iterations of a param group."""

    coefficients: Coefficients  # of each iteration
    eps: float
    safety: float = 1.0  # what the norm is multiplied by

    @classmethod
    def of(cls, coefficients: Coefficients | str, steps: int, eps: float) -> NewtonSchulz:
        """So many iterations with these coefficients, of which the last are repeated."""
        safety = 1.0
        if isinstance(coefficients, str):
            *first, last = NAMED[coefficients]
            safety = _SAFETY
            coefficients = (*((a / safety, b / safety**3, c / safety**5) for a, b, c in first), last)
        missing = (coefficients[-1],) * max(0, steps - len(coefficients))
        return cls((*coefficients, *missing)[:steps], eps, safety)


@dataclass(frozen=True)
class Workspace:
    """What the iterations need beside the matrices themselves: as much again, and two of their squares."""

    other: Tensor  # [numel]
    grams: tuple[Tensor, Tensor]  # [numel] each

    @staticmethod
    def sizes(shape: tuple[int, int, int]) -> tuple[int, int]:
        """The elements of `other` and of each of `grams` for so many matrices of one shape."""
        count, rows, columns = shape
        return count * rows * columns, count * min(rows, columns) ** 2

    def views(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for these matrices."""
        count, side = x.shape[0], min(x.shape[1:])
        size = count * side * side
        first, second = (gram[:size].view(count, side, side) for gram in self.grams)
        return self.other[: x.numel()].view(x.shape), first, second


def orthogonalize_(x: Tensor, iterations: NewtonSchulz, scale: float, workspace: Workspace) -> None:
    """Replace each matrix by `scale` times its orthogonalization; zeros stay zeros.

    Args:
        x: [matrices, rows, columns], contiguous.
        iterations: what is done.
        scale: what the result is multiplied by, in the last of the products.
        workspace: large enough for `x`.
    """
    other, gram, polynomial = workspace.views(x)
    # Its rounding to bf16 is torch's. It is never 0, so that zeros stay zeros also without an eps.
    least = max(iterations.eps, torch.finfo(x.dtype).tiny)
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=least)
    if iterations.safety != 1:
        norms *= iterations.safety
    coefficients = iterations.coefficients
    if not coefficients:
        x.div_(norms).mul_(scale)
        return
    source, target = (other, x) if len(coefficients) % 2 else (x, other)  # so that the last target is `x`
    torch.div(x, norms, out=source)
    is_tall = x.shape[1] > x.shape[2]
    for k, (a, b, c) in enumerate(coefficients, start=1):
        factor = scale if k == len(coefficients) else 1.0
        _gram(source.mT if is_tall else source, gram)
        _polynomial(gram, b, c, polynomial)
        factors = (source, polynomial) if is_tall else (polynomial, source)
        torch.baddbmm(source, *factors, beta=factor * a, alpha=factor, out=target)
        source, target = target, source


def _gram(x: Tensor, out: Tensor) -> None:
    if is_chosen(x.device):
        symmetric_product(x, out=out)
    else:
        torch.bmm(x, x.mT, out=out)


def _polynomial(gram: Tensor, b: float, c: float, out: Tensor) -> None:
    if is_chosen(gram.device):
        symmetric_product(gram, out=out, c=gram, alpha=c, beta=b)
    else:
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=out)


def spectral_scale(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """What a group's `adjust_lr_fn` makes of the learning rate of a matrix of this shape."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(ratio if adjust_lr_fn == "spectral_unclamped" else max(1, ratio))
