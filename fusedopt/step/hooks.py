"""What torch.optim does around a step for hooks and profilers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.autograd import profiler
from torch.optim import Optimizer, optimizer


def hooked_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step as torch wraps it. Without hooks and profilers it is called at once: torch takes 8 µs to tell nobody.

    Hooks are not called for a step that has been taken in backward.
    """
    told = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_watched = profiler._is_profiler_enabled or has_hooks(self)
        return (told if is_watched and not _has_stepped(self) else step)(self, *args, **kwargs)

    return wrapper


def has_hooks(self: Any) -> bool:
    """Whether anybody is called before or after the steps of an optimizer."""
    return bool(
        self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )


def has_pre_hooks(self: Any) -> bool:
    """Whether anybody is called before the steps of an optimizer."""
    return bool(self._optimizer_step_pre_hooks or optimizer._global_optimizer_pre_hooks)


def has_post_hooks(self: Any) -> bool:
    """Whether anybody is called after the steps of an optimizer."""
    return bool(self._optimizer_step_post_hooks or optimizer._global_optimizer_post_hooks)


def call_post_hooks(self: Any) -> None:
    """Call them as torch does after a step."""
    for hook in (*self._optimizer_step_post_hooks.values(), *optimizer._global_optimizer_post_hooks.values()):
        hook(self, (self,), {})


def _has_stepped(self: Any) -> bool:
    """Whether backward has taken the step and called the hooks, so that nothing is left to do."""
    return bool(self._steps_in_backward) and not any(
        param.grad is not None for group in self.param_groups for param in group["params"]
    )
