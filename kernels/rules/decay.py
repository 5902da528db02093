"""What decoupled weight decay multiplies by. Kernel twin of fusedopt/rules/decay.py."""

from ..language import tl, triton


@triton.jit
def factors(lr, weight_decay, form, max_lr):
    """For elements whose sign is not the opposite of the update's, and for those whose sign is."""
    cautious = form > 2
    coupling = tl.where(cautious, form - 3, form)
    relative_lr = lr / tl.where(coupling > 0, max_lr, 1.0)
    rate = tl.where(coupling > 0, tl.where(coupling > 1, lr * relative_lr, relative_lr), lr)
    decay = 1 - rate * weight_decay
    return decay, tl.where(cautious, 1.0, decay)


@triton.jit
def decayed(param, update, decay, opposed):
    """The parameter, decayed; `update` has the sign of what is about to be subtracted."""
    return tl.where(update * param < 0, opposed, decay) * param
