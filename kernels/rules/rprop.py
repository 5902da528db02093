"""Kernel twin of fusedopt/rules/rprop.py."""

from ..arithmetic import maximum, minimum, signum
from ..language import tl, triton


@triton.jit
def scalars(hyper, scalar_states):
    _lr, eta_minus, eta_plus, step_size_min, step_size_max, maximize = hyper
    step = scalar_states[0] + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    return (sign, eta_minus, eta_plus, step_size_min, step_size_max), (step,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, eta_minus, eta_plus, step_size_min, step_size_max = scalars
    prev, step_size = states
    grad = sign * grad
    agreement = grad * prev
    factor = tl.where(agreement > 0, eta_plus, tl.where(agreement < 0, eta_minus, 1.0))
    step_size = minimum(maximum(factor * step_size, step_size_min), step_size_max)
    grad = tl.where(agreement < 0, 0.0, grad)
    param -= signum(grad) * step_size
    return param, (grad, step_size)
