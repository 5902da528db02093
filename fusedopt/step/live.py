"""The tensors that one step works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

Row: TypeAlias = tuple[Tensor, ...]  # the states of a parameter that the step reads, in the order of `Entry.names`


@dataclass(slots=True)
class Live:
    """The tensors of this step: a parameter and a gradient an entry, a row of states for each `Entry.row`.

    Of DTensors, what this rank holds.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    rows: list[Row]
    watched: list[Tensor]  # parameters and states, one after the other
    present: list[Tensor]  # the gradients that are there
    specs: list[Any]  # how each of `watched` is sharded, if any is

    @property
    def complete(self) -> bool:
        """Whether every parameter has a gradient."""
        return len(self.present) == len(self.grads)
