"""Whole runs with states in 8 bits: every class, every engine, and what surrounds a step."""

from __future__ import annotations

import copy
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.storage.quantized_tensor import Quantized, quantize
from tests.conftest import DEVICE
from tests.twins import BACKENDS, ENGINES, bits

CUSTOM = Path(__file__).parents[2] / "docs" / "custom.md"
OPTIONS = {
    "SGD": {"lr": 0.02, "momentum": 0.9},
    "Adagrad": {"lr": 0.5},
    "RMSprop": {"lr": 0.02, "momentum": 0.5},
    "Adadelta": {"lr": 20.0},
    "Lion": {"lr": 0.03},
    "Muon": {"lr": 0.3},
    "ASGD": {"lr": 0.3},
    "Rprop": {},
    "AdaBelief": {},
}
CLASSES = sorted(name for name in fusedopt.__all__ if isinstance(getattr(fusedopt, name), type))
CLASSES = [name for name in CLASSES if name != "FusedOptimizer"] + ["AdaBelief"]
FULL = ("ASGD", "Rprop")  # whose states are never in 8 bits


@pytest.fixture(scope="module")
def ada_belief(tmp_path_factory):
    """The optimizer of docs/custom.md, from a file, as Triton reads it."""
    (source,) = (
        block for block in re.findall(r"```python\n(.*?)```", CUSTOM.read_text(), re.S) if "class Ada" in block
    )
    path = tmp_path_factory.mktemp("custom") / "ada_belief.py"
    path.write_text(source)
    spec = spec_from_file_location("ada_belief", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AdaBelief


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CLASSES)
def test_learns_as_with_full_states(name, engine, ada_belief):
    make = ada_belief if name == "AdaBelief" else getattr(fusedopt, name)
    target = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    losses = {}
    for state_dtype in (None, "8bit"):
        weight = nn.Parameter(torch.zeros_like(target))
        options = {"lr": 0.1, **OPTIONS.get(name, {}), "backend": engine, "state_dtype": state_dtype}
        optimizer = make([weight], **options)
        for _ in range(30):
            weight.grad = weight.detach() - target
            optimizer.step()
        losses[state_dtype] = float((weight.detach() - target).square().mean())
    states = [value for key, value in optimizer.state[weight].items() if key in optimizer.states]
    assert states
    assert all(isinstance(state, Quantized) != (name in FULL) for state in states)
    start = float(target.square().mean())
    assert losses[None] < start / 2
    assert abs(losses["8bit"] - losses[None]) <= start / 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_in_backward_are_ordinary_ones(backend):
    def make(params):
        return fusedopt.AdamW(params, lr=0.1, backend=backend, state_dtype="8bit", rounding="stochastic", seed=5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).to(DEVICE)
    twin = copy.deepcopy(model)
    steps, other = fusedopt.step_in_backward(model, make), make(twin.parameters())
    for seed in range(3):
        batch = torch.randn(8, 30, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        model(batch).square().sum().backward()
        other.zero_grad()
        twin(batch).square().sum().backward()
        other.step()
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert bits(param) == bits(expected)
        state, true = steps.optimizer.state[param], other.state[expected]
        assert {key: bits(value) for key, value in state.items()} == {key: bits(value) for key, value in true.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kept", ["kahan", "master_weights"])
def test_everything_at_once(kept, engine):
    """Scaled, clipped, skipped and averaged, with a transposed gradient: as in fp32, but for 8 bits."""
    options = {"lr": 0.01, "max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.5}
    generator = torch.Generator().manual_seed(1)
    values, grads = torch.randn(20, 30, generator=generator), torch.randn(4, 30, 20, generator=generator)
    weight = nn.Parameter(values.to(DEVICE, torch.bfloat16))
    true = nn.Parameter(weight.detach().float())
    mine = fusedopt.AdamW([weight], backend=engine, state_dtype="8bit", **{kept: True}, **options)
    full = fusedopt.AdamW([true], backend="eager", **options)
    for step, grad in enumerate(grads):
        weight.grad = (grad.to(DEVICE, torch.bfloat16) * 8).t()
        true.grad = grad.to(DEVICE, torch.bfloat16).t().float()
        if step == 0:
            weight.grad[0, 0] = true.grad[0, 0] = float("inf")
        mine.grad_scale = torch.tensor(8.0, device=DEVICE)
        mine.found_inf = torch.tensor(0.0, device=DEVICE)
        mine.step()
        full.step()
        if step == 0:
            assert not mine.state_dict()["state"].get(0, {}).get("exp_avg", torch.zeros(1)).any()
    assert int(mine.skipped_steps) == int(full.skipped_steps) == 1
    torch.testing.assert_close(mine.grad_norm, full.grad_norm, rtol=1e-5, atol=0)
    moved = float((true.detach() - values.to(true)).abs().max())
    for name, value in {"weight": weight, "ema": mine.state[weight]["ema"]}.items():
        expected = true.detach() if name == "weight" else full.state[true]["ema"]
        torch.testing.assert_close(value.detach().float(), expected, rtol=2**-8, atol=moved / 10, msg=name)
    # Each of three steps may be half a step of the code off. Terms of a mean cancel, those of squares do not.
    for name, near, cancelled in (("exp_avg", 0, 3 / 32), ("exp_avg_sq", 3 / 16, 2**-20)):
        state, expected = mine.state[weight][name].dequantize(), full.state[true][name]
        torch.testing.assert_close(state, expected, rtol=near, atol=float(expected.abs().max()) * cancelled)


def trained(backend, stride=(30, 1), steps=1):
    weight = nn.Parameter(torch.empty_strided((20, 30), stride, device=DEVICE))
    with torch.no_grad():
        weight.copy_(torch.linspace(-1, 1, 600, device=DEVICE).view(20, 30))
    optimizer = fusedopt.AdamW([weight], lr=0.1, backend=backend, state_dtype="8bit")
    for _ in range(steps):
        weight.grad = weight.detach().cos()
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_in_another_order_is_noticed(backend, debug, monkeypatch):
    monkeypatch.setattr("fusedopt.plan.DEBUG", debug)
    weight, optimizer = trained(backend, steps=2)
    twin, other = trained(backend, steps=2)
    state = optimizer.state[weight]["exp_avg"]
    state.data = state.dequantize().t().contiguous().t()  # the same numbers in other blocks
    true = other.state[twin]["exp_avg"]
    true.copy_(state)
    for param, each in ((weight, optimizer), (twin, other)):
        param.grad = torch.zeros_like(param)
        each.step()
    torch.testing.assert_close(weight.detach(), twin.detach(), rtol=0.1, atol=0.01)
    state = optimizer.state[weight]["exp_avg"]
    assert state.stride() == weight.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_of_another_shape_is_refused(backend, monkeypatch):
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)
    weight, optimizer = trained(backend, steps=2)
    state = optimizer.state[weight]
    state["exp_avg"] = Quantized(state["exp_avg"].memory, (600,), (1,), False)
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' of parameter 0 of group 0 is torch\.float32 of shape"):
        optimizer.step()


@pytest.mark.usefixtures("small_states_are_full")
def test_a_rank_may_have_small_parameters_only():
    """What an option acts on may lie on another rank."""
    fusedopt.AdamW([torch.ones(20)], state_dtype="8bit", rounding="stochastic")
    with pytest.raises(ValueError, match="has nothing to round"):
        fusedopt.Rprop([torch.ones(20)], state_dtype="8bit", rounding="stochastic")


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_adagrad_begins_in_shared_memory(dtype, value):
    weight = nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = fusedopt.Adagrad([weight], state_dtype="8bit", initial_accumulator_value=value)
    state = optimizer.state[weight]["sum"]
    full = torch.full_like(weight, complex(value, value) if dtype.is_complex else value)
    torch.testing.assert_close(state.dequantize(), full.detach(), rtol=2**-18, atol=0)
    assert bits(state) == bits(quantize(full.detach(), torch.uint8, (1,)))
    optimizer.share_memory()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["sum"] is state
    assert state.memory.is_shared()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_converts_nothing(backend):
    params = [nn.Parameter(torch.ones(30)) for _ in range(2)]
    optimizer = fusedopt.Adam(params, backend=backend)
    for param in params:
        param.grad = torch.ones(30)
    optimizer.step()
    optimizer.param_groups[0]["fusedopt_state_dtype"] = "8bit"
    del optimizer.state[params[1]]["exp_avg_sq"]
    with pytest.raises(RuntimeError, match="the state of parameter 1 of group 0 has no 'exp_avg_sq'"):
        optimizer.step()
    assert not isinstance(optimizer.state[params[0]]["exp_avg"], Quantized)


def test_flushed_numbers_are_not_zero():
    """The compiled engine compares bits: a number that is too small for the flag is still not 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        weight = nn.Parameter(torch.ones(300))
        optimizer = fusedopt.Adam([weight], betas=(0.0, 0.0), eps=0.0, backend=BACKENDS[1], state_dtype="8bit")
        weight.grad = torch.ones(300)
        weight.grad[1] = 1e-18
        optimizer.step()
        assert (optimizer.state[weight]["exp_avg_sq"].memory[:300] != 0).all()
    finally:
        torch.set_flush_denormal(False)
