"""Steps taken while backward runs give what a step afterwards gives, bit for bit, and free the gradients."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

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


def groups_of(name, params):
    """Muon's matrices, and the others by AdamW's rule."""
    params = list(params)
    if name != "Muon":
        return params
    others = [param for param in params if param.dim() < 2]
    return [{"params": [param for param in params if param.dim() >= 2]}, {"params": others, "use_muon": False}]


MADE = [(name, FP32, {}) for name in OPTIMIZERS]
MADE += [("AdamW", BF16, {"rounding": "stochastic", "seed": 3}), ("AdamW", BF16, {"kahan": True, "ema_decay": 0.9})]


@both_backends
def test_same_bits_as_a_step_afterwards(backend):
    for name, dtype, options in MADE:
        models = make_models(dtype)

        def make_one(params):
            return make(name, groups_of(name, params), lr=0.1, backend=backend, **options)  # noqa: B023

        steps, other = fusedopt.step_in_backward(models[0], make_one), make_one(models[1].parameters())
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
    for options, why in [
        ({"max_grad_norm": 0.0}, "max_grad_norm.*norm of all"),
        ({"max_grad_norm": 1.0}, "max_grad_norm.*norm of all"),
        ({"skip_nonfinite": True}, "finite"),
    ]:
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


class Twice(nn.Module):
    """Uses a layer twice, the first time in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch, reentrant):
        return self.layer(torch.tanh(checkpoint(self.layer, batch, use_reentrant=reentrant)))


@both_backends
def test_a_backward_within_a_backward_is_refused(backend):
    """It has only a part of the gradient."""
    torch.manual_seed(0)
    model = Twice().to(DEVICE)
    steps = fusedopt.step_in_backward(model, lambda params: fusedopt.AdamW(params, backend=backend))
    batch = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    before = bits(model.layer.weight)
    refused = pytest.raises(RuntimeError, match=r"another one has called.*checkpoint\(use_reentrant=False\), or an ord")
    with refused:
        checkpoint(model.layer, batch, use_reentrant=True).sum().backward()
    assert bits(model.layer.weight) == before
    assert not steps.optimizer.state
    with refused:
        model(batch, True).sum().backward()

    model = Twice().to(DEVICE)
    twin = copy.deepcopy(model)
    steps = fusedopt.step_in_backward(model, lambda params: fusedopt.AdamW(params, backend=backend))
    other = fusedopt.AdamW(twin.parameters(), backend=backend)
    model(batch, False).sum().backward()
    twin(batch, False).sum().backward()
    other.step()
    assert_same(steps.optimizer, other)


class Busy(torch.autograd.Function):
    """Looks around in its own backward."""

    @staticmethod
    def forward(ctx, value):
        return 1 * value

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            other = torch.ones(2, requires_grad=True)
            torch.autograd.grad(other.square().sum(), other)
            other.sum().backward()
        return grad


class Reducer(torch.autograd.Function):
    """Calls the hooks of a parameter in its own backward, as FSDP does."""

    @staticmethod
    def forward(ctx, value, param):
        ctx.param = param
        return 1 * value

    @staticmethod
    def backward(ctx, grad):
        ctx.param.grad = torch.ones_like(ctx.param)
        for hook in ctx.param._post_accumulate_grad_hooks.values():
            hook(ctx.param)
        return grad, None


def test_other_backwards_are_not_refused():
    layer = nn.Linear(4, 4).to(DEVICE)
    batch = torch.ones(3, 4, device=DEVICE)
    fusedopt.step_in_backward(layer, lambda params: fusedopt.SGD(params, lr=0.1))
    seen = [bits(layer.weight)]

    def one():
        Busy.apply(layer(Busy.apply(batch))).sum().backward()

    def other():
        Reducer.apply(batch.clone().requires_grad_(), layer.weight).sum().backward()

    thread = threading.Thread(target=one)
    for step in (one, lambda: (thread.start(), thread.join()), other):
        step()
        assert layer.weight.grad is None
        seen.append(bits(layer.weight))
    assert len(set(seen)) == 4


@both_backends
def test_post_hooks_are_called_when_backward_has_ended(backend):
    (model, _) = make_models()
    steps = fusedopt.step_in_backward(model, lambda params: fusedopt.SGD(params, lr=0.1, backend=backend))
    optimizer, calls = steps.optimizer, []

    def hook(name):
        def note(*args):
            assert args == (optimizer, (optimizer,), {})  # as torch calls it
            assert all(param.grad is None for param in model.parameters())
            calls.append((name, bits(model.first.bias)))

        return note

    optimizer.register_step_post_hook(hook("own"))
    everywhere = register_optimizer_step_post_hook(hook("global"))
    try:
        before = bits(model.first.bias)
        for step in range(2):
            backward(model, step)
            after = bits(model.first.bias)
            assert calls == [("own", after), ("global", after)]
            assert after != before
            optimizer.step()  # has nothing to do
            with torch.profiler.profile():
                optimizer.step()
            assert len(calls) == 2
            calls.clear()
        optimizer.step(lambda: backward(model, 2))
        assert len(calls) == 2
        calls.clear()

        failing = model.first.weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backward(model, 3)
        assert not calls
        failing.remove()
        model.zero_grad()
        backward(model, 4)
        assert len(calls) == 2
        calls.clear()
    finally:
        everywhere.remove()


