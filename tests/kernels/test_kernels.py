"""The kernels of every engine against the oracle: every rule, dtype, size, alignment, layout and special value."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bounded import Array, Bounded, exact
from tests.cases import CASES, Case
from tests.rules.test_reference import (
    TORCH_CASES,
    Noise,
    element_states,
    follow,
    follow_layouts,
    layouts_for,
    name_of,
    oracle_step,
    seeded,
    store,
)
from tests.tolerance import assert_close
from tests.twins import BACKENDS, ENGINES, KERNEL_ENGINES, KERNELS

pytest.importorskip("triton")
import fusedopt.engines.tables
import fusedopt.step.hyper
from fusedopt.engines.signature import Signature

pytestmark = pytest.mark.usefixtures("poisoned")

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Stored dtypes of parameter, gradient and states.
DTYPES = [
    (FP64, FP64, FP64),
    (FP32, FP32, FP32),
    (BF16, BF16, BF16),
    (FP16, FP16, FP16),
    (BF16, FP32, BF16),
    (FP32, BF16, FP32),
    (BF16, BF16, FP32),
    (FP16, FP32, FP32),
]


class Memory:
    """Carves tensors out of larger buffers, whose other elements nobody may write."""

    GUARD = 16  # elements before and after: whole 16 bytes, so that only a shift makes a tensor unaligned
    VALUE = 0.75  # a number that every optimizer would change

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int, int]] = []

    def __call__(self, tensor: Tensor, shift: int = 0) -> Tensor:
        start = self.GUARD + shift
        stop = start + tensor.numel()
        buffer = torch.full((stop + self.GUARD,), self.VALUE, dtype=tensor.dtype, device=tensor.device)
        self._buffers.append((buffer, start, stop))
        return buffer[start:stop].copy_(tensor)

    def check(self) -> None:
        for buffer, start, stop in self._buffers:
            guards = torch.cat([buffer[:start], buffer[stop:]])
            assert (guards == self.VALUE).all(), f"written outside of a tensor of {stop - start} elements"


# That the interpreter gives the bits of what is compiled says test_same_bits; here it has every size and alignment.
FEW = [Case("SGD", {"lr": 0.1}), Case("AdamW", {"amsgrad": True})]
# Every rule in each dtype of the arithmetic, and with one of 16 bits: no rule sees which one is stored.
EVERY = [(dtype, dtype, dtype) for dtype in (FP64, FP32, BF16)]
ORACLE = [(KERNELS, case, dtypes) for dtypes in DTYPES for case in (CASES if dtypes in EVERY else FEW)]
if KERNELS != "triton":
    ORACLE += [("triton", case, dtypes) for dtypes in DTYPES for case in FEW]


@seeded
@pytest.mark.parametrize(
    ("backend", "case", "dtypes"),
    ORACLE,
    ids=[f"{backend}-{case.id}-{'-'.join(map(name_of, dtypes))}" for backend, case, dtypes in ORACLE],
)
def test_follows_the_oracle(backend, case, dtypes, device, seed):
    """Tensors of every critical size and alignment, in one launch; nothing beside them is written."""
    dtype, grad_dtype, state_dtype = dtypes
    noise, grad_noise = Noise(seed, dtype, device), Noise(seed + 1, grad_dtype, device)
    block, chunk = Signature(dtype, grad_dtype, (state_dtype, state_dtype)).tiling
    sizes = {str(n): n for n in (0, 1, 3, block - 1, block, block + 1, block + 17, chunk + 5)}
    # Two blocks each: whole ones where the gradient alone is unaligned, else those of the tail.
    sizes["gradient unaligned"] = block + 13
    sizes |= {f"{what} unaligned": block // 4 + 13 for what in ("parameter", "state", "parameter gradient state")}
    memory = Memory()
    params = {name: torch.nn.Parameter(memory(noise(n), "parameter" in name)) for name, n in sizes.items()}
    grads = Memory()
    optimizer = case.make(params.values(), backend=backend)
    follow(
        optimizer,
        [case] * len(params),
        params,
        lambda: [grads(grad_noise(n), "gradient" in name) for name, n in sizes.items()],
        house=lambda name, state: memory(state.to(state_dtype), "state" in name),
        steps=2,
    )
    memory.check()
    grads.check()


@seeded
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_layouts(case, dtype, device, seed):
    noises = Noise(seed, dtype, device), Noise(seed + 1, dtype, device)
    follow_layouts(case, layouts_for(dtype), KERNELS, *noises, steps=2)


@seeded
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(FP64, FP64), (FP32, FP64), (BF16, FP32)], ids=name_of)
def test_layouts_of_other_dtypes(dtype, grad_dtype, device, seed):
    case = Case("AdamW", {"amsgrad": True})
    noises = Noise(seed, dtype, device), Noise(seed + 1, grad_dtype, device)
    follow_layouts(case, layouts_for(dtype, grad_dtype), KERNELS, *noises, steps=2)


@seeded
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_the_reference(case, dtype, device, seed):
    noise = Noise(seed, dtype, device)
    param = torch.nn.Parameter(noise(3000))
    twin = torch.nn.Parameter(param.detach().clone())
    kernels, reference = case.make([param], backend=KERNELS), case.make([twin], backend="eager")
    for step in range(1, 4):
        param.grad = noise(3000)
        twin.grad = param.grad.clone()
        value, states = oracle_step(case, twin, reference.state[twin], step)
        kernels.step()
        reference.step()
        pairs = {"parameter": (param, twin, value)}
        pairs |= {name: (kernels.state[param][name], reference.state[twin][name], states[name]) for name in states}
        for name, (ours, others, oracles) in pairs.items():
            expected = Bounded(exact(others), oracles.bound, others=oracles.others)
            assert_close(ours, expected, what=f"step {step}, {name}")
            store(ours, exact(others))


def elementwise(before: Array, after: Array) -> Array:
    """A bound where nothing cancels: no update is larger than what it begins with and what it gives together.

    With it also the signs of zeros are compared. What was infinite may become 0 (Rprop forgets a gradient).
    """
    return np.where(np.isfinite(before), before, 0) + after


def overall(before: Array, after: Array) -> Array:
    """A bound of several updates on end: the same, ample one for every element, for fp64."""
    return np.full_like(after, 8 * (before.max(initial=0) + after.max()))


def step_beside_torch(
    ours: torch.optim.Optimizer,
    torchs: torch.optim.Optimizer,
    params: list[Tensor],
    twins: list[Tensor],
    bound: Callable[[Array, Array], Array],
    what: str,
) -> None:
    """One step of both from the same values; then ours gets torch's."""

    def tensors(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> dict[str, Tensor]:
        states = {f"{i}.{k}": v for i, p in enumerate(params) for k, v in element_states(optimizer.state[p]).items()}
        return {**{f"parameter {i}": p for i, p in enumerate(params)}, **states}

    before = {name: exact(tensor) for name, tensor in tensors(torchs, twins).items()}
    ours.step()
    torchs.step()
    actual, expected = tensors(ours, params), tensors(torchs, twins)
    assert set(actual) == set(expected)
    values = {name: exact(tensor) for name, tensor in expected.items()}
    for name, value in values.items():
        scale = bound(abs(before.get(name, np.zeros_like(value))), abs(value))
        assert_close(actual[name], Bounded(value, scale), what=f"{what}, {name}")
        zero = value == 0
        if bound is elementwise and not isinstance(ours, fusedopt.NAdam):  # whose kernel divides a sum, torch the terms
            assert np.array_equal(np.signbit(exact(actual[name])[zero]), np.signbit(value[zero])), f"{what}, {name}"
    for name, value in values.items():
        store(actual[name], value)


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, 1.0]
HUGE = -3e38  # its square overflows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TORCH_CASES, ids=name_of)
def test_special_values_as_torch(case, backend, device):
    """Parameters and gradients of every pair of special values, with states of zero and of ordinary numbers."""
    # A fused multiply-add decides whether the variance of a huge gradient is inf or inf - inf.
    values = torch.tensor(SPECIAL if case.options.get("centered") else [*SPECIAL, HUGE], device=device)
    if case.optimizer == "SGD" and case.options.get("momentum"):
        values = values[~(values.signbit() & (values == 0))]  # 0 * 0.0 + -0.0, where torch copies the first -0.0
    first, special = (grid.reshape(-1).clone() for grid in torch.meshgrid(values, values, indexing="ij"))
    ordinary = torch.linspace(-2, 2, len(first), device=device)
    for grads in ([special, ordinary], [ordinary, special, ordinary]):
        param, twin = torch.nn.Parameter(first.clone()), torch.nn.Parameter(first.clone())
        ours, torchs = case.make([param], backend=backend), case.make_torch([twin])
        for step, grad in enumerate(grads, start=1):
            param.grad, twin.grad = grad.clone(), grad.clone()
            step_beside_torch(ours, torchs, [param], [twin], elementwise, f"step {step} of {len(grads)}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_subnormal_gradients_follow_the_oracle(case, dtype, backend, device):
    """Not torch, which multiplies them by the step size first, so that they vanish."""
    values = torch.finfo(dtype).tiny * torch.tensor([1, 0.5, -0.5, 1 / 16, -1 / 64, 1 / 128], dtype=FP64)
    param = torch.nn.Parameter(torch.linspace(1, 2, len(values), device=device).to(dtype))
    optimizer = case.make([param], backend=backend)
    follow(optimizer, [case], {"subnormal": param}, lambda: [values.to(device, dtype)])


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("optimizer", sorted({case.optimizer for case in CASES} - {"ASGD", "Rprop"}))
def test_infinite_parameter_without_decay_leaves_the_states_finite(optimizer, backend, device):
    param = torch.nn.Parameter(torch.tensor([math.inf, 1.0], device=device))
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    ours = Case(optimizer, {"weight_decay": 0, **options}).make([param], backend=backend)
    param.grad = torch.ones_like(param)
    ours.step()
    assert param[0] == math.inf
    assert all(state.isfinite().all() for state in ours.state[param].values())


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"eps_in_sqrt": True}], ids=str)
def test_centered_rmsprop_has_no_negative_variance(options, backend, device):
    """Where torch takes the root of a rounding error below 0."""
    grad = torch.full((3,), 0.3, device=device)
    states = {"step": 1.0, "square_avg": grad**2 * (1 - 1e-6), "grad_avg": grad.clone()}

    def stepped(make, options, **extra):
        param = torch.nn.Parameter(torch.ones(3, device=device))
        optimizer = make([param], centered=True, lr=1e-9, **options, **extra)
        optimizer.state[param] = {**copy.deepcopy(states), "momentum_buffer": torch.zeros_like(param)}
        param.grad = grad
        optimizer.step()
        return param

    in_torch = {key: value for key, value in options.items() if key != "eps_in_sqrt"}
    states["step"] = torch.tensor(1.0)
    assert stepped(torch.optim.RMSprop, in_torch, foreach=False).isnan().all(), "torch has mended it: drop the clamp"
    assert stepped(fusedopt.RMSprop, options, backend=backend).isfinite().all()


