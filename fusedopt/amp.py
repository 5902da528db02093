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


def wants_no(optimizer: Any, asker: FrameType) -> bool:
    """Whether unscaling and skipping is to be left to GradScaler, even if the step can do it.

    Args:
        optimizer: which has been asked.
        asker: the frame of the function that asks.
    """
    step = vars(optimizer).get("step")
    return _package(asker.f_globals.get("__name__")) in CLIPPERS or (
        step is not None and _package(getattr(step, "__module__", None)) in STEP_WATCHERS
    )


def _package(module: Any) -> str:
    return str(module).partition(".")[0]
