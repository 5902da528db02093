"""Steps taken while backward runs give what a step afterwards gives, bit for bit, and free the gradients."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fusedopt
from tests.cases import BF16, FP32
from tests.conftest import DEVICE
from tests.twins import BACKENDS, OPTIMIZERS, bits, make

both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Model(nn.Module):
    """With a tied parameter, one that is frozen and one that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return self.last(torch.tanh(self.first(batch) * self.frozen))


def make_models(dtype=FP32):
    torch.manual_seed(0)
    model = Model().to(DEVICE, dtype)
    return model, copy.deepcopy(model)


def backward(model, step):
    weight = model.first.weight
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(weight)
    model(batch).float().square().sum().backward()


def assert_same(optimizer, other):
    saved, expected = optimizer.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert {name: bits(value) for name, value in saved["state"][key].items()} == {
            name: bits(value) for name, value in state.items()
        }
    for group, other_group in zip(optimizer.param_groups, other.param_groups, strict=True):
        for param, twin in zip(group["params"], other_group["params"], strict=True):
            assert bits(param) == bits(twin)


MADE = [(name, FP32, {}) for name in OPTIMIZERS]
MADE += [("AdamW", BF16, {"rounding": "stochastic", "seed": 3}), ("AdamW", BF16, {"kahan": True, "ema_decay": 0.9})]


@both_backends
def test_same_bits_as_a_step_afterwards(backend):
    for name, dtype, options in MADE:
        models = make_models(dtype)
        steps = fusedopt.step_in_backward(models[0], lambda p: make(name, p, lr=0.1, backend=backend, **options))  # noqa: B023
        other = make(name, models[1].parameters(), lr=0.1, backend=backend, **options)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (steps.optimizer, other)]
        before = bits(models[0].first.weight)
        for step in range(2):
            backward(models[0], step)
            assert all(param.grad is None for param in models[0].parameters())
            backward(models[1], step)
            for optimizer in (steps.optimizer, other):  # the first has nothing left to do
                optimizer.step()
                optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
        assert bits(models[0].first.weight) != before
        assert_same(steps.optimizer, other)


@both_backends
def test_checkpoints_are_those_of_an_ordinary_optimizer(backend):
    models = make_models()
    steps = fusedopt.step_in_backward(models[0], lambda params: fusedopt.AdamW(params, lr=0.1, backend=backend))
    other = fusedopt.AdamW(models[1].parameters(), lr=0.3, backend=backend)
    backward(models[0], 0)
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(steps.optimizer.state_dict())
    backward(models[0], 1)
    backward(models[1], 1)
    other.step()
    assert_same(steps.optimizer, other)

    steps.optimizer.load_state_dict(other.state_dict())
    steps.remove()
    for model, optimizer in zip(models, (steps.optimizer, other), strict=True):
        model.zero_grad()
        backward(model, 2)
        assert model.first.weight.grad is not None
        optimizer.step()
    assert_same(steps.optimizer, other)


@both_backends
def test_gradients_are_freed_one_after_the_other(backend):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).to(DEVICE)
    fusedopt.step_in_backward(model, lambda params: fusedopt.SGD(params, lr=0.1, backend=backend))
    alive, together = [], []

    def watch(param):
        alive.append(weakref.ref(param.grad))
        together.append(sum(ref() is not None for ref in alive))

    for param in model.parameters():  # hooks run in their order: ours must come first to see what the others left
        hook = next(iter(param._post_accumulate_grad_hooks.values()))
        param._post_accumulate_grad_hooks.clear()
        param.register_post_accumulate_grad_hook(watch)
        param.register_post_accumulate_grad_hook(hook)
    model(torch.ones(2, 4, device=DEVICE)).sum().backward()
    gc.collect()
    assert together == [1, 1, 1, 1]


@both_backends
def test_what_comes_too_late_is_refused(backend):
    (model, _) = make_models()
    for options, why in [({"max_grad_norm": 1.0}, "max_grad_norm.*norm of all"), ({"skip_nonfinite": True}, "finite")]:
        with pytest.raises(ValueError, match=why):
            fusedopt.step_in_backward(model, lambda p: fusedopt.SGD(p, backend=backend, **options))  # noqa: B023
    with pytest.raises(TypeError, match="optimizer_factory must make an optimizer of fusedopt"):
        fusedopt.step_in_backward(model, torch.optim.SGD)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="listed twice"):
        fusedopt.step_in_backward(model, lambda params: fusedopt.SGD([params[0], params[0]]))

    steps = fusedopt.step_in_backward(model, lambda p: fusedopt.SGD(p, lr=0.1, backend=backend, ema_decay=0.5))
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones((), device=DEVICE))
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with step_in_backward"):
        scaler.step(steps.optimizer)
    backward(model, 0)
    kept = bits(model.first.weight)
    steps.optimizer.param_groups[0]["fusedopt_max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        backward(model, 1)
    steps.optimizer.param_groups[0]["fusedopt_max_grad_norm"] = None
    with steps.optimizer.swap_ema(), pytest.raises(RuntimeError, match="backward within swap_ema"):
        backward(model, 1)
    assert bits(model.first.weight) == kept


def test_an_error_names_the_parameter_of_the_whole():
    model = nn.Linear(2, 2).to(DEVICE)
    steps = fusedopt.step_in_backward(
        model, lambda _: fusedopt.AdamW([{"params": [("w", model.weight)]}, {"params": [("b", model.bias)]}])
    )
    model(torch.ones(1, 2, device=DEVICE)).sum().backward()
    steps.optimizer.state[model.bias]["exp_avg"] = torch.ones(5, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' of parameter 0 of group 1 \('b'\)"):
        model(torch.ones(1, 2, device=DEVICE)).sum().backward()
