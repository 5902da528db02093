"""Stochastic rounding of shards: the random numbers belong to the elements, not to the ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedopt
from fusedopt.step.sharding import first_element
from tests.cases import BF16
from tests.ranks import on_ranks, rank_device
from tests.twins import ENGINES, bits

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

# Rows of which some rank's begin within eight elements that share random numbers, and such that do not.
SHAPES = [(5, 1001), (1003,), (8, 16), (2, 3)]


def stepped(mesh, placements, backend, shapes=SHAPES, dtype=BF16):
    """The parameters after two steps, whole; without a mesh they are plain."""
    params, grads = [], []
    for index, shape in enumerate(shapes):
        values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(index)).to(rank_device(), dtype)
        if mesh is not None:
            values = [distribute_tensor(value, mesh, placements) for value in values]
        params.append(nn.Parameter(values[0]))
        grads.append(values[1])
    optimizer = fusedopt.AdamW(params, lr=0.01, rounding="stochastic", seed=5, backend=backend)
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    held = [param.detach() for param in params]
    return [bits(param if mesh is None else param.full_tensor()) for param in held]


@pytest.mark.parametrize("backend", ENGINES)
@on_ranks(4)
def test_bits_do_not_depend_on_the_number_of_ranks(backend):
    line = init_device_mesh(rank_device().type, (4,))
    square = init_device_mesh(rank_device().type, (2, 2))
    expected = stepped(None, None, backend)
    places = [
        (line, [Shard(0)]),
        (square, [Shard(0), Shard(0)]),
        (square, [Replicate(), Shard(0)]),
        (line, [Replicate()]),
    ]
    for mesh, placements in places if backend == "eager" else places[:2]:  # the interpreter takes its time
        assert stepped(mesh, placements, backend) == expected, placements


@on_ranks(4)
def test_other_shards_have_numbers_of_their_own():
    """Elements have different numbers, and replicas the same."""
    mesh = init_device_mesh(rank_device().type, (2, 2))
    for placements in ([Shard(1), Replicate()], [Shard(0), Shard(1)], [Shard(1), Shard(1)], [Shard(1), Shard(0)]):
        param = distribute_tensor(torch.zeros(5, 7, device=rank_device()), mesh, placements)
        mine = (first_element(param), param.to_local().numel())
        everybody = [None] * 4
        dist.all_gather_object(everybody, mine)
        numbers = [set(range(first, first + count)) for first, count in everybody]
        replicates = Replicate() in placements
        assert len(set.union(*numbers)) == 35
        assert sum(map(len, numbers)) == (70 if replicates else 35)
        assert not replicates or everybody[0] == everybody[1]


@on_ranks(2)
def test_backends_round_alike():
    if torch.cuda.device_count() == 1:
        pytest.skip("compiled kernels on 2 ranks need 2 GPUs")
    mesh = init_device_mesh(rank_device().type, (2,))
    shapes = [(5, 7), (3, 1003)]
    for dtype in (BF16, torch.float16):
        results = [stepped(mesh, [Shard(1)], backend, shapes, dtype) for backend in ENGINES]
        assert results[0] == results[1]
