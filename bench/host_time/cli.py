"""Host time of a step: how long `step()` keeps Python busy, by the number of tensors and param groups.

fusedopt stands beside torch's fused optimizers, in one process, by turns. On a GPU the steps are real, the device is
idle before each, and the time ends when `step()` returns. Without one there are two tables. In the first, fusedopt's
kernels are compiled for a GPU and launched by Triton's real dispatch, above a driver that runs nothing
(`bench/host_time/driver.py`), while the functions by which torch would launch its own do nothing. In the second all
kernels are emptied, fusedopt's too, so that what is left is bookkeeping. Without a GPU it is the CPU time of the thread
that counts, which other programs on the machine change less than the time of the clock: nothing waits in such a step.
What a GPU would add is not in these numbers: for fusedopt copies from pinned memory and the choice of the device, for
torch what its C++ does to pack addresses into launches, and for both the driver.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusedopt.engines.choice import triton_interprets, triton_is_installed

from ..common import (
    RESULTS,
    Parser,
    circumstances,
    default_device,
    file_name,
    usable_device,
    writable_folder,
    write,
)
from ..timing import Call, Spread, Work, host_stopwatch, interleaved, wait_for
from ..timing import launches as launches_of
from .contenders import CHANGES, CLIPPED, DISPATCHED, EMPTIED, FUSED, OURS, REAL, contenders
from .emptied import emptied_kernels

SHAPES = [(1, 1), (30, 1), (300, 1), (3000, 1), (465, 50), (465, 465)]  # tensors, param groups
PROFILED = [(300, 1), (465, 465)]
NUMEL = 256
TOP = 12  # functions in a profile


@dataclass(frozen=True)
class Aim:
    """What the host time may be: of torch fused's, or beside that of a step without `max_grad_norm`."""

    tensors: int
    groups: int
    change: str
    most: float
    is_share: bool = True


AIMS = [
    Aim(1, 1, "nothing", 1.0),
    Aim(30, 1, "nothing", 0.9),
    Aim(300, 1, "nothing", 0.7),
    Aim(3000, 1, "nothing", 0.8),
    Aim(465, 465, "nothing", 0.12),
    Aim(465, 465, "gradients, lr", 0.2),
    Aim(1, 1, "nothing", 15e-6, is_share=False),
]


@dataclass
class Row:
    """The host time of one step, in seconds."""

    launches: str
    tensors: int
    groups: int
    change: str
    contender: str
    lowest: float
    median: float
    p90: float
    samples: int
    kernels: int | None  # asked for in a step


@contextmanager
def launching(launches: str, launched: Callable[[], int]) -> Iterator[Callable[[Call], int]]:
    """Within the context launches become what is said. Yields what counts the kernels that a call asks for.

    Args:
        launches: what becomes of them.
        launched: how many kernels have got as far as the driver, if that runs nothing.
    """
    if launches == REAL:
        yield launches_of
        return
    with emptied_kernels(ours=launches == EMPTIED) as calls:

        def count(call: Call) -> int:
            before = calls.total() + launched()
            call()
            return calls.total() + launched() - before

        yield count


def measure(
    name: str, device: torch.device, rounds: int, repeats: int, launches: str, launched: Callable[[], int]
) -> list[Row]:
    """The host times of all shapes."""
    rows: list[Row] = []
    stopwatch = host_stopwatch(wait_for(device), time.thread_time if device.type == "cpu" else time.perf_counter)
    for shape in SHAPES:
        made = contenders(name, shape, device, launches)
        with launching(launches, launched) as count:
            for change in CHANGES:
                works = {who: each.work(change) for who, each in made.items()}
                for who, samples in interleaved(works, stopwatch, rounds, repeats).items():
                    spread = asdict(Spread.of(samples))
                    rows.append(Row(launches, *shape, change, who, **spread, kernels=count(works[who].run)))
        ours, fused = (row.median for row in rows[-len(CHANGES) * len(made) :][:2])
        print(
            f"{launches}: {shape[0]:>5} tensors, {shape[1]:>3} groups: {1e6 * ours:8.1f} µs, "
            f"torch fused {1e6 * fused:8.1f} µs",
            flush=True,
        )
    return rows


