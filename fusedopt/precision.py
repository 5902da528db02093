"""What every optimizer can do about 16-bit numbers: the options of a param group, and the states that they add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import real_dtype
from .options import option

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer, Group

STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")

ROUNDING_STEP = "rounding_step"  # how often a tensor has been rounded at random: the counter of its random numbers
MASTER_PARAM, KAHAN_COMP = "master_param", "kahan_comp"


def is_stochastic(group: Group) -> bool:
    """Whether a group is rounded at random."""
    return bool(option(group, "rounding") == "stochastic")


def kept_state(param: Tensor, group: Group) -> str | None:
    """The state that holds what rounding this parameter loses, if it has one."""
    if real_dtype(param.dtype).itemsize != 2:
        return None
    return MASTER_PARAM if option(group, "master_weights") else KAHAN_COMP if option(group, "kahan") else None


def kept_dtype(kept: str, param: torch.dtype) -> torch.dtype:
    """The dtype of that state beside a parameter of this dtype."""
    if kept == KAHAN_COMP:
        return param
    return torch.complex64 if param.is_complex else torch.float32


def new_kept_state(kept: str, param: Tensor) -> Tensor:
    """With which it begins: a copy of the parameter, or no loss so far."""
    if kept == MASTER_PARAM:
        return param.detach().to(kept_dtype(kept, param.dtype), copy=True)
    return torch.zeros_like(param, memory_format=torch.preserve_format)


def state_dtype(param: Tensor, group: Group) -> torch.dtype:
    """The dtype in which the states of a parameter are created."""
    dtype = option(group, "state_dtype") or param.dtype
    return dtype.to_complex() if param.dtype.is_complex and not dtype.is_complex else dtype


def check_group(group: Group, index: int) -> None:
    """Raise ValueError or TypeError for options that are invalid or exclude each other."""
    dtype, rounding, seed = option(group, "state_dtype"), option(group, "rounding"), option(group, "seed")
    if dtype not in STATE_DTYPES:
        choices = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(f"Invalid state_dtype of group {index}: {dtype!r}, choose one of {choices}")
    if rounding not in ROUNDINGS:
        choices = ", ".join(map(repr, ROUNDINGS))
        raise ValueError(f"Invalid rounding of group {index}: {rounding!r}, choose one of {choices}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed of group {index} must be an int, but it is {seed!r}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"Invalid seed of group {index}: {seed}, it must lie in [0, 2**64)")
    for name in ("master_weights", "kahan"):
        if option(group, name) not in (True, False):
            raise TypeError(f"{name} of group {index} must be True or False, but it is {option(group, name)!r}")
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


def check_effect(optimizer: FusedOptimizer) -> None:
    """Raise ValueError for an option that was asked for, but has nothing to act on in any group."""
    pairs = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    if not pairs:
        return
    has = f"the parameters are {', '.join(sorted({str(param.dtype) for param, _ in pairs}))}"
    for name, use in (("master_weights", "a copy in fp32"), ("kahan", "a compensation")):
        asking = [(param, group) for param, group in pairs if option(group, name)]
        if asking and not any(kept_state(param, group) for param, group in asking):
            raise ValueError(f"{name}=True: {use} helps 16-bit parameters only, and {has}")
    asking = [(param, group) for param, group in pairs if is_stochastic(group)]
    if asking and not any(_rounds(optimizer, param, group) for param, group in asking):
        keeping = [name for name in ("master_weights", "kahan") if any(option(group, name) for _, group in asking)]
        because = f"{has}, none has"
        if keeping:
            because = f"{keeping[0]} keeps what rounding the parameters would lose, and no state has"
        raise ValueError(f"rounding='stochastic' has nothing to round: {because} 16 bits")


def _rounds(optimizer: FusedOptimizer, param: Tensor, group: Group) -> bool:
    """Whether something of this parameter's is stored in 16 bits, and not kept elsewhere."""
    rounded = [] if kept_state(param, group) else [param.dtype]
    if any(optimizer.uses(name, group) for name in optimizer.states):
        rounded.append(state_dtype(param, group))
    return any(real_dtype(dtype).itemsize == 2 for dtype in rounded)
