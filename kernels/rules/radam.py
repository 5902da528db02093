"""Kernel twin of fusedopt/rules/radam.py."""

from ..arithmetic import div, power, sqrt
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
    beta2_power = power(beta2, step)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2_power / (1 - beta2_power)
    rectified = rho > 5
    # Where it is not rectified, numbers that make the root real.
    rho = tl.where(rectified, rho, 6.0)
    rho_inf = tl.where(rectified, rho_inf, 6.0)
    rectification = tl.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    adaptive_size = tl.where(rectified, rectification * tl.sqrt(1 - beta2_power), 0.0)
    return (sign, l2, decay, opposed, 1 - beta1, beta2, 1 - beta2, eps, step_size, adaptive_size), (step,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, l2, decay, opposed, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, adaptive_size = scalars
    exp_avg, exp_avg_sq = states
    grad = sign * grad
    grad = tl.where(l2 != 0, grad + l2 * param, grad)
    exp_avg += one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    adaptive = div(adaptive_size * exp_avg, sqrt(exp_avg_sq) + eps)
    param = decayed(param, exp_avg, decay, opposed)
    param -= step_size * tl.where(adaptive_size != 0, adaptive, exp_avg)
    return param, (exp_avg, exp_avg_sq)
