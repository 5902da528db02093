"""NAdam."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Group, Scalars, States
from .checks import check_betas, check_lr, check_not_negative
from .decay import CHOICES, OPTIONAL, decay_, factors, settle


class NAdam(FusedOptimizer):
    r"""NAdam: Adam with Nesterov's momentum.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        \mu_t &= \beta_1 (1 - \tfrac12 0.96^{t\psi}), \quad \Pi_t = \Pi_{t-1}\,\mu_t \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \eta \left(\frac{1 - \mu_t}{1 - \Pi_t}\, g + \frac{\mu_{t+1}}{1 - \Pi_{t+1}}\, m
            \right) \Big/ \left(\sqrt{v / (1 - \beta_2^t)} + \epsilon\right)

    Drop-in for ``torch.optim.NAdam``.

    Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        momentum_decay: :math:`\psi \ge 0`.
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
        ``step`` and ``mu_product`` :math:`\Pi` (0-d), ``exp_avg`` :math:`m` and ``exp_avg_sq`` :math:`v`, each of the
        parameter's shape and `state_dtype`.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "nadam"
    hyperparameters = (
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "momentum_decay",
        "maximize",
        "decoupled_weight_decay",
        *OPTIONAL,
    )
    optional = OPTIONAL
    choices = CHOICES
    settle_group = staticmethod(settle)
    scalar_states = ("step", "mu_product")
    states = ("exp_avg", "exp_avg_sq")
    always = ("step", "mu_product", "exp_avg", "exp_avg_sq")
    nonnegative = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum_decay: float | Tensor = 4e-3,
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
        check_not_negative(weight_decay=weight_decay, momentum_decay=momentum_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "weight_decay_form": weight_decay_form,
            "max_lr": max_lr,
        }
        super().__init__(params, defaults, **common)

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        state.setdefault("step", 0.0)  # first, as torch has it
        state.setdefault("mu_product", 1.0)
        super().init_state(param, state, group)

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, beta1, beta2, eps, weight_decay, momentum_decay, maximize, decoupled, form, max_lr = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        l2 = 0.0 if decoupled else weight_decay
        decay, opposed = factors(lr, weight_decay if decoupled else 0.0, form, max_lr)
        mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
        mu_product = scalar_states[1] * mu
        grad_size = lr * (1 - mu) / (1 - mu_product)
        step_size = lr * mu_next / (1 - mu_product * mu_next)
        bias_correction2 = 1 - beta2**step
        scalars = (sign, l2, decay, opposed, 1 - beta1, beta2, 1 - beta2, eps, grad_size, step_size, bias_correction2)
        return scalars, (step, mu_product)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        (
            sign, l2, decay, opposed, one_minus_beta1, beta2, one_minus_beta2, eps, grad_size, step_size,
            bias_correction2,
        ) = scalars  # fmt: skip
        exp_avg, exp_avg_sq = states
        if sign < 0:
            grad = -grad
        if l2 != 0:
            grad = grad.add(param, alpha=l2)
        exp_avg.lerp_(grad, one_minus_beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=one_minus_beta2)
        denom = exp_avg_sq.div(bias_correction2).sqrt_().add_(eps)
        direction = grad.mul(grad_size).add_(exp_avg, alpha=step_size)
        decay_(param, direction, decay, opposed)
        param.addcdiv_(direction, denom, value=-1)
