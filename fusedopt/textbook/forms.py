"""The updates as the book writes them, each as a call of the class that steps it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim.optimizer import ParamsT

from .. import SGD, Adadelta, Adagrad, Adam, FusedOptimizer, RMSprop


def gradient_descent(params: ParamsT, lr: float = 0.4, **more: Any) -> FusedOptimizer:
    """Gradient descent: x ← x − ηg."""
    return SGD(params, lr=lr, **more)


def momentum(params: ParamsT, lr: float = 0.4, momentum: float = 0.5, **more: Any) -> FusedOptimizer:
    """Momentum: m ← βm + ηg;  x ← x − m."""
    return SGD(params, lr=lr, momentum=momentum, lr_in_momentum=True, **more)


def momentum_average(params: ParamsT, lr: float = 0.4, momentum: float = 0.5, **more: Any) -> FusedOptimizer:
    """Momentum, as an average: m ← βm + (1−β)g;  x ← x − αm, where α = η/(1−β) makes it the momentum above."""
    alpha = lr / (1 - momentum)
    return SGD(params, lr=alpha, momentum=momentum, dampening=momentum, zero_init_momentum=True, **more)


def adagrad(params: ParamsT, lr: float = 0.4, eps: float = 1e-6, **more: Any) -> FusedOptimizer:
    """AdaGrad: s ← s + g²;  x ← x − ηg / √(s + ε)."""
    return Adagrad(params, lr=lr, eps=eps, eps_in_sqrt=True, **more)


def rmsprop(params: ParamsT, lr: float = 0.4, alpha: float = 0.9, eps: float = 1e-6, **more: Any) -> FusedOptimizer:
    """RMSProp: s ← βs + (1−β)g²;  x ← x − ηg / √(s + ε)."""
    return RMSprop(params, lr=lr, alpha=alpha, eps=eps, eps_in_sqrt=True, **more)


def adadelta(params: ParamsT, rho: float = 0.9, eps: float = 1e-5, lr: float = 1.0, **more: Any) -> FusedOptimizer:
    """AdaDelta: s ← ρs + (1−ρ)g²;  g′ = √((Δ + ε) / (s + ε)) g;  x ← x − ηg′;  Δ ← ρΔ + (1−ρ)g′²; η = 1 in the book."""
    return Adadelta(params, lr=lr, rho=rho, eps=eps, **more)


def adam(
    params: ParamsT, lr: float = 0.4, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-6, **more: Any
) -> FusedOptimizer:
    """Adam: v ← β₁v + (1−β₁)g;  s ← β₂s + (1−β₂)g²;  x ← x − η v̂ / (√ŝ + ε), v̂ = v/(1−β₁ᵗ), ŝ = s/(1−β₂ᵗ)."""
    return Adam(params, lr=lr, betas=(beta1, beta2), eps=eps, **more)


FORMS: dict[str, Callable[..., FusedOptimizer]] = {
    "gd": gradient_descent,
    "momentum": momentum,
    "average": momentum_average,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adadelta": adadelta,
    "adam": adam,
}
SYMBOLS = {"lr": "η", "momentum": "β", "alpha": "β", "rho": "ρ", "beta1": "β₁", "beta2": "β₂", "eps": "ε"}


def title(form: str) -> str:
    """What the book calls it."""
    return str(FORMS[form].__doc__).partition(":")[0]


def defaults(form: str) -> dict[str, float]:
    """Its hyperparameters by torch's names, with the values that the book uses in two dimensions."""
    parameters = inspect.signature(FORMS[form]).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def settings(hyper: Mapping[str, float]) -> str:
    """Hyperparameters in the book's letters."""
    return ", ".join(f"{SYMBOLS[name]} = {value:g}" for name, value in hyper.items())
