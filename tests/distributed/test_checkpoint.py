"""torch.distributed.checkpoint: saved by two ranks, loaded by any number of them, and on with the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.cases import BF16, FP32
from tests.distributed.test_sharded import make_models, set_same_grads, whole_of
from tests.ranks import on_one_worker, on_ranks, run_on_ranks
from tests.twins import BACKENDS, ELEMENTWISE, KERNELS, bits, make

pytest.importorskip("torch.distributed.fsdp")
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

# Every state that there is, beside those of the classes.
RUNS = [
    ("AdamW", BF16, {"rounding": "stochastic", "seed": 7, "ema_decay": 0.9}),
    ("AdamW", BF16, {"master_weights": True, "amsgrad": True, "state_dtype": FP32, "skip_nonfinite": True}),
    ("SGD", BF16, {"kahan": True, "dampening": 0.5}),
    ("NAdam", FP32, {}),
    ("ASGD", FP32, {}),
]


# What kernels do to shards does not differ by rule, and the interpreter takes its time.
SOME = {"eager": RUNS, KERNELS: [RUNS[0], RUNS[2]]}


def train(sharded, whole, optimizer, steps):
    for step in steps:
        set_same_grads(sharded, whole, step)
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """All values, whole, by their names."""
    saved = get_optimizer_state_dict(model, optimizer)["state"]
    values = {name: whole_of(param.detach()) for name, param in model.named_parameters()}
    for name, state in saved.items():
        values.update({f"{name}.{key}": whole_of(value) for key, value in state.items()})
    return {name: value.cpu() for name, value in values.items()}


def save_and_go_on(folder, backend):
    for index, (name, dtype, options) in enumerate(SOME[backend]):
        sharded, whole = make_models(dtype)
        optimizer = make(name, sharded.parameters(), lr=0.1, backend=backend, **options)
        train(sharded, whole, optimizer, range(2))
        model_state, optimizer_state = get_state_dict(sharded, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / str(index))
        train(sharded, whole, optimizer, range(2, 4))
        values = everything(sharded, optimizer)
        if dist.get_rank() == 0:
            torch.save(values, folder / f"{index}.pt")


def load_and_go_on(folder, backend):
    for index, (name, dtype, options) in enumerate(SOME[backend]):
        sharded, whole = make_models(dtype)
        with torch.no_grad():
            for param in sharded.parameters():
                param.zero_()
        optimizer = make(name, sharded.parameters(), lr=0.1, backend=backend, **options)
        model_state, optimizer_state = get_state_dict(sharded, optimizer)
        loaded = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(loaded, checkpoint_id=folder / str(index))
        set_state_dict(sharded, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        train(sharded, whole, optimizer, range(2, 4))
        expected = torch.load(folder / f"{index}.pt", weights_only=True)
        values = everything(sharded, optimizer)
        assert values.keys() == expected.keys()
        for key, value in values.items():
            assert bits(value) == bits(expected[key]), (name, options, key)


@on_one_worker
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resharded_run_goes_on_with_the_same_bits(backend, tmp_path):
    run_on_ranks(2, save_and_go_on, folder=tmp_path, backend=backend)
    for count in (4, 1):
        run_on_ranks(count, load_and_go_on, folder=tmp_path, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@on_ranks(2)
def test_creating_states_for_a_checkpoint_changes_no_bit(backend):
    for name in ELEMENTWISE if backend == "eager" else ["AdamW", "SGD", "Rprop"]:
        sharded, _ = make_models(BF16)
        before = [bits(param.to_local()) for param in sharded.inner.parameters()]
        optimizer = make(name, sharded.parameters(), backend=backend, ema_decay=0.9)
        get_optimizer_state_dict(sharded, optimizer)
        assert [bits(param.to_local()) for param in sharded.inner.parameters()] == before
        assert all(param.grad is None for param in sharded.parameters())
