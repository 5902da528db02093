"""Steps that are taken while backward runs, each parameter's as soon as its gradient is there."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .engines.choice import engine
from .optimizer import FusedOptimizer
from .options import ROUNDING_STEP, takes_all_gradients
from .protocol import Group
from .step.amp import NOT_IN_BACKWARD
from .step.hooks import call_post_hooks, has_post_hooks, has_pre_hooks
from .step.sharding import local
from .stepper import Stepper
from .storage.averaging import check_not_swapped
from .storage.precision import is_stochastic

_BACKWARD, _GRAD = torch.autograd.backward.__code__, torch.autograd.grad.__code__
_NODE = BackwardCFunction.apply.__code__  # of a Function that is written in Python
_TWICE = "{} steps in backward already: before you call step_in_backward again, remove() what it returned then"
_NORM_IS_LATE = "the norm of all gradients is known when backward has ended, and then the parameters have stepped"
_TOO_LATE = {
    "max_grad_norm": _NORM_IS_LATE,
    "skip_grad_norm": _NORM_IS_LATE,
    "skip_nonfinite": "when the last gradient is known to be finite, the other parameters have stepped",
}


class StepInBackward:
    """What `step_in_backward` returns.

    Attributes:
        optimizer: the whole one: its groups are for schedulers, its states for checkpoints. Its `step` and `zero_grad`
            find no gradient to work on, so that they may stay in a training loop.

    Neither this nor the hooks of the model can be copied: a copy of the model does not step in backward.
    """

    def __init__(self, model: torch.nn.Module, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self._hook = _Hook(self)
        self._parts: dict[int, _Part] = {}  # by the id of the parameter
        self._backward: int | None = None  # torch's number of the one that is running
        self._adopt()
        self._forward_hook = model.register_forward_pre_hook(_BeforeForward(self))
        optimizer._steps_in_backward = self

    def refresh(self) -> None:
        """Step in ``backward`` the parameters that the optimizer has now, and no others.

        This happens by itself in `add_param_group`, before the model is called, and at the first gradient of each
        ``backward``. Call it after you have replaced all parameters of the optimizer, or swapped them by
        ``torch.utils.swap_tensors``, if the model is compiled, or only its parts are called.
        """
        self._adopt()
        for part in self._parts.values():
            part.attach()

    def remove(self) -> None:
        """Leave steps to the optimizer's `step` again."""
        for part in self._parts.values():
            part.handle.remove()
        self._parts = {}
        self._forward_hook.remove()
        self.optimizer._steps_in_backward = None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("StepInBackward cannot be copied or saved: call step_in_backward for the copy of the model")

    def _adopt(self) -> list[_Part]:
        """Register hooks for new parameters, remove those of others. Returns the new ones."""
        placed = list(_placed(self.optimizer))
        if len({id(param) for _, _, param in placed}) < len(placed):
            raise ValueError("step_in_backward cannot step a parameter that is listed twice")
        parts, new = {}, []
        for index, (group, position, param) in enumerate(placed):
            part = self._parts.get(id(param))
            if part is None:
                if not _may_have_gradients(param):
                    continue
                stepper = self.optimizer._stepper
                part = _Part(param, Stepper(stepper.may_skip, whole=stepper))
                new.append(part)
            part.place((group, position, index))
            parts[id(param)] = part
        for part in new:
            part.register(self._hook)
        for key in self._parts.keys() - parts.keys():
            self._parts[key].handle.remove()
        self._parts = parts
        return new

    def _step(self, param: Tensor) -> None:
        part = self._parts.get(id(param))  # None for a tensor that a parameter was swapped with
        if part is None or param.grad is None:
            return
        self._begin(param)
        if self._parts.get(id(param)) is part:  # still one of the optimizer's
            part.step(self.optimizer)

    def _begin(self, param: Tensor) -> None:
        """Before the first step of each backward, that of `param`: everything that forbids it."""
        backward = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        if _is_nested(sys._getframe()):
            raise RuntimeError(
                "step_in_backward cannot step in a backward that another one has called, as checkpoint(use_reentrant="
                "True) does: the gradient may be only a part. Use checkpoint(use_reentrant=False), or an ordinary step"
            )
        optimizer = self.optimizer
        new = self._adopt()
        check_not_swapped(optimizer, "backward")
        if vars(optimizer).keys() & {"grad_scale", "found_inf"}:
            raise RuntimeError(NOT_IN_BACKWARD)
        for group in optimizer.param_groups:
            _check_options(group)
        if has_pre_hooks(optimizer):
            raise RuntimeError(
                "a step pre-hook cannot be called with step_in_backward: before the first step there is only one "
                "gradient. Use Tensor.register_hook for each parameter, or an ordinary step"
            )
        if _in_compiled_autograd():  # which never calls back
            self._check_nothing_waits_for_the_end(new)
        else:
            Variable._execution_engine.queue_callback(partial(self._end, backward, new))
        if any(map(is_stochastic, optimizer.param_groups)):
            _count_rounding(optimizer, param)
        self._backward = backward

    def _check_nothing_waits_for_the_end(self, new: list[_Part]) -> None:
        if has_post_hooks(self.optimizer):
            raise RuntimeError(
                "a step post-hook cannot be called with step_in_backward under compiled autograd, which does not say "
                "when backward has ended: do without one of them, or use an ordinary step"
            )
        if new:
            raise RuntimeError(
                "the optimizer has other parameters than before this backward, and compiled autograd calls no hook "
                "for them: call refresh() of what step_in_backward returned after each such change"
            )

    def _end(self, backward: int, new: list[_Part]) -> None:
        for part in new:  # gradients that were there before the hook
            self._step(part.param)
        if backward == self._backward:  # else called already: queued by two threads
            self._backward = None
            call_post_hooks(self.optimizer)


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
    steps once, when all of its uses have added to its gradient; a parameter that gets no gradient is left alone. What
    is unfrozen later steps from then on, and so does what is added to the optimizer or replaced in it. Step post-hooks
    are called once for each ``backward``, when it has ended. For one device, or a module that
    ``torch.distributed.fsdp.fully_shard`` shards.

    Args:
        model: the module.
        optimizer_factory: makes the optimizer, of all parameters of the model or of some, in groups or not.

    Raises:
        TypeError: the factory makes no optimizer of this package.
        ValueError: the optimizer has `max_grad_norm`, `skip_nonfinite` or `skip_grad_norm`, which need all gradients
            before the first step; a parameter is listed twice, or steps in backward already; the model is or has a
            DistributedDataParallel, or a FullyShardedDataParallel, which add the gradients of ranks when it is too
            late.
        RuntimeError: in ``backward``, what ``step`` would raise; where a step pre-hook expects all gradients; within
            another ``backward``, as of ``checkpoint(use_reentrant=True)``, where a gradient may be only a part; under
            compiled autograd, which does not say when it has ended, for a step post-hook. In ``GradScaler.step``, which
            would come too late to unscale and to skip.
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
    if optimizer._steps_in_backward:
        raise ValueError(_TWICE.format("the optimizer"))
    for group in optimizer.param_groups:
        _check_options(group)
    return StepInBackward(model, optimizer)


