"""How things are timed side by side: each has its turn in every round, so that what slows the machine slows all."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LEAST_ROUNDS = 5  # however long they take: their median counts

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


class EventStopwatch:
    """Times what the device does for a call, by events on its stream, however long the host takes to ask for it.

    The device is kept busy while the host asks; else the gaps in which it waits for the host would count. How long, is
    found out call by call: as long as the device is through before the host is, the next time has twice the head
    start. A call that itself waits for the device never gets ahead of it; `waited` knows those.

    Args:
        make_event: makes an event that can be recorded, asked, waited for, and has an `elapsed_time` in milliseconds.
        keep_busy: gives the device something to do, which also fills its cache with other data.
        most: how often at most, for one head start.
    """

    def __init__(self, make_event: Callable[[], Any], keep_busy: Call, most: int = 512) -> None:
        self._make_event = make_event
        self._keep_busy = keep_busy
        self.most = most
        self._head_starts: dict[Call, int] = {}
        self._late: set[Call] = set()

    def __call__(self, call: Call) -> float:
        head_start = self._head_starts.get(call, 1)
        start, end = self._make_event(), self._make_event()
        for _ in range(head_start):
            self._keep_busy()
        start.record()
        call()
        end.record()
        self._late.discard(call)
        if start.query():
            self._late.add(call)
            self._head_starts[call] = min(2 * head_start, self.most)
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def settle(self, work: Work) -> None:
        """Find the head start of a work, and warm it up."""
        for _ in range(self.most.bit_length() + 2):
            work.prepare()
            self(work.run)
            if work.run not in self._late:
                return

    def waited(self, call: Call) -> bool:
        """Whether the device had to wait for the host when it last did this."""
        return call in self._late


def interleaved(
    works: Mapping[str, Work], stopwatch: Stopwatch, rounds: int, repeats: int = 1, seconds: float = math.inf
) -> dict[str, list[float]]:
    """The seconds of every work, `rounds` times `repeats` of them; less where the rounds take more than `seconds`.

    In each round every work has a turn: once untimed, since another one has just used the caches, then `repeats`
    times. The order changes from round to round.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.monotonic() + seconds
    with _without_garbage_collection():
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.monotonic() > end:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                work = works[name]
                for repeat in range(repeats + 1):
                    work.prepare()
                    elapsed = stopwatch(work.run)
                    if repeat:
                        times[name].append(elapsed)
    return times


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
