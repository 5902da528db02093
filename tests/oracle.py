"""What one step should give: every optimizer's equations in numpy, each written once, for values and their bounds.

A small result of a subtraction has an error as large as its operands' rounding, so an error is measured against a
magnitude bound: the scale that an update's rounding errors have, evaluated beside the value by `Bounded`. It depends
neither on torch nor on fusedopt. Values are long doubles, so that also fp64 has an oracle more precise than itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
EPS64 = np.finfo(np.float64).eps


def exact(tensor: torch.Tensor) -> Array:
    """The elements in logical order, complex ones as their two parts."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().reshape(-1).numpy().astype(np.longdouble)


@dataclass(frozen=True)
class Bounded:
    """A value, and the scale that its rounding errors are fractions of: relative scales add up, as relative errors."""

    value: Array
    bound: Array

    @staticmethod
    def of(value: Any) -> Bounded:
        value = np.asarray(value, dtype=np.longdouble)
        return Bounded(value, np.abs(value))

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.bound)

    def __add__(self, other: Any) -> Bounded:
        other = _bounded(other)
        return Bounded(self.value + other.value, self.bound + other.bound)

    def __sub__(self, other: Any) -> Bounded:
        return self + -_bounded(other)

    def __mul__(self, other: Any) -> Bounded:
        other = _bounded(other)
        value = self.value * other.value
        return Bounded(value, self.bound * abs(other.value) + abs(self.value) * other.bound - abs(value))

    def __truediv__(self, other: Any) -> Bounded:
        other = _bounded(other)
        value = self.value / other.value
        return Bounded(value, (self.bound + abs(value) * other.bound) / abs(other.value) - abs(value))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Bounded:
        return _bounded(other) - self

    def __rtruediv__(self, other: Any) -> Bounded:
        return _bounded(other) / self

    def sqrt(self) -> Bounded:
        """The root halves an error, but adds its own. Without a bound the value is an exact 0."""
        value = np.sqrt(self.value)
        inherited = np.divide(self.bound, 2 * value, out=np.zeros_like(self.bound), where=self.bound > 0)
        return Bounded(value, np.maximum(value, inherited))

    def maximum(self, other: Any) -> Bounded:
        other = _bounded(other)
        return Bounded(np.maximum(self.value, other.value), np.maximum(self.bound, other.bound))


def _bounded(number: Any) -> Bounded:
    return number if isinstance(number, Bounded) else Bounded.of(number)


def power(base: float, exponent: int) -> Bounded:
    """base ** exponent in float64: an error of the exponent counts by its size."""
    value = np.longdouble(base) ** exponent
    return Bounded(value, value * (1 + abs(exponent * np.log2(np.longdouble(base)))))


def rounded(scalar: Bounded, dtype: torch.dtype) -> Bounded:
    """A number that was computed in float64 and then rounded to the dtype of the arithmetic."""
    share = EPS64 / torch.finfo(dtype).eps
    return Bounded(scalar.value, abs(scalar.value) + share * scalar.bound)


DEFAULTS: dict[str, dict[str, Any]] = {
    "SGD": {
        "lr": 1e-3,
        "momentum": 0,
        "dampening": 0,
        "weight_decay": 0,
        "nesterov": False,
        "lr_in_momentum": False,
        "zero_init_momentum": False,
    },
    "Adagrad": {
        "lr": 1e-2,
        "lr_decay": 0,
        "weight_decay": 0,
        "initial_accumulator_value": 0,
        "eps": 1e-10,
        "eps_in_sqrt": False,
    },
    "RMSprop": {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0,
        "centered": False,
        "eps_in_sqrt": False,
    },
    "Adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0},
    "Adam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "amsgrad": False,
        "decoupled_weight_decay": False,
    },
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False},
}


def options_of(case: Any) -> dict[str, Any]:
    """The case's options and torch.optim's defaults for all others."""
    return {"maximize": False, **DEFAULTS[case.optimizer], **case.options}


def state_names(case: Any) -> set[str]:
    """The states of one number an element that the optimizer should keep."""
    o = options_of(case)
    names = {
        "SGD": {"momentum_buffer": o.get("momentum", 0) != 0},
        "Adagrad": {"sum": True},
        "RMSprop": {"square_avg": True, "momentum_buffer": o.get("momentum", 0) > 0, "grad_avg": o.get("centered")},
        "Adadelta": {"square_avg": True, "acc_delta": True},
        "Adam": {"exp_avg": True, "exp_avg_sq": True, "max_exp_avg_sq": o.get("amsgrad")},
    }
    return {name for name, used in names["Adam" if case.optimizer == "AdamW" else case.optimizer].items() if used}


