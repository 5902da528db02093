"""Tables of addresses on a device, and the launches of the two generic kernels that read them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .backend import triton_interprets
from .precision import kept_dtype

if TYPE_CHECKING:
    from .hyper import Hyper, Number
    from .optimizer import FusedOptimizer

Array = np.ndarray[Any, Any]

PREPARE_BLOCK_SIZE = 128
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Every kernel of fusedopt starts here."""
    kernel[(programs,)](*args, **options)


def rule(optimizer: type[FusedOptimizer]) -> tuple[Any, Any]:
    """The two device functions of an optimizer: its scalars and its update."""
    if isinstance(optimizer.kernel, str):
        module = import_module(f"fusedopt.kernels.{optimizer.kernel}")
        return module.scalars, module.update
    return optimizer.kernel


@dataclass(frozen=True)
class Signature:
    """What one compiled `update` kernel is made for: the dtypes of its streams, None where a state is absent."""

    param: torch.dtype
    grad: torch.dtype
    states: tuple[torch.dtype | None, ...]
    kept: str | None = None  # the state that holds what rounding the parameter loses
    stochastic: bool = False

    @property
    def streams(self) -> list[torch.dtype]:
        """The dtype of every stream."""
        kept = [] if self.kept is None else [kept_dtype(self.kept, self.param)]
        return [self.param, self.grad, *(dtype for dtype in self.states if dtype is not None), *kept]

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of `update`, but for its rule and the number of its scalars."""
        import triton.language as tl

        def type_of(dtype: torch.dtype) -> Any:
            return getattr(tl, str(dtype).removeprefix("torch."))

        block_size, chunk_size = self.tiling
        return {
            "PARAM": type_of(self.param),
            "GRAD": type_of(self.grad),
            "STATES": tuple(None if dtype is None else type_of(dtype) for dtype in self.states),
            "KEPT": self.kept,
            "STOCHASTIC": self.stochastic,
            "COMPUTE": tl.float64 if self.param == torch.float64 else tl.float32,
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
        block_size = 512 if torch.float64 in self.streams else 1024
        few_bytes = len(self.streams) <= 3 and max(dtype.itemsize for dtype in self.streams) == 2
        return block_size, block_size * (8 if few_bytes else 4)


@dataclass(frozen=True)
class Item:
    """One parameter as the kernels see it; `position` is that of its entry in the plan."""

    position: int
    group: int
    signature: Signature
    numel: int
    tensor: int  # the place of the parameter among all of the optimizer's, for stochastic rounding
    seed: int  # as a signed number
    addresses: tuple[int, ...]  # parameter, states and what keeps the parameter's lost part, 0 = absent
    scalar_addresses: tuple[int, ...]  # of `number_address`; the last one counts the roundings


class Tables:
    """The tensors of one device that are stepped together: one `prepare`, and one `update` for each signature."""

    def __init__(self, optimizer: FusedOptimizer, items: Sequence[Item], n_scalars: int, device: torch.device) -> None:
        members: dict[Signature, list[Item]] = {}
        for item in items:
            members.setdefault(item.signature, []).append(item)
        ordered = [item for same in members.values() for item in same]
        self.positions = [item.position for item in ordered]
        self._device = device
        self._stream = self._current_stream()
        self._scalars_rule, self._update_rule = rule(type(optimizer))
        self._n_scalars = n_scalars
        self._n_scalar_states = len(optimizer.scalar_states)

        sections = [
            np.array([item.group for item in ordered], dtype=np.int64),
            np.array([item.scalar_addresses for item in ordered], dtype=np.int64).reshape(-1),
        ]
        for signature, same in members.items():
            rows = np.array([(item.numel, item.tensor, item.seed, *item.addresses) for item in same], dtype=np.int64)
            sections += [rows.reshape(-1), _chunks(rows[:, 0], signature.tiling[1])]
        self.static, bounds = _pack(sections)
        self._static = self._upload(self.static)
        self._groups, self._scalar_states, *tables = _slices(self._static, bounds)
        self._scalars = torch.empty(len(ordered) * (n_scalars + 1), dtype=torch.float64, device=device)
        firsts = [0, *accumulate(map(len, members.values()))]
        self._updates = [
            (signature.constants, first, rows, chunks)
            for signature, first, rows, chunks in zip(members, firsts, tables[::2], tables[1::2], strict=False)
            if len(chunks)
        ]

        self._hyper, self._hyper_pointers = np.empty(0), np.empty(0, dtype=np.int64)
        self._hyper_tensors: list[Tensor] = []
        self._hyper_version = -1
        self._n_hyper = 0
        self._dynamic = np.empty(0, dtype=np.int64)
        self._dynamic_slices: list[Tensor] = []

    def is_current(self) -> bool:
        """Whether the current stream is the one that the tables were made on, which owns their memory."""
        return self._stream == self._current_stream()

    def run(self, grad_addresses: Sequence[int], hyper: Hyper) -> None:
        """Step the tensors whose gradient has an address other than 0."""
        if hyper.version != self._hyper_version:
            self._read_hyper(hyper.rows)
            self._hyper_version = hyper.version
        grads = np.array(grad_addresses, dtype=np.int64)
        dynamic, bounds = _pack([grads, self._hyper.view(np.int64), self._hyper_pointers])
        if not np.array_equal(dynamic, self._dynamic):
            self._dynamic, self._dynamic_slices = dynamic, _slices(self._upload(dynamic), bounds)
        self._launch(*self._dynamic_slices)

    def _launch(self, grads: Tensor, hyper: Tensor, hyper_pointers: Tensor) -> None:
        from .kernels import multi_tensor as kernels

        n_tensors = len(self.positions)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            launch(
                kernels.prepare,
                -(-n_tensors // PREPARE_BLOCK_SIZE),
                self._groups,
                grads,
                self._scalar_states,
                hyper.view(torch.float64),
                hyper_pointers,
                self._scalars,
                n_tensors,
                SCALARS=self._scalars_rule,
                N_HYPER=self._n_hyper,
                N_SCALAR_STATES=self._n_scalar_states,
                N_SCALARS=self._n_scalars,
                HYPER_TENSORS=bool(self._hyper_tensors),
                BLOCK_SIZE=PREPARE_BLOCK_SIZE,
                **LAUNCH_OPTIONS,
            )
            for constants, first, rows, chunks in self._updates:
                launch(
                    kernels.update,
                    len(chunks),
                    rows,
                    grads,
                    self._scalars,
                    chunks.view(torch.int32),
                    first,
                    UPDATE=self._update_rule,
                    N_SCALARS=self._n_scalars,
                    **constants,
                    **LAUNCH_OPTIONS,
                )

    def _read_hyper(self, hyper: Sequence[tuple[Number, ...]]) -> None:
        """Numbers, and the addresses of those that live on a device (odd: fp32). The tensors are kept alive."""
        shape = (len(hyper), len(hyper[0]))
        self._n_hyper = shape[1]
        numbers = [number for row in hyper for number in row]
        addresses = [0] * len(numbers)
        self._hyper_tensors = []
        for i, number in enumerate(numbers):
            if isinstance(number, Tensor):
                if number.device != self._device or number.dtype not in (torch.float32, torch.float64):
                    number = number.to(self._device, torch.float64)
                self._hyper_tensors.append(number)
                addresses[i] = number_address(number)
                numbers[i] = 0.0
        self._hyper = np.array(numbers, dtype=np.float64)
        self._hyper_pointers = np.array(addresses, dtype=np.int64)

    def _upload(self, array: Array) -> Tensor:
        """A copy on the device. The pinned source may go: torch's host allocator keeps it until it has been read."""
        host = torch.from_numpy(array)
        if self._device.type == "cpu":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)

    def _current_stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0


