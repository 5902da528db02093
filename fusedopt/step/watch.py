"""Has anything moved since the last step? The one place that answers it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_address: Callable[[Any], int] = Tensor.data_ptr
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
        places = [slice(start, start + BLOCK) for start in range(0, len(tensors), BLOCK)]
        self._blocks = [(place, _same_metas(*tensors[place])) for place in places]
        self.addresses = [list(map(Tensor.data_ptr, tensors[place])) for place in places] if addresses else None

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether nothing has changed. RuntimeError or TypeError for what has no address, or is no tensor.

        Without addresses, None in place of a tensor is a change as any other.
        """
        if len(tensors) != self._count:
            return False
        for i, (place, same_metas) in enumerate(self._blocks):
            block = tensors[place]
            if self.addresses is not None and list(map(_address, block)) != self.addresses[i]:
                return False
            if not same_metas(*block):
                return False
        return True


def _same_metas(*tensors: Tensor) -> Callable[..., bool]:
    """What tells whether as many tensors have the `meta` that these have.

    torch's own guards do that in C++, a fifteenth of the price; they are no public API, so where they are missing or
    disagree with themselves (they refuse a tensor that stands twice in the list), Python does it.
    """
    if TensorGuards is not None:
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if guards.check(*tensors):
            return guards.check
    metas = list(map(meta, tensors))
    return lambda *others: [None if tensor is None else meta(tensor) for tensor in others] == metas
