"""The iterations, against singular values and polynomials of numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusedopt.matrices import newton_schulz
from fusedopt.matrices.newton_schulz import QUINTIC, NewtonSchulz, Workspace, orthogonalize_, spectral_scale
from tests.conftest import DEVICE

SHAPES = [(3, 8, 8), (2, 8, 24), (2, 24, 8), (1, 1, 5), (1, 5, 1), (4, 7, 9)]
POLAR = NewtonSchulz.of("polar_express", 5, 1e-7)
PLAIN = NewtonSchulz.of((QUINTIC,), 5, 1e-7)


def workspace_for(x):
    other, gram = Workspace.sizes(tuple(x.shape))
    return Workspace(x.new_empty(other), (x.new_empty(gram), x.new_empty(gram)))


def orthogonalized(x, iterations, scale=1.0):
    x = x.clone()
    orthogonalize_(x, iterations, scale, workspace_for(x))
    return x


def matrices(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def polynomials(values, iterations):
    for a, b, c in iterations.coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def by_singular_values(x, iterations, scale=1.0):
    """U p(S) Vᵀ, where the polynomials take the singular values of the normalized matrix."""
    u, s, vh = np.linalg.svd(x.cpu().numpy(), full_matrices=False)
    norms = np.maximum(np.sqrt((s**2).sum(-1, keepdims=True)), iterations.eps) * iterations.safety
    return torch.from_numpy(scale * u * polynomials(s / norms, iterations)[..., None, :] @ vh)


@pytest.mark.parametrize(
    "iterations", [PLAIN, POLAR, NewtonSchulz.of((QUINTIC,), 4, 1e-7), POLAR.of("polar_express", 8, 0)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_polynomials_of_the_singular_values(shape, iterations):
    x = matrices(shape)
    for scale in (1.0, 0.3):
        actual = orthogonalized(x, iterations, scale).cpu()
        torch.testing.assert_close(actual, by_singular_values(x, iterations, scale), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_iterations_normalize(shape):
    x = matrices(shape)
    expected = 0.3 * x / x.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(orthogonalized(x, NewtonSchulz.of((QUINTIC,), 0, 1e-7), 0.3), expected)


@pytest.mark.parametrize("iterations", [PLAIN, POLAR])
def test_zeros_stay_zeros_and_touch_nothing_else(iterations):
    x = matrices((3, 8, 8)).bfloat16()
    others = orthogonalized(x[[0, 2]], iterations)
    x[1] = 0
    result = orthogonalized(x, iterations)
    assert (result[1] == 0).all()
    assert result[[0, 2]].isfinite().all()
    torch.testing.assert_close(result[[0, 2]], others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_zeros_stay_zeros_without_an_eps(dtype):
    x = torch.zeros(2, 8, 8, dtype=dtype, device=DEVICE)
    assert (orthogonalized(x, NewtonSchulz.of((QUINTIC,), 5, 0.0)) == 0).all()


def test_what_is_not_finite_stays_where_it_is():
    x = matrices((3, 8, 8)).bfloat16()
    x[1, 0, 0] = float("nan")
    result = orthogonalized(x, PLAIN)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_below_eps_the_norm_is_eps():
    x = 1e-9 * matrices((1, 8, 8))
    shallow = NewtonSchulz.of(((2.0, 0.0, 0.0),), 1, 1e-3)
    torch.testing.assert_close(orthogonalized(x, shallow), 2 * x / 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_every_iteration_is_as_near_as_its_products(shape):
    """One iteration: three products, each of which is rounded once to bf16 from sums in fp32, and a sum."""
    x = matrices(shape).bfloat16()
    one = NewtonSchulz.of((QUINTIC,), 1, 1e-7)
    a, b, c = map(abs, QUINTIC)
    start = x.double() / x.double().flatten(1).norm(dim=1)[:, None, None]
    gram = (start.abs() @ start.abs().mT) if shape[1] <= shape[2] else (start.abs().mT @ start.abs())
    polynomial = b * gram + c * gram @ gram
    size = a * start.abs() + (polynomial @ start.abs() if shape[1] <= shape[2] else start.abs() @ polynomial)
    # The norm, the quotient, the first product (squared: twice), the second and the third are rounded, each by half an
    # ULP of what it is at most; the quotient goes into every factor.
    error = (orthogonalized(x, one).double().cpu() - by_singular_values(x.double(), one)).abs()
    assert (error <= 9 * torch.finfo(torch.bfloat16).eps / 2 * size.cpu() + 1e-12).all()


def test_the_polar_express_ends_near_1():
    """From every singular value down to a thousandth, as Amsel et al. promise of eight iterations; 1.01 is theirs."""
    values = np.geomspace(1e-3, 1.0, 2000)
    assert np.abs(polynomials(values, NewtonSchulz.of("polar_express", 8, 0)) - 1).max() < 1e-2
    ends = polynomials(values, POLAR)
    assert ends.min() > 0.6
    assert ends.max() < 1.2
    assert np.ptp(ends) < np.ptp(polynomials(values, PLAIN))


def test_the_last_coefficients_are_repeated():
    first, last = (3.0, -2.0, 0.5), (2.0, -1.5, 0.5)
    assert NewtonSchulz.of((first, last), 4, 0).coefficients == (first, last, last, last)
    assert NewtonSchulz.of((first, last), 1, 0).coefficients == (first,)


def test_nothing_of_the_result_depends_on_what_was_in_the_workspace():
    x = matrices((2, 8, 24)).bfloat16()
    workspace = workspace_for(x)
    for tensor in (workspace.other, *workspace.grams):
        tensor.fill_(float("nan"))
    result = x.clone()
    orthogonalize_(result, PLAIN, 1.0, workspace)
    assert torch.equal(result, orthogonalized(x, PLAIN))


def test_symmetric_products_are_used_where_they_are_chosen(monkeypatch):
    calls = []

    def product(x, *, out, c=None, alpha=1.0, beta=0.0):
        calls.append(tuple(x.shape))
        return out.copy_(alpha * x @ x.mT + (0 if c is None else beta * c))

    x = matrices((2, 24, 8))
    expected = orthogonalized(x, PLAIN)
    monkeypatch.setattr(newton_schulz, "is_chosen", lambda device: True)
    monkeypatch.setattr(newton_schulz, "symmetric_product", product)
    torch.testing.assert_close(orthogonalized(x, PLAIN), expected)
    assert calls == [(2, 8, 24), (2, 8, 8)] * 5


def test_scales():
    assert spectral_scale(None, 4, 16) == spectral_scale("original", 4, 16) == 1
    assert spectral_scale("original", 16, 4) == 2
    assert spectral_scale("spectral_unclamped", 4, 16) == 0.5
    assert spectral_scale("match_rms_adamw", 4, 16) == pytest.approx(0.8)