@seeded
@pytest.mark.parametrize("backend", ENGINES)
def test_groups_with_their_own_options(backend, device, seed):
    rows = [
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True},
        {"lr": 0.2, "maximize": True},
        {"lr": 0.3, "weight_decay": 0.2, "decoupled_weight_decay": True},
    ]
    noise = Noise(seed, FP32, device)
    params = {f"group {i}, {n}": torch.nn.Parameter(noise(50)) for i in range(len(rows)) for n in "ab"}
    pairs = list(zip(*[iter(params.values())] * 2, strict=True))
    groups = [{"params": list(pair), **row} for pair, row in zip(pairs, rows, strict=True)]
    optimizer = fusedopt.Adam(groups, backend=backend)
    cases = [Case("Adam", row) for row in rows for _ in "ab"]
    follow(optimizer, cases, params, lambda: [noise(50) for _ in params])


# torch takes the first gradient twice where a parameter without a momentum buffer stands twice.
SEQUENTIAL_CASES = [case for case in TORCH_CASES if not case.options.get("momentum") or case.optimizer != "SGD"]


@seeded
@pytest.mark.usefixtures("fp64_scalars")
@pytest.mark.parametrize("case", SEQUENTIAL_CASES, ids=name_of)
def test_duplicates_step_one_after_the_other(case, device, seed):
    noise = Noise(seed, FP64, device)
    param, other = torch.nn.Parameter(noise(40)), torch.nn.Parameter(noise(7))
    twin, other_twin = copy.deepcopy(param), copy.deepcopy(other)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours, torchs = case.make([param, other, param], backend=KERNELS), case.make_torch([twin, other_twin, twin])
    for step in range(1, 4):
        for mine, torch_s in ((param, twin), (other, other_twin)):
            mine.grad = noise(*mine.shape)
            torch_s.grad = mine.grad.clone()
        step_beside_torch(ours, torchs, [param, other], [twin, other_twin], overall, f"step {step}")
        if case.optimizer != "SGD":
            assert ours.state[param]["step"] == 2 * step


