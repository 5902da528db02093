"""What is stepped: parameters that are matrices or batches of them, and what the products of a step compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..steps.shapes import Size, gpt2_small

ON_CPU = 8  # what sides are divided by, so that a CPU is soon done
CURVE = (10, 100, 1000)  # small matrices


@dataclass(frozen=True)
class Workload:
    """A list of parameters of shape [..., rows, columns]."""

    name: str
    sizes: tuple[Size, ...]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The shape of each matrix."""
        return [(rows, columns) for *batch, rows, columns in self.sizes for _ in range(math.prod(batch))]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.sizes))

    def flops(self, iterations: int) -> int:
        """Additions and multiplications in the products of a step."""
        return sum(product_flops(rows, columns, iterations) for rows, columns in self.matrices)


def product_flops(rows: int, columns: int, iterations: int) -> int:
    """What so many Newton-Schulz iterations of a matrix compute: A = XXᵀ, A², and the product with X."""
    short, long = sorted((rows, columns))
    return iterations * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)


def four_shapes() -> Workload:
    """24 of each."""
    return Workload("96 matrices", 24 * ((128, 128), (128, 384), (384, 128), (96, 96)))


def gpt2(scale: int) -> Workload:
    """The matrices of the hidden layers as `torch.nn.Linear` has them: inputs are columns."""
    _, _, *layers = gpt2_small()  # tokens and positions come first
    return _scaled("gpt2", [(columns, rows) for rows, columns in (size for size in layers if len(size) == 2)], scale)


def experts(scale: int) -> Workload:
    """A layer of 32 experts, each as the MLP of GPT-2 small."""
    count, width = 32, 768
    return _scaled("experts", [(count, 4 * width, width), (count, width, 4 * width)], scale)


def small(count: int) -> Workload:
    """As many matrices of two shapes, half of them wide."""
    return Workload(f"{count:,} small", count // 2 * ((64, 64), (32, 96)))


def workloads(scale: int) -> list[Workload]:
    """All that are measured."""
    return [four_shapes(), gpt2(scale), experts(scale), *map(small, CURVE)]


def _scaled(name: str, sizes: list[Size], scale: int) -> Workload:
    divided = tuple((*batch, max(1, rows // scale), max(1, columns // scale)) for *batch, rows, columns in sizes)
    return Workload(name if scale == 1 else f"{name} / {scale}", divided)
