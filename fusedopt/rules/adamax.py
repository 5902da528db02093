"""Adamax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Scalars, States
from .checks import check_betas, check_lr, check_not_negative


class Adamax(FusedOptimizer):
    r"""Adamax: Adam with the largest decayed gradient in place of the root mean square.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        u &\leftarrow \max(\beta_2 u, |g| + \epsilon) \\
        \theta &\leftarrow \theta - \frac{\eta}{1 - \beta_1^t} \cdot \frac{m}{u}

    Drop-in for ``torch.optim.Adamax``.

    Kingma and Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015, section 7.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        foreach: accepted and without effect.
        maximize: negate the gradient first.
        differentiable: must be false.
        capturable: whether the step may be captured in a CUDA graph.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step`` (0-d), ``exp_avg`` :math:`m` and ``exp_inf`` :math:`u`, of the
        parameter's shape and `state_dtype`.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "adamax"
    hyperparameters = ("lr", "betas", "eps", "weight_decay", "maximize")
    scalar_states = ("step",)
    states = ("exp_avg", "exp_inf")
    always = ("step", "exp_avg", "exp_inf")
    nonnegative = ("exp_inf",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        check_lr(lr)
        check_not_negative(epsilon=eps)
        check_betas(betas)
        check_not_negative(weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **common)

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, beta1, beta2, eps, weight_decay, maximize = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        step_size = lr / (1 - beta1**step)
        return (sign, weight_decay, 1 - beta1, beta2, eps, step_size), (step,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, weight_decay, one_minus_beta1, beta2, eps, step_size = scalars
        exp_avg, exp_inf = states
        if sign < 0:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, one_minus_beta1)
        torch.maximum(exp_inf.mul_(beta2), grad.abs().add_(eps), out=exp_inf)
        param.addcdiv_(exp_avg, exp_inf, value=-step_size)