@seeded
@pytest.mark.parametrize("backend", KERNEL_ENGINES)
@pytest.mark.usefixtures("fp64_scalars")
@pytest.mark.parametrize("case", TORCH_CASES, ids=name_of)
def test_shared_memory_steps_one_after_the_other(backend, case, device, monkeypatch, seed):
    """Overlapping parameters, and gradients that are the memory of a parameter before or after them."""
    # The programs of a launch may run in any order; the interpreter's is the right one by chance.
    in_order = fusedopt.engines.tables.chunks_of
    monkeypatch.setattr(fusedopt.engines.tables, "chunks_of", lambda *sizes: in_order(*sizes)[::-1].copy())
    noise = Noise(seed, FP64, device)
    memory = 10 + noise(60).clamp(-2, 2)  # far from 0, so that no gradient is one whose sign rounding decides

    def parameters():
        base = memory.clone()
        params = [torch.nn.Parameter(base[a:b]) for a, b in ((0, 24), (8, 40), (30, 54))]
        return [*params, torch.nn.Parameter(memory[:24].clone()), torch.nn.Parameter(memory[:24].clone())]

    params, twins = parameters(), parameters()
    ours, torchs = case.make(params, backend=backend), case.make_torch(twins)
    for step in range(1, 3):
        grads = [noise(*param.shape).clamp(-0.5, 0.5) for param in params]
        for stepped in (params, twins):
            for param, grad in zip(stepped, grads, strict=True):
                param.grad = grad.clone()
            stepped[3].grad = stepped[2].detach()
            stepped[0].grad = stepped[4].detach()
        step_beside_torch(ours, torchs, params, twins, overall, f"step {step}")


