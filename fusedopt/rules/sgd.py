"""Stochastic gradient descent, with momentum in torch's form and in the two forms of "Dive into Deep Learning"."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedOptimizer
from ..options import CommonOptions
from ..protocol import Group, Scalars, States
from ..step.coding import new_state
from ..storage.precision import state_dtype
from .checks import lies_on_device


class SGD(FusedOptimizer):
    r"""Gradient descent, optionally with momentum.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        b &\leftarrow \mu b + (1 - \tau) g \quad \text{(the first time: } b \leftarrow g \text{)} \\
        \theta &\leftarrow \theta - \eta b, \quad
            \text{with Nesterov's momentum } \theta \leftarrow \theta - \eta (g + \mu b)

    Without momentum, :math:`\theta \leftarrow \theta - \eta g`. Drop-in for ``torch.optim.SGD``.

    Sutskever et al., `On the importance of initialization and momentum in deep learning
    <http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf>`_, 2013; Zhang et al., `Dive into Deep Learning
    <https://d2l.ai/chapter_optimization/momentum.html>`_, 2023.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        momentum: :math:`\mu \ge 0`.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda \ge 0`, a number or a one-element tensor.
        nesterov: use Nesterov's momentum; asks for a momentum and no dampening.
        maximize: negate the gradient first.
        foreach: accepted and without effect.
        differentiable: must be false.
        fused: False is ``backend="eager"``; None and True leave the choice to `backend`.
        lr_in_momentum: the book's first form, :math:`b \leftarrow \mu b + (1 - \tau)\eta g` and
            :math:`\theta \leftarrow \theta - b`: a new learning rate acts on new gradients only.
        zero_init_momentum: begin with :math:`b = 0` instead of the first gradient. With ``dampening=momentum`` it is
            the book's second form, an average of the gradients.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``momentum_buffer`` :math:`b`, of the parameter's shape and `state_dtype`, if there is a momentum.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "sgd"
    hyperparameters = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "lr_in_momentum")
    options = ("zero_init_momentum", "fused")
    optional: ClassVar[dict[str, Any]] = {"lr_in_momentum": False, "zero_init_momentum": False}
    scalar_states = ("momentum_begun",)
    states = ("momentum_buffer",)
    begun: ClassVar[dict[str, str]] = {"momentum_begun": "momentum_buffer"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        lr_in_momentum: bool = False,
        zero_init_momentum: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if momentum < 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if weight_decay < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "lr_in_momentum": lr_in_momentum,
            "zero_init_momentum": zero_init_momentum,
        }
        super().__init__(params, defaults, **common)

    def uses(self, name: str, group: Group) -> bool:
        momentum, dampening = group["momentum"], group["dampening"]
        has_buffer = lies_on_device(momentum) or momentum != 0
        if name == "momentum_begun":  # dampening tells the first step from the others, and state_dict() does
            told_apart = self._stepper.may_skip or lies_on_device(dampening) or dampening != 0
            return has_buffer and told_apart and not group.get("zero_init_momentum")
        return has_buffer

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        if state.get("momentum_buffer") is None and self.uses("momentum_buffer", group):
            if param.grad is None or param.grad.layout == torch.strided:
                optimizer: FusedOptimizer = self  # as mypy takes no subclass for a protocol with class variables
                state["momentum_buffer"] = new_state(optimizer, "momentum_buffer", param, group)
            else:  # the buffer is sparse too, as torch has it
                state["momentum_buffer"] = torch.zeros_like(param.grad, dtype=state_dtype(param, group))

    def check_sparse(self, group: Group, name: str) -> None:
        # A sparse parameter decays as sparsely.
        dense = [param for param in group["params"] if param.layout == torch.strided and param.grad is not None]
        if group["weight_decay"] != 0 and any(param.grad.layout != torch.strided for param in dense):
            raise RuntimeError(f"weight_decay option is not compatible with sparse gradients ({name} has one)")

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, momentum, dampening, weight_decay, nesterov, maximize, lr_in_momentum = hyper
        begun = scalar_states[0]
        sign = -1.0 if maximize else 1.0
        scale = lr if lr_in_momentum else 1.0
        step_size = 1.0 if lr_in_momentum else lr
        grad_weight = scale * (1 - dampening if begun else 1.0)
        return (sign, weight_decay, momentum, grad_weight, nesterov, scale, step_size, lr), (1.0,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, weight_decay, momentum, grad_weight, nesterov, scale, step_size, lr = scalars
        momentum_buffer = states[0]
        if sign < 0:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        if momentum_buffer is None:
            param.add_(grad, alpha=-lr)
            return
        momentum_buffer.mul_(momentum).add_(grad, alpha=grad_weight)
        direction = grad.mul(scale).add_(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
        param.add_(direction, alpha=-step_size)
