"""DDP and ZeRO: every rank steps whole parameters, and all ranks end with the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from tests.cases import BF16, FP32
from tests.ranks import on_ranks, rank_device
from tests.twins import BACKENDS, bits

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def make_models(dtype=FP32, count=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).to(rank_device(), dtype)
    return [copy.deepcopy(model) for _ in range(count)]


def loss_of(model, step, dtype=FP32):
    """The rank's part of a batch, or all of it for a model that is no replica."""
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(rank_device(), dtype)
    if isinstance(model, DistributedDataParallel):
        size = len(batch) // dist.get_world_size()
        batch = batch[dist.get_rank() * size :][:size]
    return model(batch).float().square().mean()


def assert_same_on_all_ranks(model):
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, [bits(param) for param in model.parameters()])
    assert all(theirs == everybody[0] for theirs in everybody)


@both_backends
@on_ranks(2)
def test_ddp(backend):
    """Buckets move gradients: they are made anew after the first backward, and `no_sync` accumulates in them."""
    for options in ({}, {"gradient_as_bucket_view": True}, {"gradient_as_bucket_view": True, "static_graph": True}):
        replica, whole = make_models()
        replica = DistributedDataParallel(replica, **options)
        optimizers = [
            fusedopt.AdamW(model.parameters(), lr=0.1, backend=backend, max_grad_norm=0.1) for model in (replica, whole)
        ]
        for step in range(3):
            if not options:
                with replica.no_sync():
                    loss_of(replica, 10 + step).backward()
                loss_of(whole, 10 + step).backward()
            for model, optimizer in zip((replica, whole), optimizers, strict=True):
                loss_of(model, step).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=step != 1)
        torch.testing.assert_close(list(replica.module.parameters()), list(whole.parameters()))
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
        assert_same_on_all_ranks(replica)


@both_backends
@on_ranks(2)
def test_replicas_round_at_random_alike(backend):
    (model,) = make_models(BF16, 1)
    replica = DistributedDataParallel(model)
    optimizer = fusedopt.AdamW(replica.parameters(), lr=0.01, backend=backend, rounding="stochastic", seed=3)
    for step in range(2):
        loss_of(replica, step, BF16).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_on_all_ranks(replica)


@both_backends
@on_ranks(2)
def test_ddp_with_gradscaler(backend):
    """An overflow on one rank is one on all: DDP has added the gradients."""
    (model,) = make_models(count=1)
    replica = DistributedDataParallel(model)
    optimizer = fusedopt.SGD(replica.parameters(), lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler(rank_device().type, init_scale=2.0**10)
    for step in range(3):
        before = [bits(param) for param in model.parameters()]
        loss = loss_of(replica, step) * (torch.inf if step == 1 and dist.get_rank() else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert ([bits(param) for param in model.parameters()] == before) == (step == 1)
    assert scaler.get_scale() == 2.0**9
    assert_same_on_all_ranks(replica)


@both_backends
@on_ranks(2)
def test_zero(backend):
    """Each rank keeps the states of its part of the parameters; a checkpoint holds all, and loads everywhere."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns of torch.jit

    replica, whole = make_models()
    replica = DistributedDataParallel(replica)
    sharded = ZeroRedundancyOptimizer(replica.parameters(), fusedopt.AdamW, lr=0.1, backend=backend)
    optimizer = fusedopt.AdamW(whole.parameters(), lr=0.1, backend=backend)

    def train(steps, *pairs):
        for step in steps:
            for model, opt in pairs:
                loss_of(model, step).backward()
                opt.step()
                opt.zero_grad()

    train(range(2), (replica, sharded), (whole, optimizer))
    torch.testing.assert_close(list(replica.module.parameters()), list(whole.parameters()))
    sharded.consolidate_state_dict(to=0)
    saved = [sharded.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, device=rank_device())
    expected = optimizer.state_dict()["state"]
    assert saved[0]["state"].keys() == expected.keys()
    for key, state in expected.items():
        torch.testing.assert_close(dict(saved[0]["state"][key]), dict(state), check_device=False)

    resumed = DistributedDataParallel(copy.deepcopy(replica.module))
    other = ZeroRedundancyOptimizer(resumed.parameters(), fusedopt.AdamW, lr=0.5, backend=backend)
    other.load_state_dict(copy.deepcopy(saved[0]))  # ZeRO would share the tensors
    train(range(2, 4), (replica, sharded), (resumed, other))
    assert [bits(param) for param in resumed.parameters()] == [bits(param) for param in replica.parameters()]
    assert_same_on_all_ranks(resumed)
