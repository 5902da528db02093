"""Rprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Group, Scalars, States
from .checks import check_lr


class Rprop(FusedOptimizer):
    r"""Rprop: steps by the sign of the gradient, longer while the sign stays, shorter when it changes.

    .. math::
        s &\leftarrow \min(\max(s \cdot \eta, s_{min}), s_{max}), \quad \eta = \begin{cases}
            \eta_+ & g\,g_{prev} > 0 \\ \eta_- & g\,g_{prev} < 0 \\ 1 & \text{else} \end{cases} \\
        g &\leftarrow 0 \text{ where } g\,g_{prev} < 0 \\
        \theta &\leftarrow \theta - s\,\mathrm{sign}(g) \\
        g_{prev} &\leftarrow g

    Drop-in for ``torch.optim.Rprop``. For whole batches: the sign of a noisy gradient says little.

    Riedmiller and Braun, `A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm
    <https://ieeexplore.ieee.org/document/298623>`_, 1993.

    Args:
        params: parameters, named parameters or param groups.
        lr: the length of the first step, at least 0, a number or a one-element tensor. Of no effect afterwards.
        etas: :math:`\eta_- \in (0, 1)` and :math:`\eta_+ > 1`.
        step_sizes: :math:`s_{min}` and :math:`s_{max}`.
        capturable: whether the step may be captured in a CUDA graph.
        foreach: accepted and without effect.
        maximize: negate the gradient first.
        differentiable: must be false.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step`` (0-d), ``prev`` :math:`g_{prev}` and ``step_size`` :math:`s`, of the
        parameter's shape and `state_dtype`. Neither is stored in 8 bits: the sign of a gradient, and whether it is 0,
        decides, and steps grow by factors that are finer than the code.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "rprop"
    hyperparameters = ("lr", "etas", "step_sizes", "maximize")
    scalar_states = ("step",)
    states = ("prev", "step_size")
    always = ("step", "prev", "step_size")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float | Tensor, float | Tensor] = (0.5, 1.2),
        step_sizes: tuple[float | Tensor, float | Tensor] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        check_lr(lr)
        if not 0.0 < etas[0] < 1.0 < etas[1]:
            raise ValueError(f"Invalid eta values: {etas[0]}, {etas[1]}")
        defaults = {
            "lr": lr,
            "etas": etas,
            "step_sizes": step_sizes,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **common)

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        begun = state.get("step_size") is not None
        super().init_state(param, state, group)
        if not begun:
            lr = group["lr"].to(param.device).squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
            parts = torch.view_as_real(state["step_size"]) if param.is_complex() else state["step_size"]
            parts.add_(lr)

    def is_exact(self, name: str, group: Group) -> bool:
        return True

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        _lr, eta_minus, eta_plus, step_size_min, step_size_max, maximize = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        return (sign, eta_minus, eta_plus, step_size_min, step_size_max), (step,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, eta_minus, eta_plus, step_size_min, step_size_max = scalars
        prev, step_size = states
        if sign < 0:
            grad = -grad
        agreement = grad * prev
        factor = torch.ones_like(grad).masked_fill_(agreement > 0, eta_plus).masked_fill_(agreement < 0, eta_minus)
        step_size.mul_(factor).clamp_(step_size_min, step_size_max)
        grad = grad.masked_fill(agreement < 0, 0)
        param.addcmul_(grad.sign(), step_size, value=-1)
        prev.copy_(grad)