def number_address(number: Tensor | None) -> int:
    """What the kernels find a 0-d fp32 (odd) or fp64 (even) tensor by, 0 for none."""
    return 0 if number is None else number.data_ptr() + (number.dtype == torch.float32)


def _pack(sections: Sequence[Array]) -> tuple[Array, list[tuple[int, int]]]:
    """Sections of int64 in one buffer, and their bounds.

    Each begins at a multiple of 16 bytes: Triton compiles anew for a pointer that does not.
    """
    ends = list(accumulate(len(section) + len(section) % 2 for section in sections))
    bounds = [(start, start + len(section)) for start, section in zip([0, *ends], sections, strict=False)]
    buffer = np.zeros(ends[-1], dtype=np.int64)
    for (start, stop), section in zip(bounds, sections, strict=True):
        buffer[start:stop] = section
    return buffer, bounds


def _slices(buffer: Tensor, bounds: Sequence[tuple[int, int]]) -> list[Tensor]:
    return [buffer[start:stop] for start, stop in bounds]


def _chunks(numels: Array, chunk_size: int) -> Array:
    """(row, chunk) as two int32 in one int64, for every chunk of every tensor."""
    counts = -(-numels // chunk_size)
    rows = np.repeat(np.arange(len(numels)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    pairs = np.stack([rows, np.arange(len(rows)) - firsts], axis=1).astype(np.int32)
    return pairs.reshape(-1).view(np.int64)
