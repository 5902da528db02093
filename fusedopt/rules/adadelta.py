"""AdaDelta."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Scalars, States
from .checks import check_lr, check_not_negative


class Adadelta(FusedOptimizer):
    r"""AdaDelta: a step along the gradient, in units of the root mean squares of past steps over past gradients.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        s &\leftarrow \rho s + (1 - \rho) g^2 \\
        \delta &= \frac{\sqrt{\Delta + \epsilon}}{\sqrt{s + \epsilon}}\, g \\
        \Delta &\leftarrow \rho \Delta + (1 - \rho) \delta^2 \\
        \theta &\leftarrow \theta - \eta\delta

    Drop-in for ``torch.optim.Adadelta``.

    Zeiler, `ADADELTA: An Adaptive Learning Rate Method <https://arxiv.org/abs/1212.5701>`_, 2012; Zhang et al., `Dive
    into Deep Learning <https://d2l.ai/chapter_optimization/adadelta.html>`_, 2023 (the same form).

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        rho: :math:`\rho \in [0, 1]`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        foreach: accepted and without effect.
        capturable: whether the step may be captured in a CUDA graph.
        maximize: negate the gradient first.
        differentiable: must be false.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step`` (0-d), ``square_avg`` :math:`s` and ``acc_delta`` :math:`\Delta`, each of the parameter's shape and
        dtype.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "adadelta"
    hyperparameters = ("lr", "rho", "eps", "weight_decay", "maximize")
    scalar_states = ("step",)
    states = ("square_avg", "acc_delta")
    always = ("step", "square_avg", "acc_delta")
    nonnegative = ("square_avg", "acc_delta")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float | Tensor = 0.9,
        eps: float | Tensor = 1e-6,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        check_lr(lr)
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"Invalid rho value: {rho}")
        check_not_negative(epsilon=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **common)

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, rho, eps, weight_decay, maximize = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        return (sign, weight_decay, rho, 1 - rho, eps, lr), (step,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, weight_decay, rho, one_minus_rho, eps, lr = scalars
        square_avg, acc_delta = states
        if sign < 0:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        square_avg.mul_(rho).addcmul_(grad, grad, value=one_minus_rho)
        delta = acc_delta.add(eps).sqrt_().div_(square_avg.add(eps).sqrt_()).mul_(grad)
        acc_delta.mul_(rho).addcmul_(delta, delta, value=one_minus_rho)
        param.add_(delta, alpha=-lr)
