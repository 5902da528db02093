"""What a step knows of an optimizer. `FusedOptimizer` is one, and tells what each of these means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import Tensor

Group: TypeAlias = dict[str, Any]  # a param group
Scalars: TypeAlias = tuple[float, ...]
States: TypeAlias = Sequence[Any]  # tensors, or None for one that the options leave out
Begun: TypeAlias = MutableMapping[Tensor, Any]  # by a state, the number that says whether it has begun


class OptimizerLike(Protocol):
    """A declared class, its param groups and their states. Steps, engines and storage ask for no more."""

    kernel: ClassVar[Any]
    hyperparameters: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]]
    optional: ClassVar[dict[str, Any]]
    choices: ClassVar[dict[str, tuple[str, ...]]]
    scalar_states: ClassVar[tuple[str, ...]]
    states: ClassVar[tuple[str, ...]]
    always: ClassVar[tuple[str, ...]]
    nonnegative: ClassVar[tuple[str, ...]]
    begun: ClassVar[dict[str, str]]

    backend: str
    defaults: Group
    param_groups: list[Group]
    state: defaultdict[Tensor, Any]
    _origin: tuple[int, int, int]  # group, position and index of the first parameter in a whole optimizer

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        """What an update needs beside its tensors."""
        ...

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        """The update in plain torch."""
        ...

    def uses(self, name: str, group: Group) -> bool:
        """Whether the options of a group call for a state."""
        ...

    def is_exact(self, name: str, group: Group) -> bool:
        """Whether a state is never stored in 8 bits."""
        ...

    @staticmethod
    def settle_group(group: Group, index: int) -> None:
        """Check a group, and add the keys that follow from others."""
        ...

    def product(self, group: Group) -> Any:
        """What is done to the direction of a group's matrices before they take it, None for an element-wise group."""
        ...

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        """Create the states of the class that a parameter lacks."""
        ...

    def check_sparse(self, group: Group, name: str) -> None:
        """Raise unless a step can use a sparse gradient."""
        ...
