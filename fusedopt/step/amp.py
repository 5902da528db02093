"""What torch.amp.GradScaler is told when it asks whether the step unscales and skips by itself.

The answer is yes only where all of it is known to hold. After a no GradScaler does both, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.amp.grad_scaler import GradScaler

from .hooks import has_hooks

# They ask before they clip, and refuse to where the answer is yes, with or without a GradScaler.
CLIPPERS = ("lightning", "lightning_fabric", "pytorch_lightning")
SCALER_STEP = GradScaler.step.__code__  # before anybody puts a function around it
NOT_IN_BACKWARD = (
    "GradScaler cannot be used with step_in_backward: when it would unscale or skip, the parameters have stepped, by "
    "scaled gradients"
)
# Who may put a function around a step: these only add hooks, profiling and a flag for schedulers.
WRAPPERS = ("fusedopt.step.hooks", "torch.optim.optimizer", "torch.optim.lr_scheduler")


def is_clipper(asker: FrameType) -> bool:
    """Whether the function with this frame only wants to know whether it may unscale and clip."""
    return str(asker.f_globals.get("__name__")).partition(".")[0] in CLIPPERS


def steps_by_itself(asker: FrameType, optimizer: Any, plain_step: Callable[..., Any]) -> bool:
    """Whether GradScaler asks, will call the plain step of this very object, and nobody else looks at gradients.

    A wrapper that hands attributes on would get `grad_scale` and `found_inf` in place of the optimizer. A step of a
    subclass, and hooks, would see scaled gradients, and steps that are skipped.
    """
    if asker.f_code is not SCALER_STEP or asker.f_locals["optimizer"] is not optimizer:
        return False
    return _is_plain(optimizer.step, plain_step) and not has_hooks(optimizer)


def _is_plain(step: Any, plain_step: Callable[..., Any]) -> bool:
    step = getattr(step, "__func__", step)
    while step is not plain_step:
        if getattr(step, "__globals__", {}).get("__name__") not in WRAPPERS or not hasattr(step, "__wrapped__"):
            return False
        step = step.__wrapped__
    return True
