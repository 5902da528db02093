"""How a loaded state keeps its bits: torch's load_state_dict would cast it, and later steps would write into it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..options import is_number, optional_keys, required_keys
from ..protocol import OptimizerLike
from .dtypes import scalar_dtype
from .states import ADDED


class Shielded:
    """Carries a tensor through torch's load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def shield(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook: shields the tensors, and keeps the optimizer's own options where a group has none.

    Keys that are none of its options, such as a scheduler's ``initial_lr``, are only the checkpoint's to have. Whether
    it was saved by a fused optimizer says nothing about this one.
    """
    state = {
        key: {k: Shielded(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        if isinstance(values, Mapping)
        else values
        for key, values in state_dict["state"].items()
    }
    groups = list(state_dict["param_groups"])
    if len(groups) == len(optimizer.param_groups):
        options = {**required_keys(optimizer), **optional_keys(optimizer), "fused": None}
        groups = [
            {
                **{key: own[key] for key in options if key in own and not _follows(optimizer, own, key)},
                **{key: value for key, value in {**loaded}.items() if key != "fused"},
            }
            for own, loaded in zip(optimizer.param_groups, groups, strict=True)
        ]
    return {**state_dict, "state": state, "param_groups": groups}


def _follows(optimizer: Any, group: Mapping[str, Any], key: str) -> bool:
    """Whether a key has the value that other keys of the group would give it."""
    if key not in optimizer.optional:
        return False
    others = {name: value for name, value in group.items() if name != key}
    with suppress(ValueError):
        optimizer.settle_group(others, 0)
    return key in others and bool(others[key] == group[key])


def unshield_all(states: dict[Any, Any], optimizer: OptimizerLike) -> None:
    """Replace the loaded states of every parameter by what becomes of them."""
    for owner, values in states.items():
        if isinstance(values, dict):
            device = owner.device if isinstance(owner, Tensor) else None
            # torch.distributed.checkpoint asks for every key of `state`, and gives {} for what state_dict() left out.
            left_out = [name for name in (*optimizer.states, *ADDED) if values.get(name) == {}]
            states[owner] = {
                key: _unshielded(key, value, device, optimizer) for key, value in values.items() if key not in left_out
            }


def _unshielded(key: str, value: Any, device: torch.device | None, optimizer: OptimizerLike) -> Any:
    """What becomes of a loaded state: a copy, beside its parameter; numbers become tensors."""
    if not isinstance(value, Shielded):
        number = key in optimizer.scalar_states and is_number(value)
        return torch.tensor(float(value), dtype=scalar_dtype(), device="cpu") if number else value
    if key in optimizer.scalar_states or device is None:
        return value.tensor.clone()  # the step brings it where its backend reads it
    return value.tensor.to(device, copy=True)
