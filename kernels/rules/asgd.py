"""Kernel twin of fusedopt/rules/asgd.py."""

from ..arithmetic import power
from ..language import tl, triton


@triton.jit
def scalars(hyper, scalar_states):
    lr, lambd, alpha, t0, weight_decay, maximize = hyper
    step, eta, mu = scalar_states
    step = step + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    scalars = (sign, weight_decay, 1 - lambd * eta, eta, mu)
    eta = lr / power(1 + lambd * lr * step, alpha)
    mu = 1 / tl.maximum(1.0, step - t0)
    return scalars, (step, eta, mu)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, weight_decay, decay, eta, mu = scalars
    ax = states[0]
    grad = sign * grad
    grad = tl.where(weight_decay != 0, grad + weight_decay * param, grad)
    param = decay * param - eta * grad
    ax = tl.where(mu == 1, param, ax + mu * (param - ax))
    return param, (ax,)
