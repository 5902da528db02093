"""FSDP2 and tensor parallelism on several ranks: the same numbers as on one, bit for bit where the gradients are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedopt
from tests.cases import BF16, FP32
from tests.ranks import on_ranks, rank_device
from tests.twins import BACKENDS, ELEMENTWISE, make

fsdp = pytest.importorskip("torch.distributed.fsdp")
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402

both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Model(nn.Module):
    """Rows that do not divide by the number of ranks, a shard without elements, a parameter that no rank splits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.plain = nn.Parameter(torch.ones(5))

    def forward(self, batch):
        return self.inner(batch) * self.scale * self.plain.sum()


class GivenGrad(nn.Parameter):
    """A parameter whose gradient is what it was given: autograd checks what is assigned."""

    grad = None


class ShardedGivenGrad(DTensor):
    grad = None


def make_models(dtype=FP32, mesh=None):
    """One that is sharded, and the same whole. The parameter `plain` stays a plain tensor in both."""
    torch.manual_seed(0)
    whole = Model().to(rank_device(), dtype)
    sharded = copy.deepcopy(whole)
    mesh = mesh or init_device_mesh(rank_device().type, (dist.get_world_size(),))
    fsdp.fully_shard(sharded, mesh=mesh, ignored_params={sharded.plain})
    return sharded, whole


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_same_grads(sharded, whole, step, scale=1.0):
    """Gradients that both models agree on, whatever the order in which ranks add."""
    generator = torch.Generator().manual_seed(step)
    for param, twin in zip(sharded.parameters(), whole.parameters(), strict=True):
        grad = torch.randn(twin.shape, generator=generator).to(twin) * scale
        twin.grad = grad
        param.grad = grad.clone()
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)


def assert_same_bits(sharded, whole, optimizers):
    for param, twin in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(whole_of(param), twin.detach(), rtol=0, atol=0)
        states, expected = (optimizer.state[p] for optimizer, p in zip(optimizers, (param, twin), strict=True))
        assert states.keys() == expected.keys()
        for key, value in states.items():
            assert not value.dim() or isinstance(value, DTensor) == isinstance(param, DTensor)
            torch.testing.assert_close(whole_of(value), expected[key], rtol=0, atol=0, msg=key)


@both_backends
@on_ranks(4)
def test_every_optimizer_steps_shards_as_it_steps_the_whole(backend):
    names = ELEMENTWISE if backend == "eager" else ["AdamW", "SGD", "Rprop"]  # the interpreter takes its time
    cautious = {"weight_decay": 0.3, "weight_decay_form": "cautious_corrected", "max_lr": 0.2}
    for name, options in [*((name, {}) for name in names), ("AdamW", cautious)]:
        sharded, whole = make_models()
        optimizers = [make(name, model.parameters(), lr=0.1, backend=backend, **options) for model in (sharded, whole)]
        for step in range(2):
            set_same_grads(sharded, whole, step)
            for optimizer in optimizers:
                optimizer.step()
        assert_same_bits(sharded, whole, optimizers)
    held = [param._local_tensor.numel() for param in sharded.parameters() if isinstance(param, DTensor)]
    assert (0 in held) == (dist.get_rank() > 0)


@both_backends
@on_ranks(2)
def test_gradients_with_other_placements_are_redistributed(backend):
    mesh = init_device_mesh(rank_device().type, (2,))
    rank = dist.get_rank()
    values = torch.arange(10.0, device=rank_device()).reshape(5, 2)
    param = nn.Parameter(distribute_tensor(torch.ones(5, 2, device=rank_device()), mesh, [Shard(0)]))
    optimizer = make("SGD", [param], lr=1.0, momentum=0, backend=backend)
    for step, grad in enumerate(
        [
            DTensor.from_local(values * (0.25 if rank else 0.75), mesh, [Partial()]),
            distribute_tensor(values, mesh, [Replicate()]),
            distribute_tensor(values, mesh, [Shard(1)]),
            distribute_tensor(values, mesh, [Shard(0)]),
            # Not waited for: what lies in it is a promise of a tensor.
            DTensor.from_local(values * (0.25 if rank else 0.75), mesh, [Partial()]).redistribute(
                placements=[Shard(0)], async_op=True
            ),
        ]
    ):
        before = grad._local_tensor.clone()
        param.grad = grad
        optimizer.step()
        assert param.grad is grad
        assert torch.equal(grad._local_tensor, before)
        assert torch.equal(param.full_tensor(), 1 - (step + 1) * values)


