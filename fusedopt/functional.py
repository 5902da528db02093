"""Functional counterparts, which are given gradients: what DDP and ZeRO step with while backward runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .optimizer import FusedOptimizer
from .options import takes_all_gradients
from .protocol import Group
from .storage.precision import is_stochastic


def register_functional_optim(optimizer_class: type[FusedOptimizer]) -> None:
    """Tell torch the functional counterpart of an optimizer class, so that its steps can overlap with DDP's backward.

    One line, before torch asks for it::

        fusedopt.register_functional_optim(fusedopt.AdamW)

        ddp._register_fused_optim(fusedopt.AdamW, lr=1e-3)
        # or
        zero = ZeroRedundancyOptimizer(ddp.parameters(), fusedopt.AdamW, overlap_with_ddp=True, lr=1e-3)
        ddp.register_comm_hook(None, hook_with_zero_step(allreduce_hook, ddp, zero))

    Numbers and states are those of an ordinary step, bit for bit. Unlike torch's counterparts, those of ZeRO follow
    the schedulers of the ``ZeroRedundancyOptimizer``, and can be consolidated. Like them, they have one param group,
    call no step hooks, cannot accumulate gradients over several backwards, and cannot be used with ``GradScaler``,
    which nobody notices: when it would unscale or skip, the parameters have stepped, by scaled gradients.

    Args:
        optimizer_class: one of this package, or your own. To register it again changes nothing.

    Raises:
        TypeError: it is something else.
        ValueError: when torch makes or steps the counterpart, which for ZeRO is in one of the first backwards:
            `max_grad_norm`, `skip_nonfinite` or `skip_grad_norm`, which take all gradients before the first step, or
            ``rounding="stochastic"``, whose random numbers take the parameter's place and the number of steps.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, FusedOptimizer)):
        raise TypeError(f"register_functional_optim takes a class of fusedopt's optimizers, not {optimizer_class!r}")
    from torch.distributed.optim import utils  # late, since it is slow

    utils.register_functional_optim(optimizer_class, partial(FunctionalOptimizer, optimizer_class))


class FunctionalOptimizer:
    """What torch asks of a functional optimizer, for any optimizer class of this package.

    Gradients arrive bucket by bucket, and not always in one thread. What arrives together has an optimizer of its own,
    with the options and states that its parameters have in the whole.

    Attributes:
        param_group: the parameters, and what their owner has changed since. Nothing else, as in torch: ZeRO takes over
            what there is, and a scheduler may have begun before it makes this.
        state: the states of each parameter.
    """

    def __init__(
        self,
        optimizer_class: type[FusedOptimizer],
        params: Sequence[Tensor],
        *args: Any,
        _allow_empty_param_list: bool = False,
        **kwargs: Any,
    ) -> None:
        if not params and not _allow_empty_param_list:
            raise ValueError("optimizer got an empty parameter list")
        self._make = lambda params: optimizer_class([{"params": params}], *args, **kwargs)
        self._whole = self._make(params)
        self._parts: dict[tuple[int, ...], FusedOptimizer] = {}  # by the ids of their parameters
        self.param_group: dict[str, Any] = {"params": self._whole.param_groups[0]["params"]}
        self.state = self._whole.state
        _check_options(self._whole.param_groups[0])

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Update the parameters that are given a gradient."""
        params = self.param_group["params"]
        if len(params) != len(gradients):
            raise ValueError(f"there are {len(params)} parameters, but {len(gradients)} gradients were given")
        given = [place for place, gradient in enumerate(gradients) if gradient is not None]
        if given:
            bucket = slice(given[0], given[-1] + 1)
            self._step(params[bucket], gradients[bucket], given[0])  # named as in the whole

    def step_param(self, param: Tensor, grad: Tensor | None) -> None:
        """Update one parameter, which may be new."""
        if grad is not None:
            self._step([param], [grad], 0)

    def state_dict(self) -> dict[str, Any]:
        """The states, as ``torch.optim.Optimizer.state_dict`` returns them."""
        return self._whole.state_dict()

    def _step(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None], place: int) -> None:
        key = tuple(map(id, params))
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = self._make([])  # alone they may lack what an option of the whole acts on
            part._origin = (0, place, place)
        group = part.param_groups[0]
        group.update({**self.param_group, "params": params})
        _check_options(group)
        part.state.update((param, self.state[param]) for param in params)
        kept = [param.grad for param in params]
        try:
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            part._stepper.step(part)
        finally:
            for param, grad in zip(params, kept, strict=True):
                param.grad = grad


def _check_options(group: Group) -> None:
    name = takes_all_gradients(group)
    if name is not None:
        raise ValueError(
            f"{name} cannot be had with steps that overlap with backward: when the last gradient arrives, other "
            "parameters have stepped. Leave it out, or make an ordinary step after backward"
        )
    if is_stochastic(group):
        raise ValueError(
            "rounding='stochastic' cannot be had with steps that overlap with backward: its random numbers depend on a "
            "parameter's place among all, and on how many steps all have made. Make an ordinary step after backward"
        )
