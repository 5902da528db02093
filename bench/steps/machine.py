"""Where benchmarks run, and what can be measured there: a GPU with its events and counters, or the CPU with a clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..timing import Call, EventStopwatch, Stopwatch, Work, host_stopwatch, launches, wait_for

CPU_ELEMENTS = 2**25  # of a shape on the CPU: far more than caches hold, and soon done
COPY_BYTES = 2**30  # of a buffer; larger copies are made of several
MEMORY_SHARE = 0.8  # of what is free
MAX_TEMPORARIES = 4  # the size of a parameter, that a peer may take


@dataclass(frozen=True)
class Machine:
    """A device and its measures; None for what it cannot tell."""

    device: torch.device
    backend: str  # of fusedopt
    stopwatch: Stopwatch  # of the work on the device
    host_stopwatch: Stopwatch
    rounds: int
    seconds: float = math.inf  # after which no further rounds begin
    free_bytes: Callable[[], int] | None = None  # None: the shapes are small
    launches: Callable[[Call], int] | None = None
    extra_bytes: Callable[[Call], int] | None = None  # at the peak of a call, beyond what was taken before

    @property
    def is_gpu(self) -> bool:
        return self.free_bytes is not None

    def settle(self, work: Work) -> None:
        """Run a work until its time is that of the device alone."""
        if isinstance(self.stopwatch, EventStopwatch):
            self.stopwatch.settle(work)

    def waited(self, call: Call) -> bool | None:
        """Whether the host kept the device waiting within the call."""
        return self.stopwatch.waited(call) if isinstance(self.stopwatch, EventStopwatch) else None

    def max_elements(self, bytes_per_element: int) -> int:
        """How many elements fit, if each takes so many bytes."""
        if self.free_bytes is None:
            return CPU_ELEMENTS
        return int(MEMORY_SHARE * self.free_bytes() - 2 * COPY_BYTES) // bytes_per_element

    def copy(self, moved: int) -> Call:
        """A copy on the device that reads and writes so many bytes together."""
        left = moved // 2
        n_bytes = min(left, COPY_BYTES)
        source = torch.empty(-(-n_bytes // 8), dtype=torch.int64, device=self.device).random_().view(torch.uint8)
        target = torch.empty_like(source)
        pieces = [min(n_bytes, left - start) for start in range(0, left, n_bytes)]

        def copy() -> None:
            for piece in pieces:
                target[:piece].copy_(source[:piece])

        return copy


def cpu() -> Machine:
    """The CPU. Several threads may work: what counts is the time until the last of them is done."""
    device = torch.device("cpu")
    stopwatch = host_stopwatch(wait_for(device))
    return Machine(device, "auto", stopwatch, stopwatch, rounds=100, seconds=3)


def gpu(
    device: torch.device,
    cuda: Any = torch.cuda,
    count_launches: Callable[[Call], int] = launches,
    backend: str = "auto",
) -> Machine:
    """A GPU, asked through `cuda`."""
    # Four times the cache that all multiprocessors share: nothing of the last step is left in it.
    n_words = 4 * cuda.get_device_properties(device).L2_cache_size // 8
    source = torch.empty(n_words, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)

    def free_bytes() -> int:
        cuda.empty_cache()
        return cuda.mem_get_info(device)[0]

    def extra_bytes(call: Call) -> int:
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
        before = cuda.memory_allocated(device)
        call()
        cuda.synchronize(device)
        return cuda.max_memory_allocated(device) - before

    return Machine(
        device,
        backend,
        EventStopwatch(partial(cuda.Event, enable_timing=True), partial(target.copy_, source)),
        host_stopwatch(partial(cuda.synchronize, device)),
        rounds=20,
        free_bytes=free_bytes,
        launches=count_launches,
        extra_bytes=extra_bytes,
    )


def this_machine() -> Machine:
    return gpu(torch.device("cuda")) if torch.cuda.is_available() else cpu()
