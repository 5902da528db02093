"""What one step should give: every optimizer's equations in numpy, each written once, for values and their bounds.

A small result of a subtraction has an error as large as its operands' rounding, so an error is measured against a
magnitude bound: the scale that an update's rounding errors have, evaluated beside the value by `Bounded`. It depends
neither on torch nor on fusedopt. Values are long doubles, so that also fp64 has an oracle more precise than itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.bounded import Array, Bounded, power, rounded, sign

DECAY = {"weight_decay_form": "standard", "max_lr": None}
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
        **DECAY,
    },
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False, **DECAY},
    "NAdam": {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum_decay": 4e-3,
        "decoupled_weight_decay": False,
        **DECAY,
    },
    "RAdam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "decoupled_weight_decay": False,
        **DECAY,
    },
    "Adamax": {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0},
    "ASGD": {"lr": 1e-2, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6, "weight_decay": 0},
    "Rprop": {"lr": 1e-2, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0, **DECAY},
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
        "Adamax": {"exp_avg": True, "exp_inf": True},
        "ASGD": {"ax": True},
        "Rprop": {"prev": True, "step_size": True},
        "Lion": {"exp_avg": True},
    }
    names |= {"AdamW": names["Adam"], "NAdam": names["Adam"], "RAdam": names["Adam"]}
    return {name for name, used in names[case.optimizer].items() if used}


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
    lost = 1 / (8 * torch.finfo(compute).eps)
    p, g = Bounded.of(param, lost), Bounded.of(grad, lost)
    old = {name: Bounded.of(states[name], lost) if name in states else None for name in state_names(case)}
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
    p, g, new = _moments(o, p, g, old, compute)
    m, v = new["exp_avg"], new["exp_avg_sq"]
    if o["amsgrad"]:
        v = new["max_exp_avg_sq"] = _begun(old["max_exp_avg_sq"], p).maximum(v)
    step_size = rounded(lr / (1 - power(beta1, step)), compute)
    correction = rounded((1 - power(beta2, step)).sqrt(), compute)
    return _moved(o, p, m, step_size * (m / (v.sqrt() / correction + o["eps"])), compute), new


def adamw(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    return adam({**o, "decoupled_weight_decay": True}, p, g, old, step, compute)


def nadam(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, (beta1, beta2) = o["lr"], o["betas"]
    p, g, new = _moments(o, p, g, old, compute)

    def mu(t: int) -> Bounded:
        return beta1 * (1 - 0.5 * power(0.96, t * o["momentum_decay"]))

    product = Bounded.of(1.0)
    for t in range(1, step):  # kept as fp32 between the steps
        product = Bounded.of(np.float32((product * mu(t)).value))
    product = product * mu(step)
    grad_size = rounded(lr * (1 - mu(step)) / (1 - product), compute)
    step_size = rounded(lr * mu(step + 1) / (1 - product * mu(step + 1)), compute)
    correction = rounded(1 - power(beta2, step), compute)
    denom = (new["exp_avg_sq"] / correction).sqrt() + o["eps"]
    direction = grad_size * g + step_size * new["exp_avg"]
    return _moved(o, p, direction, grad_size * g / denom + step_size * new["exp_avg"] / denom, compute), new


def radam(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, (beta1, beta2) = o["lr"], o["betas"]
    p, g, new = _moments(o, p, g, old, compute)
    step_size = rounded(lr / (1 - power(beta1, step)), compute)
    rho_inf = 2 / (1 - Bounded.of(beta2)) - 1
    rho = rho_inf - 2 * step * power(beta2, step) / (1 - power(beta2, step))
    if rho.value <= 5:
        return _moved(o, p, new["exp_avg"], step_size * new["exp_avg"], compute), new
    rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).sqrt()
    adaptive = rounded(rectification * (1 - power(beta2, step)).sqrt(), compute)
    update = step_size * (adaptive * new["exp_avg"] / (new["exp_avg_sq"].sqrt() + o["eps"]))
    return _moved(o, p, new["exp_avg"], update, compute), new


def adamax(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, (beta1, beta2) = o["lr"], o["betas"]
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    m = beta1 * _begun(old["exp_avg"], p) + rounded(1 - Bounded.of(beta1), compute) * g
    u = (beta2 * _begun(old["exp_inf"], p)).maximum(abs(g) + o["eps"])
    step_size = rounded(lr / (1 - power(beta1, step)), compute)
    return p - step_size * (m / u), {"exp_avg": m, "exp_inf": u}


def asgd(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, lambd, past = o["lr"], o["lambd"], step - 1
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    # The rate and the weight that the step before left behind, as fp32.
    eta = Bounded.of(np.float32(lr / (1 + lambd * lr * past) ** o["alpha"]))
    mu = Bounded.of(np.float32(1 / max(1, past - o["t0"])))
    p = rounded(1 - lambd * eta, compute) * p - eta * g
    average = _begun(old["ax"], p)
    return p, {"ax": p if mu.value == 1 else average + mu * (p - average)}


def rprop(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    (minus, plus), (least, most) = o["etas"], o["step_sizes"]
    length = _zeros(p) + o["lr"] if old["step_size"] is None else old["step_size"]
    agreement = (g * _begun(old["prev"], p)).value.astype(_numpy(compute))  # may underflow to 0
    factor = Bounded.of(np.where(agreement > 0, plus, np.where(agreement < 0, minus, 1.0)))
    length = factor * length
    length = Bounded(np.clip(length.value, least, most), length.bound)
    g = Bounded.of(np.where(agreement < 0, 0, g.value))
    return p - Bounded.of(np.sign(g.value)) * length, {"prev": g, "step_size": length}


def lion(o: Any, p: Bounded, g: Bounded, old: Any, step: int, compute: torch.dtype) -> Any:
    lr, (beta1, beta2) = o["lr"], o["betas"]
    m = _begun(old["exp_avg"], p)
    direction, undecided = sign(beta1 * m + rounded(1 - Bounded.of(beta1), compute) * g, compute)

    def along(direction: Array) -> Bounded:
        return _decayed(o, p, direction, compute) - lr * Bounded.of(direction)

    others = tuple(along(np.where(undecided, other, np.nan)).value for other in (-1, 0, 1))
    return replace(along(direction), others=others if undecided.any() else ()), {
        "exp_avg": beta2 * m + rounded(1 - Bounded.of(beta2), compute) * g
    }


EQUATIONS = {
    "SGD": sgd,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adadelta": adadelta,
    "Adam": adam,
    "AdamW": adamw,
    "NAdam": nadam,
    "RAdam": radam,
    "Adamax": adamax,
    "ASGD": asgd,
    "Rprop": rprop,
    "Lion": lion,
}


def _moments(o: Any, p: Bounded, g: Bounded, old: Any, compute: torch.dtype) -> tuple[Bounded, Bounded, dict[str, Any]]:
    """Weight decay and the two averages that the Adam family has in common."""
    beta1, beta2 = o["betas"]
    if o["weight_decay"] and not o["decoupled_weight_decay"]:
        g = g + o["weight_decay"] * p
    m = beta1 * _begun(old["exp_avg"], p) + rounded(1 - Bounded.of(beta1), compute) * g
    v = beta2 * _begun(old["exp_avg_sq"], p) + rounded(1 - Bounded.of(beta2), compute) * (g * g)
    return p, g, {"exp_avg": m, "exp_avg_sq": v}


def _decayed(o: Any, p: Bounded, direction: Array, compute: torch.dtype) -> Bounded:
    """Decoupled weight decay, where `direction` has the signs of the update that is to be subtracted."""
    if not o["weight_decay"]:
        return p
    coupling = o["weight_decay_form"].removeprefix("cautious_")
    rate = Bounded.of(o["lr"])
    if coupling == "fully_decoupled":
        rate = rate / Bounded.of(o["max_lr"])
    elif coupling == "corrected":
        rate = rate * rate / Bounded.of(o["max_lr"])
    decay = rounded(1 - rate * Bounded.of(o["weight_decay"]), compute)
    if o["weight_decay_form"].startswith("cautious"):
        sits_out = direction * np.sign(p.value) < 0
        decay = Bounded(np.where(sits_out, 1, decay.value), np.where(sits_out, 1, decay.bound), exact=True)
    return decay * p


def _moved(o: Any, p: Bounded, direction: Bounded, update: Bounded, compute: torch.dtype) -> Bounded:
    """Decay, if it is decoupled, and the update of an optimizer whose updates have the signs of `direction`."""
    if not o.get("decoupled_weight_decay", True):
        return p - update
    signs, undecided = sign(direction, compute)
    moved = _decayed(o, p, signs, compute) - update
    if not (o["weight_decay_form"].startswith("cautious") and undecided.any()):
        return moved
    both = (_decayed(o, p, np.full_like(signs, other), compute) - update for other in (-1, 1))
    return replace(moved, others=tuple(np.where(undecided, other.value, np.nan) for other in both))


def _numpy(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


def _root(v: Bounded, o: Any) -> Bounded:
    return (v + o["eps"]).sqrt() if o["eps_in_sqrt"] else v.sqrt() + o["eps"]


def _begun(state: Bounded | None, like: Bounded) -> Bounded:
    return _zeros(like) if state is None else state


def _zeros(like: Bounded) -> Bounded:
    return Bounded.of(np.zeros_like(like.value))
