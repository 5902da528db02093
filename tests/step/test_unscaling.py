"""A step that is given a `grad_scale` leaves every gradient unscaled, as torch's fused steps and GradScaler do."""

import pytest
import torch
from torch.nn import Parameter

import fusedopt
import fusedopt.engines.tables
from tests.bounded import Bounded, exact
from tests.cases import BF16, FP16, FP32
from tests.conftest import DEVICE
from tests.step.test_gate import COMPLEX, INF, NAN, zeros
from tests.step.test_grad_scaler import number
from tests.tolerance import assert_close
from tests.twins import ENGINES, KERNELS, bits, params_of, random, set_grads, snapshot

FP64 = torch.float64
BLOCK = 4096  # of the interpreter
CLIPPED = {"max_grad_norm": 1e-3, "skip_nonfinite": True}
both_backends = pytest.mark.parametrize("backend", ENGINES)
pytestmark = pytest.mark.usefixtures("poisoned")


def scaled_step(optimizer, grad_scale, found_inf=0.0):
    """As GradScaler makes it."""
    optimizer.grad_scale, optimizer.found_inf = number(grad_scale), number(found_inf)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def unscaled(grad, scale):
    """What GradScaler's own pass makes of a gradient: it multiplies by 1 / scale in fp32, or in fp64."""
    values = grad.detach().to_dense().resolve_conj().resolve_neg().clone()
    parts = torch.view_as_real(values) if values.is_complex() else values
    torch._amp_foreach_non_finite_check_and_unscale_([parts], number(0.0), number(scale).double().reciprocal().float())
    return values


def assert_unscaled(params, before, scale):
    for param, grad in zip(params, before, strict=True):
        assert (param.grad.dtype, param.grad.shape) == (grad.dtype, grad.shape)
        assert torch.equal(param.grad.detach().to_dense(), unscaled(grad, scale))


def grads_of(params):
    return [param.grad.detach().clone() for param in params]


def with_grads(*grads):
    """A parameter for each gradient."""
    params = [Parameter(random(tuple(grad.shape), seed, grad.dtype)) for seed, grad in enumerate(grads)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


@pytest.mark.parametrize("scale", [65536.0, 3.0])
@pytest.mark.parametrize("what", ["taken", "skipped", "unscaled before"])
def test_as_torch_fused(what, scale):
    """After an overflow torch's gradients are still scaled; after unscale_ they are unscaled once."""
    left = []
    for make in (torch.optim.AdamW, fusedopt.AdamW):
        params = with_grads(random((40,), 1, FP32), random((3, 5), 2, FP32))
        if what == "skipped":
            params[0].grad[7] = INF
        optimizer = make(params, fused=True, **({} if make is torch.optim.AdamW else {"backend": KERNELS}))
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        scaler.scale(torch.ones((), device=DEVICE))
        if what == "unscaled before":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        left.append(grads_of(params))
    torch.testing.assert_close(left[1], left[0])  # torch divides
    if scale == 65536:
        assert list(map(bits, left[1])) == list(map(bits, left[0]))


@both_backends
@pytest.mark.parametrize("options", [{}, CLIPPED], ids=str)
@pytest.mark.parametrize("scale", [65536.0, 3.0])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16, COMPLEX], ids=str)
def test_as_grad_scalers_own_pass(backend, dtype, scale, options):
    """Bit for bit, whatever clipping makes of the update. fp64 is divided more exactly than by GradScaler."""
    params = zeros(((BLOCK + 40,), dtype), ((2, 3), dtype), ((), dtype))
    optimizer = fusedopt.AdamW(params, backend=backend, **options)
    for step in range(2):
        set_grads(params, step)
        grads = grads_of(params)
        scaled_step(optimizer, scale)
        if dtype == FP64:
            for param, grad in zip(params, grads, strict=True):
                assert_close(param.grad, Bounded.of(exact(grad)) / Bounded.of(scale))
        else:
            assert_unscaled(params, grads, scale)


