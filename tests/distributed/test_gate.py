"""Clipping, skipping and scaling over several ranks: the norm is the whole model's, the decision everybody's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import on_ranks, rank_device
from tests.twins import BACKENDS, make

pytest.importorskip("torch.distributed.fsdp")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.test_sharded import make_models, set_same_grads

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def local_bits(model):
    return [param.to_local().clone() if isinstance(param, DTensor) else param.clone() for param in model.parameters()]


@both_backends
@on_ranks(4)
def test_the_norm_is_that_of_the_whole_model(backend):
    """Ranks that replicate a shard count once, as on a mesh whose first dimension replicates."""
    for shape in [(4,), (2, 2)]:
        mesh = init_device_mesh(rank_device().type, shape, mesh_dim_names=("outer", "inner")[: len(shape)])
        sharded, whole = make_models(mesh=mesh)
        optimizers = [
            make("AdamW", model.parameters(), lr=0.1, backend=backend, max_grad_norm=0.5) for model in (sharded, whole)
        ]
        for step, scale in enumerate([1e-3, 1e30]):
            set_same_grads(sharded, whole, step, scale)
            for optimizer in optimizers:
                optimizer.step()
            norm = torch.stack([param.grad.double().norm() for param in whole.parameters()]).norm()
            torch.testing.assert_close(optimizers[0].grad_norm, norm, rtol=1e-12, atol=0)
        for param, twin in zip(sharded.parameters(), whole.parameters(), strict=True):
            held = param.full_tensor() if isinstance(param, DTensor) else param
            torch.testing.assert_close(held, twin.detach(), rtol=1e-6, atol=1e-7)


@both_backends
@on_ranks(4)
def test_an_element_that_is_not_finite_skips_the_step_on_every_rank(backend):
    """Wherever it lies: in a shard of one rank, or in a plain tensor that only one rank got wrong."""
    sharded, whole = make_models()
    optimizer = make("AdamW", sharded.parameters(), lr=0.1, backend=backend, skip_nonfinite=True)
    kept = local_bits(sharded)
    for step, (where, value) in enumerate([("inner.0.weight", float("inf")), ("plain", float("nan"))]):
        set_same_grads(sharded, whole, step)
        grad = sharded.get_parameter(where).grad
        if dist.get_rank() == 2:
            (grad._local_tensor if isinstance(grad, DTensor) else grad)[..., 0] = value
        optimizer.step()
        assert all(map(torch.equal, local_bits(sharded), kept))
        assert int(optimizer.skipped_steps) == step + 1
    set_same_grads(sharded, whole, 2)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 2
    assert all(state["step"] == 1 for state in optimizer.state.values())


@both_backends
@on_ranks(4)
def test_too_long_gradients_skip_the_step_on_every_rank(backend):
    """By the norm of all shards together, which is above the threshold where that of no rank is."""
    sharded, whole = make_models()
    set_same_grads(sharded, whole, 0)
    norm = torch.stack([param.grad.double().norm() for param in whole.parameters()]).norm()
    optimizer = make("AdamW", sharded.parameters(), lr=0.1, backend=backend, skip_grad_norm=0.999 * float(norm))
    kept = local_bits(sharded)
    mine = [param.grad.to_local() if isinstance(param, DTensor) else param.grad for param in sharded.parameters()]
    assert torch.stack([grad.double().norm() for grad in mine]).norm() < 0.95 * norm
    optimizer.step()
    assert all(map(torch.equal, local_bits(sharded), kept))
    assert int(optimizer.skipped_steps) == 1
    optimizer.param_groups[0]["fusedopt_skip_grad_norm"] = 1.001 * norm.to(rank_device())
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert all(state["step"] == 1 for state in optimizer.state.values())


@both_backends
@on_ranks(4)
def test_gradscaler(backend):
    """An overflow in one shard skips the step on all ranks, though the first parameter is replicated.

    GradScaler asks other ranks about the placements of the first gradient only.
    """
    mesh = init_device_mesh(rank_device().type, (4,))
    values = torch.linspace(-1, 1, 24, device=rank_device()).reshape(8, 3)
    for placements in ([Replicate()], [Shard(0)]), ([Shard(0)], [Replicate()]):
        params = [nn.Parameter(distribute_tensor(values, mesh, placement)) for placement in placements]
        twins = [nn.Parameter(values.clone()) for _ in placements]
        optimizers = [make("AdamW", same, lr=0.1, backend=backend, max_grad_norm=0.1) for same in (params, twins)]
        scaler = torch.amp.GradScaler(rank_device().type, init_scale=4.0)
        for step in range(3):
            for param, twin in zip(params, twins, strict=True):
                twin.grad = values * (step + 1)
                param.grad = distribute_tensor(4 * twin.grad, mesh, param.placements)
            overflows = step == 1
            if overflows and dist.get_rank() == 3:
                next(param for param in params if param.placements[0].is_shard()).grad._local_tensor[0, 0] = torch.inf
            scaler.scale(torch.ones((), device=rank_device()))
            scaler.step(optimizers[0])
            scaler.update(4.0)
            if not overflows:
                optimizers[1].step()
                torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
                for param, twin in zip(params, twins, strict=True):
                    assert torch.equal(param.grad.full_tensor(), twin.grad)
        assert int(optimizers[0].skipped_steps) == 1
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param.full_tensor(), twin.detach())


@both_backends
@on_ranks(4)
def test_a_gradient_of_other_placements_stays_scaled(backend):
    """The step unscales what it has redistributed for itself. One that lies as its parameter, and is shared, is."""
    mesh = init_device_mesh(rank_device().type, (4,))
    values = torch.linspace(-1, 1, 24, device=rank_device()).reshape(8, 3)
    params = [nn.Parameter(distribute_tensor(values, mesh, [Shard(0)])) for _ in range(3)]
    params[0].grad = distribute_tensor(4 * values, mesh, [Shard(1)])
    params[1].grad = params[2].grad = distribute_tensor(4 * values, mesh, [Shard(0)])
    optimizer = make("SGD", params, lr=1.0, momentum=0, backend=backend)
    optimizer.grad_scale = 4.0
    versions = [param.grad._version for param in params]
    optimizer.step()
    for param, grad in zip(params, (4 * values, values, values), strict=True):
        assert torch.equal(param.full_tensor(), torch.zeros_like(values))
        assert torch.equal(param.grad.full_tensor(), grad)
    assert all(param.grad._version > version for param, version in zip(params[1:], versions[1:], strict=True))


@both_backends
@on_ranks(4)
def test_ranks_without_elements_or_gradients_take_part(backend):
    mesh = init_device_mesh(rank_device().type, (4,))
    alone = nn.Parameter(distribute_tensor(torch.ones(1, 2, device=rank_device()), mesh, [Shard(0)]))
    optimizer = make("SGD", [alone], lr=1.0, momentum=0, backend=backend, max_grad_norm=1.0)
    optimizer.step()  # nobody has a gradient
    assert torch.equal(alone.full_tensor(), torch.ones(1, 2, device=rank_device()))
    alone.grad = distribute_tensor(torch.tensor([[3.0, 4.0]], device=rank_device()), mesh, [Shard(0)])
    optimizer.step()
    assert float(optimizer.grad_norm) == 5
    torch.testing.assert_close(alone.full_tensor().cpu(), torch.tensor([[0.4, 0.2]]))


@both_backends
@on_ranks(4)
def test_ranks_that_disagree_about_gradients_are_told(backend):
    for shape, told in [((4,), "ranks 1, 3"), ((2, 2), "has one on rank|of another process group")]:
        mesh = init_device_mesh(rank_device().type, shape)
        placements = [Shard(0)] * len(shape)
        ones = torch.ones(8, 2, device=rank_device())
        named = [(name, nn.Parameter(distribute_tensor(ones, mesh, placements))) for name in ("first", "second")]
        optimizer = make("AdamW", named, lr=0.1, backend=backend, max_grad_norm=1.0)
        for step in range(2):
            for _, param in named:
                param.grad = distribute_tensor(ones, mesh, placements)
            if step == 1:
                kept = [param.to_local().clone() for _, param in named]
                if dist.get_rank() % 2 == 0:
                    named[1][1].grad = None
                with pytest.raises(RuntimeError, match=f"ranks disagree.*{told}") as raised:
                    optimizer.step()
                assert len(shape) == 2 or "'second'" in str(raised.value)
                assert all(map(torch.equal, kept, [param.to_local() for _, param in named]))
            else:
                optimizer.step()
