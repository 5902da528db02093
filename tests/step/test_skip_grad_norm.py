"""Skipping steps whose gradients are too long, and numbers of the gate that are tensors."""

import copy
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt.options import KEYS, SKIPPED_STEPS
from fusedopt.step import hyper
from tests.cases import BF16, FP32
from tests.conftest import DEVICE
from tests.optimizer.test_state import saved_and_loaded
from tests.step.test_gate import FP64, INF, NAN, give, norm_of, poison, sgd, zeros
from tests.twins import ENGINES, bits, make_params, params_of, train

pytestmark = pytest.mark.parametrize("backend", ENGINES)


def grads_of_norm(params, norm):
    give(params)
    factor = float(norm / norm_of(params))
    for param in params:
        param.grad *= factor


def test_a_step_with_too_long_gradients_is_not_taken(backend):
    params = zeros(((3, 4), FP64), ((40,), FP64))
    optimizer = sgd(params, backend, skip_grad_norm=2.0)
    for norm, skipped in ((2.5, 1), (1.9, 1), (1e30, 2), (2.1, 3), (0.0, 3)):
        before = list(map(bits, params))
        grads_of_norm(params, norm)
        kept = [bits(param.grad) for param in params]
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        np.testing.assert_allclose(float(optimizer.grad_norm), norm, rtol=1e-12)
        assert (list(map(bits, params)) == before) == (norm > 2 or norm == 0)
        assert [bits(param.grad) for param in params] == kept


def test_the_threshold_itself_is_not_above(backend):
    (param,) = zeros(((2,), FP64))
    param.grad = torch.tensor([3.0, 4.0], dtype=FP64, device=DEVICE)
    for threshold, skipped in ((5.0, 0), (math.nextafter(5.0, 0), 1), (0, 1), (INF, 0)):
        optimizer = sgd([param], backend, skip_grad_norm=threshold)
        optimizer.step()
        assert optimizer.skipped_steps == skipped, threshold


@pytest.mark.parametrize("value", [NAN, INF])
def test_no_threshold_lets_through_what_is_not_finite(backend, value):
    params = zeros(((3,), FP32), ((4,), FP32))
    optimizer = sgd(params, backend, skip_grad_norm=INF)
    give(params)
    poison(params, value)
    optimizer.step()
    assert not any(param.any() for param in params)
    assert optimizer.skipped_steps == 1


def test_the_norm_that_is_skipped_is_unscaled(backend):
    (param,) = zeros(((2,), FP32))
    optimizer = sgd([param], backend, skip_grad_norm=6.0)
    for scale, length, skipped in ((8.0, 5.0, 0), (8.0, 6.5, 1), (0.25, 5.9, 1), (0.25, 20.0, 2)):
        before = bits(param)
        param.grad = scale * length * torch.tensor([0.6, 0.8], device=DEVICE)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        assert (bits(param) == before) == (length > 6)


def test_skipping_and_clipping_by_the_norm(backend):
    """What is skipped is the norm before clipping."""
    (param,) = zeros(((2,), FP64))
    optimizer = sgd([param], backend, max_grad_norm=1.0, skip_grad_norm=6.0)
    for grad, expected in (([3.0, 4.0], [-0.6, -0.8]), ([6.0, 8.0], [-0.6, -0.8])):
        param.grad = torch.tensor(grad, dtype=FP64, device=DEVICE)
        optimizer.step()
        torch.testing.assert_close(param.detach(), torch.tensor(expected, dtype=FP64, device=DEVICE), rtol=1e-6, atol=0)
    assert optimizer.skipped_steps == 1


def test_a_running_statistic_as_the_threshold(backend):
    """It is the user's, on the device, and read at each step."""
    (param,) = zeros(((1,), FP64))
    threshold = torch.full((), INF, dtype=FP64, device=DEVICE)
    optimizer = sgd([param], backend, skip_grad_norm=threshold)
    skipped = []
    for norm in (1.0, 1.5, 9.0, 2.0, 3.0, 8.0):
        param.grad = torch.full((1,), norm, dtype=FP64, device=DEVICE)
        optimizer.step()
        threshold.copy_(2 * torch.minimum(optimizer.grad_norm, threshold))
        skipped.append(int(optimizer.skipped_steps))
    assert skipped == [0, 0, 1, 1, 1, 2]
    assert optimizer.param_groups[0]["fusedopt_skip_grad_norm"] is threshold


