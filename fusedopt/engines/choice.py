"""Which parameters the kernels step, and why not."""

from functools import cache

import torch
from torch import Tensor

from ..protocol import Group, OptimizerLike
from ..step.entry import Entry, state_of
from ..step.layout import has_own_memory
from ..step.sharding import local
from ..storage.dtypes import real_dtype

BACKENDS = ("auto", "triton", "eager")
KERNEL_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def use_kernels(backend: str, group: Group, param: Tensor) -> bool:
    """Whether this parameter is stepped by the kernels; "auto" asks for a GPU that Triton drives."""
    if backend == "eager" or group.get("fused") is False:
        return False
    return backend == "triton" or why_no_kernels(param) is None


def why_no_kernels(param: Tensor, *, interpreted: bool = False) -> str | None:
    """The reason why the kernels cannot step a parameter, None if they can.

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
    if param.layout != torch.strided:
        return f"it is {param.layout}"
    if not has_own_memory(type(param)):
        return f"the memory of a {type(param).__name__} is not its own"
    if param.device.type not in ("cpu", "cuda", "xpu") or not _drives(param.device):
        return f"Triton does not drive its device, {param.device}"
    if real_dtype(param.dtype) not in KERNEL_DTYPES:
        return f"the kernels do not know its dtype, {param.dtype}"
    return None


def check_reach(name: str, param: Tensor, grad: Tensor) -> None:
    """Raise unless the kernels can read and write a parameter, for which `backend` asks for them."""
    why = why_no_kernels(param, interpreted=True)
    if why is not None:
        raise RuntimeError(f"backend='triton' cannot step {name}: {why}")
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
