"""Parameters that FSDP2 has made DTensors, on one rank: the reference steps them as it steps plain tensors."""

import copy

import pytest
import torch
import torch.distributed as dist

from tests.cases import BF16, FP32, MODES
from tests.twins import BACKENDS, ELEMENTWISE, make

pytest.importorskip("torch.distributed.fsdp")
from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make_models(mesh, dtype):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).to(dtype)
    sharded = torch.distributed.fsdp.fully_shard(copy.deepcopy(plain), mesh=mesh)
    return sharded, plain


def step_both(models, optimizers, dtype):
    """The same gradients for both: those of the sharded model."""
    sharded, plain = models
    sharded(torch.ones(5, 4, dtype=dtype)).square().mean().backward()
    for param, twin in zip(sharded.parameters(), plain.parameters(), strict=True):
        twin.grad = param.grad.full_tensor().clone()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


MADE = [(name, dtype, {}) for name in ELEMENTWISE for dtype in (FP32, BF16)]
MADE += [("AdamW", mode.dtype, {"amsgrad": True, **mode.options}) for mode in MODES]


@pytest.mark.parametrize(("name", "dtype", "options"), MADE, ids=str)
def test_steps_like_plain_tensors(name, dtype, options, mesh):
    models = make_models(mesh, dtype)
    optimizers = [make(name, model.parameters(), lr=0.1, **options) for model in models]
    before = [param.detach().clone() for param in models[1].parameters()]
    for _ in range(3):
        step_both(models, optimizers, dtype)
    assert not all(map(torch.equal, before, models[1].parameters()))
    for param, twin in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(param.full_tensor(), twin)
        mine, states = (optimizer.state[p] for optimizer, p in zip(optimizers, (param, twin), strict=True))
        for key in states.keys() - {*optimizers[1].scalar_states}:
            if states[key].dim():
                assert mine[key].placements == param.placements
                mine[key] = mine[key].full_tensor()
            assert torch.equal(mine[key], states[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_through_overwritten_weights_is_noticed(mesh, backend):
    (model, _) = make_models(mesh, FP32)
    optimizer = make("SGD", model.parameters(), lr=0.1, backend=backend)
    weight = model[0].weight
    loss = (weight * weight).sum()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dtensor_that_comes_later_is_noticed(mesh, backend):
    """Of the plain tensors that were there, all but the type is the same."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = make("AdamW", params, lr=0.1, backend=backend)
    for grads in [(1.0, 1.0), (None, 1.0)]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else torch.full((3,), grad)
        optimizer.step()
    kept = [param.detach().clone() for param in params]
    params[0].grad = DTensor.from_local(torch.ones(3), mesh)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is a plain Tensor, but its gradient is a DTensor"):
        optimizer.step()
    assert all(map(torch.equal, params, kept))