class _Part:
    """An optimizer of one parameter, with the options, states and random numbers that it has in the whole."""

    handle: RemovableHandle

    def __init__(self, param: Tensor, stepper: Stepper) -> None:
        hooks = param._post_accumulate_grad_hooks or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            if hooks[key].steps() is not None:
                raise ValueError(_TWICE.format("a parameter"))
            del hooks[key]
        self.param = param
        self._origin = (0, 0, 0)
        self._stepper = stepper

    def place(self, origin: tuple[int, int, int]) -> None:
        """Tell group, position and index of the parameter in the whole."""
        if origin != self._origin:
            self._origin = origin
            self._stepper.forget()

    def register(self, hook: _Hook) -> None:
        requires_grad = self.param.requires_grad
        self.param.requires_grad_(True)  # torch takes no hook otherwise, and keeps it when the parameter is frozen
        self.handle = self.param.register_post_accumulate_grad_hook(hook)
        self.param.requires_grad_(requires_grad)

    def attach(self) -> None:
        """Register anew all that is registered: `swap_tensors` leaves hooks with the other tensor."""
        self.param._post_accumulate_grad_hooks = self.param._post_accumulate_grad_hooks

    def step(self, whole: FusedOptimizer) -> None:
        """Step the parameter and free its gradient."""
        param = self.param
        group_index, position, _ = self._origin
        group = whole.param_groups[group_index]
        names = {"param_names": group["param_names"][position : position + 1]} if "param_names" in group else {}
        part = object.__new__(type(whole))
        part.__dict__ = {**whole.__dict__, "_stepper": self._stepper, "_origin": self._origin}
        part.param_groups = [{**group, **names, "params": [param]}]
        if is_stochastic(group):
            part.param_groups[0][ROUNDING_STEP] = whole._stepper.rounding_step
        part.state = defaultdict(dict)
        if param in whole.state:
            part.state[param] = whole.state[param]
        self._stepper.step(part)
        if param in part.state:
            whole.state[param] = part.state[param]
        whole._opt_called = True  # which torch's schedulers ask
        param.grad = None


