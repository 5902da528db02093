"""What decoupled weight decay multiplies by. Kernel twin of fusedopt/rules/decay.py."""

from ..language import tl, triton


@triton.jit
def factors(lr, weight_decay, form, max_lr):
    """For elements whose sign is not the opposite of the update's, and for those whose sign is."""
    # By the places in FORMS: 0 standard, 1 fully decoupled, 2 corrected; three further, the same cautiously.
    relative_lr = tl.where((form == 0) | (form == 3), 1.0, lr / max_lr)
    rate = tl.where((form == 1) | (form == 4), 1.0, lr) * relative_lr
    decay = 1 - rate * weight_decay
    return decay, tl.where(form > 2, 1.0, decay)


@triton.jit
def decayed(param, update, decay, opposed):
    """The parameter, decayed; `update` has the sign of what is about to be subtracted."""
    # The outer condition is the same for all elements, so that a CPU asks it once for a whole loop.
    return tl.where(opposed != decay, tl.where(update * param < 0, opposed, decay), decay) * param
