"""States for programs that do not know how they are stored here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .optimizer import FusedOptimizer
from .options import EIGHT_BITS, KEYS
from .step import sharding
from .storage.quantized_tensor import Decoded


def full_state_dict(optimizer: FusedOptimizer) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` returns, with states in 8 bits as ordinary tensors of fp32.

    ``torch.optim`` loads it, and so does an optimizer of this package, whatever its `state_dtype` is: the param groups
    do not ask for 8 bits any more. DTensors stay DTensors. All else is shared with the optimizer, as in its
    ``state_dict()``.

    Args:
        optimizer: any optimizer of this package.

    Raises:
        TypeError: it is another object.
        RuntimeError: within `swap_ema`.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"full_state_dict takes an optimizer of fusedopt, but this is a {torch.typename(optimizer)}")
    state_dict = optimizer.state_dict()
    key = KEYS["state_dtype"]
    return {
        **state_dict,
        "state": {
            param: {name: _full(value) for name, value in state.items()} if isinstance(state, dict) else state
            for param, state in state_dict["state"].items()
        },
        "param_groups": [
            {name: value for name, value in group.items() if (name, value) != (key, EIGHT_BITS)}
            for group in state_dict["param_groups"]
        ],
    }


def _full(value: Any) -> Any:
    held = sharding.local(value) if isinstance(value, Tensor) else value
    if not isinstance(held, Decoded):
        return value
    values = held.dequantize()
    return sharding.like(values, value) if sharding.is_sharded(value) else values