@both_backends
@pytest.mark.parametrize("param_dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("grad_dtype", [FP64, FP32, BF16, FP16], ids=str)
def test_gradients_of_another_dtype(backend, param_dtype, grad_dtype):
    """Unscaled in the wider of the two: what an fp32 step sees of an fp64 gradient is not what is left of it."""
    (param,) = zeros(((BLOCK + 40,), param_dtype))
    param.grad_dtype = None
    param.grad = random((BLOCK + 41,), 0, grad_dtype)[1:]
    grad = param.grad.clone()
    scaled_step(fusedopt.SGD([param], lr=1.0, backend=backend), 3.0)
    assert param.grad.dtype == grad_dtype
    assert_close(param.grad, Bounded.of(exact(grad)) / Bounded.of(3.0))


@both_backends
@pytest.mark.parametrize("options", [{}, CLIPPED], ids=str)
@pytest.mark.parametrize("grad_dtype", [FP32, BF16, FP16], ids=str)
def test_rounding_of_the_gradient_stays_out_of_the_update(backend, grad_dtype, options):
    """The gradients that are left are subnormal in fp16; those that are stepped by are exact in fp32."""
    values = random((70,), 0, grad_dtype) / 8
    stepped = []
    for scale in (2.0**20, None):
        (param,) = zeros(((70,), FP32))
        param.grad_dtype = None
        param.grad = values.clone() if scale else values.float() / 2**20
        optimizer = fusedopt.AdamW([param], lr=0.5, eps=1e-9, backend=backend, **options)
        scaled_step(optimizer, scale) if scale else optimizer.step()
        stepped.append([bits(value) for value in (param, *optimizer.state[param].values())])
        if scale:
            assert torch.equal(param.grad, (values.float() / 2**20).to(grad_dtype))
    assert stepped[0] == stepped[1]


def odd_gradients(dtype=FP32):
    """That lie otherwise than their parameters, or whose memory holds other numbers than they."""
    values = random((4, 6), 3, torch.complex64)
    return {
        "transposed": random((6, 4), 0, dtype).t(),
        "with gaps": random((4, 12), 1, dtype)[:, ::2],
        "expanded": random((4, 1), 2, dtype).expand(4, 6),
        "one number": random((), 2, dtype).expand(4, 6),
        "unaligned": random((25,), 4, dtype)[1:].view(4, 6),
        "empty": random((0, 6), 5, dtype),
        "conjugated": values.conj(),
        "conjugated and expanded": values[:1].conj().expand(4, 6),
        "imaginary part": values.conj().imag,
    }


@both_backends
@pytest.mark.parametrize("scale", [65536.0, 3.0])
@pytest.mark.parametrize("what", odd_gradients())
def test_gradients_that_lie_otherwise(backend, what, scale):
    """They keep their memory, also where the kernels read a copy; where the step is skipped, also their bits."""
    grad = odd_gradients()[what]
    (param,) = params = with_grads(grad)
    place, before = (grad.data_ptr(), grad.stride()), grads_of(params)
    optimizer = fusedopt.AdamW(params, backend=backend, skip_nonfinite=True)
    optimizer.step()
    kept = snapshot(optimizer)
    scaled_step(optimizer, scale, found_inf=1.0)
    assert snapshot(optimizer) == kept
    assert torch.equal(param.grad, before[0])
    scaled_step(optimizer, scale)
    assert param.grad is grad
    assert (grad.data_ptr(), grad.stride()) == place
    assert_unscaled(params, before, scale)


@both_backends
def test_a_parameter_with_gaps(backend):
    param = Parameter(random((4, 12), 0, FP32)[:, ::2])
    param.grad = random((4, 6), 1, FP32)
    before = grads_of([param])
    scaled_step(fusedopt.AdamW([param], backend=backend), 3.0)
    assert_unscaled([param], before, 3.0)


@both_backends
def test_elements_that_are_not_finite(backend):
    """Where nothing skips: an infinite part of a complex number leaves the other part alone."""
    values = torch.tensor([INF, NAN, -INF, 0.0, -0.0, 1e-45, 3e38], device=DEVICE)
    params = with_grads(values.clone(), torch.complex(values, values.flip(0)))
    before = grads_of(params)
    scaled_step(fusedopt.SGD(params, backend=backend), 2.0)
    for param, grad in zip(params, before, strict=True):
        assert bits(param.grad) == bits(unscaled(grad, 2.0))


def sharing():
    """Parameters' gradients that have memory in common, each list with one that has not."""
    base, alone = random((6, 10), 0, FP32), random((5,), 1, FP32)
    return {
        "the same tensor": [base, alone, base],
        "the same memory": [base, alone, base.view(10, 6), base[:]],
        "a transposed view": [base, base.t(), alone],
        "overlapping rows": [base[:4], alone, base[2:], base[5]],
        "columns with gaps": [base[:, :6], base[:, 4:], alone],
        "one beside the other": [base[:3], base[3:], alone],
        "with an empty one": [base[2:2], base, alone],
    }


@pytest.mark.parametrize("backend", [*ENGINES, "mixed"])
@pytest.mark.parametrize("scale", [65536.0, 3.0])
@pytest.mark.parametrize("what", sharing())
def test_shared_gradients(backend, what, scale, monkeypatch):
    """Every step sees them scaled, and afterwards they are unscaled once."""
    in_order = fusedopt.engines.tables.chunks_of  # programs may run in any order
    monkeypatch.setattr(fusedopt.engines.tables, "chunks_of", lambda *sizes: in_order(*sizes)[::-1].copy())
    params, twins = with_grads(*sharing()[what]), with_grads(*map(torch.clone, sharing()[what]))
    before = grads_of(params)
    optimizers = []
    for same in (params, twins):
        groups = [{"params": same[:1]}, {"params": same[1:], "fused": False if backend == "mixed" else None}]
        optimizer = fusedopt.AdamW(groups, backend=KERNELS if backend == "mixed" else backend)
        scaled_step(optimizer, scale, found_inf=1.0)
        for param, grad in zip(same, before, strict=True):
            assert torch.equal(param.grad, grad)
        scaled_step(optimizer, scale)
        optimizers.append(optimizer)
        assert_unscaled(same, before, scale)
    assert list(map(bits, params)) == list(map(bits, twins))


@both_backends
def test_a_duplicate_parameter(backend):
    """Steps twice, and has one gradient."""
    param, twin = (with_grads(random((40,), 0, FP32))[0] for _ in "ab")
    before = grads_of([param])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = fusedopt.AdamW([param, param], backend=backend)
    scaled_step(optimizer, 4.0)
    assert_unscaled([param], before, 4.0)
    reference = fusedopt.AdamW([twin], backend=backend)
    twin.grad /= 4
    reference.step()
    reference.step()
    torch.testing.assert_close(param, twin)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients(coalesced, dtype):
    """Which the reference steps, beside kernels."""
    indices = torch.tensor([[1, 4] if coalesced else [1, 1]], device=DEVICE)
    grad = torch.sparse_coo_tensor(indices, random((2, 3), 0, dtype), (6, 3), check_invariants=True)
    grad = grad.coalesce() if coalesced else grad
    params = with_grads(grad, random((5,), 1, dtype), grad)
    before = grads_of(params)
    optimizer = fusedopt.SGD(params, lr=1.0, backend=KERNELS)
    start = [param.detach().clone() for param in params]
    scaled_step(optimizer, 4.0)
    assert params[0].grad is params[2].grad
    assert_unscaled(params, before, 4.0)
    for param, value, old in zip(params, start, before, strict=True):
        torch.testing.assert_close(param.detach(), value - old.to_dense() / 4)


@both_backends
def test_only_a_step_with_a_scale_writes(backend):
    """And tells autograd, as an operation in place does. After unscale_, GradScaler sets `grad_scale` to None."""
    params = with_grads(random((40,), 0, FP32), random((6, 4), 1, FP32).t(), random((4, 1), 2, FP32).expand(4, 6))
    optimizer = fusedopt.AdamW(params, backend=backend, **CLIPPED)
    before = [bits(param.grad) for param in params]
    versions = [param.grad._version for param in params]
    optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = None, number(0.0)
    optimizer.step()
    assert [bits(param.grad) for param in params] == before
    assert [param.grad._version for param in params] == versions
    scaled_step(optimizer, 2.0)
    assert all(param.grad._version > version for param, version in zip(params, versions, strict=True))


@both_backends
def test_a_scale_by_hand(backend):
    """Which stays until its user takes it away; a parameter without a gradient has none to unscale."""
    params = zeros(((40,), FP32), ((2, 3), FP32))
    optimizer = fusedopt.SGD(params, lr=1.0, backend=backend)
    optimizer.grad_scale = 4.0
    for step in range(2):
        set_grads(params, step)
        params[step].grad = None
        before = grads_of(params[1 - step :][:1])
        optimizer.step()
        assert_unscaled(params[1 - step :][:1], before, 4.0)
    assert all(param.detach().any() for param in params_of(optimizer))
