"""What every optimizer can do about 16-bit numbers: what the options of a param group ask for, and the states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import EIGHT_BITS, option
from ..protocol import Group, OptimizerLike
from .dtypes import real_dtype
from .quantized import SIGNED, UNSIGNED

MASTER_PARAM, KAHAN_COMP = "master_param", "kahan_comp"
NOTHING = "nothing"  # in place of these: rounding to nearest loses what it loses, also where others round at random
QUANTIZED_FROM = 4096  # elements of a parameter: below it 8 bits would save nothing that counts


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
    """The dtype in which the states of a parameter are created, but for those that are stored in 8 bits."""
    asked = option(group, "state_dtype")
    dtype = param.dtype if asked is None or asked == EIGHT_BITS else asked
    return dtype.to_complex() if param.dtype.is_complex and not dtype.is_complex else dtype


def code_of(optimizer: OptimizerLike, name: str, param: Tensor, group: Group) -> torch.dtype | None:
    """The code in which a state of a parameter is stored, if it is stored in 8 bits."""
    if option(group, "state_dtype") != EIGHT_BITS or name not in optimizer.states or optimizer.is_exact(name, group):
        return None
    if param.numel() < QUANTIZED_FROM or param.layout != torch.strided:
        return None
    return UNSIGNED if name in optimizer.nonnegative else SIGNED


def check_effect(optimizer: OptimizerLike) -> None:
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
        raise ValueError(f"rounding='stochastic' has nothing to round: {because} 16 or 8 bits")


def _rounds(optimizer: OptimizerLike, param: Tensor, group: Group) -> bool:
    """Whether something of this parameter's is stored in 16 or 8 bits, and not kept elsewhere."""
    rounded = [] if kept_state(param, group) else [param.dtype]
    used = [name for name in optimizer.states if optimizer.uses(name, group)]
    # How large a parameter is may depend on the rank.
    if option(group, "state_dtype") == EIGHT_BITS and not all(optimizer.is_exact(name, group) for name in used):
        return True
    rounded += [state_dtype(param, group) for _ in used]
    return any(real_dtype(dtype).itemsize <= 2 for dtype in rounded)
