"""The optimizers as "Dive into Deep Learning" writes them: its printed traces, and its formulas word for word."""

import math

import pytest
import torch

import fusedopt
from tests.twins import ENGINES

BOTH = pytest.mark.parametrize("backend", ENGINES)
START = (-5.0, -2.0)


def trace(make, backend, device, steps=20):
    """The point after so many steps down f(x) = 0.1 x₁² + 2 x₂²."""
    x = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64, device=device))
    optimizer = make([x], backend=backend)
    slope = torch.tensor([0.2, 4.0], dtype=torch.float64, device=device)
    for _ in range(steps):
        x.grad = slope * x.detach()
        optimizer.step()
    return x.tolist()


def gradient_descent(lr):
    return lambda params, **extra: fusedopt.SGD(params, lr=lr, **extra)


def momentum(lr, beta):
    """The learning rate inside of the momentum."""
    return lambda params, **extra: fusedopt.SGD(params, lr=lr, momentum=beta, lr_in_momentum=True, **extra)


def momentum_as_an_average(lr, beta):
    options = {"lr": lr / (1 - beta), "momentum": beta, "dampening": beta, "zero_init_momentum": True}
    return lambda params, **extra: fusedopt.SGD(params, **options, **extra)


def adagrad(lr):
    return lambda params, **extra: fusedopt.Adagrad(params, lr=lr, eps=1e-6, eps_in_sqrt=True, **extra)


def rmsprop(lr, beta):
    return lambda params, **extra: fusedopt.RMSprop(params, lr=lr, alpha=beta, eps=1e-6, eps_in_sqrt=True, **extra)


def adadelta(rho):
    return lambda params, **extra: fusedopt.Adadelta(params, lr=1, rho=rho, eps=1e-5, **extra)


def adam(lr, eps):
    return lambda params, **extra: fusedopt.Adam(params, lr=lr, eps=eps, **extra)


@BOTH
@pytest.mark.parametrize(
    ("make", "printed"),
    [
        pytest.param(gradient_descent(0.4), "-0.943467 -0.000073", id="gradient descent 0.4"),
        pytest.param(gradient_descent(0.6), "-0.387814 -1673.365109", id="gradient descent 0.6"),
        pytest.param(momentum(0.4, 0.5), "-0.062843 0.001202", id="momentum 0.4"),
        pytest.param(momentum(0.6, 0.5), "0.007188 0.002553", id="momentum 0.6"),
        pytest.param(momentum_as_an_average(0.4, 0.5), "-0.062843 0.001202", id="momentum as an average 0.4"),
        pytest.param(momentum_as_an_average(0.6, 0.5), "0.007188 0.002553", id="momentum as an average 0.6"),
        pytest.param(adagrad(0.4), "-2.382563 -0.158591", id="AdaGrad 0.4"),
        pytest.param(adagrad(2), "-0.002295 -0.000000", id="AdaGrad 2"),
        pytest.param(rmsprop(0.4, 0.9), "-0.010599 0.000000", id="RMSProp 0.4"),
    ],
)
def test_printed_traces(make, printed, backend, device):
    assert "{:.6f} {:.6f}".format(*trace(make, backend, device)) == printed


def book_momentum(x, g, s, t, lr=0.4, beta=0.5):
    s["m"] = beta * s["m"] + lr * g
    return x - s["m"]


def book_average(x, g, s, t, lr=0.4, beta=0.5):
    s["m"] = beta * s["m"] + (1 - beta) * g
    return x - lr / (1 - beta) * s["m"]


def book_adagrad(x, g, s, t, lr=0.4, eps=1e-6):
    s["s"] = s["s"] + g**2
    return x - lr * g / math.sqrt(s["s"] + eps)


def book_rmsprop(x, g, s, t, lr=0.4, beta=0.9, eps=1e-6):
    s["v"] = beta * s["v"] + (1 - beta) * g**2
    return x - lr * g / math.sqrt(s["v"] + eps)


def book_adadelta(x, g, s, t, rho=0.9, eps=1e-5):
    s["s"] = rho * s["s"] + (1 - rho) * g**2
    rescaled = math.sqrt((s["delta"] + eps) / (s["s"] + eps)) * g
    s["delta"] = rho * s["delta"] + (1 - rho) * rescaled**2
    return x - rescaled


def book_adam(x, g, s, t, lr=0.4, betas=(0.9, 0.999), eps=1e-6):
    s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
    s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g**2
    corrected = s["m"] / (1 - betas[0] ** t), s["v"] / (1 - betas[1] ** t)
    return x - lr * corrected[0] / (math.sqrt(corrected[1]) + eps)


@BOTH
@pytest.mark.parametrize(
    ("make", "update"),
    [
        pytest.param(momentum(0.4, 0.5), book_momentum, id="momentum"),
        pytest.param(momentum_as_an_average(0.4, 0.5), book_average, id="momentum as an average"),
        pytest.param(adagrad(0.4), book_adagrad, id="AdaGrad"),
        pytest.param(rmsprop(0.4, 0.9), book_rmsprop, id="RMSProp"),
        pytest.param(adadelta(0.9), book_adadelta, id="AdaDelta"),
        pytest.param(adam(0.4, 1e-6), book_adam, id="Adam"),
    ],
)
def test_formulas_of_the_book(make, update, backend, device):
    expected = []
    for x, slope in zip(START, (0.2, 4.0), strict=True):
        states = dict.fromkeys(["m", "s", "v", "delta"], 0.0)
        for t in range(1, 21):
            x = update(x, slope * x, states, t)
        expected.append(x)
    # Single roundings differ, and 20 steps carry them on.
    assert trace(make, backend, device) == pytest.approx(expected, rel=1e-12, abs=1e-15)
