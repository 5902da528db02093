"""The two ways to run a rule without a GPU, Triton's interpreter and machine code of the CPU, bit for bit."""

from __future__ import annotations

import ctypes
import inspect
import sys
from ctypes.util import find_library
from functools import cache, partialmethod
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cases import AVERAGED, CASES, FP16, FP32, MATRIX_CASES, MODES, Case, Mode
from tests.rules.test_reference import Noise, name_of, seeded
from tests.storage.test_precision import DISTINCT

pytest.importorskip("triton")
pytest.importorskip("numba")
from triton.runtime import interpreter

from fusedopt.engines import code_cache, compiled
from fusedopt.kernels.cpu import build, multi_tensor

PLAIN = [Mode(dtype, {}) for dtype in (torch.float64, FP32, torch.bfloat16, FP16)]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, 1.0, -3e38, 7e4]
OTHER_DTYPES = {FP32: torch.bfloat16, torch.bfloat16: FP32, FP16: FP32, torch.float64: FP32}


@pytest.fixture(autouse=True)
def one_library(monkeypatch):
    """The interpreter's logarithms and powers of 2 are numpy's, whose last bit may differ from that of the system's."""
    system = ctypes.CDLL(find_library("m"))
    for name in ("exp2", "log2"):
        function = getattr(system, name)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
        each = np.vectorize(function, otypes=[np.float64])
        operation = partialmethod(interpreter.InterpreterBuilder.unary_op, op=each)
        monkeypatch.setattr(interpreter.InterpreterBuilder, f"create_{name}", operation)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of all elements but NaN, which has to be NaN."""
    as_bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.dtype.itemsize]
    equal = a.view(as_bits) == b.view(as_bits)
    return a.dtype == b.dtype and bool((equal | (a.isnan() & b.isnan())).all())


def parameters(noise: Noise, dtype: torch.dtype, dims: int = 1) -> list[torch.nn.Parameter]:
    """Special values, subnormals and ordinary ones, in more than one program and at odd addresses."""
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    subnormal = torch.finfo(dtype).tiny * torch.linspace(-1, 1, 60, dtype=torch.float64)
    values = [special.repeat_interleave(len(SPECIAL)), subnormal, noise(17000), noise(35)[3:]]
    return [torch.nn.Parameter(value.to(dtype)[(None,) * (dims - 1)]) for value in values]


def gradients(noise: Noise, dtype: torch.dtype, grad_dtype: torch.dtype, step: int) -> list[Tensor]:
    special = torch.tensor(SPECIAL, dtype=torch.float64).repeat(len(SPECIAL))
    subnormal = torch.finfo(dtype).tiny * torch.linspace(1, -0.5, 60, dtype=torch.float64)
    ordinary = torch.linspace(-2, 2, len(special), dtype=torch.float64)
    values = [special if step % 2 else ordinary, subnormal, noise(17000), noise(35)[3:]]
    return [value.to(grad_dtype) for value in values]


def run(backend: str, case: Case, mode: Mode, seed: int, grad_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What there is after each of a few steps, one of which is scaled and one of which is skipped."""
    noise = Noise(seed, mode.dtype, torch.device("cpu"))
    params = parameters(noise, mode.dtype, dims=1 + (case in MATRIX_CASES))
    optimizer = case.make(params, backend=backend, **mode.options)
    tensors = {}
    for step in range(1, 5):
        grads = gradients(noise, mode.dtype, grad_dtype or mode.dtype, step)
        for param, grad in zip(params, grads, strict=True):
            param.grad_dtype, param.grad = grad.dtype, grad.view(param.shape)
        optimizer.grad_scale = torch.tensor(4.0) if step == 2 else None
        optimizer.found_inf = torch.tensor(float(step == 3))
        optimizer.step()
        for i, param in enumerate(params):
            named = {"parameter": param, "gradient": param.grad, **optimizer.state[param]}
            tensors |= {f"step {step}, {name} {i}": value.detach().clone() for name, value in named.items()}
    return tensors


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not same_bits(value, other[name])]


def differences(case: Case, mode: Mode, seed: int, grad_dtype: torch.dtype | None = None) -> list[str]:
    """What the two engines do not agree about."""
    return different(*(run(backend, case, mode, seed, grad_dtype) for backend in ("triton", "compiled")))


AMSGRAD = Case("AdamW", {"amsgrad": True, "maximize": True})


# No rule sees 16 bits, only what is stored of it does: once for each set of states.
RULES = [(case, mode) for case in CASES for mode in PLAIN[:2]]
RULES += [(case, PLAIN[2 + i % 2]) for i, case in enumerate(DISTINCT)]
RULES += [(case, PLAIN[i % 4]) for i, case in enumerate(MATRIX_CASES)]