def profiles(name: str, device: torch.device, steps: int, launches: str) -> dict[str, Any]:
    """Where fusedopt's time goes."""
    told = {}
    for shape in PROFILED:
        ours = contenders(name, shape, device, launches)[OURS]
        key = f"{shape[0]} tensors, {shape[1]} groups" if shape[1] > 1 else f"{shape[0]} tensors, 1 group"
        told[key] = {change: own_times(ours.work(change), steps) for change in CHANGES}
    return told


def own_times(work: Work, steps: int) -> list[dict[str, Any]]:
    """The Python functions in which a step spends most, by cProfile, with the built-in functions that they call.

    The profiler makes each call of a Python function dearer, so the sum is more than the host time.
    """
    profile = cProfile.Profile(builtins=False)
    for _ in range(steps):
        work.prepare()
        profile.runcall(work.run)
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in stats.values())
    functions = [
        {
            "function": f"{modules.get(file, Path(file).stem)}.{function}" + f":{line}" * function.startswith("<"),
            "calls": calls / steps,
            "seconds": own / steps,
            "share": own / total,
        }
        for (file, line, function), (_, calls, own, _, _) in stats.items()
    ]
    return sorted(functions, key=lambda each: -each["seconds"])[:TOP]


def aims(rows: list[Row]) -> list[dict[str, Any]]:
    """For each aim what was measured."""
    medians = {(row.tensors, row.groups, row.change, row.contender): row.median for row in rows}
    told = []
    for aim in AIMS:
        ours, fused, clipped = (
            medians.get((aim.tensors, aim.groups, aim.change, who), math.nan) for who in (OURS, FUSED, CLIPPED)
        )
        measured = ours / fused if aim.is_share else clipped - ours
        told.append({**asdict(aim), "measured": measured})
    return told


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.host_time", description=__doc__)
    add = parser.add_argument
    # Only those that torch has fused.
    add("--optimizer", choices=("AdamW", "Adam", "SGD", "Adagrad"), default="AdamW", help="(default: %(default)s)")
    add("--rounds", type=int, default=20, metavar="N", help="in which each has a turn (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="timed steps in a turn (default: %(default)s)")
    add("--device", type=usable_device, default=default_device(), help="where to step (default here: %(default)s)")
    add(
        "--out", type=writable_folder, default=RESULTS, metavar="DIR", help="of table, JSON, PNG (default: %(default)s)"
    )
    options = parser.parse_args()
    for name in ("rounds", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    return options


def main() -> int:
    options = parse_arguments()
    on_cpu = options.device.type == "cpu"
    if not triton_is_installed():
        print(
            "python -m bench.host_time: error: Triton is not installed, without which fusedopt has no kernels",
            file=sys.stderr,
        )
        return 2
    if on_cpu and triton_interprets():
        print(
            "python -m bench.host_time: error: TRITON_INTERPRET is set, but Triton's dispatch is to be timed",
            file=sys.stderr,
        )
        return 2
    from .driver import Driver, driven, libcuda  # which imports Triton

    result = circumstances("python -m bench.host_time", options.device)
    rows: list[Row] = []
    with driven(Driver(libcuda())) if on_cpu else nullcontext() as driver:
        for launches in (DISPATCHED, EMPTIED) if on_cpu else (REAL,):
            launched = driver.launches if driver else int
            rows += measure(options.optimizer, options.device, options.rounds, options.repeats, launches, launched)
        profiled = profiles(options.optimizer, options.device, options.rounds * options.repeats, rows[0].launches)
    result |= {
        "optimizer": options.optimizer,
        "launcher": driver.launcher if driver else "Triton's launcher",
        "changes": CHANGES,
        "rows": list(map(asdict, rows)),
        "aims": aims([row for row in rows if row.launches != EMPTIED]),
        "profiles": profiled,
    }
    path = options.out / f"host-time-{file_name(options.device)}.json"
    write(result, path, "bench.host_time.report")
    return 0
