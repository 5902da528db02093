"""torch.distributed.checkpoint's view of an optimizer, in one process."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.conftest import DEVICE
from tests.twins import BACKENDS, ELEMENTWISE, bits, make, make_torch

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("name", ELEMENTWISE),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SGD_OPTIONS = {"momentum": 0.9, "dampening": 0.5}


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).to(DEVICE, dtype)


def options(name):
    return {"SGD": SGD_OPTIONS, "Rprop": {}}.get(name, {"weight_decay": 0.1})


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        batch = batch.to(DEVICE, next(model.parameters()).dtype)
        model(batch).pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_priming_step_changes_no_bit(name, backend, dtype):
    model = make_model(dtype)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0.0, 0.0, 1e-40, -1e30])
    before = [bits(param) for param in model.parameters()]
    optimizer = make(name, model.parameters(), backend=backend, **options(name))
    lr = optimizer.param_groups[0]["lr"]
    saved = get_optimizer_state_dict(model, optimizer)
    assert [bits(param) for param in model.parameters()] == before
    assert all(param.grad is None for param in model.parameters())
    assert optimizer.param_groups[0]["lr"] == lr

    theirs_model = copy.deepcopy(model)
    theirs = get_optimizer_state_dict(theirs_model, make_torch(name, theirs_model.parameters(), **options(name)))
    assert {key: set(values) for key, values in saved["state"].items()} == {
        key: set(values) for key, values in theirs["state"].items()
    }


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_round_trip(name, backend, flatten):
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model()
    optimizer = make(name, model.parameters(), backend=backend, **options(name))
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))

    other_model = copy.deepcopy(model)
    other_model.zero_grad()
    other = make(name, other_model.parameters(), backend=backend, **options(name))
    set_optimizer_state_dict(other_model, other, saved, options=how)
    train(model, optimizer, range(3, 5))
    train(other_model, other, range(3, 5))
    assert [bits(param) for param in other_model.parameters()] == [bits(param) for param in model.parameters()]


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("to_torch", [True, False], ids=["to torch", "from torch"])
def test_between_torch_and_us(name, backend, to_torch, flatten):
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model()
    mine = make(name, model.parameters(), backend=backend, **options(name))
    theirs = make_torch(name, model.parameters(), **options(name))
    first, second = (mine, theirs) if to_torch else (theirs, mine)
    train(model, first, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, first, options=how))
    model.zero_grad()
    set_optimizer_state_dict(model, second, saved, options=how)
    uninterrupted = make_model()
    train(uninterrupted, make_torch(name, uninterrupted.parameters(), **options(name)), range(5))
    train(model, second, range(3, 5))
    torch.testing.assert_close(list(model.parameters()), list(uninterrupted.parameters()))
