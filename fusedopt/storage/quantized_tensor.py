"""What stands in `optimizer.state` for a state in 8 bits: a tensor that decodes itself for whoever works with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import quantized

aten = torch.ops.aten
PRESERVED = (None, torch.preserve_format)
_BYTES = 4 * quantized.BLOCK  # of a block of decoded numbers


class Decoded(Tensor):
    """A tensor that has its numbers elsewhere, in another form. Operations of torch work on a copy of them in fp32.

    What an operation writes is stored in that form again, also through views.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dequantize(self) -> Tensor:
        """The numbers, in new memory."""
        raise NotImplementedError

    def store(self, values: Tensor) -> None:
        """Take over numbers."""
        raise NotImplementedError

    def tolist(self) -> Any:
        return self.dequantize().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.dequantize().numpy(force=force)

    def __dlpack__(self, **options: Any) -> Any:
        return self.dequantize().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.dequantize().__dlpack_device__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.dequantize()!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        # In inference mode torch leaves it to whom it calls to take an operation apart: `to`, `reshape`, `contiguous` …
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func in _AS_STORED:
            result = _AS_STORED[func](*args, **kwargs)
            if result is not None:
                return result
        if func.is_view and func not in _LAZY and isinstance(args[0], Decoded):
            return _view(args[0], lambda whole: func(whole, *args[1:], **kwargs))
        if func._schema.name in ("c10d::recv_", "c10d::recv_any_source_"):  # nobody may wait for them here
            raise RuntimeError("a state in 8 bits cannot receive: let another tensor, and copy that into the state")
        decoded: dict[int, tuple[Decoded, Tensor]] = {}

        def dequantized(tensor: Decoded) -> Tensor:
            if id(tensor) not in decoded:
                decoded[id(tensor)] = tensor, tensor.dequantize()
            return decoded[id(tensor)][1]

        result = func(*tree_map_only(Decoded, dequantized, args), **tree_map_only(Decoded, dequantized, kwargs))
        if _is_collective(func):
            _wait_for(result)
        for written in _written(func, args, kwargs):
            plain = decoded[id(written)][1]
            if (plain.shape, plain.stride()) != (written.shape, written.stride()):
                raise RuntimeError(f"{func} in place would change how a state in 8 bits lies: dequantize() it before")
            written.store(plain)
        owners = {id(plain): tensor for tensor, plain in decoded.values()}  # an operation in place returns its tensor
        return tree_map_only(Tensor, lambda tensor: owners.get(id(tensor), tensor), result)


class Quantized(Decoded):
    """A state in 8 bits: codes and scales, as `fusedopt.storage.quantized` tells. It looks like a tensor of fp32.

    Args:
        memory: the codes and scales.
        shape: of the tensor.
        stride: in which order its elements follow each other, without gaps.
        is_complex: whether two numbers are one element.
    """

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor, shape: Sequence[int], stride: Sequence[int], is_complex: bool) -> Quantized:
        dtype = torch.complex64 if is_complex else torch.float32
        return Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=dtype, device=memory.device)  # type: ignore

    def __init__(self, memory: Tensor, shape: Sequence[int], stride: Sequence[int], is_complex: bool) -> None:
        self.memory = memory

    @property
    def numbers(self) -> int:
        """How many are stored."""
        return self.numel() * (2 if self.is_complex() else 1)

    def dequantize(self) -> Tensor:
        values = quantized.decode(self.memory, self.numbers)
        values = torch.view_as_complex(values.view(-1, 2)) if self.is_complex() else values
        return values.as_strided(self.shape, self.stride())

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the codes and scales."""
        return self.memory.nbytes

    def store(self, values: Tensor) -> None:
        self.memory.copy_(_encoded(values, self.memory.dtype, self.stride()))

    @property
    def data(self) -> Tensor:
        """The tensor without autograd. Programs that move an optimizer to another device assign to it."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        if not isinstance(values, Quantized):
            values = quantize(values, self.memory.dtype, torch.empty_like(values, device="meta").stride())
        Tensor.data.__set__(self, values)  # type: ignore[attr-defined]
        self.memory = values.memory

    def share_memory_(self) -> Quantized:
        """Let other processes reach the codes and scales."""
        self.memory.share_memory_()
        return self

    def with_memory(self, memory: Tensor) -> Quantized:
        """A tensor that lies as this one, with other codes and scales."""
        return Quantized(memory, self.shape, self.stride(), self.is_complex())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.memory, tuple(self.shape), self.stride(), self.is_complex())


