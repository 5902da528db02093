"""Sparse parameters, which SGD steps by gradients that are as sparse."""

import pytest
import torch
from torch.nn import Parameter

from tests.cases import BF16
from tests.conftest import DEVICE
from tests.twins import BACKENDS, make, make_torch, params_of

# A CSR tensor warns that torch's support for it is not finished.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:Sparse invariant checks")

OPTIONS = [
    {"momentum": 0},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True},
]
DTYPES = [torch.float32, torch.float64, torch.complex64]
LAYOUTS = [torch.sparse_coo, torch.sparse_csr]


def of_layout(layout, seed, dtype=torch.float32):
    """A tensor with elements at other places than those of other seeds; a COO one has an element twice."""
    random = torch.Generator().manual_seed(seed)
    places = torch.randint(3, (2, 5), generator=random)
    values = torch.randn(5, generator=random).to(dtype)
    tensor = torch.sparse_coo_tensor(places, values, (3, 3), device=DEVICE, check_invariants=True)
    return tensor if layout == torch.sparse_coo else tensor.to_dense().to_sparse(layout=layout)


def train(optimizer, layout, steps=3):
    for step in range(steps):
        for i, param in enumerate(params_of(optimizer)):
            param.grad = of_layout(layout, 10 * step + i + 1, param.dtype)
        optimizer.step()


def both(layout, dtype, **options):
    """fusedopt's optimizer of two sparse parameters, and torch's."""
    for factory in (make, make_torch):
        yield factory("SGD", [Parameter(of_layout(layout, seed, dtype)) for seed in range(2)], lr=0.1, **options)


@pytest.mark.parametrize(("layout", "dtype"), [*((a, b) for a in LAYOUTS for b in DTYPES), (torch.sparse_coo, BF16)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_like_torch(layout, dtype, options):
    mine, theirs = both(layout, dtype, **options)
    for optimizer in (mine, theirs):
        train(optimizer, layout)
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == BF16 else {}
    for param, expected in zip(params_of(mine), params_of(theirs), strict=True):
        assert param.layout == expected.layout
        torch.testing.assert_close(param.to_dense(), expected.to_dense(), **tolerance)
    saved, expected = (optimizer.state_dict()["state"] for optimizer in (mine, theirs))
    assert saved.keys() == expected.keys()
    for key, state in saved.items():
        assert state.keys() == expected[key].keys()
        buffer = state["momentum_buffer"]
        torch.testing.assert_close(buffer.to_dense(), expected[key]["momentum_buffer"].to_dense(), **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_their_norm(layout):
    mine = make("SGD", [Parameter(of_layout(layout, 0))], lr=0.1, momentum=0, max_grad_norm=0.1)
    (param,) = params_of(mine)
    before = param.detach().to_dense().clone()
    param.grad = of_layout(layout, 1)
    norm = param.grad.to_dense().double().norm()
    mine.step()
    torch.testing.assert_close(mine.grad_norm, norm)
    step = 0.1 * 0.1 / (norm + 1e-6).float() * param.grad.to_dense()
    torch.testing.assert_close(param.detach().to_dense(), before - step)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_sparse_gradients_of_dense_parameters(dtype, momentum):
    values = []
    for factory in (make, make_torch):
        param = Parameter(torch.ones(3, 4, dtype=dtype))
        optimizer = factory("SGD", [param], lr=0.1, momentum=momentum)
        for step in range(2):
            param.grad = torch.full((3, 4), 1 + 2j if dtype.is_complex else 1.0, dtype=dtype).to_sparse(1)
            param.grad = param.grad * (step + 1)
            optimizer.step()
        values.append(param.detach())
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled(layout):
    params = [Parameter(of_layout(layout, seed)) for seed in range(2)]
    mine = make("SGD", params, lr=0.1, momentum=0)
    expected = []
    for i, param in enumerate(params):
        param.grad = of_layout(layout, 1 + i)
        expected.append((param.detach().to_dense() - 0.1 * param.grad.to_dense() / 4, param.grad.to_dense() / 4))
    mine.grad_scale = 4.0
    mine.step()
    for param, (value, grad) in zip(params, expected, strict=True):
        torch.testing.assert_close((param.detach().to_dense(), param.grad.to_dense()), (value, grad))


REFUSED = [
    (torch.sparse_csr, torch.sparse_coo, torch.float32, {}, "sparse_csr .* but its gradient is torch.sparse_coo"),
    (torch.sparse_csc, torch.sparse_csc, torch.float32, {}, "is torch.sparse_csc"),
    (torch.sparse_csr, torch.sparse_csr, BF16, {}, "only fp32 and fp64"),
    (torch.sparse_csr, torch.sparse_csr, torch.float32, {"state_dtype": BF16}, "only fp32 and fp64"),
    (None, torch.sparse_coo, torch.float32, {}, "with 1 dense dimensions, but .* with 0"),
    (torch.sparse_coo, torch.sparse_coo, torch.float32, {"ema_decay": 0.9}, "ema_decay do not support"),
]


@pytest.mark.parametrize(("layout", "of_grad", "dtype", "options", "message"), REFUSED)
def test_refused_before_anything_is_written(layout, of_grad, dtype, options, message):
    params = [torch.ones(2, device=DEVICE), torch.ones(3, 3, device=DEVICE).to_sparse(1)]
    if layout is not None:
        params[1] = of_layout(layout, 0, dtype)
    params = list(map(Parameter, params))
    params[0].grad, params[1].grad = torch.ones(2, device=DEVICE), of_layout(of_grad, 1, dtype)
    if not options:
        with pytest.raises(RuntimeError):
            make_torch("SGD", params[1:]).step()
    mine = make("SGD", params, **options)
    with pytest.raises(RuntimeError, match=f"parameter 1 of group 0.*{message}"):
        mine.step()
    assert torch.equal(params[0].detach(), torch.ones(2, device=DEVICE))
    assert not mine.state


def test_kernels_do_not_know_them():
    with pytest.raises(ValueError, match="cannot step parameter 0 of group 0: it is torch"):
        make("SGD", [Parameter(of_layout(torch.sparse_coo, 0))], backend=BACKENDS[1])
