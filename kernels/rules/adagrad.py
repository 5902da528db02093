"""Kernel twin of fusedopt/rules/adagrad.py."""

from ..arithmetic import div, sqrt
from ..language import tl, triton


@triton.jit
def scalars(hyper, scalar_states):
    lr, lr_decay, weight_decay, eps, maximize, eps_in_sqrt = hyper
    step = scalar_states[0] + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    step_size = lr / (1 + (step - 1) * lr_decay)
    eps_inside = tl.where(eps_in_sqrt != 0, eps, 0.0)
    eps_outside = tl.where(eps_in_sqrt != 0, 0.0, eps)
    return (sign, weight_decay, step_size, eps_inside, eps_outside), (step,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, weight_decay, step_size, eps_inside, eps_outside = scalars
    sum = states[0]
    grad = sign * grad
    grad = tl.where(weight_decay != 0, grad + weight_decay * param, grad)
    sum += grad * grad
    denom = sqrt(sum + eps_inside) + eps_outside
    param -= step_size * div(grad, denom)
    return param, (sum,)
