"""Which states of a parameter are stored in 8 bits, and the tensors that these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..protocol import Group, OptimizerLike
from ..storage import quantized
from ..storage.precision import code_of
from ..storage.quantized_tensor import Quantized, quantize
from . import graphs, layout, sharding
from .dry import is_simulated


def codes_of(optimizer: OptimizerLike, names: Sequence[str], param: Tensor, group: Group) -> dict[str, torch.dtype]:
    """The code of each state that has one. The memory of the parameter has to be its own."""
    held = sharding.local(param)
    if not (layout.has_own_memory(type(held)) or is_simulated(held)):
        return {}
    codes = {name: code_of(optimizer, name, param, group) for name in names}
    return {name: code for name, code in codes.items() if code is not None}


def new_zeros(param: Tensor, code: torch.dtype) -> Tensor:
    """With which a state begins."""
    held = sharding.local(param)
    size = quantized.size(held.numel() * (2 if held.is_complex() else 1))
    memory = torch.zeros(size, dtype=code, device=held.device)
    zeros = Quantized(memory, held.shape, layout.dense_stride(held), held.is_complex())
    return sharding.like(zeros, param) if sharding.is_sharded(param) else zeros


def settled(value: Tensor, param: Tensor, code: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    """A state in this code, its numbers in the order of the parameter's; without a code one that had one, decoded.

    Args:
        value: what stands for the state.
        param: what this rank holds of the parameter.
        code: of `quantized.CODES`, or None.
        dtype: of a state without a code.
    """
    stride = layout.dense_stride(param)
    if isinstance(value, Quantized) and value.memory.dtype == code and _is_usable(value, param, stride):
        return value
    if graphs.is_capturing():
        raise RuntimeError("a state is to be stored in another form than before: make a step before the capture")
    if code is not None:
        return quantize(value.to(param.device), code, stride)
    return layout.dense_copy(value.to(device=param.device, dtype=dtype), stride)


def _is_usable(value: Quantized, param: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether the kernels can walk it, and read its scales: its memory may be a part of somebody's."""
    memory = value.memory
    if value.device != param.device or not layout.lies_as(value, stride) or not memory.is_contiguous():
        return False
    return is_simulated(memory) or memory.is_meta or memory.data_ptr() % 4 == 0
