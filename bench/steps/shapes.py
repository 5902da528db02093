"""What is stepped: lists of parameters as models have them, computed from their dimensions."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

Size = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A list of parameters, dealt out to a number of groups."""

    name: str
    sizes: tuple[Size, ...]
    groups: int = 1
    shrunk: int = 1  # what the number of elements of every tensor was divided by

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.sizes))

    def shrink(self, max_elements: int) -> Shape:
        """The same with less elements in every tensor, but one at least: all together about `max_elements`."""
        factor = 1
        while self.elements / factor > max_elements:
            factor *= 2
        if factor == 1:
            return self
        sizes = tuple((max(1, math.prod(size) // factor),) for size in self.sizes)
        return replace(self, sizes=sizes, shrunk=factor)


def gpt2_small() -> list[Size]:
    """Radford et al. 2019: 12 layers of width 768, 50,257 tokens, 1,024 positions, the output tied to the input."""
    width = 768
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *12 * (norm + attention + norm + mlp), *norm]


def resnet50() -> list[Size]:
    """He et al. 2016: bottlenecks of three convolutions, each followed by a normalisation; 1,000 classes."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[Size]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    sizes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                sizes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*sizes, (1000, inputs), (1000,)]


def llama_3_2_1b() -> list[Size]:
    """Meta 2024: 16 layers of width 2,048, 8 of 32 heads for keys and values, the output tied to the input."""
    width, keys, hidden = 2048, 512, 8192
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    mlp = [(hidden, width), (hidden, width), (width, hidden)]
    return [(128256, width), *16 * (attention + mlp + [(width,), (width,)]), (width,)]


def small_tensors() -> list[Size]:
    """5,000 of 1 to 4,096 elements, always the same."""
    numbers = random.Random(0)
    return [(numbers.randint(1, 4096),) for _ in range(5000)]


ONE = Shape("1 × 1,000", ((1000,),))
THIRTY = Shape("30 × 1,000", 30 * ((1000,),))
LARGE = Shape("one tensor", ((2**28,),))
GPT2 = Shape("GPT-2 small", tuple(gpt2_small()))
RESNET50 = Shape("ResNet-50", tuple(resnet50()))
LLAMA = Shape("Llama-3.2-1B", tuple(llama_3_2_1b()))
THOUSAND = Shape("1,000 × 1,000", 1000 * ((1000,),))
# As many elements as in a detector of 30 million parameters that gives each parameter a group of its own.
GROUPS = Shape("465 groups", 465 * ((65536,),), groups=465)
SMALL = Shape("5,000 small", tuple(small_tensors()))
LISTS = [GPT2, RESNET50, LLAMA, THOUSAND, GROUPS, SMALL]
# What shrinks here has so few elements that more than memory counts, as in models that a CPU trains.
GPT2_ON_CPU, GROUPS_ON_CPU = GPT2.shrink(2**20), GROUPS.shrink(2**20)


def elements_curve() -> list[Shape]:
    """One tensor of 2^10 to 2^30 elements."""
    return [Shape(f"2^{power} elements", ((2**power,),)) for power in range(10, 31, 2)]


def tensors_curve() -> list[Shape]:
    """1 to 10,000 tensors of 1,000 elements."""
    return [Shape(f"{count:,} tensors", count * ((1000,),)) for count in (1, 10, 100, 1000, 10_000)]
