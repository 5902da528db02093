"""Flat checkpoints of torch.distributed.checkpoint ask for every key of a group, in whatever order the groups are."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import fusedopt
from tests.cases import BF16
from tests.conftest import DEVICE
from tests.twins import BACKENDS, bits

OPTIONS = [{}, {"rounding": "stochastic"}, {"skip_nonfinite": True}, {"rounding": "stochastic", "ema_decay": 0.5}]


def loss(model):
    return model(torch.ones(2, 4, dtype=BF16, device=DEVICE)).float().square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_groups_in_another_order(options, momentum, flat, backend):
    torch.manual_seed(0)
    model = nn.Linear(4, 4).to(DEVICE, BF16)

    def make(model, names):
        groups = [{"params": [getattr(model, name)]} for name in names]
        return fusedopt.SGD(groups, lr=0.125, momentum=momentum, backend=backend, **options)

    def train(model, optimizer, steps):
        for _ in range(steps):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = make(model, ["weight", "bias"])
    train(model, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    other_model = copy.deepcopy(model)
    other = make(other_model, ["bias", "weight"])
    set_optimizer_state_dict(other_model, other, saved, options=how)
    # Where there are no states torch makes a step before it saves, in the hope of some.
    steps = 3 + (momentum == 0 and "ema_decay" not in options)
    for group in (*optimizer.param_groups, *other.param_groups):
        assert group.get("fusedopt_rounding_step") == (steps if "rounding" in options else None)
    train(model, optimizer, 2)
    train(other_model, other, 2)
    if "rounding" in options:  # by the places of parameters in their optimizers, which are others now
        assert optimizer.param_groups[0]["fusedopt_rounding_step"] == other.param_groups[1]["fusedopt_rounding_step"]
    else:
        assert [bits(param) for param in other_model.parameters()] == [bits(param) for param in model.parameters()]
