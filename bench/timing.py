"""How things are timed side by side: each has its turn in every round, so that what slows the machine slows all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]  # runs the call once and says how many seconds it took


@dataclass(frozen=True)
class Work:
    """Something to time, and what has to happen before each time."""

    run: Call
    prepare: Call = lambda: None


@dataclass(frozen=True)
class Spread:
    """What many measurements say, in seconds."""

    lowest: float
    median: float
    p90: float
    samples: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        p90 = statistics.quantiles(times, n=10, method="inclusive")[8] if len(times) > 1 else times[0]
        return cls(min(times), statistics.median(times), p90, len(times))


def wait_for(device: torch.device) -> Call:
    """What waits until the device has done everything that it was asked for."""
    wait = torch.cpu.synchronize if device.type == "cpu" else torch.accelerator.synchronize
    return lambda: wait(device)


def host_stopwatch(wait: Call, clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """Until a call returns. The device, for which `wait` waits, is idle before; what it does later does not count."""

    def measure(call: Call) -> float:
        wait()
        start = clock()
        call()
        return clock() - start

    return measure


def interleaved(works: Mapping[str, Work], stopwatch: Stopwatch, rounds: int, repeats: int = 1) -> dict[str, Spread]:
    """Time every work `rounds` times `repeats` times.

    In each round every work has a turn: once untimed, since another one has just used the caches, then `repeats`
    times. The order changes from round to round.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _without_garbage_collection():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                work = works[name]
                for repeat in range(repeats + 1):
                    work.prepare()
                    elapsed = stopwatch(work.run)
                    if repeat:
                        times[name].append(elapsed)
    return {name: Spread.of(each) for name, each in times.items()}


def launches(call: Call) -> int:
    """How many kernels the call starts on a GPU, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.accelerator.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    others = ("Memcpy", "Memset", "Optimizer.")  # the last is a mark that torch's optimizers leave
    return sum(not event.name.startswith(others) for event in on_device)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