@both_backends
@on_ranks(2)
def test_what_does_not_fit_is_named(backend):
    device = rank_device()
    mesh, other = init_device_mesh(device.type, (2,)), init_device_mesh(device.type, (2, 1))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2, device=device), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(3, device=device))
    partial = nn.Parameter(DTensor.from_local(torch.ones(2, device=device), mesh, [Partial()]))
    optimizer = make("Adam", [("plain", plain), ("sharded", sharded)], backend=backend)

    def refused(message, which=optimizer):
        with pytest.raises(RuntimeError, match=message):
            which.step()
        assert torch.equal(sharded.full_tensor(), torch.ones(4, 2, device=device))
        assert torch.equal(plain, torch.ones(3, device=device))

    for steps in range(2):
        plain.grad = torch.ones_like(plain)
        sharded.grad = torch.ones_like(sharded)
        if steps:
            optimizer.param_groups[0]["lr"] = 0.0
            optimizer.step()
        sharded.__class__ = ShardedGivenGrad
        sharded.grad = torch.ones(4, 2, device=device)
        refused(r"parameter 1 of group 0 \('sharded'\) is a DTensor.*its gradient is a plain Tensor")
        sharded.grad = distribute_tensor(torch.ones(4, 2, device=device), other, [Shard(0), Replicate()])
        refused(r"parameter 1 of group 0 \('sharded'\) is a DTensor.*its gradient is a DTensor")
        sharded.grad = distribute_tensor(torch.ones(4, 3, device=device), mesh, [Shard(0)])
        refused(r"\('sharded'\) has shape \(4, 2\), but its gradient has \(4, 3\)")
        sharded.grad = distribute_tensor(torch.ones(4, 2, device=device), mesh, [Shard(0)])
        plain.__class__ = GivenGrad
        plain.grad = distribute_tensor(torch.ones(3, device=device), mesh, [Shard(0)])
        refused(r"parameter 0 of group 0 \('plain'\) is a plain Tensor.*its gradient is a DTensor")
        plain.__class__ = nn.Parameter
        sharded.__class__ = DTensor
        plain.grad, sharded.grad = torch.ones_like(plain), torch.ones_like(sharded)
    optimizer.state[sharded]["exp_avg"] = torch.zeros(4, 2, device=device)
    refused(r"state 'exp_avg' of parameter 1 of group 0 \('sharded'\) is a plain Tensor")
    partial.grad = torch.ones_like(partial)
    refused("parameter 0 of group 0 has placements.*partial", make("Adam", [partial], backend=backend))


@both_backends
@on_ranks(2)
def test_modules_are_converted_between_steps(backend):
    for dtype in (BF16, torch.float64):
        sharded, whole = make_models()
        optimizers = [
            make("AdamW", model.parameters(), lr=0.1, backend=backend, ema_decay=0.5) for model in (sharded, whole)
        ]
        for step in range(4):
            if step == 2:
                for model in (sharded, whole):
                    model.to(dtype)
            if step == 3:
                sharded.to(rank_device())
            set_same_grads(sharded, whole, step)
            for optimizer in optimizers:
                optimizer.step()
        assert_same_bits(sharded, whole, optimizers)
        assert all(param.dtype == dtype for param in sharded.parameters())
        averages = [whole_of(optimizers[0].state[param]["ema"]).clone() for param in sharded.parameters()]
        with optimizers[0].swap_ema():
            for param, average in zip(sharded.parameters(), averages, strict=True):
                assert torch.equal(whole_of(param.detach()), average.to(dtype))
        assert_same_bits(sharded, whole, optimizers)


@both_backends
@on_ranks(4)
def test_fsdp_and_tensor_parallel_together(backend):
    """A mesh of two dimensions: some parameters are split along both, some along one, on meshes of their own."""
    mesh = init_device_mesh(rank_device().type, (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5)).to(rank_device(), torch.float64)
    sharded = copy.deepcopy(whole)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(sharded, mesh["tp"], plan)
    fsdp.fully_shard(sharded, mesh=mesh["dp"])
    options = {"lr": 0.1, "max_grad_norm": 0.1, "ema_decay": 0.9}
    optimizers = [make("AdamW", model.parameters(), backend=backend, **options) for model in (sharded, whole)]
    before = [param.detach().clone() for param in whole.parameters()]
    for step in range(3):
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(rank_device())
        for model, optimizer in zip((sharded, whole), optimizers, strict=True):
            model(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
    for param, twin, old in zip(sharded.parameters(), whole.parameters(), before, strict=True):
        assert isinstance(param, DTensor)
        torch.testing.assert_close(param.full_tensor(), twin.detach())
        assert not torch.equal(twin, old)
    assert len({param.placements for param in sharded.parameters()}) > 2


@both_backends
@on_ranks(2)
def test_step_in_backward(backend):
    """fully_shard calls the hooks when a gradient has been reduced."""
    models = [make_models()[0] for _ in range(2)]
    steps = fusedopt.step_in_backward(models[0], lambda params: fusedopt.AdamW(params, lr=0.1, backend=backend))
    optimizer = fusedopt.AdamW(models[1].parameters(), lr=0.1, backend=backend)
    for step in range(2):
        batch = torch.randn(3, 6, generator=torch.Generator().manual_seed(step)).to(rank_device())
        for model in models:
            model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(param.grad is None for param in models[0].parameters())
    assert steps.optimizer.state[models[0].scale]["step"] == 2
    for param, twin in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(whole_of(param.detach()), whole_of(twin.detach()), rtol=0, atol=0)
