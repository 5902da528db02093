"""Kernel twin of fusedopt/rules/muon.py."""

from ..arithmetic import lerp
from ..language import tl, triton
from . import adam
from .decay import decayed


@triton.jit
def scalars(hyper, scalar_states):
    lr, weight_decay, momentum, nesterov, beta1, beta2, eps, form, max_lr = hyper
    zero = tl.zeros_like(lr)
    hyper_of_adam = (lr, beta1, beta2, eps, weight_decay, zero, zero + 1.0, form, max_lr)
    scalars_of_adam, scalar_states = adam.scalars(hyper_of_adam, scalar_states)
    scalars_of_muon = (1 - momentum, tl.where(nesterov != 0, momentum, 1.0), lr)
    return scalars_of_adam + scalars_of_muon, scalar_states


@triton.jit
def direction(param, grad, states, scalars, STATES: tl.constexpr):
    momentum_weight, lean, _ = scalars[10:]
    momentum_buffer = lerp(states[2], grad, momentum_weight)
    return lerp(grad, momentum_buffer, lean), (states[0], states[1], momentum_buffer)


@triton.jit
def descent(param, grad, states, scalars, STATES: tl.constexpr):
    decay, opposed, lr = scalars[2], scalars[3], scalars[12]
    param = decayed(param, grad, decay, opposed)
    return param - lr * grad, states


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    return adam.update(param, grad, states, scalars[:10], STATES)
