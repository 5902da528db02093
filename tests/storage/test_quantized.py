"""The code of states in 8 bits: what it keeps of numbers, in torch and in every engine, against numpy."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt.kernels.language import tl, triton
from fusedopt.storage import quantized
from fusedopt.storage.quantized import BLOCK, SIGNED, UNSIGNED
from fusedopt.storage.quantized_tensor import Quantized, quantize
from tests import quantized_oracle
from tests.bounded import exact
from tests.twins import BACKENDS, ENGINES, bits

both_codes = pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
TABLES = {SIGNED: quantized_oracle.SIGNED, UNSIGNED: quantized_oracle.UNSIGNED}
LARGEST = float(torch.finfo(torch.float32).max)
finite = st.floats(-LARGEST, LARGEST, width=32)
magnitudes = st.floats(2.0**-80, 2.0**80, width=32)


@st.composite
def vectors(draw, elements=finite):
    """Numbers in one block or a few, of one magnitude or of all."""
    few = draw(st.lists(elements, min_size=1, max_size=20))
    places = draw(st.lists(st.integers(0, len(few) - 1), min_size=1, max_size=3 * BLOCK))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-30]))
    return torch.tensor([few[place] for place in places], dtype=torch.float32) * scale


def there_and_back(values, code, random=None):
    return quantized.decode(quantized.encode(values, code, random), len(values))


def of_code(values, code):
    return values.abs() if code == UNSIGNED else values


@both_codes
@settings(deadline=None, max_examples=200)
@given(values=vectors())
def test_is_within_half_a_step_and_keeps_signs_and_zeros(code, values):
    values = of_code(values, code)
    got = there_and_back(values, code)
    scale = quantized_oracle.scales_of(exact(values)).repeat(BLOCK)[: len(values)]
    codes = TABLES[code]
    ratio = exact(values.abs()) / np.where(scale == 0, 1, scale)
    above = np.minimum(np.searchsorted(codes, ratio), len(codes) - 1)
    step = (codes[above] - codes[np.maximum(above - 1, 0)]) * scale
    near = np.abs(exact(got) - exact(values)) <= step / 2 + exact(values.abs()) * 2.0**-18
    if code == UNSIGNED:  # the smallest code instead of 0
        smallest = codes[1] * scale
        near |= (ratio > 0) & (ratio < codes[1] / 2) & (np.abs(exact(got) - smallest) <= smallest * 2.0**-18)
        assert torch.equal(got == 0, values == 0)
    assert near.all()
    assert torch.equal(got[values == 0], values[values == 0])
    assert torch.equal(got.signbit(), values.signbit())


@both_codes
@settings(deadline=None, max_examples=100)
@given(values=vectors())
def test_is_monotone(code, values):
    values = of_code(values, code)[:BLOCK].sort().values
    got = there_and_back(values, code)
    assert (got.diff() >= 0).all()


@both_codes
@settings(deadline=None, max_examples=100)
@given(data=st.data(), scale=magnitudes)
def test_every_code_is_the_code_of_its_number(code, data, scale):
    """Also of one block after the other, if each has a number of the largest code, as every stored one has."""
    n_blocks = data.draw(st.integers(1, 3))
    drawn = data.draw(st.binary(min_size=n_blocks * BLOCK, max_size=n_blocks * BLOCK))
    codes = torch.frombuffer(bytearray(drawn), dtype=torch.uint8)
    codes[::BLOCK] = 255 if code == UNSIGNED else 127
    scales = (torch.full((n_blocks,), scale).view(torch.int32) & -16).view(torch.float32)
    memory = torch.cat([codes.view(code), scales.view(code)])
    assert torch.equal(quantized.encode(quantized.decode(memory, len(codes)), code), memory)


@both_codes
def test_the_numbers_of_all_codes(code):
    memory = torch.cat([torch.arange(BLOCK, dtype=torch.uint8), torch.ones(1).view(torch.uint8)]).view(code)
    got, table = exact(quantized.decode(memory, BLOCK)), TABLES[code]
    assert (got[: len(table)] == table).all()
    assert (got[len(table) :] == -table[: BLOCK - len(table)]).all()


@both_codes
@settings(deadline=None, max_examples=50)
@given(values=vectors(), seed=st.integers(0, 2**32 - 1))
def test_random_rounding_is_numpys(code, values, seed):
    values = of_code(values, code)
    random = torch.randint(0, 65536, (len(values),), generator=torch.Generator().manual_seed(seed))
    got, scales = exact(there_and_back(values, code, random)), quantized_oracle.scales_of(exact(values))
    near = exact(values.abs()) * 2.0**-18
    low, high = (
        quantized_oracle.rounded(exact(values) + error, scales, TABLES[code], random.numpy()) for error in (-near, near)
    )
    near = np.abs(got) * 2.0**-18  # where a scale is cut, the next one begins
    assert ((np.minimum(low, high) - near <= got) & (got <= np.maximum(low, high) + near)).all()


@both_codes
def test_random_rounding_is_right_on_average(code):
    values = torch.cat([torch.tensor([1.0]), torch.rand(BLOCK - 1, generator=torch.Generator().manual_seed(0))])
    every = torch.arange(0, 65536, 64)  # evenly: the mean is right to a 1024th of a step
    mean = torch.stack([there_and_back(values, code, torch.full((BLOCK,), int(r))) for r in every]).double().mean(0)
    assert ((mean - values).abs() <= values / 8 / 1024 + 2.0**-17).all()


@both_codes
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(code, bad):
    values = torch.ones(2 * BLOCK)
    values[3] = bad
    got = there_and_back(values, code)
    assert not got[:BLOCK].isfinite().any()
    assert got[3].isnan() if bad != bad else got[3] == bad
    assert (got[BLOCK:] == got[BLOCK]).all()
    assert got[BLOCK].isfinite()


@both_codes
def test_zeros_have_no_scale(code):
    memory = quantized.encode(torch.zeros(BLOCK + 3), code)
    assert not memory.any()
    assert len(memory) == quantized.size(BLOCK + 3) == 272 + 8


@pytest.mark.usefixtures("small_states_are_full")
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_parameters_and_other_groups_keep_full_states(backend):
    """And so do states that have to be exact. What a group asks for counts, also later."""
    sizes = {"small": 4095, "large": 4096, "other": 4096}
    params = {name: torch.nn.Parameter(torch.ones(size)) for name, size in sizes.items()}
    groups = [
        {"params": [params["small"], params["large"]]},
        {"params": [params["other"]], "fusedopt_state_dtype": torch.bfloat16},
    ]
    optimizer = fusedopt.Adam(groups, backend=backend, state_dtype="8bit")

    def dtypes():
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        states = {name: optimizer.state[param]["exp_avg_sq"] for name, param in params.items()}
        return {name: "8bit" if isinstance(state, Quantized) else state.dtype for name, state in states.items()}

    assert dtypes() == {"small": torch.float32, "large": "8bit", "other": torch.bfloat16}
    optimizer.param_groups[0]["fusedopt_state_dtype"] = torch.bfloat16
    before = optimizer.state[params["large"]]["exp_avg_sq"].dequantize()
    assert dtypes() == {"small": torch.float32, "large": torch.bfloat16, "other": torch.bfloat16}
    after = optimizer.state[params["large"]]["exp_avg_sq"].float()
    torch.testing.assert_close(after, before * 0.999 + 0.001, rtol=2**-7, atol=0)
    optimizer.param_groups[1]["fusedopt_state_dtype"] = "8bit"
    assert dtypes() == {"small": torch.float32, "large": torch.bfloat16, "other": "8bit"}


@pytest.mark.parametrize("dtype", ["8 bit", "int8", torch.int8, 8])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=re.escape(f"state_dtype of group 0: {dtype!r}, choose one of None,")):
        fusedopt.Adam([torch.ones(1)], state_dtype=dtype)


def test_a_name_that_is_no_state_is_refused():
    class Wrong(Keeper):
        nonnegative = ("of_nobody",)

    with pytest.raises(TypeError, match="`nonnegative` of Wrong names 'of_nobody'"):
        Wrong([torch.ones(1)])


# One step stores the gradient, in both codes; the next one makes what is decoded the parameter.


@triton.jit
def scalars(hyper, scalar_states):
    return (hyper[0],), ()


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    of_signed, of_unsigned = states
    decoded = tl.where(scalars[0] > 0, of_unsigned, of_signed)
    return decoded, (grad, tl.abs(grad))


class Keeper(fusedopt.FusedOptimizer):
    kernel = (scalars, update)
    hyperparameters = ("lr",)
    states = ("of_signed", "of_unsigned")
    nonnegative = ("of_unsigned",)

    def __init__(self, params, lr=0.0, **options):
        super().__init__(params, {"lr": lr}, **options)

    @staticmethod
    def scalars(hyper, scalar_states):
        return (hyper[0],), ()

    @staticmethod
    def reference(param, grad, states, scalars):
        param.copy_(states[1] if scalars[0] > 0 else states[0])
        states[0].copy_(grad)
        states[1].copy_(grad.abs())


@pytest.mark.parametrize("engine", ENGINES)
@settings(deadline=None, max_examples=15)
@given(values=vectors(), rounding=st.sampled_from(["nearest", "stochastic"]))
def test_every_engine_has_the_same_bits(engine, values, rounding):
    expected = SimpleNamespace()
    for backend in ("eager", engine):
        param = torch.nn.Parameter(torch.zeros(len(values)))
        optimizer = Keeper([param], backend=backend, state_dtype="8bit", rounding=rounding, seed=3)
        param.grad = values.clone()
        optimizer.step()
        state = optimizer.state[param]
        found = [bits(state[name]) for name in Keeper.states]
        for name, lr in zip(Keeper.states, (0.0, 1.0), strict=True):
            before = state[name].dequantize()
            optimizer.param_groups[0]["lr"] = lr
            with torch.no_grad():
                optimizer.step()
            assert torch.equal(param.detach(), before)
            param.grad = torch.zeros_like(param) if name is Keeper.states[-1] else values.clone()
        if backend == "eager":
            expected.found = found
        assert found == expected.found
        if rounding == "nearest":
            for name, code, of in zip(Keeper.states, (SIGNED, UNSIGNED), (values, values.abs()), strict=True):
                assert found[Keeper.states.index(name)] == bits(quantize(of, code, of.stride()))
