"""Which states of a parameter are stored in 8 bits, and the tensors that these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..protocol import Group, OptimizerLike
from ..storage import quantized
from ..storage.precision import code_of, state_dtype
from ..storage.quantized_tensor import Quantized, quantize
from . import graphs, layout, sharding
from .dry import is_simulated


def codes_of(optimizer: OptimizerLike, names: Sequence[str], param: Tensor, group: Group) -> dict[str, torch.dtype]:
    """The code of each state that has one. The memory of the parameter has to be its own."""
    codes = {name: code for name in names if (code := code_of(optimizer, name, param, group)) is not None}
    if not codes:
        return codes
    held = sharding.local(param)
    return codes if layout.has_own_memory(type(held)) or is_simulated(held) else {}


def new_state(optimizer: OptimizerLike, name: str, param: Tensor, group: Group, fill: float = 0.0) -> Tensor:
    """A state that begins with a number, in each part of complex elements: in 8 bits, or in the dtype of its group."""
    code = codes_of(optimizer, [name], param, group).get(name)
    if code is None:
        zeros = torch.zeros_like(param, dtype=state_dtype(param, group), memory_format=torch.preserve_format)
        return zeros if fill == 0 else zeros.fill_(complex(fill, fill) if param.is_complex() else fill)
    held = sharding.local(param)
    one = torch.full((1,), fill, dtype=torch.float32, device=held.device)
    memory = quantized.repeated(quantized.encode(one, code), held.numel() * (2 if held.is_complex() else 1))
    state = Quantized(memory, held.shape, layout.dense_stride(held), held.is_complex())
    return sharding.like(state, param) if sharding.is_sharded(param) else state


def settled(value: Tensor, param: Tensor, code: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    """A state in this code, its numbers in the order of the parameter's; without a code one that had one, decoded.

    Args:
        value: what stands for the state.
        param: what this rank holds of the parameter.
        code: of `quantized.CODES`, or None.
        dtype: of a state without a code.
    """
    stride = layout.dense_stride(param)
    if (
        isinstance(value, Quantized)
        and (value.memory.dtype, value.device) == (code, param.device)
        and layout.lies_as(value, stride)
    ):
        return value if _is_usable(value.memory) else value.clone()
    if graphs.is_capturing():
        raise RuntimeError("a state is to be stored in another form than before: make a step before the capture")
    if code is not None:
        return quantize(value.to(param.device), code, stride)
    return layout.dense_copy(value.to(device=param.device, dtype=dtype), stride)


def _is_usable(memory: Tensor) -> bool:
    """Whether the kernels can read the scales: a program may have made it a part of its own memory."""
    return is_simulated(memory) or memory.is_meta or (memory.is_contiguous() and memory.data_ptr() % 4 == 0)
