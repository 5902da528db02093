"""Bytes of states, counted in the memory that they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusedopt.storage.quantized_tensor import Quantized
from tests.cases import CASES, Case

from ..steps.shapes import Shape, Size

STATE_DTYPES: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "8 bits": "8bit"}
DECIDING = ("momentum", "centered", "amsgrad")  # options that say which states there are
MILLION = Shape("one tensor", ((2**20,),))


def stored_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the memory that all states lie in; what several share, as a table of codes, counts once."""
    tensors = (tensor for state in optimizer.state.values() for value in state.values() for tensor in _inner(value))
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def _inner(value: Any) -> Iterator[Tensor]:
    """The plain tensors of which a state is made."""
    if isinstance(value, Quantized):
        yield value.memory
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _inner(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def bytes_of_states(make: Callable[..., torch.optim.Optimizer], sizes: Iterable[Size]) -> dict[str, float]:
    """For each dtype the bytes of states a parameter, after a step."""
    found = {}
    for name, dtype in STATE_DTYPES.items():
        params = [nn.Parameter(torch.zeros(size)) for size in sizes]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizer = make(params, state_dtype=dtype)
        optimizer.step()
        found[name] = stored_bytes(optimizer) / sum(param.numel() for param in params)
    return found


def all_bytes() -> list[dict[str, Any]]:
    """A row for each class and each choice of its states."""
    kinds: dict[tuple[str, ...], tuple[Case, str]] = {}
    for case in CASES:
        told = {key: value for key, value in case.options.items() if key in DECIDING}
        label = ", ".join(f"{key}={value!r}" for key, value in told.items())
        kinds.setdefault((case.optimizer, *sorted(told)), (case, label))
    return [
        {"optimizer": case.optimizer, "options": label, **bytes_of_states(case.make, MILLION.sizes)}
        for case, label in kinds.values()
    ]
