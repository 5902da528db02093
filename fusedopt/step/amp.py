"""What torch.amp.GradScaler and those around it are told when they ask whether the step unscales and skips by itself.

All ask for the same attribute, `_step_supports_amp_scaling`, but mean different things by it.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

# They ask before they unscale and clip, and refuse to where the answer is yes, with or without a GradScaler. A step
# takes gradients that have been unscaled as well, and GradScaler reads and writes all of them either way.
CLIPPERS = ("lightning", "lightning_fabric", "pytorch_lightning")
# Its optimizers put a step of their own in place, and take the real one for skipped if GradScaler does not call it.
# Schedulers and logs rely on that, so GradScaler must decide, which waits for the device.
STEP_WATCHERS = ("accelerate",)


def is_clipper(asker: FrameType) -> bool:
    """Whether the function with this frame only wants to know whether it may unscale and clip."""
    return _package(asker.f_globals.get("__name__")) in CLIPPERS


def is_watched(optimizer: Any) -> bool:
    """Whether somebody takes a step for skipped only if GradScaler does not call it."""
    step = vars(optimizer).get("step")
    return step is not None and _package(getattr(step, "__module__", None)) in STEP_WATCHERS


def _package(module: Any) -> str:
    return str(module).partition(".")[0]
