"""Where matrices lie while they are multiplied: shapes, memory, pieces, padding, and what sits out."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt.engines import compiled, direct
from fusedopt.matrices import batches
from tests.conftest import DEVICE
from tests.matrices.exact import exact_products, step, stepped_by_torch  # noqa: F401
from tests.twins import BACKENDS, ENGINES, KERNEL_ENGINES

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def random(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def parameters(shapes, dtype=torch.float64):
    return [torch.nn.Parameter(random(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def gradients(params, steps=2):
    seeds = itertools.count(1000)
    return [[random(tuple(param.shape), next(seeds), param.dtype) for param in params] for _ in range(steps)]


def matrices_in(params, split=1, dim=-2):
    """Every matrix, and piece of one, as a tensor of its own."""
    flat = [matrix for param in params for matrix in param.detach().reshape(-1, *param.shape[-2:])]
    pieces = [list(matrix.chunk(split, dim) if isinstance(split, int) else matrix.split(split, dim)) for matrix in flat]
    return [piece for of_matrix in pieces for piece in of_matrix]


def assert_as_torch(params, grads, split=1, dim=-2, backend="auto", **options):
    """The same numbers as torch's, which steps every matrix, or piece of one, by itself."""
    expected = stepped_by_torch(
        matrices_in(params, split, dim), [matrices_in(of_step, split, dim) for of_step in grads], options
    )
    groups = {} if split == 1 else {"split": split, "split_dim": dim}
    optimizer = fusedopt.Muon(params, backend=backend, **options, **groups)
    step(optimizer, params, grads)
    momenta = matrices_in([optimizer.state[param]["momentum_buffer"] for param in params], split, dim)
    for actual, momentum, (param, of_torch) in zip(matrices_in(params, split, dim), momenta, expected, strict=True):
        torch.testing.assert_close(actual, param.detach(), **CLOSE)
        torch.testing.assert_close(momentum, of_torch, **CLOSE)
    return optimizer


SHAPES = [(8, 16), (8, 16), (16, 8), (8, 8), (3, 5), (5, 3), (1, 7), (7, 1), (1, 1), (4, 8, 16), (2, 3, 5, 4)]


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", ENGINES)
def test_shapes(backend):
    params = parameters(SHAPES)
    assert_as_torch(params, gradients(params), lr=0.1, backend=backend)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: random((16, 8), 0).t(),
        lambda: random((5, 3), 0).t(),
        lambda: random((4, 16, 8), 0).mT,
        lambda: random((8, 4, 16), 0).permute(1, 0, 2),
        lambda: random((16, 8, 4), 0).permute(2, 1, 0),
        lambda: random((20, 34), 0)[::2, ::2],
    ],
    ids=["transposed", "odd", "batch", "matrices within each other", "reversed", "gaps"],
)
@pytest.mark.parametrize("is_contiguous", [True, False], ids=["", "strided gradients"])
def test_layouts(make, is_contiguous, backend):
    params = [torch.nn.Parameter(make()), *parameters([(8, 16)])]
    grads = gradients(params)
    if not is_contiguous:
        grads = [[grad.mT.contiguous().mT for grad in of_step] for of_step in grads]
    assert_as_torch(params, grads, lr=0.1, backend=backend)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("split", [3, (8, 8, 8), (8, 15, 1), (3, 21)])
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_pieces(split, dim, adjust_lr_fn):
    whole = {-2: (24, 16), -1: (16, 24)}[dim]
    params = parameters([whole, (2, *whole)])
    params.append(torch.nn.Parameter(random(whole[::-1], 5).t()))
    assert_as_torch(params, gradients(params), split, dim, lr=0.1, adjust_lr_fn=adjust_lr_fn)


