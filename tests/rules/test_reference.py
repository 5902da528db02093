"""The reference (backend="eager") against torch.optim, and against the oracle where torch has no like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.bounded import Array, Bounded, exact
from tests.cases import CASES, Case
from tests.tolerance import assert_close

SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = list(SHORT)
# The dtypes of a parameter and of its gradient.
MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
]

seeded = pytest.mark.parametrize("seed", [1], ids="seed={}".format)


class Noise:
    """Seeded random tensors of many magnitudes, zeros among them, that fp16 can hold and square."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self._device = device

    def __call__(self, *shape: int) -> Tensor:
        scale = torch.randint(-4, 4, shape, generator=self._generator)
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * 2.0**scale
        values[torch.rand(shape, generator=self._generator) < 0.1] = 0
        return values.to(self._device, self.dtype)

    def complex(self, *shape: int) -> Tensor:
        return torch.view_as_complex(self(*shape, 2))

    def channels_last(self, *shape: int) -> Tensor:
        return self(*shape).to(memory_format=torch.channels_last)


Layout = tuple[Callable[[Noise], Tensor], Callable[[Noise], Tensor]]

# How a parameter and its gradient lie.
LAYOUTS: dict[str, Layout] = {
    "vector": (lambda noise: noise(33), lambda noise: noise(33)),
    "matrix": (lambda noise: noise(5, 7), lambda noise: noise(5, 7)),
    "scalar": (lambda noise: noise(), lambda noise: noise()),
    "empty": (lambda noise: noise(0, 3), lambda noise: noise(0, 3)),
    "channels_last": (lambda noise: noise.channels_last(2, 3, 4, 5), lambda noise: noise.channels_last(2, 3, 4, 5)),
    "channels_last_grad_contiguous": (lambda noise: noise.channels_last(2, 3, 4, 5), lambda noise: noise(2, 3, 4, 5)),
    "transposed": (lambda noise: noise(7, 5).t(), lambda noise: noise(7, 5).t()),
    "transposed_grad_contiguous": (lambda noise: noise(7, 5).t(), lambda noise: noise(5, 7)),
    "grad_transposed": (lambda noise: noise(5, 7), lambda noise: noise(7, 5).t()),
    "grad_expanded": (lambda noise: noise(5, 7), lambda noise: noise(5, 1).expand(5, 7)),
    "grad_gaps": (lambda noise: noise(5, 7), lambda noise: noise(10, 14)[::2, ::2]),
    "grad_negative": (lambda noise: noise(33), lambda noise: torch._neg_view(noise(33))),
    "gaps": (lambda noise: noise(10, 14)[::2, ::2], lambda noise: noise(5, 7)),
    "gaps_both": (lambda noise: noise(10, 14)[::2, ::2], lambda noise: noise(10, 14)[::2, ::2]),
}
COMPLEX_LAYOUTS: dict[str, Layout] = {
    "complex": (lambda noise: noise.complex(4, 5), lambda noise: noise.complex(4, 5)),
    "complex_conj": (lambda noise: noise.complex(4, 5), lambda noise: noise.complex(4, 5).conj()),
    "complex_adjoint": (lambda noise: noise.complex(4, 5), lambda noise: noise.complex(5, 4).mH),
    "complex_gaps": (lambda noise: noise.complex(10, 14)[::2, ::2], lambda noise: noise.complex(5, 7).conj()),
}


def layouts_for(*dtypes: torch.dtype) -> dict[str, Layout]:
    """Complex tensors have parts of fp32 or fp64."""
    wide = all(dtype in (torch.float32, torch.float64) for dtype in dtypes)
    return {**LAYOUTS, **COMPLEX_LAYOUTS} if wide else LAYOUTS


def name_of(item: Any) -> str | None:
    """The id of a parametrised test."""
    if isinstance(item, Case):
        return item.id
    return SHORT.get(item) if isinstance(item, torch.dtype) else None


def set_grad(param: Tensor, grad: Tensor) -> None:
    if grad.dtype != param.dtype:
        param.grad_dtype = None
    param.grad = grad


@torch.no_grad()
def store(tensor: Tensor, values: Array) -> None:
    """Round the oracle's values into a tensor, of any layout."""
    real = torch.from_numpy(values.astype(np.float64))
    if tensor.is_complex():
        tensor.copy_(torch.view_as_complex(real.reshape(*tensor.shape, 2)))
    else:
        tensor.copy_(real.reshape(tensor.shape))


def compute_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


SCALAR_STATES = {"step", "mu_product", "eta", "mu"}


def element_states(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in SCALAR_STATES}


def oracle_step(case: Case, param: Tensor, state: dict[str, Any], step: int) -> tuple[Bounded, dict[str, Bounded]]:
    assert param.grad is not None
    states = {name: exact(value) for name, value in element_states(state).items()}
    return oracle.step(case, exact(param), exact(param.grad), states, step, compute_dtype(param))


