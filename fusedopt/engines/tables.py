"""Tables of addresses on a device, and the launches of the two generic kernels that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..protocol import OptimizerLike
from ..step.gate import Gate
from ..step.hyper import N_LIMITS, Hyper, Number, count_scalars, flat, tuple_getter
from .choice import triton_interprets, warp_size
from .compiled import CompiledKernels, Kernel, Launch
from .signature import Signature, launch_options, rule, triton_value
from .uploads import Array, Uploads

PREPARE_BLOCK_SIZE = 128
SQUARES_BLOCK_SIZE = 1024
SQUARES_CHUNK_SIZE = 16 * SQUARES_BLOCK_SIZE  # one look-up serves many elements
# Programs that add up squares: enough for a large GPU, few for the interpreter. Fixed, so that the sums are too.
SQUARES_PROGRAMS = {False: 1024, True: 4}


_interpreter = Lock()  # has one grid for all threads


def launch(kernel: Any, programs: int, *args: Any, enable_fp_fusion: bool, **options: Any) -> Any:
    """Have Triton launch a kernel, told whether products and sums are fused, since its default changes."""
    with _interpreter if triton_interprets() else nullcontext():
        return kernel[(programs,)](*args, enable_fp_fusion=enable_fp_fusion, **options)


def _launch(kernel: Any, programs: int, *args: Any, **options: Any) -> Any:
    return launch(kernel, programs, *args, **options)  # looked up at every launch: tests put theirs in its place


class TritonKernels:
    """The kernels of `fusedopt.kernels`, to be bound to their arguments."""

    prepare_block_size = PREPARE_BLOCK_SIZE
    squares_chunk_size = SQUARES_CHUNK_SIZE

    def __init__(self, device: torch.device) -> None:
        self._options = launch_options(warp_size(device))

    @property
    def squares_programs(self) -> int:
        """At most so many programs add up squares."""
        return SQUARES_PROGRAMS[triton_interprets()]

    def chunk_size(self, signature: Signature) -> int:
        """Elements of a program of `update`."""
        return signature.tiling[1]

    def prepare(self, **constants: Any) -> Kernel:
        """`prepare`."""
        from ..kernels import multi_tensor

        return self._kernel(multi_tensor.prepare, BLOCK_SIZE=PREPARE_BLOCK_SIZE, **constants)

    def update(self, signature: Signature, **constants: Any) -> Kernel:
        """`update` for one signature."""
        from ..kernels import multi_tensor

        return self._kernel(multi_tensor.update, **signature.constants, **constants)

    def sum_squares(self, grad: torch.dtype) -> Kernel:
        """`sum_squares` for gradients of this dtype."""
        from ..kernels import gate

        return self._kernel(gate.sum_squares, **squares_constants(grad))

    def _kernel(self, kernel: Any, **constants: Any) -> Kernel:
        from .direct import TritonKernel

        return TritonKernel(kernel, {**constants, **self._options}, _launch)


@dataclass(frozen=True)
class Item:
    """One parameter as the kernels see it; `position` is that of its entry in the plan."""

    position: int
    group: int
    signature: Signature
    numel: int
    tensor: int  # the place of the parameter among all of the optimizer's, for stochastic rounding
    seed: int  # as a signed number
    addresses: tuple[int, ...]  # parameter, states, what keeps the parameter's lost part, the average; 0 = absent
    scalar_addresses: tuple[int, ...]  # of `number_address`; the last one says whether the average has begun
    part: int = 0  # of `Ranks`
    first: int = 0  # the place of the first element in the whole parameter, for stochastic rounding


class Launches(NamedTuple):
    """What a step launches."""

    prepare: Launch  # of what the gate is told
    prepare_open: Launch  # where it is told nothing
    updates: list[Launch]  # one a signature


class Tables:
    """The tensors of one device that are stepped together: one `prepare`, and one `update` for each signature."""

    def __init__(
        self, optimizer: OptimizerLike, items: Sequence[Item], n_hyper: int, device: torch.device, engine: str
    ) -> None:
        self._kernels = CompiledKernels() if engine == "compiled" else TritonKernels(device)
        members: dict[Signature, list[Item]] = {}
        for item in items:
            members.setdefault(item.signature, []).append(item)
        ordered = [item for same in members.values() for item in same]
        self.positions = [item.position for item in ordered]
        self.pick = tuple_getter(self.positions)
        self.device = device
        self.uploads = Uploads(device)
        self._scalars_rule, _ = rule(type(optimizer))
        self._n_hyper = n_hyper
        self._n_scalars = n_scalars = count_scalars(type(optimizer), n_hyper)
        self._n_scalar_states = len(optimizer.scalar_states)
        self._squares = Squares(ordered, self._kernels)

        sections = [
            np.array([item.group for item in ordered], dtype=np.int64),
            np.array([item.scalar_addresses for item in ordered], dtype=np.int64).reshape(-1),
            *self._squares.sections,
        ]
        for signature, same in members.items():
            rows = np.array(
                [(item.numel, item.tensor, item.seed, item.first, *item.addresses) for item in same], dtype=np.int64
            )
            sections += [rows.reshape(-1), chunks_of(rows[:, 0], self._kernels.chunk_size(signature))]
        self.static, parts = _sections(list(map(len, sections)))
        for part, section in zip(parts, sections, strict=True):
            self.static[part] = section
        on_device = self.uploads.upload(self.static, self.uploads.memory_for(self.static))
        self._groups, self._scalar_states, *tables = (on_device[part] for part in parts)
        n_squares = len(self._squares.sections)
        self._squares.tables, tables = tables[:n_squares], tables[n_squares:]
        self._scalars = torch.empty(len(ordered) * (n_scalars + 1), dtype=torch.float64, device=device)
        self._control = torch.empty(4, dtype=torch.float64, device=device)
        # In place of what a step has not.
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._zero = torch.zeros((), dtype=torch.float32, device=device)
        self._unread = torch.zeros((), dtype=torch.float64, device=device)
        self._unskipped, self._unrounded = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

        # What may differ between two steps: gradients, numbers, addresses of numbers, limits.
        n_numbers = len(optimizer.param_groups) * (n_hyper + 1)
        self._dynamic, parts = _sections([len(ordered), n_numbers, n_numbers, N_LIMITS, N_LIMITS])
        self._told = [
            self._dynamic[part].view(dtype)
            for part, dtype in zip(parts, (np.int64, *(np.float64, np.int64) * 2), strict=True)
        ]
        self._dynamic_on_device = self.uploads.memory_for(self._dynamic)
        dtypes = (torch.int64, *(torch.float64, torch.int64) * 2)
        self._reads = [self._dynamic_on_device[part].view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        self._hyper_tensors: list[Tensor] = []
        self._converts = False  # whether any of them is a copy, which does not follow its source
        self._hyper_version = -1
        self._known: Any = None  # what the last `read` was told

        # The arguments of the launches that stay the same.
        grads, hyper, hyper_tensors, limits, limit_tensors = self._reads
        n_tensors = len(ordered)
        self._prepare = (
            *(-(-n_tensors // self._kernels.prepare_block_size), n_tensors),
            *(self._groups, grads, self._scalar_states, hyper, hyper_tensors, limits, limit_tensors),
            *(self._scalars, self._control, n_tensors),
        )
        firsts = accumulate(map(len, members.values()), initial=0)
        self._updates = [
            (
                signature,
                rule(type(optimizer), signature.update)[1],
                (
                    len(chunks),
                    sum(item.numel for item in same),
                    *(rows, grads, self._scalars, self._control, chunks.view(torch.int32), first),
                ),
            )
            for (signature, same), first, rows, chunks in zip(
                members.items(), firsts, tables[::2], tables[1::2], strict=False
            )
            if len(chunks)
        ]
        self._bound: dict[tuple[bool, bool], Launches] = {}  # by what a step asks of them

    def read(self, grad_addresses: Sequence[int], hyper: Hyper, gate: Gate) -> None:
        """Bring what may differ between two steps to the device; gradients without an address sit this one out."""
        known = grad_addresses, hyper.version
        if known == self._known and not self._converts and not gate.is_captured:
            return
        self._told[0][:] = grad_addresses
        if hyper.version != self._hyper_version or self._converts:
            self._read_hyper(hyper)
        # The stream's earlier kernels have read the old contents by the time that these arrive.
        self.uploads.upload(self._dynamic, self._dynamic_on_device)
        self._known, self._hyper_version = known, hyper.version

    def sum_squares(self) -> list[tuple[int, Tensor]]:
        """For each part, sums of squares of its gradients, and not 0 where an element is not finite: float64 [n, 2]."""
        with self.uploads.on_device():
            return self._squares.launch(self._reads[0])

    def compile(self, unscale: bool, reads_gradients: bool) -> None:
        """Have the kernels of a step. Triton compiles its own when they are launched."""
        self.bind(unscale)
        if reads_gradients:
            self._squares.bind(self._reads[0])

    def bind(self, unscale: bool) -> Launches:
        """The launches of a step that unscales gradients or does not.

        Raises:
            CompileError: one cannot be compiled for the CPU.
        """
        kind = bool(self._hyper_tensors), unscale
        if kind not in self._bound:
            prepare = self._kernels.prepare(
                SCALARS=self._scalars_rule,
                N_HYPER=self._n_hyper,
                N_SCALAR_STATES=self._n_scalar_states,
                N_SCALARS=self._n_scalars,
                HYPER_TENSORS=kind[0],
            )
            same = {"N_SCALARS": self._n_scalars, "UNSCALE": unscale}
            nothing = self._one, self._zero, self._unread, self._unread, self._unskipped, self._unrounded, 0, 0
            self._bound[kind] = Launches(
                prepare.bound(*self._prepare),
                prepare.bound(*self._prepare, *nothing),
                [
                    self._kernels.update(signature, UPDATE=update, **same).bound(*args)
                    for signature, update, args in self._updates
                ],
            )
        return self._bound[kind]

    def step(self, gate: Gate) -> None:
        """Step the tensors, if the gate lets the step pass."""
        launches = self.bind(unscale=gate.grad_scale is not None)
        with self.uploads.on_device():
            if gate.is_open and gate.rounding_step is None:
                launches.prepare_open()
            else:
                self._prepare_gated(launches.prepare, gate)
            for update in launches.updates:
                update()
        gate.decided = True
        if gate.is_captured:
            self.uploads.keep_for_graph(self._hyper_tensors, self._reads)

    def _prepare_gated(self, prepare: Launch, gate: Gate) -> None:
        """Have `prepare` decide, and count."""
        n_partials, partials, grad_norm = 0, self._unread, self._unread
        gate.skip = self._control[1] if gate.skip is None else gate.skip
        if gate.partials:
            partials = gate.partials_on(self.device)
            n_partials = partials.shape[0]
            grad_norm = torch.empty_like(self._unread)
            gate.grad_norm = grad_norm if gate.grad_norm is None else gate.grad_norm
        skipped_steps, (rounding_step, advance) = gate.take_counter(), gate.take_rounding_step()
        skipped_here = self._here(skipped_steps, self._unskipped)
        rounding_here = self._here(rounding_step, self._unrounded)
        found_inf = self._zero if gate.found_inf is None else _on(self.device, gate.found_inf)
        grad_scale = self._one if gate.grad_scale is None else _on(self.device, gate.grad_scale)
        prepare(grad_scale, found_inf, partials, grad_norm, skipped_here, rounding_here, n_partials, advance)
        if gate.is_captured:
            self.uploads.keep_for_graph(partials, grad_norm, skipped_here, rounding_here, found_inf, grad_scale)
        for counter, here in ((skipped_steps, skipped_here), (rounding_step, rounding_here)):
            if counter is not None and counter is not here:
                counter.copy_(here, non_blocking=True)

    def _here(self, counter: Tensor | None, instead: Tensor) -> Tensor:
        return instead if counter is None else counter.to(self.device, non_blocking=True)

    def _read_hyper(self, hyper: Hyper) -> None:
        """Numbers, and the addresses of those that live on a device (odd: fp32). The tensors are kept alive."""
        _, hyper_numbers, hyper_pointers, limits, limit_pointers = self._told
        self._hyper_tensors, self._converts = [], False
        self._put_numbers(flat(hyper.rows), hyper_numbers, hyper_pointers, hyper.on_device)
        self._put_numbers(hyper.limits, limits, limit_pointers, hyper.on_device)

    def _put_numbers(self, source: Iterable[Number], numbers: Array, pointers: Array, on_device: bool) -> None:
        pointers[:] = 0
        if not on_device:
            numbers[:] = np.fromiter(source, np.float64, len(numbers))
            return
        for i, number in enumerate(source):
            if isinstance(number, Tensor):
                if number.device != self.device or number.dtype not in (torch.float32, torch.float64):
                    number, self._converts = number.to(self.device, torch.float64), True
                self._hyper_tensors.append(number)
                pointers[i] = number_address(number)
            else:
                numbers[i] = number


class Squares:
    """The gradients of some tables as `sum_squares` reads them: by their part and dtype, whatever else they are."""

    def __init__(self, items: Sequence[Item], kernels: TritonKernels | CompiledKernels) -> None:
        rows: dict[tuple[int, torch.dtype], list[tuple[int, int]]] = {}
        for tensor, item in enumerate(items):
            rows.setdefault((item.part, item.signature.grad), []).append((tensor, item.numel))
        arrays = [np.array(same, dtype=np.int64) for same in rows.values()]
        pairs = [(same.reshape(-1), chunks_of(same[:, 1], kernels.squares_chunk_size)) for same in arrays]
        self.sections = [section for pair in pairs for section in pair]
        self.tables: list[Tensor] = []  # the same on the device
        self._kernels = kernels
        self._bound: list[Launch] | None = None
        self._kinds = list(rows)
        self._sizes = [(int(same[:, 1].sum()), len(chunks)) for same, (_, chunks) in zip(arrays, pairs, strict=True)]
        self._sums: list[tuple[int, Tensor]] = []

    def bind(self, grads: Tensor) -> list[Launch]:
        """`sum_squares` for each part and dtype. CompileError if it cannot be compiled for the CPU."""
        if self._bound is None:
            counts = [min(n_chunks, self._kernels.squares_programs) for _, n_chunks in self._sizes]
            partials = torch.empty((sum(counts), 2), dtype=torch.float64, device=grads.device)
            parts = partials.split(counts)
            self._bound = [
                self._kernels.sum_squares(dtype).bound(
                    count, elements, rows, grads, chunks.view(torch.int32), part, n_chunks
                )
                for (_, dtype), count, (elements, n_chunks), rows, chunks, part in zip(
                    self._kinds, counts, self._sizes, self.tables[::2], self.tables[1::2], parts, strict=True
                )
                if count
            ]
            whole = len({part for part, _ in self._kinds}) == 1
            self._sums = (
                [(self._kinds[0][0], partials)]
                if whole
                else [(part, sums) for (part, _), sums in zip(self._kinds, parts, strict=True)]
            )
        return self._bound

    def launch(self, grads: Tensor) -> list[tuple[int, Tensor]]:
        """One launch for each part and dtype; for each part, what it left."""
        for sum_squares in self.bind(grads):
            sum_squares()
        return self._sums


def squares_constants(grad: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `sum_squares`."""
    return {
        "GRAD": triton_value(grad),
        "BLOCK_SIZE": SQUARES_BLOCK_SIZE,
        "CHUNK_SIZE": SQUARES_CHUNK_SIZE,
        "CONTIGUITY": 16 // grad.itemsize,
        "UNROLL": max(1, 8 // grad.itemsize),  # 64 bytes of each thread on their way at once
    }


def _on(device: torch.device, number: Any) -> Tensor:
    """A number of the user's as an fp32 tensor on this device."""
    tensor = number if isinstance(number, Tensor) else torch.tensor(number, device="cpu")
    return tensor.to(device, torch.float32, non_blocking=True)


def number_address(number: Tensor | None) -> int:
    """What the kernels find a 0-d fp32 (odd) or fp64 (even) tensor by, 0 for none."""
    return 0 if number is None else number.data_ptr() + (number.dtype == torch.float32)


def _sections(sizes: Sequence[int]) -> tuple[Array, list[slice]]:
    """One buffer of int64, and where in it sections of these sizes are.

    Each begins at a multiple of 16 bytes: Triton compiles anew for a pointer that does not.
    """
    ends = list(accumulate(size + size % 2 for size in sizes))
    parts = [slice(start, start + size) for start, size in zip([0, *ends], sizes, strict=False)]
    return np.zeros(ends[-1], dtype=np.int64), parts


def chunks_of(numels: Array, chunk_size: int) -> Array:
    """(row, chunk) as two int32 in one int64, for every chunk of every tensor."""
    counts = -(-numels // chunk_size)
    rows = np.repeat(np.arange(len(numels)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    pairs = np.stack([rows, np.arange(len(rows)) - firsts], axis=1).astype(np.int32)
    return pairs.reshape(-1).view(np.int64)
