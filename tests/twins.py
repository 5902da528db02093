"""The same parameters and gradients for fusedopt and torch.optim, and what an optimizer holds, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.storage.quantized_tensor import Quantized
from tests.cases import CASES, MATRIX_CASES
from tests.conftest import DEVICE, HAS_GPU

# What is true of every engine is tested on two of them; Triton's code, where it is at stake, in its interpreter too.
KERNELS = "triton" if HAS_GPU else "compiled"
BACKENDS = ["eager", KERNELS]
KERNEL_ENGINES = ["triton"] if HAS_GPU else ["triton", "compiled"]
ENGINES = ["eager", *KERNEL_ENGINES]
SHAPES = [(3, 4), (5,), ()]
MATRIX_SHAPES = [(3, 4), (5, 2), (2, 2)]
IN_TORCH = [case for case in [*CASES, *MATRIX_CASES] if case.in_torch]
OPTIMIZERS = sorted({case.optimizer for case in IN_TORCH})
# What steps element by element, whatever the shape. Beside torch's numbers the others ask for `exact_products`.
ELEMENTWISE = [name for name in OPTIMIZERS if name != "Muon"]
# Options under which every class has states.
OPTIONS: dict[str, dict[str, Any]] = {name: {"momentum": 0.9} if name == "SGD" else {} for name in OPTIMIZERS}


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)
    return (values if dtype.is_complex else values.real.contiguous()).to(DEVICE, dtype)


def make_params(dtype: torch.dtype = torch.float64, of: str = "SGD") -> list[Parameter]:
    """Three parameters that this class steps."""
    shapes = MATRIX_SHAPES if of == "Muon" else SHAPES
    return [Parameter(random(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def make(name: str, params: Any, **options: Any) -> fusedopt.FusedOptimizer:
    return getattr(fusedopt, name)(params, **{**OPTIONS[name], **options})


def make_torch(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    loop = {"foreach": False} if name in ELEMENTWISE else {}
    return getattr(torch.optim, name)(params, **{**OPTIONS[name], **loop, **options})


def in_group(**options: Any) -> dict[str, Any]:
    """The options of every optimizer as the keys of a param group."""
    return {f"fusedopt_{name}": value for name, value in options.items()}


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(params: list[Any], seed: int) -> None:
    for i, param in enumerate(params):
        param.grad = random(tuple(param.shape), 100 * (seed + 1) + i, param.dtype)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """A step for each number, which decides the gradients."""
    for step in steps:
        set_grads(params_of(optimizer), step)
        optimizer.step()


def assert_same(mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer, *, check_dtype: bool = True) -> None:
    """Same parameters and same saved states, but for rounding."""
    torch.testing.assert_close(params_of(mine), params_of(theirs))
    saved, expected = mine.state_dict()["state"], theirs.state_dict()["state"]
    assert saved.keys() == expected.keys()
    for key in saved:
        assert saved[key].keys() == expected[key].keys()
        torch.testing.assert_close(dict(saved[key]), dict(expected[key]), check_device=False, check_dtype=check_dtype)


def bits(value: Any) -> Any:
    """What a tensor is, in a form that compares by bits: -0.0 is not 0.0, NaN equals the same NaN."""
    if not isinstance(value, Tensor):
        return repr(value)
    if isinstance(value, Quantized):
        return bits(value.memory), tuple(value.shape), value.stride()
    if value.layout != torch.strided or value.device.type == "meta":
        return str(value)
    raw = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return value.dtype, tuple(value.shape), value.stride(), bytes(raw.view(torch.uint8).tolist())


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every bit that a step may write."""
    params = params_of(optimizer)
    state = {id(key): values for key, values in optimizer.state.items()}
    return {
        "params": [bits(param) for param in params],  # or what else stands in a group
        "grads": [bits(getattr(param, "grad", None)) for param in params],
        "state": {
            key: {name: bits(value) for name, value in values.items()} if isinstance(values, dict) else repr(values)
            for key, values in state.items()
        },
    }
