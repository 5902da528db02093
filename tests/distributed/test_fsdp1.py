"""FullyShardedDataParallel, the first one: a rank steps its pieces, and asks torch for what all ranks must know."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import fusedopt
from tests.ranks import on_ranks, rank_device
from tests.twins import BACKENDS, bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about this class
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def sharded(use_orig_params):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(rank_device())
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=rank_device())


def backward(model, scale=1.0):
    inputs = torch.ones(4, 6, device=rank_device()) + dist.get_rank()
    (model(inputs).square().mean() * scale).backward()


@both_backends
@on_ranks(2)
def test_no_norm_of_pieces(backend):
    """Each rank would clip by the norm of what it holds, and skip for itself."""
    for use_orig_params in (False, True):
        for option, value in (("max_grad_norm", 0.1), ("skip_nonfinite", True)):
            model = sharded(use_orig_params)
            optimizer = fusedopt.AdamW(model.parameters(), lr=0.1, backend=backend)
            backward(model)
            optimizer.step()
            before = [bits(param) for param in model.parameters()]
            optimizer.param_groups[0][f"fusedopt_{option}"] = value
            for _ in range(2):
                with pytest.raises(ValueError, match=r"parameter 0 of group 0.*model\.clip_grad_norm_"):
                    optimizer.step()
            assert [bits(param) for param in model.parameters()] == before
            del optimizer.param_groups[0][f"fusedopt_{option}"]
            optimizer.step()
            fresh = fusedopt.AdamW(model.parameters(), backend=backend, **{option: value})
            with pytest.raises(ValueError, match=r"model\.clip_grad_norm_"):
                fresh.step()
            assert not fresh.state


@both_backends
@on_ranks(1)
def test_one_rank_has_whole_gradients(backend):
    model = sharded(True)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1, backend=backend, max_grad_norm=1e-3)
    backward(model)
    optimizer.step()
    norm = torch.stack([param.grad.norm() for param in model.parameters()]).norm()
    torch.testing.assert_close(optimizer.grad_norm.float(), norm)


@both_backends
@on_ranks(2)
def test_an_overflow_is_shared(backend):
    """By ShardedGradScaler, which must not leave it to the step."""
    for use_orig_params in (False, True):
        model, twin = sharded(use_orig_params), sharded(use_orig_params)
        mine = fusedopt.AdamW(model.parameters(), lr=0.1, backend=backend)
        theirs = torch.optim.AdamW(twin.parameters(), lr=0.1)
        for net, optimizer in ((model, mine), (twin, theirs)):
            # Its default is the group that there was when torch's module was imported, by an earlier test maybe.
            group = dist.group.WORLD
            scaler = ShardedGradScaler(device=rank_device().type, init_scale=4.0, process_group=group)
            for step in range(3):
                optimizer.zero_grad()
                backward(net, scaler.scale(torch.ones((), device=rank_device())))
                if step == 1 and dist.get_rank() == 1:
                    for param in net.parameters():
                        if param.grad is not None and param.grad.numel():
                            param.grad.view(-1)[0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
            assert scaler.get_scale() == 2.0
        for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, expected)
