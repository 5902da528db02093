"""Kernel twin of fusedopt/rules/sgd.py."""

from ..language import tl, triton


@triton.jit
def scalars(hyper, scalar_states):
    lr, momentum, dampening, weight_decay, nesterov, maximize, lr_in_momentum = hyper
    begun = scalar_states[0]
    sign = tl.where(maximize != 0, -1.0, 1.0)
    scale = tl.where(lr_in_momentum != 0, lr, 1.0)
    step_size = tl.where(lr_in_momentum != 0, 1.0, lr)
    grad_weight = scale * tl.where(begun != 0, 1 - dampening, 1.0)
    return (sign, weight_decay, momentum, grad_weight, nesterov, scale, step_size, lr), (tl.zeros_like(lr) + 1.0,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    sign, weight_decay, momentum, grad_weight, nesterov, scale, step_size, lr = scalars
    momentum_buffer = states[0]
    grad = sign * grad
    grad = tl.where(weight_decay != 0, grad + weight_decay * param, grad)
    if STATES[0] is not None:
        momentum_buffer = momentum * momentum_buffer + grad_weight * grad
        direction = tl.where(nesterov != 0, scale * grad + momentum * momentum_buffer, momentum_buffer)
        param -= step_size * direction
    else:
        param -= lr * grad
    return param, (momentum_buffer,)