@both_backends
def test_pre_hooks_are_refused(backend):
    """They expect all gradients."""
    (model, _) = make_models()
    steps = fusedopt.step_in_backward(model, lambda params: fusedopt.SGD(params, lr=0.1, backend=backend))
    before = [bits(param) for param in model.parameters()]
    calls = []
    for register in (steps.optimizer.register_step_pre_hook, register_optimizer_step_pre_hook):
        hook = register(lambda *args: calls.append(args))
        try:
            with pytest.raises(RuntimeError, match=r"pre-hook cannot be called.*Use Tensor\.register_hook"):
                backward(model, 0)
        finally:
            hook.remove()
        model.zero_grad()
    assert [bits(param) for param in model.parameters()] == before
    assert not calls
    backward(model, 0)
    assert bits(model.first.weight) != before[0]


def test_one_parameter_steps_once():
    layer = nn.Linear(4, 4).to(DEVICE)
    steps = fusedopt.step_in_backward(layer, lambda params: fusedopt.SGD(params, lr=0.1))
    again = {"optimizer": lambda params: steps.optimizer, "parameter": lambda params: fusedopt.SGD(params[1:])}
    for what, factory in again.items():
        with pytest.raises(ValueError, match=rf"{what} steps in backward already.*remove\(\)"):
            fusedopt.step_in_backward(layer, factory)
    steps.remove()
    fusedopt.step_in_backward(layer, lambda params: steps.optimizer)
    steps.optimizer.param_groups[0]["params"].append(layer.weight)
    with pytest.raises(ValueError, match="listed twice"):
        layer(torch.ones(4, device=DEVICE))


def test_a_model_and_its_optimizer_are_freed():
    layer = nn.Linear(4, 4).to(DEVICE)
    parts = nn.ModuleList([layer])
    steps = fusedopt.step_in_backward(parts, lambda params: fusedopt.AdamW(params, lr=0.1))
    layer(torch.ones(4, device=DEVICE)).sum().backward()
    optimizer = weakref.ref(steps.optimizer)
    del steps
    gc.collect()
    layer(torch.ones(4, device=DEVICE)).sum().backward()  # as long as there is the model
    assert layer.weight.grad is None
    del parts
    gc.collect()
    assert optimizer() is None
    with pytest.raises(RuntimeError, match=r"are gone.*keep what step_in_backward returned"):
        layer(torch.ones(4, device=DEVICE)).sum().backward()
    fusedopt.step_in_backward(layer, lambda params: fusedopt.AdamW(params, lr=0.1))
    layer(torch.ones(4, device=DEVICE)).sum().backward()
    assert layer.weight.grad is None


def test_copies_do_not_step():
    layer = nn.Linear(4, 4).to(DEVICE)
    steps = fusedopt.step_in_backward(layer, lambda params: fusedopt.SGD(params, lr=0.1))
    before = bits(layer.weight)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin(torch.ones(4, device=DEVICE)).sum().backward()
        assert twin.weight.grad is not None
    assert bits(twin.weight) == bits(layer.weight) == before
    for function in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="StepInBackward cannot be copied"):
            function(steps)
    twin, optimizer = copy.deepcopy((layer, steps.optimizer))
    twin(torch.ones(4, device=DEVICE)).sum().backward()
    optimizer.step()
    assert bits(twin.weight) != before


@both_backends
def test_ways_to_call_backward(backend):
    layers = [nn.Linear(4, 4).to(DEVICE) for _ in range(2)]
    first, last = (
        fusedopt.step_in_backward(layer, lambda params: fusedopt.SGD(params, lr=0.1, backend=backend)).optimizer
        for layer in layers
    )
    calls = []
    for optimizer in (first, last):
        optimizer.register_step_post_hook(lambda stepped, *_: calls.append(stepped))

    def loss():
        return layers[1](layers[0](torch.ones(2, 4, device=DEVICE))).sum()

    def stepped(run):
        calls.clear()
        before = [bits(param) for layer in layers for param in layer.parameters()]
        run()
        assert all(param.grad is None for layer in layers for param in layer.parameters())
        return [bits(param) for layer in layers for param in layer.parameters()] != before, calls

    assert stepped(lambda: loss().backward()) == (True, [last, first])
    assert stepped(lambda: loss().backward(inputs=[layers[0].bias])) == (True, [first])
    assert stepped(lambda: torch.autograd.grad(loss(), list(layers[0].parameters()))) == (False, [])
    again = loss()
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as after any step
        again.backward()
