"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Group, Scalars, States
from .checks import check_betas, check_lr, check_not_negative
from .decay import CHOICES, OPTIONAL, decay_, factors, settle


class Adam(FusedOptimizer):
    r"""Adam: a step along the mean of the gradients, divided by the root of the mean of their squares.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \frac{\eta}{1 - \beta_1^t} \cdot
            \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    With `amsgrad` the largest :math:`v` so far stands under the root. Drop-in for ``torch.optim.Adam``.

    Kingma and Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015; Reddi et al.,
    `On the Convergence of Adam and Beyond <https://openreview.net/forum?id=ryQu7f-RZ>`_, 2018.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`, both numbers or both one-element tensors.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        amsgrad: use the largest second moment so far.
        foreach: accepted and without effect.
        maximize: negate the gradient first.
        capturable: whether the step may be captured in a CUDA graph.
        differentiable: must be false.
        fused: False is ``backend="eager"``; None and True leave the choice to `backend`.
        decoupled_weight_decay: :math:`\theta \leftarrow (1 - \eta\lambda)\theta` before the update, in place of the
            first line.
        weight_decay_form: how much a step takes of a parameter, where :math:`u` is what it subtracts beside that:

            - ``"standard"``: :math:`\eta\lambda\theta`.
            - ``"fully_decoupled"``: :math:`(\eta / \eta_{max})\lambda\theta`. The decay follows the schedule of the
              learning rate, but not its size (`Loshchilov and Hutter <https://arxiv.org/abs/1711.05101>`_, 2019;
              `decouple_lr` of torch-optimi). A good :math:`\lambda` is :math:`\eta_{max}` times that of the standard.
            - ``"corrected"``: :math:`(\eta / \eta_{max})\eta\lambda\theta`, which keeps the ratio of gradients and
              parameters steady in layers that a normalization follows (AdamC: `Defazio
              <https://arxiv.org/abs/2506.02285>`_, 2025). Leave the other layers standard, in a group of their own.
            - ``"cautious"``: as the standard, but only where :math:`u\theta \ge 0`, so that decay never holds an update
              up (`Chen et al. <https://arxiv.org/abs/2510.12402>`_, 2025). Also ``"cautious_fully_decoupled"`` and
              ``"cautious_corrected"``.
        max_lr: :math:`\eta_{max} > 0`, the largest learning rate of the schedule, a number or a one-element tensor.
            None is the `lr` that a group begins with; ``OneCycleLR`` sets its own.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step`` (0-d), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v` and, with `amsgrad`, ``max_exp_avg_sq``, each of
        the parameter's shape and `state_dtype`.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "adam"
    hyperparameters = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay", *OPTIONAL)
    options = ("amsgrad", "fused")
    optional = OPTIONAL
    choices = CHOICES
    settle_group = staticmethod(settle)
    scalar_states = ("step",)
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    always = ("step", "exp_avg", "exp_avg_sq")
    nonnegative = ("exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        weight_decay_form: str = "standard",
        max_lr: float | Tensor | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        if isinstance(lr, Tensor) and foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        check_lr(lr)
        check_not_negative(epsilon=eps)
        check_betas(betas)
        check_not_negative(weight_decay=weight_decay)
        if not (all(isinstance(b, float) for b in betas) or all(isinstance(b, Tensor) for b in betas)):
            raise ValueError("betas must be either both floats or both Tensors")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor):
                if not capturable and foreach:
                    raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
                if beta.numel() != 1:
                    raise ValueError(f"Tensor betas[{i}] must be 1-element")
        defaults = {
            "lr": lr,
            "betas": tuple(beta.squeeze() if isinstance(beta, Tensor) else beta for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "weight_decay_form": weight_decay_form,
            "max_lr": max_lr,
        }
        super().__init__(params, defaults, **common)

    def uses(self, name: str, group: Group) -> bool:
        return name != "max_exp_avg_sq" or group["amsgrad"]

    def check_sparse(self, group: Group, name: str) -> None:
        raise RuntimeError(
            f"Adam does not support sparse gradients, please consider SparseAdam instead ({name} has one)"
        )

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, beta1, beta2, eps, weight_decay, maximize, decoupled, form, max_lr = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        l2 = 0.0 if decoupled else weight_decay
        decay, opposed = factors(lr, weight_decay if decoupled else 0.0, form, max_lr)
        step_size = lr / (1 - beta1**step)
        bias_correction2_sqrt = (1 - beta2**step) ** 0.5
        scalars = (sign, l2, decay, opposed, 1 - beta1, beta2, 1 - beta2, eps, step_size, bias_correction2_sqrt)
        return scalars, (step,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        (
            sign, l2, decay, opposed, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, bias_correction2_sqrt,
        ) = scalars  # fmt: skip
        exp_avg, exp_avg_sq, max_exp_avg_sq = states
        if sign < 0:
            grad = -grad
        if l2 != 0:
            grad = grad.add(param, alpha=l2)
        exp_avg.lerp_(grad, one_minus_beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=one_minus_beta2)
        if max_exp_avg_sq is not None:
            torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
            denom = max_exp_avg_sq.sqrt().div_(bias_correction2_sqrt).add_(eps)
        else:
            denom = exp_avg_sq.sqrt().div_(bias_correction2_sqrt).add_(eps)
        decay_(param, exp_avg, decay, opposed)
        param.addcdiv_(exp_avg, denom, value=-step_size)


class AdamW(Adam):
    r"""Adam with decoupled weight decay: :math:`\theta \leftarrow (1 - \eta\lambda)\theta` before Adam's update.

    Drop-in for ``torch.optim.AdamW``. Arguments, states and errors are those of `Adam`, but `weight_decay` is 0.01 by
    default and always decoupled.

    Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            weight_decay_form=weight_decay_form,
            max_lr=max_lr,
            **common,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults["decoupled_weight_decay"] = True
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
