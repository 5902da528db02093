"""A step of fusedopt beside its peers'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .compare import Row
from .comparisons import CONTENDERS, steps

COMPARISONS = steps(gpu=torch.cuda.is_available())


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda each: each.id, indirect=True, scope="module")
def test_step(comparison: dict[str, Row], contender: str, show: Callable[[str], None]) -> None:
    show(contender)
