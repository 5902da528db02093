"""RAdam."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Scalars, States
from .checks import check_betas, check_lr, check_not_negative
from .decay import CHOICES, OPTIONAL, decay_, factors, settle


class RAdam(FusedOptimizer):
    r"""RAdam: Adam that adapts only once the variance of its second moment is known well enough.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \quad
            \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}} \\
        \theta &\leftarrow \theta - \frac{\eta}{1 - \beta_1^t}\, m \cdot
            \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v} + \epsilon) & \rho_t > 5 \\ 1 & \text{else}\end{cases}

    Drop-in for ``torch.optim.RAdam``.

    Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond <https://arxiv.org/abs/1908.03265>`_, 2020.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        decoupled_weight_decay: :math:`\theta \leftarrow (1 - \eta\lambda)\theta` before the update, in place of the
            first line.
        foreach: accepted and without effect.
        maximize: negate the gradient first.
        capturable: whether the step may be captured in a CUDA graph.
        differentiable: must be false.
        weight_decay_form: how much a decoupled decay takes in a step, and where: one of the names that `Adam` lists.
        max_lr: :math:`\eta_{max} > 0` of these forms, as for `Adam`.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step`` (0-d), ``exp_avg`` :math:`m` and ``exp_avg_sq`` :math:`v`, of the
        parameter's shape and `state_dtype`.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "radam"
    hyperparameters = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay", *OPTIONAL)
    optional = OPTIONAL
    choices = CHOICES
    settle_group = staticmethod(settle)
    scalar_states = ("step",)
    states = ("exp_avg", "exp_avg_sq")
    always = ("step", "exp_avg", "exp_avg_sq")
    nonnegative = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        weight_decay_form: str = "standard",
        max_lr: float | Tensor | None = None,
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
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
            "weight_decay_form": weight_decay_form,
            "max_lr": max_lr,
        }
        super().__init__(params, defaults, **common)

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, beta1, beta2, eps, weight_decay, maximize, decoupled, form, max_lr = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        l2 = 0.0 if decoupled else weight_decay
        decay, opposed = factors(lr, weight_decay if decoupled else 0.0, form, max_lr)
        step_size = lr / (1 - beta1**step)
        beta2_power = beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2_power / (1 - beta2_power)
        adaptive_size = 0.0
        if rho > 5:
            rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            adaptive_size = rectification * (1 - beta2_power) ** 0.5
        return (sign, l2, decay, opposed, 1 - beta1, beta2, 1 - beta2, eps, step_size, adaptive_size), (step,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, l2, decay, opposed, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, adaptive_size = scalars
        exp_avg, exp_avg_sq = states
        if sign < 0:
            grad = -grad
        if l2 != 0:
            grad = grad.add(param, alpha=l2)
        exp_avg.lerp_(grad, one_minus_beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=one_minus_beta2)
        decay_(param, exp_avg, decay, opposed)
        if adaptive_size != 0:
            param.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-step_size * adaptive_size)
        else:
            param.add_(exp_avg, alpha=-step_size)
