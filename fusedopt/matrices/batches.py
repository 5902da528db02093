"""Matrices of one shape beside each other, so that one product serves all of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .newton_schulz import NewtonSchulz, Workspace, orthogonalize_, spectral_scale

DTYPE = torch.bfloat16  # of the products
# Elements that are multiplied in one go: more of them are no faster, and would need as much workspace.
TOGETHER = 1 << 27
MULTIPLE = 8  # elements, so that rows begin at multiples of 16 bytes, which the fast products of GPUs and CPUs ask for


def direction_dtype(param: torch.dtype) -> torch.dtype:
    """The dtype of the direction of a parameter: that of the products, but arithmetic in fp64 ends in fp64."""
    return torch.float64 if param == torch.float64 else DTYPE


@dataclass(frozen=True)
class Product:
    """What is done to the direction of the matrices of a param group."""

    iterations: NewtonSchulz
    adjust_lr_fn: str | None
    split: int | tuple[int, ...] | None  # into how many equal pieces, or pieces of which sizes
    split_dim: int  # -2: rows are divided, -1: columns

    def sizes(self, shape: Sequence[int]) -> list[int]:
        """How the rows, or columns, of a matrix of this shape divide."""
        whole = shape[self.split_dim]
        if self.split is None:
            return [whole]
        return [whole // self.split] * self.split if isinstance(self.split, int) else list(self.split)


class Memory:
    """Buffers that nobody needs between two steps.

    Args:
        shared: those of all plans of an optimizer and of its parts, which step one after the other: the next plan takes
            over those that fit, and parts that step in backward have them in common.
    """

    def __init__(self, shared: MutableMapping[Hashable, Tensor]) -> None:
        self._shared = shared
        self._held: dict[Hashable, Tensor] = {}

    def take(self, name: Hashable, numel: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """The flat buffer of this name, of zeros where it is new, where `like` is."""
        key = name, numel, dtype, like.device, type(like)
        buffer = self._shared.get(key)
        if buffer is None:
            buffer = like.new_zeros(numel, dtype=dtype)
        self._shared[key] = self._held[key] = buffer
        return buffer

    @property
    def nbytes(self) -> int:
        """The size of all of them."""
        return sum(buffer.nbytes for buffer in self._held.values())


@dataclass(frozen=True)
class Key:
    """What the matrices of a batch have in common."""

    device: torch.device
    rows: int
    columns: int
    iterations: NewtonSchulz
    scale: float


@dataclass
class Batch:
    """Matrices that are multiplied together.

    Attributes:
        places: of each parameter, its position in the plan, its first matrix here and how many it has.
        x: [matrices, rows, columns], once all are known.
    """

    key: Key
    places: list[tuple[int, int, int]] = field(default_factory=list)
    count: int = 0
    x: Tensor = field(init=False)

    def reserve(self, position: int, count: int) -> int:
        """A place for so many matrices; where it begins."""
        first = self.count
        self.places.append((position, first, count))
        self.count += count
        return first

    @property
    def most(self) -> int:
        """How many matrices are multiplied in one go."""
        return max(1, min(self.count, TOGETHER // max(1, self.key.rows * self.key.columns)))

    def run(self, present: Collection[int] | None, workspace: Workspace) -> None:
        """Orthogonalize the matrices of these parameters, of all at None."""
        for first, last in self._runs(present):
            for start in range(first, last, self.most):
                part = self.x[start : min(last, start + self.most)]
                orthogonalize_(part, self.key.iterations, self.key.scale, workspace)

    def _runs(self, present: Collection[int] | None) -> list[tuple[int, int]]:
        """What is multiplied together. Matrices between those that are present may be, too: nobody reads them then.

        A gap is bridged unless it is longer than all that are present, so that there are few runs, none of them long.
        """
        if present is None:
            return [(0, self.count)]
        places = [(first, first + count) for position, first, count in self.places if position in present]
        together = sum(last - first for first, last in places)
        runs: list[tuple[int, int]] = []
        for first, last in places:
            if runs and first - runs[-1][1] <= together:
                runs[-1] = runs[-1][0], last
            else:
                runs.append((first, last))
        return runs


@dataclass
class Matrices:
    """The matrices of one parameter that are whole on this rank, and where their direction lies.

    Attributes:
        position: of the parameter in the plan.
        shape: of the parameter.
        stride: of the direction, which lies in memory as the parameter does.
        dtype: of the direction.
        slot: the direction.
    """

    position: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    product: Product
    like: Tensor
    slot: Tensor = field(init=False)


class Batches:
    """All matrices of a plan that are whole on this rank.

    The direction of a parameter lies where it is multiplied, if its memory is that of a batch. Others are copied there
    and back: those that are divided along what is no row in memory, those of fp64, and those whose rows are no multiple
    of 16 bytes, which are padded with zeros.

    Args:
        matrices: of each parameter; they get their `slot`.
        memory: where buffers are.
    """

    def __init__(self, matrices: Sequence[Matrices], memory: Memory) -> None:
        self._batches: dict[Key, Batch] = {}
        self._copies: list[tuple[int, Tensor, Tensor]] = []  # position; a piece of a slot, and of a batch
        self._padded: list[tuple[int, Tensor]] = []  # position; all of a piece's place in a batch
        places = [(each, self._reserve_direct(each)) for each in matrices]
        pieces = [(each, self._reserve_pieces(each)) for each, place in places if place is None]
        like = {each.like.device: each.like for each in matrices}
        for key, batch in self._batches.items():
            shape = batch.count, key.rows, key.columns
            batch.x = memory.take(key, math.prod(shape), DTYPE, like[key.device]).view(shape)
        for index, (each, place) in enumerate(places):
            if place is None:
                flat = memory.take(("slot", index), math.prod(each.shape), each.dtype, each.like)
            else:
                key, first, count = place
                flat = self._batches[key].x[first : first + count].view(-1)
            each.slot = flat.as_strided(each.shape, each.stride, flat.storage_offset())
        for each, reserved in pieces:
            for piece, (key, first, count) in zip(_pieces(each), reserved, strict=True):
                block = self._batches[key].x[first : first + count]
                if block.numel() > piece.numel():
                    self._padded.append((each.position, block))
                target = block[:, : piece.shape[-2], : piece.shape[-1]]
                self._copies.append(
                    (each.position, piece, target.unflatten(0, piece.shape[:-2] or (1,)).view_as(piece))
                )
        self._workspaces = {
            device: self._workspace(memory, device, like[device]) for device in {key.device for key in self._batches}
        }

    def run(self, present: Collection[int] | None) -> None:
        """Orthogonalize the directions of these parameters, of all at None, where they lie."""
        copies = [(piece, target) for position, piece, target in self._copies if present is None or position in present]
        pieces, targets = [piece for piece, _ in copies], [target for _, target in copies]
        padded = [block for position, block in self._padded if present is None or position in present]
        if padded:  # another plan, or what was not finite, may have left something there
            torch._foreach_zero_(padded)
        if copies:
            torch._foreach_copy_(targets, pieces)
        for key, batch in self._batches.items():
            batch.run(present, self._workspaces[key.device])
        if copies:
            torch._foreach_copy_(pieces, targets)

    def _batch(self, matrices: Matrices, rows: int, columns: int, scale: float) -> Batch:
        key = Key(matrices.like.device, rows, columns, matrices.product.iterations, scale)
        return self._batches.setdefault(key, Batch(key))

    def _reserve_direct(self, matrices: Matrices) -> tuple[Key, int, int] | None:
        """A place in a batch which the direction can lie in itself, if there is one."""
        product = matrices.product
        lies = torch.empty_strided(matrices.shape, matrices.stride, device="meta")
        sizes = product.sizes(matrices.shape)
        if matrices.dtype != DTYPE or len(set(sizes)) != 1 or not lies.numel():
            return None
        for view, rows_dim in ((lies, -2), (lies.mT, -1)):
            if view.is_contiguous() and (len(sizes) == 1 or product.split_dim == rows_dim):
                rows, columns = view.shape[-2] // len(sizes), view.shape[-1]
                if rows % MULTIPLE or columns % MULTIPLE:
                    return None
                count = view.numel() // (rows * columns)
                batch = self._batch(matrices, rows, columns, _scale(product, matrices.shape, sizes[0]))
                return batch.key, batch.reserve(matrices.position, count), count
        return None

    def _reserve_pieces(self, matrices: Matrices) -> list[tuple[Key, int, int]]:
        """Places in batches that each piece of the direction is copied to."""
        places = []
        count = math.prod(matrices.shape[:-2])
        for size in matrices.product.sizes(matrices.shape) if math.prod(matrices.shape) else []:
            shape = list(matrices.shape[-2:])
            shape[matrices.product.split_dim] = size
            rows, columns = (-(-side // MULTIPLE) * MULTIPLE for side in sorted(shape))
            batch = self._batch(matrices, rows, columns, _scale(matrices.product, matrices.shape, size))
            places.append((batch.key, batch.reserve(matrices.position, count), count))
        return places

    def _workspace(self, memory: Memory, device: torch.device, like: Tensor) -> Workspace:
        sizes = [
            Workspace.sizes((batch.most, key.rows, key.columns))
            for key, batch in self._batches.items()
            if key.device == device
        ]
        most, most_gram = (max(column) for column in zip(*sizes, strict=True))
        other = memory.take((device, "other"), most, DTYPE, like)
        grams = [memory.take((device, "gram", i), most_gram, DTYPE, like) for i in range(2)]
        return Workspace(other, (grams[0], grams[1]))


def _scale(product: Product, shape: Sequence[int], size: int) -> float:
    """What the orthogonalization of one piece of a matrix is multiplied by."""
    piece = list(shape[-2:])
    piece[product.split_dim] = size
    return spectral_scale(product.adjust_lr_fn, *piece)


def _pieces(matrices: Matrices) -> list[Tensor]:
    """What the direction of a parameter divides into, each with no more rows than columns."""
    pieces = matrices.slot.split(matrices.product.sizes(matrices.shape), dim=matrices.product.split_dim)
    return [piece.mT if piece.shape[-2] > piece.shape[-1] else piece for piece in pieces if piece.numel()]
