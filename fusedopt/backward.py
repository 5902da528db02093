"""Steps that are taken while backward runs, each parameter's as soon as its gradient is there."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .optimizer import FusedOptimizer
from .options import option
from .protocol import Group
from .stepper import Stepper
from .storage.averaging import check_not_swapped

_TOO_LATE = {
    "max_grad_norm": "the norm of all gradients is known when backward has ended, and then the parameters have stepped",
    "skip_nonfinite": "when the last gradient is known to be finite, the other parameters have stepped",
}


class StepInBackward:
    """What `step_in_backward` returns.

    Attributes:
        optimizer: the whole one: its groups are for schedulers, its states for checkpoints. Its `step` and `zero_grad`
            find no gradient to work on, so that they may stay in a training loop.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self._hooks = [
            param.register_post_accumulate_grad_hook(_Part(optimizer, group, position, index))
            for index, (group, position, param) in enumerate(_placed(optimizer))
            if param.requires_grad
        ]
        optimizer._steps_in_backward = True

    def remove(self) -> None:
        """Leave steps to the optimizer's `step` again."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer._steps_in_backward = False


def step_in_backward(
    model: torch.nn.Module, optimizer_factory: Callable[[list[torch.nn.Parameter]], FusedOptimizer]
) -> StepInBackward:
    """Step each parameter in ``backward``, as soon as its gradient has been accumulated, and free the gradient.

    Saves the memory of the gradients: only those that backward is about to use are there at the same time. After
    ``backward`` every ``grad`` is None and every parameter has its new value, that of an ordinary step, bit for bit.
    The states are those of one ordinary optimizer, and so are its checkpoints::

        steps = fusedopt.step_in_backward(model, lambda params: fusedopt.AdamW(params, lr=1e-3))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(steps.optimizer, 1000)
        for batch in batches:
            model(batch).sum().backward()
            scheduler.step()

    Each parameter has launches of its own (one `prepare`, one `update`), which cost the host more than a step of all
    together; and each ``backward`` is a step, so that gradients cannot be accumulated over several. A tied parameter
    steps once, when all of its uses have added to its gradient; a parameter that gets no gradient, or does not require
    one now, is left alone. For one device, or a module that ``torch.distributed.fsdp.fully_shard`` shards.

    Args:
        model: the module.
        optimizer_factory: makes the optimizer, of all parameters of the model or of some, in groups or not.

    Raises:
        TypeError: the factory makes no optimizer of this package.
        ValueError: the optimizer has `max_grad_norm` or `skip_nonfinite`, which need all gradients before the first
            step; a parameter is listed twice; the model is or has a DistributedDataParallel, or a
            FullyShardedDataParallel, which add the gradients of ranks when it is too late.
        RuntimeError: in ``backward``, what ``step`` would raise; in ``GradScaler.step``, which would come too late to
            unscale and to skip.
    """
    for module in model.modules():
        if isinstance(module, _wrappers()):
            raise ValueError(
                f"step_in_backward does not know when {type(module).__name__} has added the gradients of all ranks: "
                "use torch.distributed.fsdp.fully_shard, or an ordinary step"
            )
    optimizer = optimizer_factory(list(model.parameters()))
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer_factory must make an optimizer of fusedopt, but it made {optimizer!r}")
    params = [param for _, _, param in _placed(optimizer)]
    if len(set(params)) < len(params):
        raise ValueError("step_in_backward cannot step a parameter that is listed twice")
    for group in optimizer.param_groups:
        _check_options(group)
    return StepInBackward(optimizer)


class _Part:
    """A hook: an optimizer of one parameter, with the options, states and random numbers that it has in the whole."""

    def __init__(self, optimizer: FusedOptimizer, group: int, position: int, index: int) -> None:
        self._whole = optimizer
        self._group, self._position = group, position
        self._part = object.__new__(type(optimizer))
        self._part.__dict__.update(optimizer.__dict__)
        self._part._stepper = Stepper(optimizer._stepper.may_skip)
        self._part._origin = (group, position, index)

    def __call__(self, param: Tensor) -> None:
        whole, part = self._whole, self._part
        check_not_swapped(whole, "backward")
        group = whole.param_groups[self._group]
        _check_options(group)
        names = {"param_names": [group["param_names"][self._position]]} if "param_names" in group else {}
        part.backend = whole.backend
        part.param_groups = [{**group, **names, "params": [param]}]
        part.state = defaultdict(dict)
        if param in whole.state:
            part.state[param] = whole.state[param]
        part._stepper.step(part)
        if param in part.state:
            whole.state[param] = part.state[param]
        whole._opt_called = True  # which torch's schedulers ask
        param.grad = None


def _placed(optimizer: FusedOptimizer) -> Iterator[tuple[int, int, Any]]:
    for group_index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            yield group_index, position, param


def _check_options(group: Group) -> None:
    for name, why in _TOO_LATE.items():
        if option(group, name) not in (None, False):
            raise ValueError(f"{name} cannot be had with step_in_backward: {why}")


def _wrappers() -> tuple[type, ...]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (DistributedDataParallel, *([fsdp.FullyShardedDataParallel] if fsdp is not None else []))
