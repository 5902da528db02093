"""What a kernel is compiled for: the functions of its rule, the dtypes of its streams, and what these decide."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from ..protocol import OptimizerLike
from ..storage.averaging import ema_dtype
from ..storage.precision import NOTHING, kept_dtype
from ..storage.quantized import CODES
from .choice import triton_interprets

THREADS = 128  # of a program: on every GPU a thread then holds as many elements, hence has accesses as wide


def launch_options(warp_size: int) -> dict[str, Any]:
    """What the compiler is told beside the arguments, for a GPU with so many threads in a warp."""
    return {"num_warps": THREADS // warp_size, "enable_fp_fusion": True}


def rule(optimizer: type[OptimizerLike], update: str = "update") -> tuple[Any, Any]:
    """The two device functions of an optimizer: its scalars, and its update or another one of this name."""
    if isinstance(optimizer.kernel, str):
        module = import_module(f"fusedopt.kernels.rules.{optimizer.kernel}")
        return module.scalars, getattr(module, update)
    return optimizer.kernel


def triton_value(value: Any) -> Any:
    """A dtype, or a tuple of them, as Triton calls it; other values as they are."""
    import triton.language as tl

    if isinstance(value, tuple):
        return tuple(map(triton_value, value))
    return getattr(tl, str(value).removeprefix("torch.")) if isinstance(value, torch.dtype) else value


@dataclass(frozen=True)
class Signature:
    """What one compiled `update` kernel is made for: the dtypes of its streams, None where a state is absent."""

    param: torch.dtype
    grad: torch.dtype
    states: tuple[torch.dtype | None, ...]
    kept: str | None = None  # the state that holds what rounding the parameter loses
    stochastic: bool = False
    averaged: bool = False
    update: str = "update"  # the function of the rule

    @property
    def quantized(self) -> bool:
        """Whether any state has 8 bits."""
        return not CODES.isdisjoint(self.states)

    @property
    def streams(self) -> list[torch.dtype]:
        """The dtype of every stream."""
        kept = [] if self.kept in (None, NOTHING) else [kept_dtype(self.kept, self.param)]
        ema = [ema_dtype(self.param)] if self.averaged else []
        return [self.param, self.grad, *(dtype for dtype in self.states if dtype is not None), *kept, *ema]

    @cached_property
    def kinds(self) -> dict[str, Any]:
        """The compile-time arguments of `update` that say how numbers are stored, dtypes as torch knows them."""
        return {
            "PARAM": self.param,
            "GRAD": self.grad,
            "STATES": self.states,
            "KEPT": self.kept,
            "EMA": ema_dtype(self.param) if self.averaged else None,
            "STOCHASTIC": self.stochastic,
            "QUANTIZED": self.quantized,
            "COMPUTE": torch.float64 if self.param == torch.float64 else torch.float32,
        }

    @cached_property
    def constants(self) -> dict[str, Any]:
        """All compile-time arguments of Triton's `update`, but for its rule and the number of its scalars."""
        block_size, chunk_size = self.tiling
        return {
            **{name: triton_value(kind) for name, kind in self.kinds.items()},
            "BLOCK_SIZE": block_size,
            "CHUNK_SIZE": chunk_size,
            # Threads that hold 8 elements of one stream and 4 of another would exchange them through shared memory.
            "CONTIGUITY": 16 // max(dtype.itemsize for dtype in self.streams),
        }

    @cached_property
    def tiling(self) -> tuple[int, int]:
        """Elements of a block and of a program. The interpreter pays for programs, a GPU for long chunks."""
        if triton_interprets():
            return 4096, 4 * 4096
        block_size = 512 if torch.float64 in self.streams and not self.quantized else 1024  # a block of codes a warp
        few_bytes = len(self.streams) <= 3 and max(dtype.itemsize for dtype in self.streams) == 2
        return block_size, block_size * (8 if few_bytes else 4)
