"""A step of more and more elements, and of tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .compare import Row
from .comparisons import CONTENDERS, scale

COMPARISONS = scale(gpu=torch.cuda.is_available())


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda each: each.id, indirect=True, scope="module")
def test_scale(comparison: dict[str, Row], contender: str, show: Callable[[str], None]) -> None:
    show(contender)
