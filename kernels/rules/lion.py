"""Kernel twin of fusedopt/rules/lion.py."""

from ..arithmetic import signum
from ..language import tl, triton
from .decay import decayed, factors


@triton.jit
def scalars(hyper, scalar_states):
    lr, beta1, beta2, weight_decay, maximize, form, max_lr = hyper
    sign = tl.where(maximize != 0, -1.0, 1.0)
    decay, opposed = factors(lr, weight_decay, form, max_lr)
    return (sign, decay, opposed, beta1, 1 - beta1, beta2, 1 - beta2, lr), ()


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, decay, opposed, beta1, one_minus_beta1, beta2, one_minus_beta2, lr = scalars
    exp_avg = states[0]
    grad = sign * grad
    direction = signum(beta1 * exp_avg + one_minus_beta1 * grad)
    param = decayed(param, direction, decay, opposed) - lr * direction
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad
    return param, (exp_avg,)
