"""Matrices that are cut between ranks: one of them gets the pieces, multiplies, and gives them back.

Every rank orthogonalizes some whole matrices, so that none gathers all and none multiplies the same as another, and
takes part in two all-to-all a step: one brings pieces of the directions to their owners, one brings the results back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..step.sharding import spec_of
from .batches import Matrices, Memory


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut: among which ranks, and along which of its dimensions."""

    ranks: Any  # dist.ProcessGroup
    places: tuple[int, ...]  # of each of its ranks, along the dimension of the mesh
    dim: int
    shape: tuple[int, ...]  # of the whole parameter

    def piece(self, rank: int) -> tuple[int, int]:
        """Where the piece of a rank begins, and how long it is."""
        length = self.shape[self.dim]
        chunk = -(-length // len(self.places))
        start = min(self.places[rank] * chunk, length)
        return start, min(chunk, length - start)

    def shape_on(self, rank: int) -> tuple[int, ...]:
        """The shape of what a rank holds."""
        return (*self.shape[: self.dim], self.piece(rank)[1], *self.shape[self.dim + 1 :])


def cut_of(param: Tensor, name: str) -> Cut | None:
    """How the matrices of a parameter are cut, None where each is whole on a rank.

    Raises:
        RuntimeError: they are cut in a way that nobody here puts together.
    """
    spec = spec_of(param)
    coordinate = None if spec is None else spec.mesh.get_coordinate()
    if coordinate is None:
        return None
    split = [
        (mesh_dim, placement)
        for mesh_dim, placement in enumerate(spec.placements)
        if not placement.is_replicate() and spec.mesh.size(mesh_dim) > 1
    ]
    plain = all(type(placement).__name__ == "Shard" for _, placement in split)
    if plain and all(placement.dim < param.dim() - 2 for _, placement in split):
        return None
    if not plain or len(split) > 1:
        raise RuntimeError(
            f"Muon cannot put the matrices of {name} together: its placements are {spec.placements}, but they may be "
            "cut along one dimension of the mesh only, by Shard"
        )
    ((mesh_dim, placement),) = split
    ranks = spec.mesh.get_group(mesh_dim)
    index = (*coordinate[:mesh_dim], slice(None), *coordinate[mesh_dim + 1 :])
    in_mesh = spec.mesh.mesh[index].tolist()
    places = tuple(map(in_mesh.index, dist.get_process_group_ranks(ranks)))
    return Cut(ranks, places, placement.dim, tuple(param.shape))


def owners(costs: Sequence[float], count: int) -> list[int]:
    """Which of so many ranks gets what costs this: the most costly first, each to the one that has least."""
    loads = [0.0] * count
    owner = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        owner[index] = rank
        loads[rank] += costs[index]
    return owner


def cost(shape: Sequence[int]) -> float:
    """The multiplications of one iteration for all matrices of a parameter."""
    *lead, rows, columns = shape
    short, long = sorted((rows, columns))
    return float(math.prod(lead) * short * short * (2 * long + short))


def _padded(numel: int) -> int:
    return -(-numel // 8) * 8  # so that every slot is aligned


class Exchange:
    """What the ranks of one process group send each other, all of one dtype.

    The slots of what this rank sends lie in the order of the owners, so that the kernels write what is sent.

    Args:
        members: what this rank holds of each parameter, which gets its `slot`, and how it is cut.
        memory: where buffers are.
        name: of the buffers.
    """

    def __init__(self, members: Sequence[tuple[Matrices, Cut]], memory: Memory, name: object) -> None:
        self._ranks = members[0][1].ranks
        rank, count = dist.get_rank(self._ranks), dist.get_world_size(self._ranks)
        owner = owners([cost(cut.shape) for _, cut in members], count)
        by_owner = [
            [member for member, of in zip(members, owner, strict=True) if of == other] for other in range(count)
        ]
        self._sent = [sum(_padded(math.prod(cut.shape_on(rank))) for _, cut in theirs) for theirs in by_owner]
        self._mine = by_owner[rank]
        self._got = [sum(_padded(math.prod(cut.shape_on(other))) for _, cut in self._mine) for other in range(count)]
        first = members[0][0]
        self._out = memory.take((name, "sent"), sum(self._sent), first.dtype, first.like)
        self._in = memory.take((name, "got"), sum(self._got), first.dtype, first.like)
        self._laid: list[tuple[Tensor, Tensor]] = []  # slots that do not lie as they are sent, and what is sent
        start = 0
        for matrices, _ in (member for theirs in by_owner for member in theirs):
            size = math.prod(matrices.shape)
            sent = self._out[start : start + size].view(matrices.shape)
            start += _padded(size)
            matrices.slot = sent
            if sent.stride() != matrices.stride and size:
                flat = memory.take(("slot", matrices.position), size, matrices.dtype, matrices.like)
                matrices.slot = flat.as_strided(matrices.shape, matrices.stride)
                self._laid.append((matrices.slot, sent))
        self.owned = [
            replace(matrices, shape=cut.shape, stride=torch.empty(cut.shape, device="meta").stride())
            for matrices, cut in self._mine
        ]
        self._pieces: list[tuple[Tensor, Tensor]] = []  # of what has been got, and of whole matrices

    def connect(self) -> None:
        """Learn where the whole matrices are that this rank owns."""
        start = 0
        for rank in range(len(self._got)):
            for owned, (_, cut) in zip(self.owned, self._mine, strict=True):
                shape = cut.shape_on(rank)
                size = math.prod(shape)
                if size:
                    got = self._in[start : start + size].view(shape)
                    self._pieces.append((got, owned.slot.narrow(cut.dim, *cut.piece(rank))))
                start += _padded(size)

    def gather(self) -> None:
        """Bring the pieces to the owners of the matrices."""
        _copy([(sent, slot) for slot, sent in self._laid])
        self._all_to_all(self._in, self._got, self._out, self._sent)
        _copy([(whole, got) for got, whole in self._pieces])

    def scatter(self) -> None:
        """Bring them back."""
        _copy(self._pieces)
        self._all_to_all(self._out, self._sent, self._in, self._got)
        _copy(self._laid)

    def _all_to_all(self, target: Tensor, to: Sequence[int], source: Tensor, of: Sequence[int]) -> None:
        size = target.element_size()  # as bytes, since not every backend knows bf16
        to, of = ([number * size for number in numbers] for numbers in (to, of))
        dist.all_to_all_single(target.view(torch.uint8), source.view(torch.uint8), to, of, group=self._ranks)


class Exchanges:
    """All that a step exchanges.

    Args:
        cut: what this rank holds of each parameter that is cut, and how it is.
        memory: where buffers are.
    """

    def __init__(self, cut: Sequence[tuple[Matrices, Cut]], memory: Memory) -> None:
        together: dict[tuple[Any, torch.dtype], list[tuple[Matrices, Cut]]] = {}
        for matrices, how in cut:
            together.setdefault((how.ranks, matrices.dtype), []).append((matrices, how))
        self._exchanges = [
            Exchange(members, memory, ("exchange", place)) for place, members in enumerate(together.values())
        ]

    def __bool__(self) -> bool:
        """Whether there is anything to exchange."""
        return bool(self._exchanges)

    @property
    def owned(self) -> list[Matrices]:
        """The whole matrices that this rank multiplies for all, to be given their slots before `connect`."""
        return [matrices for exchange in self._exchanges for matrices in exchange.owned]

    def connect(self) -> None:
        """Learn where these are."""
        for exchange in self._exchanges:
            exchange.connect()

    def gather(self) -> None:
        """Bring all pieces to the owners of their matrices."""
        for exchange in self._exchanges:
            exchange.gather()

    def scatter(self) -> None:
        """Bring the results back."""
        for exchange in self._exchanges:
            exchange.scatter()


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first."""
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