@pytest.mark.usefixtures("exact_products")
def test_groups_of_different_iterations():
    params = parameters([(8, 16)] * 3)
    options = [{"ns_steps": 5}, {"ns_steps": 2, "lr": 0.3}, {"ns_coefficients": (2.0, -1.5, 0.5), "eps": 1.0}]
    grads = gradients(params)
    expected = [
        stepped_by_torch([param], [[of_step[i]] for of_step in grads], {"lr": 0.1, **options[i]})[0][0]
        for i, param in enumerate(params)
    ]
    groups = [{"params": [param], **of_group} for param, of_group in zip(params, options, strict=True)]
    step(fusedopt.Muon(groups, lr=0.1), params, grads)
    for param, of_torch in zip(params, expected, strict=True):
        torch.testing.assert_close(param, of_torch, **CLOSE)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", ENGINES)
def test_what_has_no_gradient_sits_out(backend):
    """Also between two that have one, in a batch of its own, for the first time, and for a while."""
    params = parameters([(8, 16)] * 4 + [(3, 5)] * 2 + [(16, 8)])
    grads = gradients(params, 5)
    for of_step, missing in zip(grads, [(1, 4, 6), (), (0, 5), (1, 2), (6,)], strict=True):
        for place in missing:
            of_step[place] = None
    expected = stepped_by_torch(params, grads, {"lr": 0.1})
    optimizer = fusedopt.Muon(params, lr=0.1, backend=backend)
    step(optimizer, params, grads)
    for param, (of_torch, momentum) in zip(params, expected, strict=True):
        torch.testing.assert_close(param, of_torch, **CLOSE)
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], momentum, **CLOSE)


@pytest.mark.usefixtures("exact_products")
def test_large_batches_are_multiplied_one_part_after_the_other(monkeypatch):
    monkeypatch.setattr(batches, "TOGETHER", 3 * 8 * 16)
    params = parameters([(8, 16)] * 7)
    optimizer = assert_as_torch(params, gradients(params), lr=0.1)
    (workspace,) = optimizer._stepper.plan._step._batches._workspaces.values()
    assert workspace.other.numel() == 3 * 8 * 16


