"""The options that every optimizer takes beside its own.

In a param group their keys have a prefix, since a group may have keys of the user's by any name. They are there only
where they differ from the default, so that torch's checkpoints fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from typing import Any, TypedDict

import torch
from torch import Tensor

from .protocol import Group, OptimizerLike

DEFAULTS: Group = {
    "state_dtype": None,
    "master_weights": False,
    "kahan": False,
    "rounding": "nearest",
    "seed": 0,
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "skip_grad_norm": None,
    "ema_decay": None,
}
PREFIX = "fusedopt_"
KEYS = {name: PREFIX + name for name in DEFAULTS}  # of a param group
# What groups save beside their options. No states, since programs cut and lengthen those.
SKIPPED_STEPS = PREFIX + "skipped_steps"
ROUNDING_STEP = PREFIX + "rounding_step"  # how many steps have been rounded at random: counts the random numbers
COUNTERS = (SKIPPED_STEPS, ROUNDING_STEP)
# One value for all groups: these are about the gradients of all parameters together.
SHARED = ("max_grad_norm", "skip_nonfinite", "skip_grad_norm")
NUMBERS = ("max_grad_norm", "skip_grad_norm", "ema_decay")  # None, or a number, which may be a tensor
EIGHT_BITS = "8bit"
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, EIGHT_BITS)
ROUNDINGS = ("nearest", "stochastic")


class CommonOptions(TypedDict, total=False):
    """The keyword arguments that all optimizers share; `FusedOptimizer` tells what they mean."""

    backend: str
    state_dtype: torch.dtype | str | None
    master_weights: bool
    kahan: bool
    rounding: str
    seed: int
    max_grad_norm: float | Tensor | None
    skip_nonfinite: bool
    skip_grad_norm: float | Tensor | None
    ema_decay: float | Tensor | None


def option(group: Group, name: str) -> Any:
    """One of these options, by its name in the constructor."""
    return group.get(KEYS[name], DEFAULTS[name])


def takes_all_gradients(group: Group) -> str | None:
    """The option of a group that takes the gradients of all parameters before the first step, if there is one."""
    for name in ("max_grad_norm", "skip_grad_norm"):
        if option(group, name) is not None:
            return name
    return "skip_nonfinite" if option(group, "skip_nonfinite") else None


def optional_keys(optimizer: OptimizerLike) -> Group:
    """The keys that a group of this optimizer may lack, with their defaults."""
    return {**{KEYS[name]: default for name, default in DEFAULTS.items()}, **optimizer.optional}


def required_keys(optimizer: OptimizerLike) -> Group:
    """The keys that every group of this optimizer has, with the defaults that the constructor was given."""
    others = {*DEFAULTS, "backend", *optimizer.optional}
    return {key: default for key, default in optimizer.defaults.items() if key not in others}


def settle_options(optimizer: OptimizerLike, group: Group, own: Set[str]) -> None:
    """Give the options that torch has put into a new group the keys that they have here.

    Args:
        optimizer: the optimizer, whose constructor was given `defaults`.
        group: the new group.
        own: the keys that the user has put into it.
    """
    unknown = [key for key in own if str(key).startswith(PREFIX) and key not in (*KEYS.values(), *COUNTERS)]
    if unknown:
        known = ", ".join(KEYS.values())
        raise TypeError(f"{type(optimizer).__name__} has no option {unknown[0]!r}, but it has {known}")
    for name, key in KEYS.items():
        default = optimizer.defaults.get(name, DEFAULTS[name])
        if name not in own:
            group.pop(name, None)
        elif default != DEFAULTS[name] and repr(group[name]) != repr(default):  # ZeRO repeats the constructor's
            warnings.warn(
                f"a param group has the key {name!r}, which means nothing to {type(optimizer).__name__}: if it is to "
                f"be the option of this group, call it {key!r}",
                stacklevel=2,
            )
        group.setdefault(key, default)
    if "backend" not in own:
        group.pop("backend", None)
    for key, default in optional_keys(optimizer).items():
        saved = key == KEYS["seed"] and option(group, "rounding") == "stochastic"  # a resumed run needs it
        if key in group and is_default(group[key], default) and not saved:
            del group[key]


def is_default(value: Any, default: Any) -> bool:
    """Whether a value, which may be an array of numbers, is its default."""
    return not getattr(value, "ndim", 0) and bool(value == default)


def begin_counters(group: Group) -> None:
    """Let a new group save what it counts from the beginning, and not what another optimizer has counted."""
    for key in COUNTERS:
        group.pop(key, None)
    if option(group, "rounding") == "stochastic":
        group[ROUNDING_STEP] = 0
    if option(group, "skip_nonfinite") or option(group, "skip_grad_norm") is not None:
        group[SKIPPED_STEPS] = 0


def is_number(value: Any) -> bool:
    """Whether a value is a number, of Python's or numpy's."""
    return hasattr(value, "__float__") and not isinstance(value, Tensor) and getattr(value, "ndim", 0) == 0


def check_torchs_flags(group: Group, name: str) -> None:
    """Raise RuntimeError for torch's flags of one group where they ask the class of this name for what nobody does."""
    if group.get("fused") and group.get("differentiable"):
        raise RuntimeError("`fused` does not support `differentiable`")
    if group.get("differentiable"):
        raise RuntimeError(f"{name} does not support `differentiable`: its step is not traced")
    if group.get("fused") and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def read_number(value: Any, name: str, index: int) -> float | None:
    """A number of a group, None for a tensor that the host would wait for; ValueError or TypeError for no number."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} of group {index} must be 1-element")
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"Tensor {name} of group {index} must be real, but its dtype is {value.dtype}")
        if value.device.type != "cpu":
            return None
    elif isinstance(value, bool) or not is_number(value):
        raise TypeError(f"{name} of group {index} must be a number or None, but it is {value!r}")
    return float(value)


def check_number(value: Any, name: str, index: int) -> None:
    """Raise ValueError or TypeError unless one of `NUMBERS` of a group is a number in its range."""
    number = read_number(value, name, index)
    if number is None:
        return
    if name == "ema_decay":
        if not 0 <= number < 1:
            raise ValueError(f"Invalid ema_decay of group {index}: {number}, it must lie in [0, 1)")
    elif not number >= 0:
        raise ValueError(f"Invalid {name} of group {index}: {number}, it must not be negative")


def share_equal_tensors(groups: Sequence[Group]) -> None:
    """Make one tensor of those that `SHARED` options have in several groups, since a checkpoint may have copies."""
    for name in SHARED:
        first: Any = None
        for group in groups:
            value = option(group, name)
            first = value if first is None else first
            if isinstance(value, Tensor) and isinstance(first, Tensor) and _same_tensor(value, first):
                group[KEYS[name]] = first


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def check_group(groups: Sequence[Group], index: int) -> None:
    """Raise ValueError or TypeError for options of one group that are invalid, exclude each other, or ought to agree.

    Args:
        groups: all groups up to this one, at least.
        index: of the group.
    """
    group = groups[index]
    _check_storage(group, index)
    _check_flag(group, "skip_nonfinite", index)
    for name in NUMBERS:
        if option(group, name) is not None:
            check_number(option(group, name), name, index)
    for name in SHARED:
        value, first = option(group, name), option(groups[0], name)
        is_tensor = isinstance(value, Tensor) or isinstance(first, Tensor)
        if value is not first and (is_tensor or value != first):
            raise ValueError(
                f"{name} is one for all groups, since it is about all gradients together, "
                f"but it is {first!r} in group 0 and {value!r} in group {index}"
            )


def _check_storage(group: Group, index: int) -> None:
    dtype, rounding, seed = option(group, "state_dtype"), option(group, "rounding"), option(group, "seed")
    if dtype not in STATE_DTYPES:
        choices = ", ".join(repr(choice) for choice in STATE_DTYPES)
        raise ValueError(f"Invalid state_dtype of group {index}: {dtype!r}, choose one of {choices}")
    if rounding not in ROUNDINGS:
        choices = ", ".join(map(repr, ROUNDINGS))
        raise ValueError(f"Invalid rounding of group {index}: {rounding!r}, choose one of {choices}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed of group {index} must be an int, but it is {seed!r}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"Invalid seed of group {index}: {seed}, it must lie in [0, 2**64)")
    _check_flag(group, "master_weights", index)
    _check_flag(group, "kahan", index)
    if option(group, "master_weights") and option(group, "kahan"):
        raise ValueError(
            f"master_weights and kahan of group {index}: both keep what rounding a 16-bit parameter loses, choose one"
        )
    if dtype in (torch.bfloat16, torch.float16) and any(
        isinstance(param, Tensor) and param.dtype.is_complex for param in group["params"]
    ):
        raise ValueError(
            f"state_dtype={dtype} of group {index}: states of its complex parameters are complex, "
            "and torch does not compute with complex numbers of so few bits"
        )


def _check_flag(group: Group, name: str, index: int) -> None:
    value = option(group, name)
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"{name} of group {index} must be True or False, but it is {value!r}")
