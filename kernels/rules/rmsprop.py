"""Kernel twin of fusedopt/rules/rmsprop.py."""

from ..arithmetic import div, maximum, sqrt
from ..language import tl, triton


@triton.jit
def scalars(hyper, scalar_states):
    lr, alpha, eps, weight_decay, momentum, maximize, eps_in_sqrt = hyper
    step = scalar_states[0] + 1
    sign = tl.where(maximize != 0, -1.0, 1.0)
    eps_inside = tl.where(eps_in_sqrt != 0, eps, 0.0)
    eps_outside = tl.where(eps_in_sqrt != 0, 0.0, eps)
    return (sign, weight_decay, alpha, 1 - alpha, eps_inside, eps_outside, momentum, lr), (step,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, weight_decay, alpha, one_minus_alpha, eps_inside, eps_outside, momentum, lr = scalars
    square_avg, momentum_buffer, grad_avg = states
    grad = sign * grad
    grad = tl.where(weight_decay != 0, grad + weight_decay * param, grad)
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad
    if STATES[2] is not None:
        grad_avg += one_minus_alpha * (grad - grad_avg)
        variance = maximum(square_avg - grad_avg * grad_avg, 0.0)
    else:
        variance = square_avg
    denom = sqrt(variance + eps_inside) + eps_outside
    if STATES[1] is not None:
        momentum_buffer = momentum * momentum_buffer + div(grad, denom)
        param -= lr * momentum_buffer
    else:
        param -= lr * div(grad, denom)
    return param, (square_avg, momentum_buffer, grad_avg)
