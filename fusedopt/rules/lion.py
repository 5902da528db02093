"""Lion."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Scalars, States
from .checks import check_betas, check_lr, check_not_negative
from .decay import CHOICES, OPTIONAL, decay_, factors, settle


class Lion(FusedOptimizer):
    r"""Lion: a step by the sign of a momentum that leans towards the newest gradient.

    .. math::
        d &= \mathrm{sign}(\beta_1 m + (1 - \beta_1) g) \\
        \theta &\leftarrow (1 - \eta\lambda)\theta - \eta d \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    Every element moves by :math:`\eta`, so that a good learning rate is 3 to 10 times smaller than Adam's, and a good
    weight decay as many times larger. torch.optim has no Lion; its interface here is that of torch's AdamW.

    Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        weight_decay: :math:`\lambda \ge 0`, decoupled from the gradient.
        maximize: negate the gradient first.
        foreach: accepted and without effect.
        capturable: whether the step may be captured in a CUDA graph.
        differentiable: must be false.
        fused: False is ``backend="eager"``; None and True leave the choice to `backend`.
        weight_decay_form: how much a decoupled decay takes in a step, and where: one of the names that `Adam` lists.
        max_lr: :math:`\eta_{max} > 0` of these forms, as for `Adam`.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``exp_avg`` :math:`m`, of the parameter's shape and `state_dtype`.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "lion"
    hyperparameters = ("lr", "betas", "weight_decay", "maximize", *OPTIONAL)
    options = ("fused",)
    optional = OPTIONAL
    choices = CHOICES
    settle_group = staticmethod(settle)
    states = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        weight_decay_form: str = "standard",
        max_lr: float | Tensor | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        check_lr(lr)
        check_betas(betas)
        check_not_negative(weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "weight_decay_form": weight_decay_form,
            "max_lr": max_lr,
        }
        super().__init__(params, defaults, **common)

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, beta1, beta2, weight_decay, maximize, form, max_lr = hyper
        sign = -1.0 if maximize else 1.0
        decay, opposed = factors(lr, weight_decay, form, max_lr)
        return (sign, decay, opposed, beta1, 1 - beta1, beta2, 1 - beta2, lr), ()

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, decay, opposed, beta1, one_minus_beta1, beta2, one_minus_beta2, lr = scalars
        (exp_avg,) = states
        if sign < 0:
            grad = -grad
        direction = exp_avg.mul(beta1).add_(grad, alpha=one_minus_beta1).sign_()
        decay_(param, direction, decay, opposed)
        param.add_(direction, alpha=-lr)
        exp_avg.mul_(beta2).add_(grad, alpha=one_minus_beta2)