@seeded
@pytest.mark.parametrize(("case", "mode"), RULES, ids=[f"{case.id}-{mode.id}" for case, mode in RULES])
def test_every_rule_gives_the_same_bits(case, mode, seed):
    assert not differences(case, mode, seed)


# Of Muon's two updates, each in a few: a mode is the same for every rule.
FEW = [
    Mode(torch.bfloat16, {"kahan": True, "ema_decay": 0.9}),
    Mode(torch.bfloat16, {"rounding": "stochastic"}),
    MODES[-3],
]
WAYS = [(case, mode) for mode in [*MODES, *AVERAGED] for case in (Case("SGD"), AMSGRAD)]
WAYS += [(MATRIX_CASES[0], mode) for mode in FEW]


@seeded
@pytest.mark.parametrize(("case", "mode"), WAYS, ids=[f"{case.id}-{mode.id}" for case, mode in WAYS])
def test_every_way_to_store_numbers_gives_the_same_bits(case, mode, seed):
    if mode.asks_for_nothing(case):
        pytest.skip("these options have nothing to act on")
    assert not differences(case, mode, seed)


@seeded
@pytest.mark.parametrize("mode", PLAIN, ids=name_of)
def test_gradients_of_another_dtype_give_the_same_bits(mode, seed):
    assert not differences(AMSGRAD, mode, seed, OTHER_DTYPES[mode.dtype])


MUTANTS = [  # what is written in another way, where, and a mode that shows it
    ("store(param_address, offset, param, PARAM)", "store(param_address, offset, param * 1.0000001, PARAM)", FP32, {}),
    ("store(state_addresses[i], offset, state, STATES[i])", "pass", FP32, {}),
    ("state = states[i]", "state = states[0]", FP32, {}),
    ("unscale * scaled_grad, GRAD)", "grad, GRAD)", torch.bfloat16, {"max_grad_norm": 1.0}),
    ('store(kept_address, offset, param, "float32")', "pass", FP16, {"master_weights": True}),
    ("param - nearest(param, PARAM)", "nearest(param, PARAM) - param", torch.bfloat16, {"kahan": True}),
    ("lerp(ema, param, ema_weight)", "lerp(param, ema, ema_weight)", FP32, {"ema_decay": 0.9}),
    ("where(ema_begun == 0, 1.0, 1 - ema_decay)", "1 - ema_decay", FP32, {"ema_decay": 0.9}),
    ("random_bits(bits, draw, 0,", "random_bits(bits, draw, 1,", torch.bfloat16, {"rounding": "stochastic"}),
    ("1 + i), draw, 1 + i,", "1 + i), draw, 2 + i,", torch.bfloat16, {"rounding": "stochastic"}),
    ("store_number(addresses[i], scalar_states[i])", "pass", FP32, {}),
    ("where(skip, 0, rounding_advance)", "rounding_advance", torch.bfloat16, {"rounding": "stochastic"}),
    ('if (grad_address == 0) | (load(control_ptr, 1, "float64") != 0):', "if grad_address == 0:", FP32, {}),
    ("range(start, tile_stop)", "range(start, tile_stop - 1)", FP32, {}),
    ("(state_address + quantized.first_scale(numel),)", "(state_address,)", FP32, {"state_dtype": "8bit"}),
    ("load(scale_addresses[i], start // quantized.BLOCK", "load(scale_addresses[i], 0", FP32, {"state_dtype": "8bit"}),
    ("store(values + VALUES * i, lane,", "store(values, lane,", FP32, {"state_dtype": "8bit"}),
]


@pytest.mark.parametrize(("old", "new", "dtype", "options"), MUTANTS, ids=[old for old, *_ in MUTANTS])
def test_a_mistake_in_the_twin_is_noticed(old, new, dtype, options, tmp_path, monkeypatch):
    """Its bits are not those without the mistake, which the tests above find in the interpreter too."""
    right = run("compiled", AMSGRAD, Mode(dtype, options), seed=0)
    source = Path(multi_tensor.__file__).read_text()
    assert source.count(old) == 1
    kernel = "prepare" if old in inspect.getsource(multi_tensor.prepare) else "update"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = spec_from_file_location("fusedopt.kernels.cpu.mutant", path)
    monkeypatch.setitem(sys.modules, spec.name, module := module_from_spec(spec))
    spec.loader.exec_module(module)
    monkeypatch.setattr(build, "KERNELS", {**build.KERNELS, kernel: getattr(module, kernel)})
    monkeypatch.setenv(code_cache.VARIABLE, "")
    known = compiled._kernel
    anew = cache(known.__wrapped__)
    monkeypatch.setattr(
        compiled, "_kernel", lambda name, constants: (anew if name == kernel else known)(name, constants)
    )
    assert different(right, run("compiled", AMSGRAD, Mode(dtype, options), seed=0))
