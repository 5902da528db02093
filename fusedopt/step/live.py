"""The tensors that one step works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    specs: list[Any]  # how each of `watched` is sharded, if any is
    coded: list[Tensor] = field(default_factory=list)  # the states in 8 bits; their memory is among `watched`
    complete: bool = False  # whether every parameter is known to have a gradient

    @property
    def present(self) -> list[Tensor]:
        """The gradients that are there."""
        return [grad for grad in self.grads if grad is not None]
