r"""Decoupled weight decay, in every form. The kernels' twin is kernels/rules/decay.py.

A step takes the share :math:`d` of the parameter away beside its update :math:`u`, where :math:`\eta` is the learning
rate and :math:`\eta_{max}` the largest of its schedule:

.. math::
    \theta \leftarrow \theta - d\,\theta - \eta u, \qquad
    d = \begin{cases}
        \eta\lambda & \text{standard} \\
        (\eta / \eta_{max})\,\lambda & \text{fully decoupled} \\
        (\eta / \eta_{max})\,\eta\lambda & \text{corrected}
    \end{cases}

A cautious form takes it where :math:`u\theta \ge 0` only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..options import read_number
from ..protocol import Group

COUPLINGS = ("standard", "fully_decoupled", "corrected")
# `factors` gets the place of the name. Where the decay is cautious, it is as many places further.
FORMS = (*COUPLINGS, "cautious", "cautious_fully_decoupled", "cautious_corrected")
# In the order of the hyperparameters.
OPTIONAL: Group = {"weight_decay_form": "standard", "max_lr": None}
CHOICES: dict[str, tuple[str, ...]] = {"weight_decay_form": FORMS}


def factors(lr: float, weight_decay: float, form: float, max_lr: float) -> tuple[float, float]:
    """For elements whose sign is not the opposite of the update's, and for those whose sign is."""
    cautious, coupling = divmod(int(form), len(COUPLINGS))
    relative_lr = 1.0 if coupling == 0 else lr / max_lr
    rate = (1.0 if coupling == 1 else lr) * relative_lr
    decay = 1 - rate * weight_decay
    return decay, 1.0 if cautious else decay


def decay_(param: Tensor, update: Tensor, decay: float, opposed: float) -> None:
    """Decay the parameter; `update` has the sign of what is about to be subtracted."""
    if decay != opposed:
        param.copy_(torch.where(update * param < 0, opposed * param, decay * param))
    elif decay != 1:
        param.mul_(decay)


def settle(group: Group, index: int) -> None:
    """Give a group the `max_lr` that its form of decay asks for, unless it has one: the `lr` that it begins with.

    Raises:
        ValueError: the decay of the group is not decoupled; `max_lr` is not above 0.
        TypeError: `max_lr` is no number.
    """
    form = group.get("weight_decay_form", "standard")
    if form != "standard" and not group.get("decoupled_weight_decay", True):
        raise ValueError(
            f"weight_decay_form={form!r} of group {index} is a form of decoupled decay: set decoupled_weight_decay=True"
        )
    max_lr = group.get("max_lr")
    if max_lr is None:
        if form in ("standard", "cautious"):
            return
        lr = group.get("initial_lr", group["lr"])
        max_lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
    number = read_number(max_lr, "max_lr", index)
    if number is not None and not 0 < number < math.inf:
        raise ValueError(
            f"Invalid max_lr of group {index}: {number}, it must be positive. It is the largest lr of the schedule, "
            "and that with which the group begins unless you set it"
        )
    group["max_lr"] = max_lr
