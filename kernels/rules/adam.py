"""Kernel twin of fusedopt/rules/adam.py."""

from ..arithmetic import div, maximum, power, sqrt
from ..language import tl, triton
from .decay import decayed, factors


@triton.jit
def scalars(hyper, scalar_states):
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled, form, max_lr = hyper
    step = scalar_states[0] + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    l2 = tl.where(decoupled != 0, 0.0, weight_decay)
    decay, opposed = factors(lr, tl.where(decoupled != 0, weight_decay, 0.0), form, max_lr)
    step_size = lr / (1 - power(beta1, step))
    inv_bias_correction2_sqrt = 1 / tl.sqrt(1 - power(beta2, step))
    scalars = (sign, l2, decay, opposed, 1 - beta1, beta2, 1 - beta2, eps, step_size, inv_bias_correction2_sqrt)
    return scalars, (step,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    (
        sign, l2, decay, opposed, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inv_bias_correction2_sqrt,
    ) = scalars  # fmt: skip
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    grad = sign * grad
    grad = tl.where(l2 != 0, grad + l2 * param, grad)
    exp_avg += one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    if STATES[2] is not None:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        denom = sqrt(max_exp_avg_sq) * inv_bias_correction2_sqrt + eps
    else:
        denom = sqrt(exp_avg_sq) * inv_bias_correction2_sqrt + eps
    param = decayed(param, exp_avg, decay, opposed)
    param -= step_size * div(exp_avg, denom)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)
