"""Which engine steps which parameter, and why no other."""

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..protocol import Group, OptimizerLike
from ..step import dry
from ..step.entry import Entry, state_of
from ..step.layout import has_own_memory
from ..step.sharding import local
from ..storage.dtypes import real_dtype

BACKENDS = ("auto", "triton", "compiled", "eager")
KERNEL_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

_refused: WeakSet[type[Any]] = WeakSet()  # optimizers whose rules cannot be compiled for the CPU


def engine(optimizer: OptimizerLike, group: Group, param: Tensor) -> str:
    """Who steps a parameter: "triton", "compiled" or "eager".

    "auto" takes Triton's kernels on a GPU that Triton drives, compiled ones on the CPU, and else the reference.
    """
    if optimizer.backend == "eager" or group.get("fused") is False:
        return "eager"
    if optimizer.backend != "auto":
        return optimizer.backend
    if dry.is_simulating():
        return "eager"
    if why_not_triton(param) is None:
        return "triton"
    if why_not_compiled(param) is None and type(optimizer) not in _refused:
        return "compiled"
    return "eager"


def refuse(optimizer: OptimizerLike, why: Exception) -> None:
    """Leave an optimizer to the reference from now on, where "auto" would have compiled it; raise for who insists."""
    if optimizer.backend != "auto":
        raise why
    if type(optimizer) in _refused:
        return
    _refused.add(type(optimizer))
    warnings.warn(
        f"{type(optimizer).__name__} cannot be compiled for the CPU, and is stepped by its reference there: {why}",
        RuntimeWarning,
        stacklevel=2,
    )


def why_not(backend: str, param: Tensor) -> str | None:
    """The reason why a backend that was asked for by name cannot step a parameter, None if it can."""
    if backend == "triton":
        return why_not_triton(param, interpreted=True)
    return why_not_compiled(param) if backend == "compiled" else None


def why_not_triton(param: Tensor, *, interpreted: bool = False) -> str | None:
    """The reason why Triton's kernels cannot step a parameter, None if they can.

    Tensors on the CPU are within reach only of the interpreter, which is slow and never chosen by itself:
    `interpreted` says that it was asked for. Of a DTensor the kernels step what this rank holds.
    """
    param = local(param)
    on_cpu = param.device.type == "cpu"
    if on_cpu and not interpreted:
        return "it is on the CPU"
    if not triton_is_installed():
        return "Triton is not installed"
    if on_cpu and not triton_interprets():
        return "it is on the CPU, where Triton runs only in its interpreter (set TRITON_INTERPRET=1 before the start)"
    if not on_cpu and triton_interprets():
        return "Triton's interpreter, which TRITON_INTERPRET=1 has turned on, reaches only the memory of the CPU"
    if param.device.type not in ("cpu", "cuda", "xpu") or not _drives(param.device):
        return f"Triton does not drive its device, {param.device}"
    return _why_unreadable(param)


def why_not_compiled(param: Tensor) -> str | None:
    """The reason why kernels that are compiled for the CPU cannot step a parameter, None if they can."""
    param = local(param)
    if param.device.type != "cpu":
        return f"it is on {param.device}"
    if not numba_is_installed():
        return "numba is not installed (pip install fusedopt[cpu])"
    return _why_unreadable(param)


def _why_unreadable(param: Tensor) -> str | None:
    if param.layout != torch.strided:
        return f"it is {param.layout}"
    if not has_own_memory(type(param)):
        return f"the memory of a {type(param).__name__} is not its own"
    if real_dtype(param.dtype) not in KERNEL_DTYPES:
        return f"the kernels do not know its dtype, {param.dtype}"
    return None


def check_reach(backend: str, name: str, param: Tensor, grad: Tensor) -> None:
    """Raise unless the kernels of a backend that was asked for by name can read and write a parameter."""
    why = why_not(backend, param)
    if why is not None:
        raise RuntimeError(f"backend={backend!r} cannot step {name}: {why}")
    if dry.is_simulating():
        raise RuntimeError(f"backend={backend!r} cannot step {name} in FakeTensorMode, where states have no memory")
    param = local(param)
    if param.numel() and not (param.data_ptr() and grad.data_ptr()):
        raise RuntimeError(f"{name} or its gradient has no memory that a kernel can reach")


def check_dtypes(optimizer: OptimizerLike, entry: Entry, param: Tensor) -> None:
    """Raise for a gradient or a state, of a parameter of the kernels, that these cannot read."""
    state = state_of(optimizer, param)
    stored = {f"state {name!r}": state[name].dtype for name in optimizer.states if state.get(name) is not None}
    for what, dtype in {"gradient": entry.grad_dtype, **stored}.items():
        if real_dtype(dtype) not in KERNEL_DTYPES:
            raise RuntimeError(
                f"the kernels cannot step {entry.name}: they do not know the dtype of its {what}, {dtype}; "
                "backend='eager' does"
            )


@cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported. Asked once, and quietly."""
    try:
        import triton  # noqa: F401
    except Exception:  # a broken installation raises more than ImportError
        return False
    return True


@cache
def numba_is_installed() -> bool:
    """Whether there is what compiles kernels for the CPU. Does not import it, which takes a while."""
    try:
        return find_spec("numba") is not None and find_spec("llvmlite") is not None
    except Exception:  # something else has been put in its place
        return False


@cache
def triton_interprets() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU. Fixed when Triton is first imported."""
    if not triton_is_installed():
        return False
    from ..kernels.rounding import INTERPRET

    return bool(INTERPRET.value)


@cache
def warp_size(device: torch.device) -> int:
    """How many threads of a device run together."""
    if device.type != "cuda":
        return 32
    return getattr(torch.cuda.get_device_properties(device), "warp_size", 32)


@cache
def _drives(device: torch.device) -> bool:
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True
