"""What an optimizer counts is the same whether it steps in backward or afterwards, and goes from one to the other."""

import copy

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.step import dry
from tests.cases import BF16
from tests.conftest import DEVICE
from tests.optimizer.test_step_in_backward import assert_same, both_backends
from tests.twins import KERNELS

ROUNDED = {"fusedopt_rounding": "stochastic", "fusedopt_seed": 3}


def two_layers(dtype=BF16):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]).to(DEVICE, dtype)
    return model, copy.deepcopy(model)


def groups_of(model):
    return [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), **ROUNDED}]


def loss(model, layers, step):
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(3, 16, generator=generator).to(DEVICE, model[0].weight.dtype)
    return sum(model[layer](batch).float().square().mean() for layer in layers)


@both_backends
def test_one_step_of_rounding_a_backward(backend):
    """Also of a backward that only reaches parameters which are rounded to nearest, and with `step` in the loop."""
    model, twin = two_layers()
    steps = fusedopt.step_in_backward(
        model, lambda params: fusedopt.SGD(groups_of(model), lr=0.1, momentum=0.9, backend=backend)
    )
    ordinary = fusedopt.SGD(groups_of(twin), lr=0.1, momentum=0.9, backend=backend)
    counters = set()
    for step, layers in enumerate([(0, 1), (0,), (1,), (), (0, 1)]):
        for network, optimizer in ((model, steps.optimizer), (twin, ordinary)):
            if layers:
                loss(network, layers, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        counters.add(id(steps.optimizer.param_groups[1]["fusedopt_rounding_step"]))
        assert_same(steps.optimizer, ordinary)
    assert steps.optimizer.param_groups[1]["fusedopt_rounding_step"] == 4
    assert len(counters) == 1, "a captured graph would advance another tensor than it reads"


@both_backends
def test_what_has_begun(backend):
    """A momentum and an average of which the first step was skipped, by an ordinary step, begin in backward."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "ema_decay": 0.5, "backend": backend}
    models = two_layers(torch.float32)
    optimizers = [fusedopt.SGD(model.parameters(), **options) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        loss(model, (0, 1), 0).backward()
        optimizer.found_inf = 1.0
        optimizer.step()
        del optimizer.found_inf
        optimizer.zero_grad()
        assert not any(optimizer.state_dict()["state"].values())
    mine, ordinary = optimizers
    steps = fusedopt.step_in_backward(models[0], lambda params: mine)
    for step in (1, 2):
        for model in models:
            loss(model, (0, 1), step).backward()
        ordinary.step()
        ordinary.zero_grad()
        assert_same(mine, ordinary)
        assert all(state.keys() == {"momentum_buffer", "ema"} for state in mine.state_dict()["state"].values())
    steps.remove()
    for model, optimizer in zip(models, optimizers, strict=True):
        loss(model, (0, 1), 3).backward()
        optimizer.step()
    assert_same(mine, ordinary)


@both_backends
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_scaled_gradients_are_refused(name, backend):
    model, twin = two_layers()
    optimizer = fusedopt.step_in_backward(model, lambda params: fusedopt.SGD(params, backend=backend)).optimizer
    setattr(optimizer, name, 1.0)
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with step_in_backward"):
        loss(model, (0, 1), 0).backward()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_group_that_cannot_be_added_is_not_there():
    model, other = two_layers()
    optimizer = fusedopt.step_in_backward(model, lambda params: fusedopt.SGD(params, lr=0.1)).optimizer
    keep = fusedopt.step_in_backward(other, lambda params: fusedopt.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="a parameter steps in backward already"):
        optimizer.add_param_group({"params": list(other.parameters())})
    assert len(optimizer.param_groups) == 1
    loss(model, (0, 1), 0).backward()
    keep.remove()


@both_backends
def test_a_backward_within_a_gradient_is_refused(backend):
    model, twin = two_layers(torch.float32)
    fusedopt.step_in_backward(model, lambda params: fusedopt.SGD(params, lr=0.1, backend=backend))
    value = torch.ones(3, 16, device=DEVICE, requires_grad=True)
    hooked = value * 2

    @hooked.register_hook
    def call_backward(grad):
        with torch.enable_grad():
            loss(model, (1,), 0).backward()

    with pytest.raises(RuntimeError, match="another one has called"):
        torch.autograd.grad(hooked.sum(), value)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_the_reference_does_not_ask_for_a_count_that_it_does_not_need(monkeypatch):
    """On a GPU it would wait for the kernels."""
    model, _ = two_layers()
    groups = [{"params": list(model[0].parameters()), "fused": False}, groups_of(model)[1]]
    optimizer = fusedopt.SGD(groups, lr=0.1)
    optimizer.backend = KERNELS
    asked = []
    monkeypatch.setattr(dry, "item", asked.append)
    for _ in range(2):
        loss(model, (0, 1), 0).backward()
        optimizer.step()
    assert not asked
    assert optimizer.param_groups[1]["fusedopt_rounding_step"] == 2