def step(
    case: Any, param: Array, grad: Array, states: Mapping[str, Array], step: int, compute: torch.dtype
) -> tuple[Bounded, dict[str, Bounded]]:
    """The parameter and the states after step number `step` (from 1).

    Args:
        case: a row of `cases.CASES`.
        param: the parameter before.
        grad: its gradient.
        states: the states before, by name; one that is missing has not begun.
        step: which step this is.
        compute: the dtype of the arithmetic to which the hyperparameters are rounded.

    """
    o = options_of(case)
    p, g = Bounded.of(param), Bounded.of(grad)
    old = {name: Bounded.of(states[name]) if name in states else None for name in state_names(case)}
    if o["maximize"]:
        g = -g
    with np.errstate(all="ignore"):
        return EQUATIONS[case.optimizer](o, p, g, old, step, compute)


def sgd(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, momentum = o["lr"], o["momentum"]
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    if not momentum:
        return p - lr * g, {}
    scaled = lr * g if o["lr_in_momentum"] else g
    damped = rounded(1 - Bounded.of(o["dampening"]), compute) * scaled
    if step > 1:
        b = momentum * old["momentum_buffer"] + damped
    else:
        b = damped if o["zero_init_momentum"] else scaled
    d = scaled + momentum * b if o["nesterov"] else b
    return p - (d if o["lr_in_momentum"] else lr * d), {"momentum_buffer": b}


def adagrad(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    s = (_zeros(p) + o["initial_accumulator_value"] if old["sum"] is None else old["sum"]) + g * g
    lr = rounded(o["lr"] / (1 + (step - 1) * Bounded.of(o["lr_decay"])), compute)
    return p - lr * (g / _root(s, o)), {"sum": s}


def rmsprop(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, alpha = o["lr"], o["alpha"]
    rest = rounded(1 - Bounded.of(alpha), compute)
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    new = {"square_avg": alpha * _begun(old["square_avg"], p) + rest * (g * g)}
    v = new["square_avg"]
    if o["centered"]:
        a = new["grad_avg"] = alpha * _begun(old["grad_avg"], p) + rest * g
        v = (v - a * a).maximum(0)
    d = g / _root(v, o)
    if o["momentum"]:
        d = new["momentum_buffer"] = o["momentum"] * _begun(old["momentum_buffer"], p) + d
    return p - lr * d, new


def adadelta(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, rho, eps = o["lr"], o["rho"], o["eps"]
    rest = rounded(1 - Bounded.of(rho), compute)
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    acc = _begun(old["acc_delta"], p)
    s = rho * _begun(old["square_avg"], p) + rest * (g * g)
    d = (acc + eps).sqrt() / (s + eps).sqrt() * g
    return p - lr * d, {"square_avg": s, "acc_delta": rho * acc + rest * (d * d)}


def adam(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, (beta1, beta2) = o["lr"], o["betas"]
    if o["decoupled_weight_decay"]:
        p = rounded(1 - lr * Bounded.of(o["weight_decay"]), compute) * p
    elif o["weight_decay"]:
        g = g + o["weight_decay"] * p
    m = beta1 * _begun(old["exp_avg"], p) + rounded(1 - Bounded.of(beta1), compute) * g
    v = beta2 * _begun(old["exp_avg_sq"], p) + rounded(1 - Bounded.of(beta2), compute) * (g * g)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if o["amsgrad"]:
        v = new["max_exp_avg_sq"] = _begun(old["max_exp_avg_sq"], p).maximum(v)
    step_size = rounded(lr / (1 - power(beta1, step)), compute)
    correction = rounded((1 - power(beta2, step)).sqrt(), compute)
    return p - step_size * (m / (v.sqrt() / correction + o["eps"])), new


def adamw(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    return adam({**o, "decoupled_weight_decay": True}, p, g, old, step, compute)


EQUATIONS = {
    "SGD": sgd,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adadelta": adadelta,
    "Adam": adam,
    "AdamW": adamw,
}


def _root(v: Bounded, o: Any) -> Bounded:
    return (v + o["eps"]).sqrt() if o["eps_in_sqrt"] else v.sqrt() + o["eps"]


def _begun(state: Bounded | None, like: Bounded) -> Bounded:
    return _zeros(like) if state is None else state


def _zeros(like: Bounded) -> Bounded:
    return Bounded.of(np.zeros_like(like.value))
