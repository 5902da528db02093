"""Kernel twin of fusedopt/rules/nadam.py."""

from ..arithmetic import div, power, sqrt
from ..language import tl, triton
from .decay import decayed, factors


@triton.jit
def scalars(hyper, scalar_states):
    lr, beta1, beta2, eps, weight_decay, momentum_decay, maximize, decoupled, form, max_lr = hyper
    step = scalar_states[0] + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    l2 = tl.where(decoupled != 0, 0.0, weight_decay)
    decay, opposed = factors(lr, tl.where(decoupled != 0, weight_decay, 0.0), form, max_lr)
    base = tl.full(step.shape, 0.96, tl.float64)
    mu = beta1 * (1 - 0.5 * power(base, step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * power(base, (step + 1) * momentum_decay))
    mu_product = scalar_states[1] * mu
    grad_size = lr * (1 - mu) / (1 - mu_product)
    step_size = lr * mu_next / (1 - mu_product * mu_next)
    inv_bias_correction2 = 1 / (1 - power(beta2, step))
    scalars = (
        sign, l2, decay, opposed, 1 - beta1, beta2, 1 - beta2, eps, grad_size, step_size, inv_bias_correction2,
    )  # fmt: skip
    return scalars, (step, mu_product)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    (
        sign, l2, decay, opposed, one_minus_beta1, beta2, one_minus_beta2, eps, grad_size, step_size,
        inv_bias_correction2,
    ) = scalars  # fmt: skip
    exp_avg, exp_avg_sq = states
    grad = sign * grad
    grad = tl.where(l2 != 0, grad + l2 * param, grad)
    exp_avg += one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    denom = sqrt(exp_avg_sq * inv_bias_correction2) + eps
    direction = grad_size * grad + step_size * exp_avg
    param = decayed(param, direction, decay, opposed)
    param -= div(direction, denom)
    return param, (exp_avg, exp_avg_sq)
