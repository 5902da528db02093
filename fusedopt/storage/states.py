"""Which states there are: of one parameter those of its class, and those that the options add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import PREFIX, option
from ..protocol import Group, OptimizerLike
from .averaging import EMA, EMA_STEP, new_ema
from .precision import (
    KAHAN_COMP,
    MASTER_PARAM,
    ROUNDING_STEP,
    is_stochastic,
    kept_state,
    new_kept_state,
    state_dtype,
)

ADDED = (ROUNDING_STEP, MASTER_PARAM, KAHAN_COMP, EMA)  # what options add to the states of every class
SKIPPED_STEPS = PREFIX + "skipped_steps"  # a key of the first param group, which torch.distributed.checkpoint saves


def create_states(optimizer: OptimizerLike, param: Tensor, state: dict[str, Any], group: Group) -> None:
    """Create the states that a parameter lacks, in the dtypes that its group asks for."""
    missing = [name for name in optimizer.states if state.get(name) is None]
    optimizer.init_state(param, state, group)
    if option(group, "state_dtype") is not None:  # which a subclass may not have asked for
        dtype = state_dtype(param, group)
        state.update({name: state[name].to(dtype) for name in missing if state.get(name) is not None})
    kept = kept_state(param, group)
    if kept is not None and state.get(kept) is None:
        state[kept] = new_kept_state(kept, param)
    if is_stochastic(group):
        state.setdefault(ROUNDING_STEP, torch.tensor(0.0, dtype=torch.float64, device="cpu"))  # beyond 2^24
    if option(group, "ema_decay") is not None and state.get(EMA) is None:
        state[EMA] = new_ema(param)


def settle_begun(optimizer: OptimizerLike, names: Sequence[str], state: dict[str, Any], flags: dict[str, Any]) -> None:
    """Say of states that are not there that they begin with this step, and of others that they have begun.

    These numbers lie beside `optimizer.state`, in which torch keeps no number but `step`: programs that replace
    parameters cut or lengthen all other states. What they, or a checkpoint, put there has begun.

    Args:
        optimizer: the optimizer.
        names: of the numbers.
        state: the state of one parameter, before what is missing is created.
        flags: its numbers, which are changed.
    """
    for name in names:
        if state.get(_begins(optimizer)[name]) is None:
            flags[name] = 0.0
        else:
            flags.setdefault(name, 1.0)


def without_unbegun(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict post-hook: leaves out the states of which the first step was skipped, as torch has none then."""
    begins = _begins(optimizer)
    places = {
        param: place
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        for param, place in zip(group["params"], packed["params"], strict=True)
    }
    states = dict(state_dict["state"])
    for param, flags in optimizer._stepper.begun.items():
        hidden = {begins[name] for name, begun in flags.items() if not begun}
        if hidden and places.get(param) in states:
            state = states[places[param]]
            states[places[param]] = {name: value for name, value in state.items() if name not in hidden}
    return {**state_dict, "state": states}


def _begins(optimizer: OptimizerLike) -> dict[str, str]:
    """The state of which each of these numbers tells."""
    return {**optimizer.begun, EMA_STEP: EMA}


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
