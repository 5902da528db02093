"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Group, Scalars, States
from ..storage.dtypes import scalar_dtype
from .checks import check_lr, check_not_negative


class ASGD(FusedOptimizer):
    r"""Gradient descent that also keeps the average of its parameters.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        \theta &\leftarrow (1 - \lambda_d\eta_{t-1})\theta - \eta_{t-1}\, g \\
        \bar\theta &\leftarrow \bar\theta + \mu_{t-1}(\theta - \bar\theta) \\
        \eta_t &= \frac{\eta_0}{(1 + \lambda_d\eta_0 t)^\alpha}, \quad \mu_t = \frac{1}{\max(1, t - t_0)}

    Drop-in for ``torch.optim.ASGD``.

    Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging
    <https://doi.org/10.1137/0330046>`_, 1992.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta_0 \ge 0`, a number or a one-element tensor.
        lambd: :math:`\lambda_d \ge 0`, the decay.
        alpha: :math:`\alpha \ge 0`, the power of the learning rate's decay.
        t0: :math:`t_0`, the step at which to begin to average.
        weight_decay: :math:`\lambda \ge 0`.
        foreach: accepted and without effect.
        maximize: negate the gradient first.
        differentiable: must be false.
        capturable: whether the step may be captured in a CUDA graph.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step``, ``eta`` :math:`\eta` and ``mu`` :math:`\mu` (0-d), and ``ax`` :math:`\bar\theta`, of the parameter's
        shape and `state_dtype`. The average is what ASGD is for: it is not stored in 8 bits.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "asgd"
    hyperparameters = ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize")
    scalar_states = ("step", "eta", "mu")
    states = ("ax",)
    always = ("step", "eta", "mu", "ax")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float | Tensor = 1e-4,
        alpha: float | Tensor = 0.75,
        t0: float | Tensor = 1e6,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        check_lr(lr)
        check_not_negative(lambd=lambd, alpha=alpha, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **common)

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        lr = group["lr"]
        state.setdefault("step", 0.0)  # first, as torch has it
        state.setdefault("eta", lr.detach().to(scalar_dtype(), copy=True) if isinstance(lr, Tensor) else lr)
        state.setdefault("mu", 1.0)
        super().init_state(param, state, group)

    def is_exact(self, name: str, group: Group) -> bool:
        return True

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, lambd, alpha, t0, weight_decay, maximize = hyper
        step, eta, mu = scalar_states
        step = step + 1
        sign = -1.0 if maximize else 1.0
        scalars = (sign, weight_decay, 1 - lambd * eta, eta, mu)
        eta = lr / (1 + lambd * lr * step) ** alpha
        mu = 1 / max(1.0, step - t0)
        return scalars, (step, eta, mu)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, weight_decay, decay, eta, mu = scalars
        (ax,) = states
        if sign < 0:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        param.mul_(decay).add_(grad, alpha=-eta)
        if mu == 1:
            ax.copy_(param)
        else:
            ax.add_(torch.sub(param, ax), alpha=mu)
