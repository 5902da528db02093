"""Which states there are: of one parameter those of its class, and those that the options add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import option
from ..protocol import Begun, Group, OptimizerLike
from .averaging import EMA, EMA_BEGUN, new_ema
from .precision import (
    KAHAN_COMP,
    MASTER_PARAM,
    kept_state,
    new_kept_state,
    state_dtype,
)

ADDED = (MASTER_PARAM, KAHAN_COMP, EMA)  # what options add to the states of every class


def create_states(optimizer: OptimizerLike, param: Tensor, state: dict[str, Any], group: Group) -> None:
    """Create the states that a parameter lacks, in the dtypes that its group asks for."""
    missing = [name for name in optimizer.states if state.get(name) is None]
    optimizer.init_state(param, state, group)
    if isinstance(option(group, "state_dtype"), torch.dtype):  # which a subclass may not have asked for
        dtype = state_dtype(param, group)
        state.update({name: state[name].to(dtype) for name in missing if state.get(name) is not None})
    kept = kept_state(param, group)
    if kept is not None and state.get(kept) is None:
        state[kept] = new_kept_state(kept, param)
    if option(group, "ema_decay") is not None and state.get(EMA) is None:
        state[EMA] = new_ema(param)


def begun_of(optimizer: OptimizerLike, name: str, state: dict[str, Any], begun: Begun) -> Any:
    """The number of this name, which says whether one of the states of a parameter has begun.

    It lies beside `optimizer.state`, in which torch keeps no number but `step`: programs that replace parameters cut or
    lengthen all other states. It belongs to a tensor: 0 to one that was created for a step that may have been skipped.
    What programs, or a checkpoint, put there has begun.
    """
    tensor = state.get(what_begins(optimizer, name))
    return 0.0 if tensor is None else begun.get(tensor, 1.0) if isinstance(tensor, Tensor) else 1.0


def what_begins(optimizer: OptimizerLike, name: str) -> str:
    """The state of which such a number tells."""
    return EMA if name == EMA_BEGUN else optimizer.begun[name]


def without_unbegun(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict post-hook: leaves out the states of which the first step was skipped, as torch has none then."""
    begun = optimizer._stepper.begun
    states = {
        key: {name: value for name, value in state.items() if not isinstance(value, Tensor) or begun.get(value, 1) != 0}
        if isinstance(state, dict) and any(isinstance(value, Tensor) and value in begun for value in state.values())
        else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def check_complete(optimizer: OptimizerLike, state: dict[str, Any], name: str) -> None:
    """Raise for a state that has begun, but lacks what this class always keeps: it is another class's, or half of one.

    Args:
        optimizer: the optimizer.
        state: the state of one parameter.
        name: what messages call the parameter.
    """
    there = {key for key, value in state.items() if value is not None}
    names = (*optimizer.scalar_states, *optimizer.states)
    missing = [key for key in optimizer.always if key in names and key not in there]
    if missing and not there.isdisjoint(optimizer.always):
        foreign = sorted(map(repr, there.difference(names, ADDED)))
        raise RuntimeError(
            f"the state of {name} has no {' and no '.join(map(repr, missing))}"
            + (f", but {', '.join(foreign)}" if foreign else "")
            + f": {type(optimizer).__name__} cannot go on from it. Load what this class has saved, or delete the state "
            "of the parameter to begin anew"
        )
