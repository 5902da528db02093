"""Steps of one process that stands for one rank of many, or for all of them."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedopt
from tests.cases import BF16, FP32
from tests.step.test_dry import OPTIONS
from tests.twins import BACKENDS, make

pytest.importorskip("torch.distributed.fsdp")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

MODES = {"real": nullcontext, "fake": FakeTensorMode}


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def step(optimizer, gradients):
    for _ in range(2):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = gradients(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize(("mode", "device"), [("real", "cpu"), ("real", "meta"), ("fake", "cpu")])
def test_shards(mode, device, dtype, options, mesh):
    with MODES[mode]():
        shards = [torch.ones(shape, dtype=dtype, device=device) for shape in [(3, 4), (0, 4)]]
        params = [torch.nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)) for shard in shards]
        optimizer = step(make("Adam", params, **options), torch.ones_like)
    held = [state["exp_avg"].to_local() for state in optimizer.state.values()]
    assert [tensor.shape for tensor in held] == [(3, 4), (0, 4)]
    assert {tensor.device.type for tensor in held} == {device}
    assert (optimizer.grad_norm is None) == (not {"max_grad_norm", "skip_nonfinite"} & options.keys())


@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize(("mode", "device"), [("real", "cpu"), ("real", "meta"), ("fake", "cpu")])
def test_shards_of_matrices(mode, device, dtype, options, mesh):
    """Nobody sends this rank the others' pieces."""
    with MODES[mode]():
        shards = [torch.ones(shape, dtype=dtype, device=device) for shape in [(3, 4), (0, 4), (2, 3, 4)]]
        placements = [[Shard(dim)] for dim in (0, 0, 1)]
        params = [
            torch.nn.Parameter(DTensor.from_local(shard, mesh, placement, run_check=False))
            for shard, placement in zip(shards, placements, strict=True)
        ]
        optimizer = step(fusedopt.Muon(params, **options), torch.ones_like)
    held = [state["momentum_buffer"].to_local() for state in optimizer.state.values()]
    assert [tensor.shape for tensor in held] == [(3, 4), (0, 4), (2, 3, 4)]
    assert {tensor.device.type for tensor in held} == {device}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
def test_a_rank_of_a_fake_group(backend, dtype, options, mesh):
    """It hears of no other rank, and steps as if there were none."""
    shard = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    split = torch.nn.Parameter(DTensor.from_local(shard.clone(), mesh, [Shard(0)], run_check=False))
    whole = torch.nn.Parameter(shard.clone())
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    step(make("Adam", [whole], backend=backend, **options), lambda param: grad)
    gradients = DTensor.from_local(grad, mesh, [Shard(0)], run_check=False)
    step(make("Adam", [split], backend=backend, **options), lambda param: gradients)
    assert torch.equal(split.detach().to_local(), whole.detach())


@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_fully_shard(mode, dtype, options, mesh):
    with MODES[mode]():
        net = torch.nn.Sequential(torch.nn.Linear(4, 8, dtype=dtype), torch.nn.Linear(8, 3, dtype=dtype))
        fully_shard(net, mesh=mesh)
        optimizer = make("AdamW", net.parameters(), **options)
        for _ in range(2):
            net(torch.ones(2, 4, dtype=dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [state["exp_avg"].shape for state in optimizer.state.values()] == [(8, 4), (8,), (3, 8), (3,)]


@pytest.mark.parametrize("rows", [4, 3])
@pytest.mark.parametrize(("dtype", "options"), [*OPTIONS, (FP32, {"max_grad_norm": 1e-3})], ids=str)
def test_all_ranks_in_one_process(rows, dtype, options, mesh):
    """In LocalTensorMode all have values: those of a step without ranks."""
    tensors = torch.randn(6, rows, 3, generator=torch.Generator().manual_seed(0)).to(dtype)

    def trained(distribute):
        distributed = map(distribute, tensors)
        params = [torch.nn.Parameter(next(distributed)) for _ in range(2)]
        optimizer = step(make("Adam", params, lr=0.1, **options), lambda param: next(distributed))
        return [param.detach() for param in params], optimizer.grad_norm

    expected, norm = trained(torch.clone)
    with pytest.importorskip("torch.distributed._local_tensor").LocalTensorMode(2):
        params, mine = trained(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
        params = [param.full_tensor().reconcile() for param in params]
        mine = None if mine is None else mine.reconcile()
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=0 if dtype == BF16 else 1e-6, atol=0)
    torch.testing.assert_close(mine, norm)
