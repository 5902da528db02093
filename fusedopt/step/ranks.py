"""What the ranks of a mesh must know of each other's gradients before a step: their norm, and whether to skip."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dry import communicates
from .sharding import local, spec_of


@dataclass(frozen=True)
class Group:
    """The ranks along one dimension of a mesh, and what they add up."""

    ranks: Any  # dist.ProcessGroup
    rows: Tensor | None  # of the values, None for all of them


class Ranks:
    """Parameters by how they are split: part 0 is whole on this rank, each other part is one set of process groups.

    The squares of a part are added up along the dimensions of its mesh that split it, and counted once along those that
    replicate it. All ranks take part in every step, whatever gradients and elements they hold, so that none waits for
    another that does not come.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        parts: dict[tuple[Any, ...], int] = {(): 0}
        members: dict[Any, list[int]] = {}
        self.part_of: list[int] = []
        self._sharded: list[int] = []
        self._device = torch.device("cpu")
        for index, param in enumerate(params):
            groups = _groups(param)
            if groups and len(parts) == 1:
                mesh_device, device = spec_of(param).mesh.device_type, local(param).device
                self._device = device if device.type == mesh_device else torch.device(mesh_device)
            part = parts.setdefault(groups, len(parts))
            for group in groups:
                if part not in members.setdefault(group, []):
                    members[group].append(part)
            self.part_of.append(part)
            if part:
                self._sharded.append(index)
        self._n_parts = len(parts) - 1
        flags = [self._n_parts, self._n_parts + 1]
        self._groups = [
            Group(
                group,
                None
                if len(same) == self._n_parts
                else torch.tensor([*(part - 1 for part in same), *flags], device=self._device),
            )
            for group, same in members.items()
        ]

    def __bool__(self) -> bool:
        """Whether there is anybody to ask."""
        return bool(self._groups)

    def add_up(self, partials: Sequence[tuple[int, Tensor]], found_inf: Any) -> tuple[Tensor, Tensor]:
        """Sums over all ranks.

        Args:
            partials: for some parts, sums of squares, and 0 where all is finite, each float64 [n, 2].
            found_inf: GradScaler's on this rank, None without one.

        Returns:
            The same for all parts but part 0, float64 [1, 2], where the second number is about part 0 too; and
            `found_inf`, 0-d, not 0 if any rank's is not 0.
        """
        # By part the sums of squares, then how much is not finite, then found_inf.
        values = torch.zeros(self._n_parts + 2, dtype=torch.float64, device=self._device)
        for part, sums in partials:
            squares, not_finite = sums.to(self._device, non_blocking=True).sum(dim=0)
            if part:
                values[part - 1] += squares
            values[-2] += not_finite
        if found_inf is not None:
            told = found_inf if isinstance(found_inf, Tensor) else torch.tensor(found_inf, device="cpu")
            values[-1] = told.to(self._device, torch.float64, non_blocking=True)
        for group in self._groups:
            shared = values if group.rows is None else values[group.rows]
            dist.all_reduce(shared, group=group.ranks)
            if group.rows is not None:
                values[group.rows] = shared
        return torch.stack([values[:-2].sum(), values[-2]]).reshape(1, 2), values[-1]

    def check_agreement(self, has_grad: Sequence[bool], names: Sequence[str]) -> None:
        """Raise on every rank, with the same names, if the ranks disagree about which parameters have gradients.

        Waits for the other ranks.

        Args:
            has_grad: whether each parameter has a gradient on this rank.
            names: of the parameters.
        """
        if not all(communicates(group.ranks) for group in self._groups):
            return
        mine = [has_grad[index] for index in self._sharded]
        # All of n numbers are equal if and only if n times the sum of their squares is the square of their sum.
        # 20 bits keep that exact for 8192 ranks.
        code = float(zlib.crc32(bytes(mine)) >> 12)
        differing = 0.0
        for group in self._groups:
            sums = torch.tensor([code, code * code, differing], dtype=torch.float64, device=self._device)
            dist.all_reduce(sums, group=group.ranks)
            total, squares, differing = sums.tolist()
            differing += dist.get_world_size(group.ranks) * squares - total * total
        if not differing:
            return
        lines = []
        for group in self._groups:
            everybody: list[Any] = [None] * dist.get_world_size(group.ranks)
            dist.all_gather_object(everybody, mine, group=group.ranks)
            for place, index in enumerate(self._sharded):
                having = [
                    rank
                    for rank, theirs in zip(dist.get_process_group_ranks(group.ranks), everybody, strict=True)
                    if theirs[place]
                ]
                if 0 < len(having) < len(everybody):
                    lines.append(f"{names[index]} has one on {_listed(having)} only")
        where = "; ".join(lines) if lines else "those of another process group do"
        raise RuntimeError(f"the ranks disagree about which parameters have gradients: {where}")


def _groups(param: Tensor) -> tuple[Any, ...]:
    """The process groups among which a parameter is split."""
    spec = spec_of(param)
    if spec is None or spec.mesh.get_coordinate() is None:
        return ()
    return tuple(
        spec.mesh.get_group(dim)
        for dim, placement in enumerate(spec.placements)
        if not placement.is_replicate() and spec.mesh.size(dim) > 1
    )


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