def test_skipping_by_the_norm_is_counted_in_checkpoints(backend):
    optimizer = sgd(params := zeros(((3,), FP64)), backend, skip_grad_norm=1.0)
    for norm in (2.0, 0.5, 3.0):
        grads_of_norm(params, norm)
        optimizer.step()
    fresh = sgd(zeros(((3,), FP64)), backend, skip_grad_norm=1.0)
    assert fresh.state_dict()["param_groups"][0][SKIPPED_STEPS] == 0
    resumed = sgd(zeros(((3,), FP64)), backend)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    grads_of_norm(params_of(resumed), 2.0)
    resumed.step()
    assert resumed.skipped_steps == 3
    assert not params_of(resumed)[0].any()


# Tensors.


NUMBERS = {"max_grad_norm": (0.5, 0.1), "skip_grad_norm": (1e6, 1e-6), "ema_decay": (0.5, 0.9)}


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_tensor_is_the_number_that_it_holds(backend, name, shape, dtype, where, monkeypatch):
    if where == "device":  # as if it were on one, so that it is read where it lies
        monkeypatch.setattr(hyper, "_number", lambda value, *_: value if isinstance(value, Tensor) else float(value))
    first, second = (torch.full(shape, value, dtype=dtype) for value in NUMBERS[name])
    ours = fusedopt.AdamW(make_params(), backend=backend, **{name: (live := first.clone().to(DEVICE))})
    twin = fusedopt.AdamW(make_params(), backend=backend, **{name: first.item()})
    for step, value in enumerate((first, second)):
        live.copy_(value)
        twin.param_groups[0][KEYS[name]] = value.item()
        train(ours, range(step, step + 1))
        train(twin, range(step, step + 1))
    for mine, other in zip(params_of(ours), params_of(twin), strict=True):
        assert bits(mine) == bits(other)
        if name == "ema_decay":
            assert bits(ours.state[mine]["ema"]) == bits(twin.state[other]["ema"])
    assert ours.skipped_steps == twin.skipped_steps == (name == "skip_grad_norm")


def test_groups_share_one_tensor(backend):
    """Also after a checkpoint, of which some are loaded piece by piece."""
    one, other, third = make_params()
    key = KEYS["skip_grad_norm"]
    groups = [{"params": [one]}, {"params": [other]}]
    threshold = torch.tensor(1e-6, device=DEVICE)
    optimizer = fusedopt.SGD(groups, lr=0.1, backend=backend, skip_grad_norm=threshold)
    optimizer.add_param_group({"params": [third]})
    train(optimizer, range(1))
    assert optimizer.skipped_steps == 1
    saved = saved_and_loaded(optimizer.state_dict())
    for group in saved["param_groups"]:
        group[key] = group[key].clone()
    for loaded in (copy.deepcopy(optimizer), optimizer):
        loaded.load_state_dict(saved)
        loaded.param_groups[0][key].fill_(1e6)
        train(loaded, range(1))
        assert loaded.skipped_steps == 1
    for wrong in (torch.tensor(1e6), 1e6, None):
        optimizer.param_groups[1][key] = wrong
        with pytest.raises(ValueError, match="skip_grad_norm is one for all groups"):
            optimizer.step()


@pytest.mark.parametrize("number", [np.array(0.5), np.float32(0.5), Fraction(1, 2), Decimal("0.5")], ids=repr)
def test_other_numbers_are_numbers(backend, number):
    for name in NUMBERS:
        optimizer = fusedopt.AdamW(make_params(), backend=backend, **{name: number})
        twin = fusedopt.AdamW(make_params(), backend=backend, **{name: 0.5})
        for each in (optimizer, twin):
            train(each, range(2))
        assert list(map(bits, params_of(optimizer))) == list(map(bits, params_of(twin)))


def test_a_tensor_costs_no_new_plan(backend, monkeypatch):
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)
    live = {name: torch.tensor(first) for name, (first, _) in NUMBERS.items()}
    optimizer = fusedopt.AdamW(make_params(), backend=backend, **live)
    train(optimizer, range(1))
    plan = optimizer._stepper.plan
    for name, (_, second) in NUMBERS.items():
        live[name].fill_(second)
        train(optimizer, range(1))
        assert optimizer._stepper.plan is plan
