"""Low precision: every mode with every optimizer, by the reference and by the kernels, against numpy."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
import fusedopt.engines.tables
from fusedopt.storage.quantized_tensor import Quantized
from fusedopt.storage.states import create_states
from tests import oracle, quantized_oracle, rounding_oracle
from tests.bounded import Array, Bounded, exact
from tests.cases import CASES, FP32, MODES, Case, Mode
from tests.rules.test_reference import LAYOUTS, SCALAR_STATES, Noise, seeded
from tests.tolerance import ULPS, assert_close, ulp
from tests.twins import BACKENDS, ENGINES

pytestmark = pytest.mark.usefixtures("poisoned")

# One case for each rule and its set of states, the last one, which has the most options.
DISTINCT = list({(case.optimizer, *sorted(oracle.state_names(case))): case for case in CASES}.values())
COMBINATIONS = [(case, mode) for case, mode in product(DISTINCT, MODES) if not mode.asks_for_nothing(case)]
# Every mode with few and with many states, every rule with the modes of most code; the rest says test_same_bits.
INTERPRETED = [
    (case, mode)
    for case, mode in COMBINATIONS
    if case.optimizer in ("SGD", "AdamW") or mode.id in ("bfloat16-kahan", "bfloat16-rounding=stochastic")
]
ORACLE = [("eager", *pair) for pair in COMBINATIONS] + [("triton", *pair) for pair in INTERPRETED]
both_backends = pytest.mark.parametrize("backend", ENGINES)
SEED = 7
STATE_OF = {"master_weights": "master_param", "kahan": "kahan_comp"}


def assert_between(actual: torch.Tensor, expected: Bounded, random: Array, what: str) -> None:
    """Rounded with these random bits from a number within the tolerance of fp32: no element may be off."""
    dtype = actual.dtype
    got = exact(actual)
    right = ~np.isfinite(expected.bound) & ~np.isnan(got)
    for value in (expected.value, *expected.others):
        with np.errstate(invalid="ignore"):
            near = ULPS[FP32] * ulp(np.where(np.isfinite(expected.bound), expected.bound, 0), FP32)
            low, high = (rounding_oracle.stochastic(value + error, dtype, random) for error in (-near, near))
            right |= (low <= got) & (got <= high)
    wrong = np.flatnonzero(~right)
    assert not len(wrong), f"{what}: {len(wrong)} elements are wrong, first {wrong[0]}: {got[wrong[0]]}"


def assert_coded(state: Quantized, expected: Bounded, random: Array | None, what: str) -> None:
    """What the code makes of numbers within the tolerance of fp32: no element may be off."""
    got, scales = quantized_oracle.parts_of(state)
    assert np.array_equal(exact(state), got), f"{what}: not what the codes mean"
    codes = quantized_oracle.UNSIGNED if state.memory.dtype == torch.uint8 else quantized_oracle.SIGNED
    near = ULPS[FP32] * ulp(expected.bound, FP32)
    size = np.abs(expected.value)
    least, most = (quantized_oracle.scales_of(np.maximum(size + error, 0)) for error in (-near, near))
    one = 1 + 2.0**-19  # of 20 bits, where the next number would begin
    assert ((least <= scales * one) & (scales <= most * one)).all(), f"{what}: another scale"
    # The ratio is rounded in fp32 before it is compared.
    near = near + size * 2.0**-18
    low, high = (quantized_oracle.rounded(expected.value + error, scales, codes, random) for error in (-near, near))
    low, high = np.minimum(low, high), np.maximum(low, high)
    wrong = np.flatnonzero(~((low <= got) & (got <= high)))
    assert not len(wrong), f"{what}: {len(wrong)} elements are wrong, first {wrong[0]}: {got[wrong[0]]}"


def check_step(case: Case, mode: Mode, optimizer: fusedopt.FusedOptimizer, params: list[Any], step: int) -> None:
    """Step once; every number must follow from what was stored before."""
    stochastic = mode.options.get("rounding") == "stochastic"
    expected = []
    for param in params:
        state = optimizer.state[param]
        kept = {name: exact(state[name]) for name in ("master_param", "kahan_comp") if name in state}
        start = rounding_oracle.with_kept(exact(param), kept, param.dtype)
        states = {name: exact(state[name]) for name in oracle.state_names(case) & state.keys()}
        expected.append(oracle.step(case, start, exact(param.grad), states, step, FP32))
    optimizer.step()
    for i, (param, (value, states)) in enumerate(zip(params, expected, strict=True)):
        state, where = optimizer.state[param], f"{case.id}, {mode.id}, step {step}, parameter {i}"
        named = {"": (param, value), **{name: (state[name], states[name]) for name in states}}
        streams = ["", *optimizer.states]
        for name, (tensor, bounded) in named.items():
            if not name and mode.options.keys() & {"master_weights", "kahan"}:
                check_kept(param, state, bounded, where)
            elif stochastic and (tensor.dtype.itemsize == 2 or isinstance(tensor, Quantized)):
                random = rounding_oracle.random_bits(SEED, i, step, streams.index(name), tensor.numel())
                check = assert_coded if isinstance(tensor, Quantized) else assert_between
                check(tensor, bounded, random, f"{where}, {name}")
            elif isinstance(tensor, Quantized):
                assert_coded(tensor, bounded, None, f"{where}, {name}")
            else:
                assert_close(tensor, bounded, what=f"{where}, {name}")
        for name in states:
            asked = mode.options.get("state_dtype", param.dtype)
            if asked == "8bit":
                is_exact = optimizer.is_exact(name, optimizer.param_groups[0])
                assert isinstance(state[name], Quantized) != is_exact, where
                asked = param.dtype if is_exact else FP32
            assert state[name].dtype == asked, where
        extra = {STATE_OF[option] for option in mode.options.keys() & STATE_OF}
        assert state.keys() - SCALAR_STATES == states.keys() | extra, where


def check_kept(param: torch.Tensor, state: dict[str, Any], value: Bounded, where: str) -> None:
    if "master_param" in state:
        master = state["master_param"]
        assert master.dtype == FP32, where
        assert_close(master, value, what=f"{where}, master")
        assert torch.equal(param, master.to(param.dtype)), f"{where}: not the rounding of its master"
        return
    comp = state["kahan_comp"]
    assert comp.dtype == param.dtype, where
    assert_close(param, value, what=f"{where}, parameter")
    half = ulp(np.maximum(abs(exact(param)), abs(value.value)), param.dtype) / 2
    assert (abs(exact(comp)) <= half).all(), f"{where}: a compensation of more than rounding can lose"
    # The sum is as near as the rounding of the compensation allows.
    lost = ulp(half, param.dtype) / 2 + ULPS[FP32] * ulp(value.bound, FP32)
    others = [np.where(np.isnan(other), value.value, other) for other in value.others]
    errors = [abs(exact(param) + exact(comp) - true) for true in (value.value, *others)]
    assert (np.min(errors, axis=0) <= lost).all(), f"{where}: the sum with the compensation is wrong"


@seeded
@pytest.mark.parametrize(
    ("backend", "case", "mode"), ORACLE, ids=[f"{backend}-{case.id}-{mode.id}" for backend, case, mode in ORACLE]
)
def test_every_mode_of_every_optimizer(case, mode, backend, device, seed):
    """Three steps; before the last one somebody writes into a parameter, which counts from then on."""
    noise = Noise(seed, mode.dtype, device)
    params = [torch.nn.Parameter(noise(size)) for size in (200, 0, 1, 4096 + 77)]
    optimizer = case.make(params, backend=backend, seed=SEED, **mode.options)
    for param in params:  # some begin with more than zeros, which are rounded too
        create_states(optimizer, param, optimizer.state[param], optimizer.param_groups[0])
    for step in range(1, 4):
        for param in params:
            param.grad = noise(param.numel())
        if step == 3:
            with torch.no_grad():
                params[0].clamp_(-0.5, 0.5)
                params[0][:20] = 0
        check_step(case, mode, optimizer, params, step)


@seeded
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, mode, device, seed):
    """The random numbers follow the memory, so that both backends round alike: here nothing else can differ.

    Tensors are laid out for both engines of kernels by the same code, so that the interpreter has the modes of most.
    """
    engines = ENGINES if "rounding" in mode.options else BACKENDS
    make_param, make_grad = LAYOUTS[layout]
    noise = Noise(seed, mode.dtype, device)
    values = make_param(noise)
    options = {"lr": 2.0**-6, "momentum": 0.5, "seed": SEED, **mode.options}
    params = [torch.nn.Parameter(torch.empty_like(values).copy_(values)) for _ in engines]
    if "gaps" in layout:
        params = [torch.nn.Parameter(make_param(Noise(seed, mode.dtype, device))) for _ in engines]
    optimizers = [fusedopt.SGD([p], backend=b, **options) for p, b in zip(params, engines, strict=True)]
    for _ in range(3):
        grad = make_grad(noise)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad
            optimizer.step()
        first, *others = ({"": p, **optimizer.state[p]} for p, optimizer in zip(params, optimizers, strict=True))
        for other in others:
            assert first.keys() == other.keys()
            for name, value in first.items():
                tolerance = 2.0**-20 if value.dtype == FP32 else 0
                torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)
