"""Matrices that are cut between ranks: one of them gets the pieces, multiplies, and gives them back.

Every rank orthogonalizes some whole matrices, so that none gathers all and none multiplies the same as another, and
takes part in two all-to-all a step: one brings pieces of the directions to their owners, one brings the results back.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..step.sharding import local, spec_of
from .batches import Matrices, Memory


@dataclass(frozen=True)
class Cut:
    """How matrices are cut: among which ranks, and along which of the dimensions of their parameter."""

    ranks: Any  # dist.ProcessGroup
    count: int  # of them, who hold their pieces in the order of the group, as torch's collectives have it
    dim: int
    shape: tuple[int, ...]  # of the matrices that are whole when all pieces are put together

    def piece(self, rank: int) -> tuple[int, int]:
        """Where the piece of a rank begins, and how long it is."""
        length = self.shape[self.dim]
        chunk = -(-length // self.count)
        start = min(rank * chunk, length)
        return start, min(chunk, length - start)

    def shape_on(self, rank: int) -> tuple[int, ...]:
        """The shape of what a rank holds."""
        return (*self.shape[: self.dim], self.piece(rank)[1], *self.shape[self.dim + 1 :])


def cuts_of(param: Tensor) -> list[tuple[int, Any]]:
    """The dimensions of the mesh along which the matrices of a parameter are cut, each with its placement.

    A batch that is cut into whole matrices counts for nothing.
    """
    spec = spec_of(param)
    if spec is None or spec.mesh.get_coordinate() is None:
        return []
    first = param.dim() - 2
    return [
        (mesh_dim, placement)
        for mesh_dim, placement in enumerate(spec.placements)
        if spec.mesh.size(mesh_dim) > 1
        and not placement.is_replicate()
        and getattr(placement, "dim", first) >= first  # a partial sum has none
    ]


def cut_of(param: Tensor, name: str) -> Cut | None:
    """How the matrices of a parameter are cut, None where each is whole on a rank.

    Raises:
        RuntimeError: they are cut in a way that nobody here puts together.
    """
    cuts = cuts_of(param)
    if not cuts:
        return None
    spec = spec_of(param)
    (mesh_dim, placement), *others = cuts
    if others or type(placement).__name__ != "Shard":
        raise RuntimeError(
            f"Muon cannot put the matrices of {name} together: its placements are {spec.placements}, but matrices may "
            "be cut along one dimension of the mesh only, by Shard"
        )
    held, dim = local(param).shape, placement.dim
    return Cut(
        spec.mesh.get_group(mesh_dim), spec.mesh.size(mesh_dim), dim, (*held[:dim], param.shape[dim], *held[dim + 1 :])
    )


def owners(costs: Sequence[float], count: int, first: int = 0) -> list[int]:
    """Which of so many ranks gets what costs this: the most costly first, each to the one that has least.

    Args:
        costs: of what is given away.
        count: how many ranks there are.
        first: the rank that begins, where several have least.
    """
    loads = [0.0] * count
    owner = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = min(range(count), key=lambda rank: (loads[rank], (rank - first) % count))
        owner[index] = rank
        loads[rank] += costs[index]
    return owner


def cost(shape: Sequence[int]) -> float:
    """The multiplications of one iteration for all matrices of a parameter."""
    *lead, rows, columns = shape
    short, long = sorted((rows, columns))
    return float(math.prod(lead) * short * short * (2 * long + short))


@dataclass
class Share:
    """What one rank owns of a parameter: all matrices, or some of a batch.

    Attributes:
        matrices: what this rank holds of the parameter.
        cut: how those of the share are cut.
        first: where they begin along the first dimension.
        sent: what this rank holds of them, as it is sent.
    """

    matrices: Matrices
    cut: Cut
    first: int
    sent: Tensor = field(init=False)

    def size_on(self, rank: int) -> int:
        """How many elements there are for what a rank holds of them: so many that all pieces are aligned."""
        return -(-math.prod(self.cut.shape_on(rank)) // 8) * 8

    @property
    def held(self) -> Tensor:
        """What this rank holds of them, as the updates write and read it."""
        return self.matrices.slot.narrow(0, self.first, self.sent.shape[0])


def shares_of(matrices: Matrices, cut: Cut) -> list[Share]:
    """What is owned together of a parameter: a batch is divided into as many parts as there are ranks."""
    if len(cut.shape) == 2 or not cut.shape[0]:
        return [Share(matrices, cut, 0)]
    length, *rest = cut.shape
    ends = [length * part // cut.count for part in range(cut.count + 1)]
    return [
        Share(matrices, replace(cut, shape=(end - first, *rest)), first) for first, end in pairwise(ends) if end > first
    ]


class Exchange:
    """What the ranks of one process group send each other, all of one dtype.

    The slots of what this rank sends lie in the order of the owners, so that the updates write what is sent.

    Args:
        members: what this rank holds of each parameter, which gets its `slot`, and how it is cut.
        memory: where buffers are.
        name: of the buffers.
        turn: a number that differs between exchanges that follow each other, so that not one rank owns all of them.
    """

    def __init__(self, members: Sequence[tuple[Matrices, Cut]], memory: Memory, name: Hashable, turn: int) -> None:
        self._ranks = members[0][1].ranks
        rank, count = dist.get_rank(self._ranks), members[0][1].count
        of_members = [shares_of(matrices, cut) for matrices, cut in members]
        shares = [share for of_member in of_members for share in of_member]
        owner = owners([cost(share.cut.shape) for share in shares], count, turn % count)
        by_owner = [[share for share, of in zip(shares, owner, strict=True) if of == other] for other in range(count)]
        self._mine = by_owner[rank]
        self._sent = [sum(share.size_on(rank) for share in theirs) for theirs in by_owner]
        self._got = [sum(share.size_on(other) for share in self._mine) for other in range(count)]
        first = members[0][0]
        self._out = memory.take((name, "sent"), sum(self._sent), first.dtype, first.like)
        self._in = memory.take((name, "got"), sum(self._got), first.dtype, first.like)
        start = 0
        for share in chain.from_iterable(by_owner):
            shape = share.cut.shape_on(rank)
            share.sent = self._out[start : start + math.prod(shape)].view(shape)
            start += share.size_on(rank)
        self._laid: list[Share] = []  # those whose slots do not lie as they are sent
        for (matrices, _), of_member in zip(members, of_members, strict=True):
            size = math.prod(matrices.shape)
            if not size or (len(of_member) == 1 and of_member[0].sent.stride() == matrices.stride):
                matrices.slot = of_member[0].sent.view(matrices.shape)
            else:
                flat = memory.take((name, "laid", matrices.position), size, matrices.dtype, matrices.like)
                matrices.slot = flat.as_strided(matrices.shape, matrices.stride)
                self._laid += of_member
        self.owned = [
            replace(share.matrices, shape=share.cut.shape, stride=torch.empty(share.cut.shape, device="meta").stride())
            for share in self._mine
        ]
        self._pieces: list[tuple[Tensor, Tensor]] = []  # of what has been got, and of whole matrices

    def connect(self) -> None:
        """Learn where the whole matrices are that this rank owns."""
        start = 0
        for rank in range(len(self._got)):
            for owned, share in zip(self.owned, self._mine, strict=True):
                shape = share.cut.shape_on(rank)
                if math.prod(shape):
                    got = self._in[start : start + math.prod(shape)].view(shape)
                    self._pieces.append((got, owned.slot.narrow(share.cut.dim, *share.cut.piece(rank))))
                start += share.size_on(rank)

    def gather(self) -> None:
        """Bring the pieces to the owners of the matrices."""
        _copy([(share.sent, share.held) for share in self._laid])
        self._all_to_all(self._in, self._got, self._out, self._sent)
        _copy([(whole, got) for got, whole in self._pieces])

    def scatter(self) -> None:
        """Bring them back."""
        _copy(self._pieces)
        self._all_to_all(self._out, self._sent, self._in, self._got)
        _copy([(share.held, share.sent) for share in self._laid])

    def _all_to_all(self, target: Tensor, to: Sequence[int], source: Tensor, of: Sequence[int]) -> None:
        size = target.element_size()  # as bytes, since not every backend knows bf16
        to, of = ([number * size for number in numbers] for numbers in (to, of))
        dist.all_to_all_single(target.view(torch.uint8), source.view(torch.uint8), to, of, group=self._ranks)


class Exchanges:
    """All that a step exchanges.

    Args:
        cut: what this rank holds of each parameter that is cut, and how it is.
        memory: where buffers are.
        turn: the place of the first parameter among those of the whole optimizer.
    """

    def __init__(self, cut: Sequence[tuple[Matrices, Cut]], memory: Memory, turn: int) -> None:
        together: dict[tuple[Any, torch.dtype], list[tuple[Matrices, Cut]]] = {}
        for matrices, how in cut:
            together.setdefault((how.ranks, matrices.dtype), []).append((matrices, how))
        self._exchanges = [
            Exchange(members, memory, ("exchange", place), turn) for place, members in enumerate(together.values())
        ]

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
