"""Dry runs: on the meta device, and with fake tensors, a step has shapes, dtypes and memory, but no values."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def is_dry(params: Sequence[Tensor]) -> bool:
    """Whether no parameter has values. One that has some makes a step real, which asks for those of all."""
    return bool(params) and all(param.is_meta or isinstance(param, FakeTensor) for param in params)


def is_simulating() -> bool:
    """Whether operations make fake tensors of real ones."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()
    )


def item(number: Tensor) -> float:
    """The value of a number in a dry run, 0 where it has none."""
    if number.is_meta or (isinstance(number, FakeTensor) and number.constant is None):
        return 0.0
    return number.item()


def is_simulated(tensor: Tensor) -> bool:
    """Whether a tensor stands for the memory of a real run: a fake one, or that of all ranks in LocalTensorMode."""
    local_tensor = getattr(sys.modules.get("torch.distributed._local_tensor"), "LocalTensor", FakeTensor)
    return isinstance(tensor, (FakeTensor, local_tensor))


def communicates(group: Any) -> bool:
    """Whether the ranks of a group hear of each other."""
    return str(dist.get_backend(group)) != "fake"
