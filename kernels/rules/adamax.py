"""Kernel twin of fusedopt/rules/adamax.py."""

from ..arithmetic import div, maximum, power
from ..language import tl, triton


@triton.jit
def scalars(hyper, scalar_states):
    lr, beta1, beta2, eps, weight_decay, maximize = hyper
    step = scalar_states[0] + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    step_size = lr / (1 - power(beta1, step))
    return (sign, weight_decay, 1 - beta1, beta2, eps, step_size), (step,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, weight_decay, one_minus_beta1, beta2, eps, step_size = scalars
    exp_avg, exp_inf = states
    grad = sign * grad
    grad = tl.where(weight_decay != 0, grad + weight_decay * param, grad)
    exp_avg += one_minus_beta1 * (grad - exp_avg)
    exp_inf = maximum(beta2 * exp_inf, tl.abs(grad) + eps)
    param -= step_size * div(exp_avg, exp_inf)
    return param, (exp_avg, exp_inf)
