"""Scaling, clipping and skipping in the step: beside GradScaler, clip_grad_norm_ and float64, on both backends."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import fusedopt
from tests.bounded import Bounded, exact
from tests.cases import AVERAGED, BF16, CASES, FP16, FP32, MATRIX_CASES, MODES, Case, Mode
from tests.conftest import DEVICE
from tests.optimizer.test_state import saved_and_loaded
from tests.tolerance import assert_close
from tests.twins import ENGINES, bits, make_params, params_of, random, set_grads, snapshot, train

FP64, COMPLEX = torch.float64, torch.complex64
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.parametrize("backend", ENGINES)


def zeros(*shapes_and_dtypes):
    """Parameters that one step of SGD at lr 1 makes the negative of what it takes for their gradients."""
    return [Parameter(torch.zeros(shape, dtype=dtype, device=DEVICE)) for shape, dtype in shapes_and_dtypes]


def give(params, scale=1.0):
    for i, param in enumerate(params):
        param.grad = random(tuple(param.shape), 70 + i, param.dtype) * scale


def norm_of(params):
    """In long double."""
    squares = [
        np.square(exact(param.grad.coalesce().values() if param.grad.is_sparse else param.grad)) for param in params
    ]
    return np.sqrt(sum(part.sum() for part in squares))


def sgd(params, backend, **options):
    return fusedopt.SGD(params, lr=1.0, backend=backend, **options)


def assert_steps_along(params, factor):
    """Each parameter, which was zero, is minus its gradient times the factor."""
    for i, param in enumerate(params):
        grad = param.grad.to_dense() if param.grad.is_sparse else param.grad
        # The factor is rounded to the dtype of the arithmetic, and so is the product.
        expected = -(Bounded.of(exact(grad)) * Bounded.of(factor))
        assert_close(param, expected, what=f"parameter {i}")


EVERY_DTYPE = [
    ((3, 4), FP32),
    ((100,), BF16),
    ((), FP64),
    ((7, 2), FP16),
    ((5,), COMPLEX),
    ((0, 3), FP32),
    ((65,), FP32),
]


# Clipping.


@pytest.mark.parametrize("max_grad_norm", [0, 0.5, 3, 1e-30])
def test_clips_by_the_norm_of_all_gradients(backend, max_grad_norm):
    """Of every dtype, also complex, and without elements."""
    params = zeros(*EVERY_DTYPE)
    optimizer = sgd(params, backend, max_grad_norm=max_grad_norm)
    give(params)
    grads = [bits(param.grad) for param in params]
    norm = norm_of(params)
    optimizer.step()
    assert_steps_along(params, max_grad_norm / (norm + 1e-6))
    assert [bits(param.grad) for param in params] == grads
    assert (optimizer.grad_norm.shape, optimizer.grad_norm.dtype) == ((), FP64)
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-14)


@pytest.mark.parametrize("max_grad_norm", [100, INF])
def test_short_gradients_stay_as_they_are(backend, max_grad_norm):
    clipped, plain = zeros(*EVERY_DTYPE), zeros(*EVERY_DTYPE)
    for params, options in ((clipped, {"max_grad_norm": max_grad_norm}), (plain, {})):
        give(params)
        sgd(params, backend, **options).step()
    assert list(map(bits, clipped)) == list(map(bits, plain))


@pytest.mark.parametrize("values", [(1.0, 2.0), (NAN, 1.0), (INF, 1.0), (1e300, 1.0), (-INF, NAN)], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.25, INF])
def test_clips_as_torch(backend, max_norm, values):
    """Also by a norm that is not finite: fp64 squares overflow at 1e300, and one NaN makes all of them NaN."""
    params, twins = zeros(((3,), FP64), ((2,), FP64)), zeros(((3,), FP64), ((2,), FP64))
    for pair, value in zip(zip(params, twins, strict=True), values, strict=True):
        for param in pair:
            param.grad = torch.full_like(param, 0.5)
            param.grad[0] = value
    ours, theirs = sgd(params, backend, max_grad_norm=max_norm), torch.optim.SGD(twins, lr=1.0, foreach=False)
    ours.step()
    norm = clip_grad_norm_(twins, max_norm)
    theirs.step()
    torch.testing.assert_close(ours.grad_norm, norm, equal_nan=True)
    torch.testing.assert_close(params, twins, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "value"), [(FP32, 1e30), (FP32, 3e38), (FP32, 1e-30), (FP16, 6e4), (BF16, 3e38), (COMPLEX, 1e30)]
)
def test_no_square_overflows_or_vanishes(backend, dtype, value):
    params = zeros(((40,), dtype), ((3, 3), dtype))
    give(params)
    for param in params:
        param.grad = param.grad / param.grad.abs().max() * value
    optimizer = sgd(params, backend, max_grad_norm=value / 8)
    optimizer.step()
    norm = norm_of(params)
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-14)
    assert_steps_along(params, np.longdouble(value / 8) / (norm + 1e-6))


def test_lays_no_weight_on_how_gradients_lie(backend):
    """Transposed, with gaps, conjugated, sparse with a row twice, missing, unaligned."""
    params = zeros(((4, 3), FP32), ((4, 3), FP32), ((5,), COMPLEX), ((2, 3), FP32), ((8,), FP32), ((8,), FP32))
    give(params)
    params[0].grad = random((3, 4), 1, FP32).t()
    params[1].grad = random((4, 6), 2, FP32)[:, ::2]
    params[2].grad = params[2].grad.conj()
    rows = torch.tensor([[1, 0, 1]], device=DEVICE)
    params[3].grad = torch.sparse_coo_tensor(rows, random((3, 3), 3, FP32), (2, 3), check_invariants=True)
    params[4].grad = None
    params[5].grad = random((9,), 4, FP32)[1:]
    optimizer = sgd(params, backend, max_grad_norm=0.5)
    optimizer.step()
    assert not params.pop(4).any()
    norm = norm_of(params)
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-14)
    assert_steps_along(params, 0.5 / (norm + 1e-6))


def test_many_chunks_give_the_same_bits_again(backend):
    params = zeros(((200_003,), FP32), ((70_000,), FP32), ((33,), FP32))
    give(params)
    norms = []
    for _ in range(2):
        optimizer = sgd(params, backend, max_grad_norm=0.5)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert float(norms[0]) == pytest.approx(float(norm_of(params)), rel=1e-13)
    assert bits(norms[0]) == bits(norms[1])


def test_the_norm_is_that_of_the_last_step(backend):
    params = zeros(((3,), FP32), ((3,), FP32))
    optimizer = sgd(params, backend)
    give(params)
    optimizer.step()
    assert optimizer.grad_norm is None, "nobody asked for it"
    optimizer.param_groups[0]["fusedopt_max_grad_norm"] = 1.0
    optimizer.step()
    first = optimizer.grad_norm
    kept = float(first)
    params[0].grad = None
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(float(norm_of(params[1:])))
    optimizer.zero_grad()
    optimizer.step()
    assert float(optimizer.grad_norm) == 0, "as clip_grad_norm_ says"
    assert float(first) == kept
    fresh = sgd(zeros(((3,), FP32)), backend, max_grad_norm=1.0)
    fresh.step()
    assert float(fresh.grad_norm) == 0


def test_one_value_for_all_groups(backend):
    """Which may be stepped by the kernels and by the reference, and changes when all of them change."""
    params = zeros(((30,), FP32), ((4,), BF16), ((6,), FP32))
    groups = [{"params": params[:1]}, {"params": params[1:2], "fused": False}, {"params": params[2:], "lr": 2.0}]
    optimizer = sgd(groups, backend, max_grad_norm=0.5, skip_nonfinite=True)
    give(params)
    optimizer.step()
    norm = norm_of(params)
    assert_steps_along(params[:2], 0.5 / (norm + 1e-6))
    assert_steps_along(params[2:], 2 * 0.5 / (norm + 1e-6))
    before = snapshot(optimizer)
    params[1].grad[0] = NAN
    optimizer.step()
    assert snapshot(optimizer)["params"] == before["params"]
    assert optimizer.skipped_steps == 1
    for group in optimizer.param_groups:
        group["fusedopt_max_grad_norm"] = np.float32(0.25)
    for param in params:
        param.data.zero_()
    give(params)
    optimizer.step()
    assert_steps_along(params[:2], 0.25 / (norm + 1e-6))


# Skipping.


def poison(params, value=NAN):
    """One bad element, not in the first parameter."""
    grad = params[-1].grad
    (torch.view_as_real(grad) if grad.is_complex() else grad).reshape(-1)[-1] = value


def run(optimizer, plan):
    """A step for each number; one in brackets has a gradient that is not finite."""
    params = params_of(optimizer)
    for step in plan:
        set_grads(params, step[0] if isinstance(step, list) else step)
        if isinstance(step, list):
            poison(params)
            before, begun = snapshot(optimizer), optimizer._stepper.plan is not None
            optimizer.step()
            after = snapshot(optimizer)
            assert after["params"] == before["params"]
            assert after["state"] == before["state"] or not begun
        else:
            optimizer.step()
    return optimizer


def everything(optimizer):
    """The bits of parameters and states, whichever object holds them."""
    states = [optimizer.state.get(param, {}) for param in params_of(optimizer)]
    return list(map(bits, params_of(optimizer))), [{k: bits(v) for k, v in state.items()} for state in states]


SKIPPED = [(case, Mode(FP64, {})) for case in [*CASES, MATRIX_CASES[0]]]
SKIPPED += [(Case("AdamW", {"lr": 0.01, "amsgrad": True}), mode) for mode in [*MODES, *AVERAGED, Mode(COMPLEX, {})]]


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("case", "mode"), SKIPPED, ids=[f"{case.id}-{mode.id}" for case, mode in SKIPPED])
def test_a_skipped_step_has_not_been(backend, case, mode):
    """Bit for bit, with the step counts and the counts of random roundings and averages, also as the first."""
    options = {**mode.options, "backend": backend, "skip_nonfinite": True}
    skipping = run(case.make(make_params(mode.dtype, case.optimizer)[:2], **options), [[1], 0, [2], 1])
    plain = run(case.make(make_params(mode.dtype, case.optimizer)[:2], **options), [0, 1])
    assert everything(skipping) == everything(plain)
    assert (skipping.skipped_steps, plain.skipped_steps) == (2, 0)
    if case.in_torch and mode.dtype == FP64:
        theirs = case.make_torch(make_params(of=case.optimizer)[:2])
        train(theirs, range(2))
        torch.testing.assert_close(params_of(skipping), params_of(theirs))


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16, COMPLEX], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite(backend, value, dtype):
    params = zeros(((3,), FP32), ((40,), dtype))
    optimizer = sgd(params, backend, skip_nonfinite=True)
    give(params)
    poison(params, value)
    optimizer.step()
    assert not any(param.any() for param in params)
    assert optimizer.skipped_steps == 1
    poison(params, torch.finfo(dtype).max)
    optimizer.step()
    assert all(param.all() for param in params)
    assert optimizer.skipped_steps == 1


def test_off_by_default(backend):
    params = zeros(((3,), FP32), ((4,), FP32))
    optimizer = sgd(params, backend)
    give(params)
    poison(params)
    optimizer.step()
    assert params[0].all()
    assert params[1][-1].isnan()
    assert optimizer.skipped_steps == 0


FIRST = [
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
]


@pytest.mark.parametrize("options", FIRST, ids=str)
def test_sgd_begins_its_buffer_at_the_first_step_that_is_taken(backend, options):
    """With the gradient itself, not dampened. Until then there is none to save."""
    ours = fusedopt.SGD(make_params(), lr=0.1, skip_nonfinite=True, backend=backend, **options)
    run(ours, [[0], [1]])
    saved = saved_and_loaded(ours.state_dict())
    assert all(state == {} for state in saved["state"].values())
    theirs = torch.optim.SGD(make_params(), lr=0.1, foreach=False, **options)
    theirs.load_state_dict(copy.deepcopy(saved))
    other = next(engine for engine in ENGINES if engine != backend)
    loaded = fusedopt.SGD(make_params(), lr=0.1, backend=other, **options)
    loaded.load_state_dict(saved)
    for optimizer in (ours, loaded, copy.deepcopy(ours), theirs):
        train(optimizer, range(2, 4))
        torch.testing.assert_close(params_of(optimizer), params_of(ours))
        for param, twin in zip(params_of(optimizer), params_of(ours), strict=True):
            mine, true = optimizer.state[param]["momentum_buffer"], ours.state[twin]["momentum_buffer"]
            torch.testing.assert_close(mine, true)
    assert all(state.keys() == {"momentum_buffer"} for state in ours.state_dict()["state"].values())
