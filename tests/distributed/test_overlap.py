"""Steps that overlap with DDP's backward: the numbers of ordinary steps after it, bit for bit."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from tests.cases import FP32
from tests.distributed.test_replicas import assert_same_on_all_ranks, loss_of, make_models
from tests.ranks import on_ranks
from tests.twins import BACKENDS, bits

both_backends = pytest.mark.parametrize("backend", BACKENDS)
BUCKETS = {"bucket_cap_mb": 1e-4}  # two, so that each rank of ZeRO steps one


def in_ddp(model, **options):
    return DistributedDataParallel(copy.deepcopy(model), **BUCKETS, **options)


def backward(model, step, dtype=FP32):
    model.zero_grad(set_to_none=step != 1)
    loss_of(model, step, dtype).backward()


def bits_of(model):
    return [bits(param) for param in model.parameters()]


def overlap_zero(ddp, *args, **options):
    """ZeRO that steps in DDP's backward. torch refuses gloo, whose threads may wait for each other, but not here."""
    from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
    from torch.distributed.optim import ZeroRedundancyOptimizer

    zero = ZeroRedundancyOptimizer(ddp.parameters(), *args, overlap_with_ddp=True, **options)
    with mock.patch.object(dist, "get_backend", return_value="nccl"):
        ddp.register_comm_hook(None, hook_with_zero_step(allreduce_hook, ddp, zero))
    return zero


@both_backends
@on_ranks(2)
def test_ddp(backend):
    for optimizer_class, options, ddp_options in (
        (fusedopt.AdamW, {"amsgrad": True}, {}),
        (fusedopt.SGD, {"momentum": 0.9, "nesterov": True}, {"gradient_as_bucket_view": True}),
        (fusedopt.SGD, {}, {"static_graph": True}),
        (fusedopt.Lion, {"ema_decay": 0.9}, {}),
    ):
        (model,) = make_models(count=1)
        overlapping, ordinary = in_ddp(model, **ddp_options), in_ddp(model, **ddp_options)
        fusedopt.register_functional_optim(optimizer_class)
        overlapping._register_fused_optim(optimizer_class, 0.1, backend=backend, **options)
        optimizer = optimizer_class(ordinary.parameters(), 0.1, backend=backend, **options)
        for step in range(3):
            backward(overlapping, step)
            backward(ordinary, step)
            assert [bits(param.grad) for param in overlapping.parameters()] == [
                bits(param.grad) for param in ordinary.parameters()
            ]
            optimizer.step()
            assert bits_of(overlapping) == bits_of(ordinary)
        assert_same_on_all_ranks(overlapping)


@both_backends
@pytest.mark.parametrize("static_graph", [False, True])
@on_ranks(2)
def test_zero(backend, static_graph):
    """torch takes two or three backwards to learn the buckets, and steps in none of them."""
    (model,) = make_models(count=1)
    overlapping, ordinary = in_ddp(model, static_graph=static_graph), in_ddp(model)
    fusedopt.register_functional_optim(fusedopt.AdamW)
    zero = overlap_zero(overlapping, fusedopt.AdamW, lr=0.1, backend=backend, betas=(0.8, 0.9))
    optimizer = fusedopt.AdamW(ordinary.parameters(), lr=0.1, backend=backend, betas=(0.8, 0.9))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (zero, optimizer)]
    for step in range(6):
        backward(overlapping, step)
        backward(ordinary, step)
        if step >= 2 + static_graph:
            optimizer.step()
        else:
            optimizer._opt_called = True  # or the scheduler warns
        for scheduler in schedulers:
            scheduler.step()
        assert bits_of(overlapping) == bits_of(ordinary)
    assert bits_of(ordinary) != bits_of(model)
    zero.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        saved, expected = zero.state_dict()["state"], optimizer.state_dict()["state"]
        assert saved.keys() == expected.keys()
        for key, state in expected.items():
            assert {name: bits(value) for name, value in saved[key].items()} == {
                name: bits(value) for name, value in state.items()
            }


@on_ranks(2)
def test_not_registered():
    class Mine(fusedopt.SGD):
        pass

    (model,) = make_models(count=1)
    with pytest.raises(ValueError, match="does not have a functional counterpart"):
        in_ddp(model)._register_fused_optim(Mine, lr=0.1)
    with pytest.raises(ValueError, match="no supported functional optimizer"):
        overlap_zero(in_ddp(model), Mine, lr=0.1)
    fusedopt.register_functional_optim(Mine)
    in_ddp(model)._register_fused_optim(Mine, lr=0.1)
    overlap_zero(in_ddp(model), Mine, lr=0.1)


@on_ranks(2)
def test_what_would_come_too_late():
    fusedopt.register_functional_optim(fusedopt.AdamW)
    for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        (model,) = make_models(count=1)
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} cannot be had .* ordinary step after backward"):
            in_ddp(model)._register_fused_optim(fusedopt.AdamW, lr=0.1, **options)
        overlapping = in_ddp(model)
        overlap_zero(overlapping, fusedopt.AdamW, lr=0.1, **options)
        backward(overlapping, 0)
        backward(overlapping, 1)
        with pytest.raises(ValueError, match=f"{name} cannot be had .* ordinary step after backward"):
            backward(overlapping, 2)
        assert bits_of(overlapping) == bits_of(model)
