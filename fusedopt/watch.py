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

BLOCK = 512  # tensors that the processor's cache holds while they are looked at twice


def meta(tensor: Tensor) -> tuple[object, ...]:
    """Everything but the address that decides how the memory of a tensor is read."""
    stride = tensor.stride() if tensor.layout == torch.strided else None
    conj, neg = tensor.is_conj(), tensor.is_neg()
    return tensor.dtype, tensor.device, tensor.shape, stride, tensor.layout, conj, neg, type(tensor)


class Watch:
    """Compares a list of tensors with what it was when the watch began: their `meta` and, if asked for, addresses."""

    def __init__(self, tensors: Sequence[Tensor], *, addresses: bool) -> None:
        self._count = len(tensors)
        blocks = [tensors[start : start + BLOCK] for start in range(0, len(tensors), BLOCK)]
        self._metas = [_MetaWatch(block) for block in blocks]
        self.addresses = [list(map(Tensor.data_ptr, block)) for block in blocks] if addresses else None

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether nothing has changed. RuntimeError or TypeError for what has no address, or is no tensor."""
        if len(tensors) != self._count:
            return False
        for i, metas in enumerate(self._metas):
            block = tensors[i * BLOCK : (i + 1) * BLOCK]
            if self.addresses is not None and list(map(Tensor.data_ptr, block)) != self.addresses[i]:
                return False
            if not metas.hold(block):
                return False
        return True


class _MetaWatch:
    """Compares the `meta` of tensors.

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

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        if self._guards is not None:
            return self._guards.check(*tensors)
        return list(map(meta, tensors)) == self._metas