class View(Decoded):
    """A view of such a tensor. It reads and writes the blocks that it reaches, the others keep their bits.

    Args:
        base: the tensor.
        lie: a tensor without values, which lies in its memory as the view does among the numbers of `base`.
    """

    @staticmethod
    def __new__(cls, base: Quantized, lie: Tensor) -> View:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, lie.shape, strides=lie.stride(), dtype=lie.dtype, device=base.device
        )

    def __init__(self, base: Quantized, lie: Tensor) -> None:
        self.base, self.lie = base, lie
        first = lie.storage_offset()
        last = first + sum((size - 1) * step for size, step in zip(lie.shape, lie.stride(), strict=True))
        end = last + 1 if lie.numel() else first
        self._blocks = first * lie.element_size() // _BYTES, -(-end * lie.element_size() // _BYTES)

    def dequantize(self) -> Tensor:
        return self._pick(self._reached())

    def store(self, values: Tensor) -> None:
        numbers = self._reached()
        self._pick(numbers).copy_(values)
        part = quantized.encode(numbers, self.base.memory.dtype)
        quantized.set_blocks(self.base.memory, self.base.numbers, *self._blocks, part)

    def _reached(self) -> Tensor:
        part, numel = quantized.blocks(self.base.memory, self.base.numbers, *self._blocks)
        return quantized.decode(part, numel)

    def _pick(self, numbers: Tensor) -> Tensor:
        lie = self.lie
        offset = lie.storage_offset() - self._blocks[0] * _BYTES // lie.element_size()
        return numbers.view(lie.dtype).as_strided(lie.shape, lie.stride(), offset)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dequantize().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().clone().__reduce_ex__(protocol)


def quantize(values: Tensor, code: torch.dtype, stride: Sequence[int]) -> Quantized:
    """A tensor in 8 bits.

    Args:
        values: its numbers; complex ones have two an element.
        code: of `quantized.CODES`.
        stride: in which order its elements are to lie, without gaps.
    """
    return Quantized(_encoded(values, code, stride), values.shape, stride, values.is_complex())


def _encoded(values: Tensor, code: torch.dtype, stride: Sequence[int]) -> Tensor:
    dtype = torch.complex64 if values.is_complex() else torch.float32
    laid = torch.empty_strided(values.shape, stride, dtype=dtype, device=values.device).copy_(values)
    flat = laid.as_strided((laid.numel(),), (1,))
    return quantized.encode(torch.view_as_real(flat).view(-1) if flat.is_complex() else flat, code)


def _rebuilt(memory: Tensor, shape: Sequence[int], stride: Sequence[int], is_complex: bool) -> Quantized:
    return Quantized(memory, shape, stride, is_complex)


def _view(tensor: Decoded, view: Callable[[Tensor], Any]) -> Any:
    if isinstance(tensor, View):
        base, lie = tensor.base, tensor.lie
    else:
        assert isinstance(tensor, Quantized)
        base = tensor
        lie = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype, device="meta")
    views = view(lie)
    # Views of what is no inference tensor are none either.
    with torch.inference_mode(base.is_inference()):
        return _view_of(base, views) if isinstance(views, Tensor) else [_view_of(base, one) for one in views]


def _view_of(base: Quantized, lie: Tensor) -> Decoded:
    if (lie.shape, lie.stride(), lie.dtype) == (base.shape, base.stride(), base.dtype):
        return base.with_memory(base.memory)
    return View(base, lie)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Decoded]:
    """Which arguments an operation writes."""
    if _is_collective(func):  # whose schemas do not say that they write the first one
        yield from (tensor for tensor in tree_leaves(args[0]) if isinstance(tensor, Decoded))
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in given if isinstance(given, list | tuple) else [given]:
                if isinstance(tensor, Decoded):
                    yield tensor


def _is_collective(func: Any) -> bool:
    return bool(func.namespace == "c10d" and func._schema.name != "c10d::send")


def _wait_for(result: Any) -> None:
    """Let a collective of torch.distributed write what it was given."""
    for work in tree_leaves(result):
        if isinstance(work, torch.ScriptObject):
            torch.distributed.Work.unbox(work).wait()


def _clone(tensor: Decoded, *, memory_format: Any = None) -> Decoded | None:
    if isinstance(tensor, Quantized) and memory_format in PRESERVED:
        return tensor.with_memory(tensor.memory.clone())
    return None


def _to(
    tensor: Decoded, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **options: Any
) -> Decoded | None:
    if isinstance(tensor, Quantized) and dtype in (None, tensor.dtype) and memory_format in PRESERVED:
        return tensor.with_memory(aten._to_copy(tensor.memory, device=device, **options))
    return None


def _new_empty(tensor: Decoded, size: Sequence[int], *, device: Any = None, **options: Any) -> Decoded | None:
    """For torch.distributed.checkpoint.async_save, which copies a tensor by this, and then each of its attributes."""
    same = tuple(size) == tuple(tensor.shape) and options.get("dtype") is None
    if isinstance(tensor, Quantized) and same and device is not None:
        return tensor.with_memory(torch.empty_like(tensor.memory, device=device))
    return None


def _copy(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
    if not (isinstance(tensor, Quantized) and isinstance(source, Quantized)):
        return None
    if (tensor.memory.dtype, tensor.shape, tensor.stride()) != (source.memory.dtype, source.shape, source.stride()):
        return None
    tensor.memory.copy_(source.memory, non_blocking=non_blocking)
    return tensor


# Views that compute: torch does that for whoever reads them, but not within a subclass. Here they are copies.
_LAZY = {aten._conj.default, aten._neg_view.default}

# The operations that leave numbers as they are need not decode them. None: not in this case.
_AS_STORED: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.copy_.default: _copy,
    aten.new_empty.default: _new_empty,
}

torch.serialization.add_safe_globals([_rebuilt])
