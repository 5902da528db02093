"""Kernel twin of fusedopt/rules/adadelta.py."""

from ..arithmetic import div, sqrt
from ..language import tl, triton


@triton.jit
def scalars(hyper, scalar_states):
    lr, rho, eps, weight_decay, maximize = hyper
    step = scalar_states[0] + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    return (sign, weight_decay, rho, 1 - rho, eps, lr), (step,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, weight_decay, rho, one_minus_rho, eps, lr = scalars
    square_avg, acc_delta = states
    grad = sign * grad
    grad = tl.where(weight_decay != 0, grad + weight_decay * param, grad)
    square_avg = rho * square_avg + one_minus_rho * grad * grad
    delta = div(sqrt(acc_delta + eps), sqrt(square_avg + eps)) * grad
    acc_delta = rho * acc_delta + one_minus_rho * delta * delta
    param -= lr * delta
    return param, (square_avg, acc_delta)