def test_no_matrix_is_too_empty():
    params = [
        torch.nn.Parameter(torch.zeros(shape, device=DEVICE))
        for shape in [(0, 4), (4, 0), (0, 3, 4), (3, 0, 4), (8, 8)]
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fusedopt.Muon(params, lr=0.1)
    optimizer.step()
    assert params[-1].isfinite().all()
    assert (params[-1] != 0).any()
    assert optimizer.state[params[0]]["momentum_buffer"].shape == (0, 4)


@pytest.mark.parametrize("backend", ENGINES)
def test_zero_gradients_give_zero_updates(backend):
    params = parameters([(8, 16), (3, 5)], torch.float32)
    before = [param.detach().clone() for param in params]
    step(
        fusedopt.Muon(params, lr=0.1, weight_decay=0, backend=backend),
        params,
        [[torch.zeros_like(p) for p in params]] * 3,
    )
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def products(count):
    """How often a step calls each operation of torch that multiplies or normalizes."""
    params = parameters([(8, 16), (16, 8), (8, 8)] * count, torch.float32)
    optimizer = fusedopt.Muon(params, lr=0.1)
    step(optimizer, params, gradients(params, 1))
    with Operations() as seen:
        optimizer.step()
    counts = Counter(seen.names)
    return {name: counts[name] for name in ("bmm", "baddbmm", "linalg_vector_norm", "clamp_", "div", "_foreach_copy_")}


def test_products_do_not_depend_on_the_number_of_matrices():
    """For each of three shapes three products an iteration, and one norm."""
    once = {"linalg_vector_norm": 3, "clamp_": 3, "div": 3}
    assert products(1) == products(20) == {"bmm": 15, "baddbmm": 30, **once, "_foreach_copy_": 0}


@pytest.mark.parametrize("missing", [slice(None, None, 2), slice(None, None, 3), slice(10, 30)], ids=str)
def test_absent_matrices_break_no_batch(missing):
    """They are multiplied with the others, whatever is there; only a long gap is left out."""
    params = parameters([(8, 16)] * 60, torch.float32)
    optimizer = fusedopt.Muon(params, lr=0.1)
    step(optimizer, params, gradients(params, 1))
    for param in params[missing]:
        param.grad = None
    before = [param.detach().clone() for param in params]
    with Operations() as seen:
        optimizer.step()
    assert Counter(seen.names)["linalg_vector_norm"] == 1
    for param, was in zip(params, before, strict=True):
        assert torch.equal(param, was) == (param.grad is None)


def test_few_matrices_of_a_large_batch_are_multiplied_alone():
    params = parameters([(8, 16)] * 60, torch.float32)
    optimizer = fusedopt.Muon(params, lr=0.1)
    step(optimizer, params, gradients(params, 1))
    (batch,) = optimizer._stepper.plan._step._batches._batches.values()
    assert batch._runs({0, 59}) == [(0, 1), (59, 60)]
    assert batch._runs({3, 5, 59}) == [(3, 6), (59, 60)]
    assert batch._runs(None) == [(0, 60)]
    assert batch._runs(set()) == []


@pytest.mark.parametrize("backend", KERNEL_ENGINES)
def test_launches_do_not_depend_on_the_number_of_matrices(backend, monkeypatch):
    """One `prepare` and one `update` before the products, which step AdamW's parameters too, and as many after them."""
    launched = []
    bound = compiled.CompiledKernel.bound if backend == "compiled" else direct.TritonKernel.bound

    def counted(kernel, *args):
        launch = bound(kernel, *args)
        return lambda *lasts: (launched.append(1), launch(*lasts))

    where = compiled.CompiledKernel if backend == "compiled" else direct.TritonKernel
    monkeypatch.setattr(where, "bound", counted)
    for count in (1, 20):
        params = parameters([(8, 16), (16, 8), (3, 5)] * count, torch.float32)
        others = parameters([(8,), (8, 8)] * count, torch.float32)
        optimizer = fusedopt.Muon([{"params": params}, {"params": others, "use_muon": False}], backend=backend)
        for of_step in gradients([*params, *others], 2):
            launched.clear()
            step(optimizer, [*params, *others], [of_step])
            assert len(launched) == 5


def test_the_memory_is_that_of_the_plan_before():
    """A new plan takes over what fits, and needs other memory for what does not."""
    params = parameters([(8, 16)] * 2 + [(3, 5)], torch.float32)
    optimizer = fusedopt.Muon(params, lr=0.1)
    step(optimizer, params, gradients(params, 1))
    first = {name: tensor.data_ptr() for name, tensor in optimizer._stepper.plan._step.memory._held.items()}
    params[0].data = params[0].data.clone()
    step(optimizer, params, gradients(params, 1))
    again = {name: tensor.data_ptr() for name, tensor in optimizer._stepper.plan._step.memory._held.items()}
    assert first == again


@pytest.mark.usefixtures("exact_products")
def test_nothing_of_the_plan_before_is_left_around_a_smaller_matrix():
    """Both shapes are padded to the same one."""
    first, second = parameters([(7, 7), (1, 5)])
    optimizer = fusedopt.Muon([first], lr=0.1)
    step(optimizer, [first], gradients([first], 1))
    optimizer.param_groups[0]["params"] = [second]
    grads = gradients([second], 2)
    ((expected, _),) = stepped_by_torch([second], grads, {"lr": 0.1})
    step(optimizer, [second], grads)
    torch.testing.assert_close(second, expected, **CLOSE)


def test_the_size_of_the_memory_is_told():
    """2 bytes an element for directions, as much for the largest batch and two of its squares."""
    params = parameters([(8, 16)] * 4 + [(16, 16)], torch.float32)
    optimizer = fusedopt.Muon(params, lr=0.1)
    step(optimizer, params, gradients(params, 1))
    directions = 4 * 8 * 16 + 16 * 16
    assert optimizer._stepper.plan._step.nbytes == 2 * (directions + 4 * 8 * 16 + 2 * 4 * 8 * 8)
