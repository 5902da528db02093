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
from fusedopt.storage.quantized_tensor import Quantized
from tests.conftest import DEVICE
from tests.twins import BACKENDS, ENGINES, bits

CUSTOM = Path(__file__).parents[2] / "docs" / "custom.md"
OPTIONS = {
    "SGD": {"lr": 0.02, "momentum": 0.9},
    "Adagrad": {"lr": 0.5},
    "RMSprop": {"lr": 0.02, "momentum": 0.5},
    "Adadelta": {"lr": 20.0},
    "Lion": {"lr": 0.03},
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
