"""The lists of parameters that are benchmarked are those of the models."""

import pytest

from bench.steps import shapes
from bench.steps.shapes import Shape


@pytest.mark.parametrize(
    ("shape", "tensors", "elements"),
    [
        (shapes.GPT2, 148, 124_439_808),
        (shapes.RESNET50, 161, 25_557_032),
        (shapes.LLAMA, 146, 1_235_814_400),
        (shapes.THOUSAND, 1000, 1_000_000),
        (shapes.LARGE, 1, 2**28),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_models(shape, tensors, elements):
    """As transformers and torchvision count them."""
    assert (len(shape.sizes), shape.elements) == (tensors, elements)


def test_other_lists():
    assert (shapes.GROUPS.groups, len(shapes.GROUPS.sizes)) == (465, 465)
    sizes = [size for (size,) in shapes.SMALL.sizes]
    assert len(sizes) == 5000
    assert 1 <= min(sizes) < 10
    assert 4086 < max(sizes) <= 4096
    assert shapes.small_tensors() == list(shapes.SMALL.sizes)


def test_curves():
    assert [shape.elements for shape in shapes.elements_curve()] == [2**power for power in range(10, 31, 2)]
    assert [len(shape.sizes) for shape in shapes.tensors_curve()] == [1, 10, 100, 1000, 10_000]


def test_shrinking_keeps_tensors_and_groups():
    shape = Shape("list", ((100, 10), (3,), (64,)), groups=3)
    assert shape.shrink(1067) is shape
    assert shape.shrink(1066) == Shape("list", ((500,), (1,), (32,)), groups=3, shrunk=2)
    assert shape.shrink(100) == Shape("list", ((62,), (1,), (4,)), groups=3, shrunk=16)
