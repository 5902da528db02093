"""RMSProp."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Group, Scalars, States
from .checks import check_lr, check_not_negative, lies_on_device


class RMSprop(FusedOptimizer):
    r"""RMSProp: a step along the gradient, divided by the root of the mean of its squares.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        d &= \sqrt{v} + \epsilon, \quad \text{centered: } a \leftarrow \alpha a + (1 - \alpha) g
            \text{ and } d = \sqrt{\max(v - a^2, 0)} + \epsilon \\
        \theta &\leftarrow \theta - \eta\, g / d, \quad
            \text{with momentum: } b \leftarrow \mu b + g / d \text{ and } \theta \leftarrow \theta - \eta b

    Drop-in for ``torch.optim.RMSprop``, which lacks the maximum and returns NaN where rounding makes the variance
    negative.

    Hinton, `Neural Networks for Machine Learning, lecture 6
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012; Graves, `Generating Sequences
    With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_, 2013 (centered); Zhang et al., `Dive into Deep
    Learning <https://d2l.ai/chapter_optimization/rmsprop.html>`_, 2023.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        alpha: :math:`\alpha \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        momentum: :math:`\mu \ge 0`.
        centered: divide by the standard deviation of the gradient instead.
        capturable: whether the step may be captured in a CUDA graph.
        foreach: accepted and without effect.
        maximize: negate the gradient first.
        differentiable: must be false.
        eps_in_sqrt: the book's form, :math:`\sqrt{v + \epsilon}` in place of :math:`\sqrt{v} + \epsilon`.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step`` (0-d), ``square_avg`` :math:`v`, ``momentum_buffer`` :math:`b` if there is a momentum and ``grad_avg``
        :math:`a` if centered, each of the parameter's shape and `state_dtype`. Where it is centered, :math:`v` and
        :math:`a` are not stored in 8 bits: of the difference :math:`v - a^2` nothing would be left.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "rmsprop"
    hyperparameters = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize", "eps_in_sqrt")
    options = ("centered",)
    optional: ClassVar[dict[str, Any]] = {"eps_in_sqrt": False}
    scalar_states = ("step",)
    states = ("square_avg", "momentum_buffer", "grad_avg")
    always = ("step", "square_avg")
    nonnegative = ("square_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float | Tensor = 0.99,
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum: float | Tensor = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_in_sqrt: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        check_lr(lr)
        check_not_negative(epsilon=eps, momentum=momentum, weight_decay=weight_decay, alpha=alpha)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "eps_in_sqrt": eps_in_sqrt,
        }
        super().__init__(params, defaults, **common)

    def uses(self, name: str, group: Group) -> bool:
        if name == "momentum_buffer":
            return lies_on_device(group["momentum"]) or group["momentum"] > 0
        return name != "grad_avg" or group["centered"]

    def is_exact(self, name: str, group: Group) -> bool:
        return bool(group["centered"]) and name != "momentum_buffer"

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, alpha, eps, weight_decay, momentum, maximize, eps_in_sqrt = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        eps_inside = eps if eps_in_sqrt else 0.0
        eps_outside = 0.0 if eps_in_sqrt else eps
        return (sign, weight_decay, alpha, 1 - alpha, eps_inside, eps_outside, momentum, lr), (step,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, weight_decay, alpha, one_minus_alpha, eps_inside, eps_outside, momentum, lr = scalars
        square_avg, momentum_buffer, grad_avg = states
        if sign < 0:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        square_avg.mul_(alpha).addcmul_(grad, grad, value=one_minus_alpha)
        if grad_avg is not None:
            grad_avg.lerp_(grad, one_minus_alpha)
            variance = square_avg.addcmul(grad_avg, grad_avg, value=-1).clamp_(min=0)
            denom = (variance.add_(eps_inside) if eps_inside else variance).sqrt_().add_(eps_outside)
        else:
            denom = (square_avg.add(eps_inside).sqrt_() if eps_inside else square_avg.sqrt()).add_(eps_outside)
        if momentum_buffer is not None:
            momentum_buffer.mul_(momentum).addcdiv_(grad, denom)
            param.add_(momentum_buffer, alpha=-lr)
        else:
            param.addcdiv_(grad, denom, value=-lr)
