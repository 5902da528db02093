"""How tensors lie in memory: a kernel walks parameter, gradient and states in one flat order, which they must share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def has_own_memory(kind: type[Tensor]) -> bool:
    """Whether tensors of a class are numbers in memory, not what the class makes of other tensors."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def lie(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(size, stride) of every dimension that decides the order of the elements; size 1 decides nothing."""
    return tuple((size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order of the dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for size, stride in sorted(lie(tensor), key=lambda dimension: dimension[1]):
        if stride != expected:
            return False
        expected *= size
    return True


def is_raw(tensor: Tensor) -> bool:
    """Whether the memory holds the values themselves, not their conjugates or negatives."""
    return not (tensor.is_conj() or tensor.is_neg())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices certainly share memory, as in an expanded tensor."""
    is_strided = tensor.layout == torch.strided
    return is_strided and any(stride == 0 for _, stride in lie(tensor)) and tensor.numel() > 1


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides in which the kernels walk a tensor: its own, or the same order without its gaps."""
    if is_dense(tensor):
        return tensor.stride()
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def dense_copy(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The values of a tensor in new, raw memory of these strides."""
    copy = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def in_memory(tensor: Tensor) -> Tensor:
    """What an in-place operation can write: of an expanded tensor each place once, of a sparse one the values."""
    if tensor.layout != torch.strided:
        return tensor._values() if tensor.is_sparse else tensor.values()
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def write_back(tensor: Tensor, copy: Tensor) -> None:
    """Give a tensor the values of its copy, in which those that share a place are equal."""
    places = in_memory(tensor)
    places.copy_(in_memory(copy)[tuple(map(slice, places.shape))])


def scale(tensor: Tensor, factor: float) -> None:
    """Multiply a tensor in place, of a complex one each part: 0 times infinity would get from one into the other."""
    places = in_memory(tensor)
    if places.is_complex():
        places = torch.view_as_real(places.conj() if places.is_conj() else places)
    places.mul_(factor)


def same_order(shape: tuple[int, ...], stride: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two tensors of one shape are walked in the same order; a dimension of size 1 decides nothing."""
    return all(size == 1 or a == b for size, a, b in zip(shape, stride, wanted, strict=True))


def lies_as(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether the kernels can walk a tensor by these strides."""
    return is_raw(tensor) and same_order(tensor.shape, tensor.stride(), stride)


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as the real tensor of its parts, which shares its memory where that is raw."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the tensor reaches."""
    address = tensor.data_ptr()
    return address, address + reach(tensor.shape, tensor.stride()) * tensor.element_size()


def reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements there are from the first to the last in memory, with the gaps."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
