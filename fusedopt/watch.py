"""Has anything moved since the last step? The one place that answers it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None


def meta(tensor: Tensor) -> tuple[object, ...]:
    """Everything but the address that decides how the memory of a tensor is read."""
    stride = tensor.stride() if tensor.layout == torch.strided else None
    return tensor.dtype, tensor.device, tensor.shape, stride, tensor.layout, tensor.is_conj(), tensor.is_neg()


class MetaWatch:
    """Compares the `meta` of a list of tensors with what it was when the watch began.

    torch's own guards do that in C++, a fifteenth of the price; they are no public API, so where they are missing or
    disagree with themselves (they refuse a tensor that stands twice in the list), Python does it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._metas: list[tuple[object, ...]] = []
        self._guards = None
        if TensorGuards is not None:
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            if self._guards.check(*tensors):
                return
            self._guards = None
        self._metas = list(map(meta, tensors))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether this list of the same length still has the same metas."""
        if self._guards is not None:
            return self._guards.check(*tensors)
        return list(map(meta, tensors)) == self._metas