class _Hook:
    """What torch calls for each parameter.

    It holds nothing that holds a parameter: Python cannot collect a cycle through torch's hooks.
    """

    def __init__(self, steps: StepInBackward) -> None:
        self.steps = weakref.ref(steps)

    def __call__(self, param: Tensor) -> None:
        _untraced_step(self, param) if torch.compiler.is_compiling() else _step(self, param)


def _step(hook: _Hook, param: Tensor) -> None:
    steps = hook.steps()
    if steps is None:
        raise RuntimeError(
            "the model and the optimizer of step_in_backward are gone, but a parameter is not: keep what "
            "step_in_backward returned, or call its remove()"
        )
    steps._step(param)


@torch._disable_dynamo  # as in optimizer.py
def _untraced_step(hook: _Hook, param: Tensor) -> None:
    _step(hook, param)


_untraced_step._torchdynamo_disable = True  # type: ignore[attr-defined]  # dynamo asks for the message only then
_untraced_step._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "steps are not traced: with step_in_backward, compile backward with fullgraph=False"
)


class _BeforeForward:
    """A forward pre-hook. In a copy of the model it does nothing."""

    def __init__(self, steps: StepInBackward | None = None) -> None:
        self._steps = steps

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        if self._steps is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._steps.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return _BeforeForward, ()


def _count_rounding(optimizer: FusedOptimizer, param: Tensor) -> None:
    """Count one step of rounding at random, for all parameters. Where the first of them steps nobody has to wait."""
    first, *others = optimizer.param_groups
    group = next((group for group in others if any(other is param for other in group["params"])), first)
    device = torch.device("cpu") if engine(optimizer, group, param) == "eager" else local(param).device
    optimizer._stepper.settled_rounding_step(optimizer.param_groups, device).add_(1)


def _placed(optimizer: FusedOptimizer) -> Iterator[tuple[int, int, Any]]:
    for group_index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            yield group_index, position, param


def _may_have_gradients(param: Tensor) -> bool:
    """Now, or when it is unfrozen."""
    return param.requires_grad or ((param.is_floating_point() or param.is_complex()) and not param.is_inference())


def _is_nested(frame: FrameType | None) -> bool:
    """Whether the running backward was called by a node of another one.

    FSDP calls hooks from a node of the running backward itself.
    """
    called = False
    while frame is not None:
        if called and frame.f_code in (_BACKWARD, _GRAD, _NODE):
            return True
        called = called or frame.f_code is _BACKWARD
        frame = frame.f_back
    return False


def _in_compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region


def _check_options(group: Group) -> None:
    name = takes_all_gradients(group)
    if name is not None:
        raise ValueError(f"{name} cannot be had with step_in_backward: {_TOO_LATE[name]}")


def _wrappers() -> tuple[type, ...]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (DistributedDataParallel, *([fsdp.FullyShardedDataParallel] if fsdp is not None else []))
