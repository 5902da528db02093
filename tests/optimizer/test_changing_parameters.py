"""Steps in backward where parameters are unfrozen, added, replaced, moved, taken away: bit for bit an ordinary step."""

import copy

import pytest
import torch
from torch import nn

import fusedopt
from tests.cases import BF16
from tests.conftest import DEVICE
from tests.optimizer.test_step_in_backward import assert_same, both_backends
from tests.twins import bits, params_of


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4), requires_grad=False)])
        self.count = nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)

    def forward(self, batch):
        value = torch.tanh(self.first(batch))
        for scale in self.scales:
            value = value * scale
        return self.last(value)


def unfreeze(model, optimizer):
    model.scales[0].requires_grad_()


def add_group(model, optimizer):
    model.scales.append(nn.Parameter(torch.full_like(model.scales[0], 2.0)))
    optimizer.add_param_group({"params": [model.scales[1]], "lr": 0.2})


def append(model, optimizer):
    model.scales.append(nn.Parameter(torch.full_like(model.scales[0], 2.0)))
    optimizer.param_groups[0]["params"].append(model.scales[1])


def replace(model, optimizer, modules=("last",)):
    """As Gaussian splatting does it."""
    params = optimizer.param_groups[0]["params"]
    for module in map(model.get_submodule, modules):
        for name, param in list(module.named_parameters(recurse=False)):
            fresh = nn.Parameter(1.5 * param.detach())
            setattr(module, name, fresh)
            params[next(place for place, old in enumerate(params) if old is param)] = fresh
            optimizer.state[fresh] = optimizer.state.pop(param)


def replace_all(model, optimizer):
    replace(model, optimizer, ("first", "last"))


def take_away(model, optimizer):
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop(0))


def turn_around(model, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def swap(model, optimizer):
    """`load_state_dict` then exchanges what tensors are made of, hooks included."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = [unfreeze, add_group, append, replace, replace_all, take_away, turn_around, swap]


@pytest.mark.parametrize("forward", [Changing.__call__, Changing.forward])  # the second calls no hooks
@pytest.mark.parametrize("change", CHANGES)
@both_backends
def test_parameters_that_change(backend, change, forward):
    """Stochastic rounding, since its random numbers depend on the place."""
    torch.manual_seed(0)
    model = Changing().to(DEVICE)
    model.first.bfloat16(), model.last.bfloat16(), model.scales.bfloat16()
    twin = copy.deepcopy(model)

    def make_one(params):
        floats = [param for param in params if param.is_floating_point()]
        return fusedopt.AdamW(floats, lr=0.1, rounding="stochastic", seed=3, backend=backend)

    steps, other = fusedopt.step_in_backward(model, make_one), make_one(twin.parameters())
    hooked = len(params_of(steps.optimizer))
    batch = torch.ones(2, 4, device=DEVICE, dtype=BF16)
    for step in range(4):
        if step == 2:
            change(model, steps.optimizer)
            change(twin, other)
            if forward is Changing.forward and change in (replace_all, swap):
                steps.refresh()
        forward(model, batch).sum().backward()
        forward(twin, batch).sum().backward()
        other.step()
        other.zero_grad()
        assert all(param.grad is None for param in params_of(steps.optimizer))
        assert_same(steps.optimizer, other)
    assert hooked == 5
    if change is take_away:
        assert model.first.weight.grad is not None
        assert not model.first.weight._post_accumulate_grad_hooks


@both_backends
def test_nothing_is_left_when_steps_are_removed(backend):
    model = Changing().to(DEVICE)
    steps = fusedopt.step_in_backward(
        model, lambda params: fusedopt.SGD([p for p in params if p.is_floating_point()], lr=0.1, backend=backend)
    )
    assert not model.scales[0].requires_grad
    add_group(model, steps.optimizer)
    steps.remove()
    steps.remove()
    unfreeze(model, steps.optimizer)
    append(model, steps.optimizer)
    before = [bits(param) for param in model.parameters()]
    model(torch.ones(2, 4, device=DEVICE)).sum().backward()
    assert [bits(param) for param in model.parameters()] == before
    assert all(param.grad is not None for param in params_of(steps.optimizer))
    assert not model._forward_pre_hooks
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
