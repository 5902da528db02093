"""Gradients and states in eight bits: the reference computes in fp32, the kernels refuse them by name."""

import pytest
import torch
from torch.nn import Parameter

from tests.conftest import DEVICE
from tests.optimizer.test_errors import refused
from tests.twins import make, set_grads

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
every_dtype = pytest.mark.parametrize("dtype", FLOAT8, ids=str)
every_optimizer = pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "Muon"])


def make_two(name, backend, grad_dtype=None, **options):
    params = [Parameter(torch.linspace(-1, 1, 6, device=DEVICE).view(2, 3)) for _ in range(2)]
    params[1].grad_dtype = grad_dtype
    optimizer = make(name, params, lr=0.1, backend=backend, **options)
    params[0].grad, params[1].grad = (torch.full((2, 3), 0.5, device=DEVICE, dtype=d) for d in (None, grad_dtype))
    return optimizer, params


def make_states(optimizer, dtype):
    (_, param) = optimizer.param_groups[0]["params"]
    for key in optimizer.states:
        if key in optimizer.state[param]:
            optimizer.state[param][key] = optimizer.state[param][key].to(dtype)


@every_dtype
@every_optimizer
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1, "skip_nonfinite": True}], ids=str)
def test_the_reference_reads_gradients(name, dtype, options):
    """Both parameters have the same gradient, of which eight bits lose nothing."""
    optimizer, params = make_two(name, "eager", dtype, **options)
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(params[1], params[0])


@every_dtype
@every_optimizer
def test_the_reference_keeps_states(name, dtype):
    optimizer, params = make_two(name, "eager")
    optimizer.step()
    make_states(optimizer, dtype)
    optimizer.step()
    kept = [optimizer.state[params[1]][key] for key in optimizer.states if key in optimizer.state[params[1]]]
    assert {state.dtype for state in kept} == {dtype}
    torch.testing.assert_close(params[1], params[0], atol=0.05, rtol=0)


@every_dtype
@every_optimizer
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=str)
def test_the_kernels_refuse_gradients(name, dtype, options):
    optimizer, _ = make_two(name, "triton", dtype, **options)
    with refused(optimizer, RuntimeError, f"parameter 1 of group 0: .* its gradient, {dtype}; backend='eager' does"):
        optimizer.step()


@every_dtype
@every_optimizer
@pytest.mark.parametrize("has_grad", [True, False])
def test_the_kernels_refuse_states(name, dtype, has_grad):
    optimizer, params = make_two(name, "triton")
    optimizer.step()
    make_states(optimizer, dtype)
    set_grads(params, 1)
    if not has_grad:
        params[1].grad = None
    with refused(optimizer, RuntimeError, f"parameter 1 of group 0: .* its state '.*', {dtype}; backend='eager' does"):
        optimizer.step()