@seeded
@pytest.mark.parametrize("backend", KERNEL_ENGINES)
@pytest.mark.parametrize("debug", [False, True])  # under which every step makes new tables
def test_hyperparameters_on_the_device(backend, device, monkeypatch, seed, debug):
    """`prepare` reads tensors through their addresses, at each step again; numbers beside them stay numbers."""
    monkeypatch.setattr("fusedopt.plan.DEBUG", debug)
    monkeypatch.setattr(
        fusedopt.step.hyper, "_number", lambda value, *_: value if isinstance(value, Tensor) else float(value)
    )
    noise = Noise(seed, FP32, device)
    values = [noise(40) for _ in range(3)]
    tensors = {
        "lr": torch.tensor(0.1, dtype=FP32, device=device),
        "betas": (torch.tensor(0.8, dtype=FP64, device=device), torch.tensor([0.99], dtype=FP32, device=device)),
        "weight_decay": torch.tensor(0.5, dtype=BF16, device=device),
        "eps": torch.tensor(1e-3, dtype=FP32, device=device),
    }

    def numbers():
        return {k: tuple(map(float, v)) if isinstance(v, tuple) else float(v) for k, v in tensors.items()}

    def optimizer(options):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        groups = [{"params": params[:1], "lr": 0.3}, {"params": params[1:], **options}]
        return fusedopt.Adam(groups, backend=backend), params

    (by_address, params), (by_value, twins) = optimizer(tensors), optimizer(numbers())
    for factor in (0.5, 0.25, 1.0):
        for param, twin in zip(params, twins, strict=True):
            param.grad = noise(40)
            twin.grad = param.grad.clone()
        by_address.step()
        by_value.step()
        assert all(map(torch.equal, params, twins))
        for tensor in (tensors["lr"], tensors["betas"][0], tensors["weight_decay"]):
            tensor.mul_(factor)
        by_value.param_groups[1].update(numbers())