def follow(
    optimizer: torch.optim.Optimizer,
    cases: list[Case],
    params: dict[str, Tensor],
    new_grads: Callable[[], list[Tensor]],
    house: Callable[[str, Tensor], Tensor] = lambda name, state: state,
    steps: int = 3,
) -> None:
    """Step beside the oracle; each step begins at the oracle's result of the last one, rounded to the stored dtypes.

    Args:
        optimizer: steps `params`.
        cases: for each parameter, what the optimizer is for it.
        params: the parameters by a name for messages.
        new_grads: makes the gradients of a step.
        house: gets every state once, after the step that made it, and may put it elsewhere.
        steps: how many.

    """
    for step in range(1, steps + 1):
        for param, grad in zip(params.values(), new_grads(), strict=True):
            set_grad(param, grad)
        grads = [exact(param.grad) for param in params.values()]
        expected = [
            oracle_step(case, param, optimizer.state[param], step)
            for case, param in zip(cases, params.values(), strict=True)
        ]
        optimizer.step()
        for case, (name, param), grad, (value, states) in zip(cases, params.items(), grads, expected, strict=True):
            where = f"{case.id}, {name}, step {step}"
            state = optimizer.state[param]
            assert state.get("step", step) == step, where
            assert set(element_states(state)) == set(states), where
            assert np.array_equal(exact(param.grad), grad), f"{where}: the gradient was written"
            assert_close(param, value, what=f"{where}, parameter")
            store(param, value.value)
            for key, new in states.items():
                assert_close(state[key], new, what=f"{where}, {key}")
                if step == 1:
                    state[key] = house(name, state[key])
                store(state[key], new.value)


def follow_layouts(
    case: Case, layouts: dict[str, Layout], backend: str, param_noise: Noise, grad_noise: Noise, steps: int = 3
) -> None:
    params = {name: torch.nn.Parameter(make(param_noise)) for name, (make, _) in layouts.items()}
    optimizer = case.make(params.values(), backend=backend)
    follow(
        optimizer, [case] * len(params), params, lambda: [new(grad_noise) for _, new in layouts.values()], steps=steps
    )


TORCH_CASES = [case for case in CASES if case.in_torch]


@seeded
@pytest.mark.usefixtures("fp64_scalars")
@pytest.mark.parametrize("layout", [*LAYOUTS, *COMPLEX_LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("case", TORCH_CASES, ids=name_of)
def test_equals_torch(case, dtype, layout, seed):
    """Several steps, each from torch's result of the last one."""
    make_param, make_grad = {**LAYOUTS, **COMPLEX_LAYOUTS}[layout]
    noise = Noise(seed, dtype)
    param = torch.nn.Parameter(make_param(noise))
    stride = param.stride()
    twin = torch.nn.Parameter(param.detach().clone())
    ours, torchs = case.make([param], backend="eager"), case.make_torch([twin])
    for step in range(1, 5):
        param.grad = make_grad(noise)
        twin.grad = param.grad.resolve_conj().resolve_neg().clone()
        value, states = oracle_step(case, twin, torchs.state[twin], step)
        ours.step()
        torchs.step()
        assert param.stride() == stride
        assert_close(param, Bounded(exact(twin), value.bound), what=f"step {step}, parameter")
        store(param, exact(twin))
        state, torch_state = ours.state[param], torchs.state[twin]
        assert set(state) == set(torch_state)
        for name, expected in element_states(torch_state).items():
            assert_close(state[name], Bounded(exact(expected), states[name].bound), what=f"step {step}, {name}")
            store(state[name], exact(expected))


@seeded
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_follows_the_oracle(case, dtype, seed):
    follow_layouts(case, layouts_for(dtype), "eager", Noise(seed, dtype), Noise(seed + 1, dtype))


@seeded
@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient_of_another_dtype(case, dtype, grad_dtype, seed):
    layouts = layouts_for(dtype, grad_dtype)
    follow_layouts(case, layouts, "eager", Noise(seed, dtype), Noise(seed + 1, grad_dtype))


@seeded
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_states_wider_than_the_parameter(case, dtype, seed):
    noise = Noise(seed, dtype)
    params = {"vector": torch.nn.Parameter(noise(100))}
    optimizer = case.make(params.values(), backend="eager")
    follow(optimizer, [case], params, lambda: [noise(100)], house=lambda _, state: state.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_initial_accumulator_value(dtype):
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    state = Case("Adagrad", {"initial_accumulator_value": 0.1}).make([param]).state[param]
    assert torch.equal(state["sum"], torch.full((3,), 0.1, dtype=dtype))
