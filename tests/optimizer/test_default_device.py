"""torch.set_default_device puts whatever is made without a device elsewhere: here on one that holds no values."""

import copy
import pickle

import pytest
import torch

import fusedopt
from tests.cases import BF16
from tests.twins import BACKENDS, KERNELS, OPTIMIZERS, make, make_params, params_of, set_grads, snapshot

AROUND = {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "rounding": "stochastic"}


@pytest.fixture
def no_values():
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def trained(name, backend, options, gradients, begin=lambda: None):
    """What is left of an optimizer after some of everything, with the default device that `begin` sets."""
    params = make_params(BF16, of=name)
    begin()
    optimizer = make(name, params, backend=backend, **options)
    fusedopt.warmup(optimizer)
    for step in range(3):
        for param, grad in zip(params_of(optimizer), gradients[step], strict=True):
            param.grad = grad.clone()
        if step == 1:
            optimizer.grad_scale, optimizer.found_inf = 2.0, 0
        optimizer.step()
        optimizer.__dict__.pop("grad_scale", None)
        optimizer.__dict__.pop("found_inf", None)
        saved = copy.deepcopy(optimizer.state_dict())
        if "step" in saved["state"].get(0, {}):
            saved["state"][0]["step"] = float(saved["state"][0]["step"])
        optimizer.load_state_dict(saved)
    assert optimizer.skipped_steps == 0
    assert pickle.loads(pickle.dumps(optimizer)).skipped_steps == 0
    torch.set_default_device(None)
    left = snapshot(optimizer)
    return left["params"], list(left["state"].values())


# What is around a rule is the same for all of them, so that the kernels have it with two.
RUNS = [(backend, name, {}) for backend in BACKENDS for name in OPTIMIZERS]
RUNS += [("eager", name, AROUND) for name in OPTIMIZERS]
RUNS += [(KERNELS, name, AROUND) for name in ("Adagrad", "AdamW")]


@pytest.mark.parametrize(("backend", "name", "options"), RUNS, ids=str)
def test_nothing_is_made_on_the_default_device(name, backend, options, no_values):
    params = make_params(BF16, of=name)
    gradients = []
    for step in range(3):
        set_grads(params, step)
        gradients.append([param.grad for param in params])
    expected = trained(name, backend, options, gradients)
    assert trained(name, backend, options, gradients, no_values) == expected
