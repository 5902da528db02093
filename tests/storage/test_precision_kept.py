"""What rounding a parameter loses, kept in a master or a compensation, and what somebody writes between two steps."""

from __future__ import annotations

import pytest
import torch

import fusedopt
import fusedopt.engines.tables
from tests.cases import BF16, FP32
from tests.conftest import DEVICE
from tests.optimizer.test_custom import readme_class  # noqa: F401
from tests.optimizer.test_state import saved_and_loaded
from tests.twins import ENGINES, bits

pytestmark = pytest.mark.parametrize("backend", ENGINES)


def master(backend, values=(1.0, -3.0, 0.3), **options):
    param = torch.nn.Parameter(torch.tensor(values, dtype=BF16, device=DEVICE))
    param.grad = torch.full_like(param, 2**-12)
    return param, fusedopt.SGD([param], lr=1.0, master_weights=True, backend=backend, **options)


def test_small_updates_add_up_in_the_master(backend):
    param, optimizer = master(backend)
    start = param.detach().float()
    for _ in range(100):
        optimizer.step()
    assert torch.equal(optimizer.state[param]["master_param"], start - 100 * 2.0**-12)  # exact
    assert torch.equal(param, (start - 100 * 2.0**-12).to(BF16))


@pytest.mark.parametrize("write", [lambda p: p.clamp_(max=0.5), lambda p: p.zero_(), lambda p: p.mul_(2)])
def test_what_is_written_into_a_parameter_counts(backend, write):
    param, optimizer = master(backend)
    optimizer.step()
    before = optimizer.state[param]["master_param"].clone()
    kept = param.detach().clone()
    with torch.no_grad():
        write(param)
    start = torch.where(param == kept, before, param.detach().float())
    assert not torch.equal(start, before)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["master_param"], start - 2.0**-12)


def test_a_loaded_master_comes_back_exactly(backend):
    param, optimizer = master(backend)
    for _ in range(3):
        optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    weights = param.detach().clone()
    expected = optimizer.state[param]["master_param"].clone()
    other_param, other = master(backend, values=(9.0, 9.0, 9.0))
    other.load_state_dict(saved)
    with torch.no_grad():
        other_param.copy_(weights)
    other.step()
    assert torch.equal(other.state[other_param]["master_param"], expected - 2.0**-12)


def test_a_checkpoint_without_a_master_begins_with_the_parameter(backend):
    param = torch.nn.Parameter(torch.tensor([1.0, 0.3], dtype=BF16, device=DEVICE))
    theirs = torch.optim.Adam([param])
    param.grad = torch.ones_like(param)
    theirs.step()
    ours = fusedopt.Adam([param], lr=0.0, master_weights=True, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["fusedopt_master_weights"] is True
    ours.param_groups[0]["lr"] = 0.0
    ours.step()
    assert torch.equal(ours.state[param]["master_param"], param.detach().float())
    assert ours.state[param]["step"] == 2


def test_a_master_of_another_dtype_becomes_fp32(backend):
    param, optimizer = master(backend)
    optimizer.step()
    state = optimizer.state[param]
    state["master_param"] = state["master_param"].double()
    optimizer.step()
    assert state["master_param"].dtype == FP32
    assert torch.equal(state["master_param"], torch.tensor([1.0, -3.0, 0.30078125], device=DEVICE) - 2.0**-11)


def test_kahan_keeps_small_updates(backend):
    params = [torch.nn.Parameter(torch.ones(3, dtype=BF16, device=DEVICE)) for _ in range(2)]
    groups = [{"params": [params[0]], "fusedopt_kahan": True}, {"params": [params[1]]}]
    optimizer = fusedopt.SGD(groups, lr=1.0, backend=backend)
    for _ in range(100):
        for param in params:
            param.grad = torch.full_like(param, 2**-10)
        optimizer.step()
    assert params[1].tolist() == [1, 1, 1], "nearest rounding stalls"
    exact = 1 - 100 * 2.0**-10
    assert params[0].tolist() == [torch.tensor(exact).to(BF16).item()] * 3
    comp = optimizer.state[params[0]]["kahan_comp"]
    assert (params[0].float() + comp.float()).tolist() == [exact] * 3


def test_a_compensation_does_not_outlive_its_parameter(backend):
    param = torch.nn.Parameter(torch.full((3,), 100.0, dtype=BF16, device=DEVICE))
    optimizer = fusedopt.SGD([param], lr=1.0, kahan=True, backend=backend)
    param.grad = torch.full_like(param, 0.1)
    optimizer.step()
    assert optimizer.state[param]["kahan_comp"].ne(0).all()
    with torch.no_grad():
        param.zero_()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.eq(0).all()


@pytest.mark.parametrize("options", [{}, {"kahan": True}, {"master_weights": True}], ids=str)
def test_a_step_of_nothing_keeps_negative_zeros(backend, options):
    param = torch.nn.Parameter(torch.tensor([-0.0, 0.0, -1.0], dtype=BF16, device=DEVICE))
    optimizer = fusedopt.SGD([param], lr=0.0, backend=backend, **options)
    before = bits(param)
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert bits(param) == before
