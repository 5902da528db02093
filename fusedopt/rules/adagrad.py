"""AdaGrad."""

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
from ..storage.dtypes import scalar_dtype
from ..storage.states import create_states
from .checks import check_lr, check_not_negative


class Adagrad(FusedOptimizer):
    r"""AdaGrad: a step along the gradient, divided by the root of the sum of all its squares so far.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta - \frac{\eta}{1 + (t - 1)\,\gamma} \cdot \frac{g}{\sqrt{s} + \epsilon}

    Drop-in for ``torch.optim.Adagrad``.

    Duchi, Hazan and Singer, `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    <http://jmlr.org/papers/v12/duchi11a.html>`_, 2011; Zhang et al., `Dive into Deep Learning
    <https://d2l.ai/chapter_optimization/adagrad.html>`_, 2023.

    Args:
        params: parameters, named parameters or param groups.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        lr_decay: :math:`\gamma \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        initial_accumulator_value: the value at which every element of :math:`s` begins, at least 0.
        eps: :math:`\epsilon \ge 0`.
        foreach: accepted and without effect.
        maximize: negate the gradient first.
        differentiable: must be false.
        fused: False is ``backend="eager"``; None and True leave the choice to `backend`.
        eps_in_sqrt: the book's form, :math:`\sqrt{s + \epsilon}` in place of :math:`\sqrt{s} + \epsilon`.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``step`` (0-d) and ``sum`` :math:`s`, of the parameter's shape and `state_dtype`; both there from the start.
        In 8 bits the sum grows as it should only with ``rounding="stochastic"``: to the nearest, what is less than a
        thirtieth of it is lost.

    Raises:
        ValueError: an argument outside its range.
    """

    kernel = "adagrad"
    hyperparameters = ("lr", "lr_decay", "weight_decay", "eps", "maximize", "eps_in_sqrt")
    options = ("fused",)
    optional: ClassVar[dict[str, Any]] = {"eps_in_sqrt": False}
    scalar_states = ("step",)
    states = ("sum",)
    always = ("step", "sum")
    nonnegative = ("sum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        initial_accumulator_value: float = 0,
        eps: float | Tensor = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eps_in_sqrt: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        check_lr(lr)
        check_not_negative(
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            epsilon=eps,
        )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "eps_in_sqrt": eps_in_sqrt,
        }
        super().__init__(params, defaults, **common)
        optimizer: FusedOptimizer = self  # as mypy takes no subclass for a protocol with class variables
        for group in self.param_groups:
            for param in group["params"]:
                create_states(optimizer, param, self.state[param], group)

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        value = self.defaults["initial_accumulator_value"]
        state.setdefault("step", torch.tensor(0.0, dtype=scalar_dtype(), device="cpu"))
        if state.get("sum") is None:
            optimizer: FusedOptimizer = self  # as mypy takes no subclass for a protocol with class variables
            state["sum"] = new_state(optimizer, "sum", param, group, fill=value)

    def share_memory(self) -> None:
        """Move every ``sum`` to shared memory, for training by several processes."""
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"].share_memory_()

    def check_sparse(self, group: Group, name: str) -> None:
        if group["weight_decay"] != 0:
            raise RuntimeError(f"weight_decay option is not compatible with sparse gradients ({name} has one)")

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, lr_decay, weight_decay, eps, maximize, eps_in_sqrt = hyper
        step = scalar_states[0] + 1
        sign = -1.0 if maximize else 1.0
        step_size = lr / (1 + (step - 1) * lr_decay)
        eps_inside = eps if eps_in_sqrt else 0.0
        eps_outside = 0.0 if eps_in_sqrt else eps
        return (sign, weight_decay, step_size, eps_inside, eps_outside), (step,)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        sign, weight_decay, step_size, eps_inside, eps_outside = scalars
        (sum,) = states
        if sign < 0:
            grad = -grad
        if grad.is_sparse:
            # Only the rows that have a gradient; each index once, since the update is not linear in it.
            grad = grad.coalesce()
            sum.add_(grad * grad)
            values = sum.sparse_mask(grad).values().add(eps_inside).sqrt_().add_(eps_outside)
            step = torch.sparse_coo_tensor(grad.indices(), grad.values() / values, grad.shape, check_invariants=False)
            param.add_(step, alpha=-step_size)
            return
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        sum.addcmul_(grad, grad)
        denom = (sum.add(eps_inside).sqrt_() if eps_inside else sum.sqrt()).add_(eps_outside)
        param.addcdiv_(grad, denom, value=-step_size)
