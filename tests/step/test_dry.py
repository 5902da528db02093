"""Dry runs, on the meta device and with fake tensors: all that a step has but values."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedopt
from tests.cases import BF16, FP32
from tests.twins import KERNELS, make

OPTIONS = [
    (FP32, {}),
    (FP32, {"max_grad_norm": 1.0}),
    (FP32, {"skip_nonfinite": True, "ema_decay": 0.9}),
    (BF16, {"rounding": "stochastic"}),
    (BF16, {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "rounding": "stochastic", "kahan": True}),
    (BF16, {"max_grad_norm": 1.0, "rounding": "stochastic", "master_weights": True, "state_dtype": BF16}),
]
RUNS = [(name, *options) for name in ("SGD", "NAdam", "Rprop") for options in OPTIONS]
RUNS += [("Muon", *OPTIONS[0]), ("Muon", *OPTIONS[4])]
KINDS = {
    "meta": (lambda: nullcontext(), "meta", torch.Tensor),
    "fake": (lambda: FakeTensorMode(), "cpu", FakeTensor),
}


def trained(name, dtype, options, device="cpu", **told):
    shapes = [(3, 4), (0, 2), (2, 3) if name == "Muon" else ()]
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in shapes]
    optimizer = make(name, params, **options)
    for key, value in told.items():
        setattr(optimizer, key, value)
    for missing in (None, 1, 2):
        for param in params:
            param.grad = None if missing is not None and param is params[missing] else torch.ones_like(param)
        optimizer.step()
    return optimizer


def lies(tensor):
    return tensor.shape, tensor.dtype, tensor.stride()


@pytest.mark.parametrize(("name", "dtype", "options"), RUNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_is_like_a_real_one(name, kind, dtype, options):
    mode, device, cls = KINDS[kind]
    real = trained(name, dtype, options)
    with mode():
        dry = trained(name, dtype, options, device)
    for state, expected in zip(dry.state.values(), real.state.values(), strict=True):
        assert {key: lies(value) for key, value in state.items()} == {key: lies(v) for key, v in expected.items()}
        tensors = [value for key, value in state.items() if value.dim()]
        assert {(type(tensor), tensor.device.type) for tensor in tensors} <= {(cls, device)}
    assert (dry.grad_norm is None) == (real.grad_norm is None)
    if dry.grad_norm is not None:
        assert (type(dry.grad_norm), dry.grad_norm.device.type) == (cls, device)
        assert lies(dry.grad_norm) == lies(real.grad_norm)
    assert lies(dry.skipped_steps) == lies(real.skipped_steps)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_without_values(kind):
    mode, device, _ = KINDS[kind]
    with mode():
        told = {"grad_scale": torch.ones((), device=device), "found_inf": torch.zeros((), device=device)}
        optimizer = trained("Adam", FP32, {"max_grad_norm": 1.0}, device, **told)
    assert optimizer.grad_norm.device.type == device


def test_steps_that_have_no_value():
    """States that come from elsewhere, as those of a loaded optimizer that is made fake."""
    real = trained("NAdam", BF16, {"rounding": "stochastic", "ema_decay": 0.9})
    values = [param.detach() for param in real.param_groups[0]["params"]]
    with FakeTensorMode() as mode:
        params = [torch.nn.Parameter(mode.from_tensor(value)) for value in values]
        optimizer = make("NAdam", params, rounding="stochastic", ema_decay=0.9)
        for param, state in zip(params, real.state.values(), strict=True):
            optimizer.state[param] = {key: mode.from_tensor(value) for key, value in state.items()}
            param.grad = torch.ones_like(param)
        optimizer.step()
    for state, expected in zip(optimizer.state.values(), real.state.values(), strict=True):
        assert {key: lies(value) for key, value in state.items()} == {key: lies(v) for key, v in expected.items()}


def test_one_parameter_without_values_is_no_dry_run():
    params = [torch.nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta")]
    optimizer = fusedopt.SGD(params, max_grad_norm=1.0)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_have_nothing_to_reach(kind):
    mode, device, _ = KINDS[kind]
    with mode(), pytest.raises(ValueError, match=f"backend={KERNELS!r} cannot step parameter 0 of group 0"):
        trained("Adam", FP32, {"backend": KERNELS}, device)


def test_a_fake_tensor_of_a_device_that_is_not_there():
    with FakeTensorMode():
        optimizer = trained("Adam", FP32, {}, "cuda")
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cuda"}
