"""All that surrounds a step, in it and around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .compare import Row
from .comparisons import CONTENDERS, pipelines

COMPARISONS = pipelines(gpu=torch.cuda.is_available())


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda each: each.id, indirect=True, scope="module")
def test_pipeline(comparison: dict[str, Row], contender: str, show: Callable[[str], None]) -> None:
    show(contender)
