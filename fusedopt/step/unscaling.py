"""A step that is given a `grad_scale` leaves each gradient unscaled, once, however many parameters share it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from . import layout
from .entry import Entry
from .live import Live


class GradMemory:
    """The memory of a plan's gradients: it may be elsewhere at each step, but is then laid out as before."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries

    @cached_property
    def _reaches(self) -> Any:
        return np.array(list(map(_reach, self._entries)))

    def part(self, live: Live) -> list[tuple[Tensor, Tensor]]:
        """Put a copy in place of each gradient that has memory in common with another.

        Returns:
            Those gradients with their copies, for `layout.write_back` after the step.
        """
        present = live.present
        if len(present) < 2:
            return []
        positions = [position for position, grad in enumerate(live.grads) if grad is not None]
        starts = np.array([layout.in_memory(grad).data_ptr() for grad in present])
        order = starts.argsort()
        starts, ends = starts[order], (starts + self._reaches[positions])[order]
        apart = starts[1:] >= np.maximum.accumulate(ends)[:-1]
        if apart.all():
            return []
        blocks = np.cumsum([0, *apart])
        live.grads = grads = list(live.grads)
        parted = []
        for i in order[np.bincount(blocks)[blocks] > 1]:
            grad = present[i]
            grads[positions[i]] = copy = grad.clone()
            parted.append((grad, copy))
        return parted


def _reach(entry: Entry) -> int:
    """Bytes from the first to the last of a gradient; 1 for a sparse one: values that are shared begin together."""
    assert entry.grad_meta is not None
    dtype, _, shape, stride = entry.grad_meta[:4]
    return 1 if stride is None else layout.reach(shape, stride) * dtype.itemsize
