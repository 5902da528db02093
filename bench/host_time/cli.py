"""Host time of a step: how long `step()` keeps Python busy, by the number of tensors and param groups.

fusedopt stands beside torch's fused and foreach optimizers, in one process, by turns. On a GPU the steps are real, the
device is idle before each, and the time ends when `step()` returns. Without one every kernel is emptied, torch's too,
so that what is left is bookkeeping: `fusedopt.engines.tables.launch`, by which Triton's kernels start,
`fusedopt.engines.threads.run`, by which those do that are compiled for the CPU, and all of torch.optim's
`torch._fused_*` and `torch._foreach_*`, are functions that do nothing. Then it is the CPU time of the thread that
counts, which other programs on the machine change less than the time of the clock: nothing waits in such a step. What a
GPU would add is not in these numbers: for fusedopt Triton's launcher and copies from pinned memory, for torch what its
C++ does to pack addresses into launches.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import fusedopt
from fusedopt.engines import tables, threads
from fusedopt.engines.choice import numba_is_installed, triton_is_installed

from ..common import (
    RESULTS,
    Parser,
    circumstances,
    default_device,
    file_name,
    usable_device,
    writable_folder,
)
from ..timing import Call, Spread, Work, host_stopwatch, interleaved, launches, wait_for

SHAPES = [(1, 1), (30, 1), (300, 1), (3000, 1), (465, 50), (465, 465)]  # tensors, param groups
PROFILED = [(300, 1), (465, 465)]
NUMEL = 256
TOP = 12  # functions in a profile
OURS, FUSED, FOREACH, ON_CPU = "fusedopt", "torch fused", "torch foreach", "fusedopt, compiled"
# What happens to the optimizer's input between two steps.
CHANGES = {
    "nothing": "nothing changes",
    "gradients": "every gradient is at another address",
    "gradients, lr": "so it is, and every group has another lr",
}
AIMS = {(300, 1): 1 / 2, (465, 465): 1 / 10}  # of torch fused's


@dataclass
class Row:
    """The host time of one step, in seconds."""

    tensors: int
    groups: int
    change: str
    contender: str
    lowest: float
    median: float
    p90: float
    samples: int
    kernels: int | None  # asked for in a step


class Contender:
    """An optimizer with parameters of its own, and two sets of gradients to change between."""

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], shape: tuple[int, int], device: torch.device
    ) -> None:
        n_tensors, n_groups = shape
        self.params = [nn.Parameter(torch.randn(NUMEL, device=device)) for _ in range(n_tensors)]
        self.grads = [[torch.randn_like(param) for param in self.params] for _ in range(2)]
        self.set_grads(0)
        self.optimizer = make([{"params": self.params[i::n_groups]} for i in range(n_groups)])

    def set_grads(self, which: int) -> None:
        for param, grad in zip(self.params, self.grads[which], strict=True):
            param.grad = grad

    def work(self, change: str) -> Work:
        """A step after a change, which is not timed."""

        def prepare() -> None:
            if "gradients" in change:
                self.set_grads(int(self.params[0].grad is self.grads[0][0]))
            if "lr" in change:
                for group in self.optimizer.param_groups:
                    group["lr"] *= 0.999

        return Work(self.optimizer.step, prepare)


def makers(name: str, device: torch.device) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """The optimizers of this name, from both libraries."""
    ours, theirs = getattr(fusedopt, name), getattr(torch.optim, name)
    made = {
        OURS: partial(ours, backend="triton"),
        FUSED: partial(theirs, fused=True),
        FOREACH: partial(theirs, foreach=True),
    }
    if device.type == "cpu" and numba_is_installed():
        made[ON_CPU] = partial(ours, backend="compiled")
    return made


@contextmanager
def emptied_kernels() -> Iterator[Counter[str]]:
    """Within the context no step computes anything; what is asked for is counted by its name."""
    calls: Counter[str] = Counter()

    def empty(name: str) -> Callable[..., Any]:
        def nothing(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return args[0]  # a list of tensors is what a foreach function returns

        return nothing

    hollow = ModuleType("torch")
    hollow.__dict__.update(vars(torch))
    for name in vars(torch):
        if name.startswith(("_fused_", "_foreach_")):
            setattr(hollow, name, empty(name))
    modules = [module for name, module in sys.modules.items() if name.startswith("torch.optim.")]
    modules = [module for module in modules if vars(module).get("torch") is torch]
    launch, run = tables.launch, threads.run
    try:
        tables.launch, threads.run = empty("launch"), empty("run")
        for module in modules:
            module.torch = hollow
        yield calls
    finally:
        tables.launch, threads.run = launch, run
        for module in modules:
            module.torch = torch


def contenders(name: str, shape: tuple[int, int], device: torch.device) -> dict[str, Contender]:
    """The optimizers of one name, with their states created."""
    made = {who: Contender(make, shape, device) for who, make in makers(name, device).items()}
    for who, contender in made.items():
        # With empty kernels torch would stay at step 0, and foreach divide by 0. fusedopt creates its states anyway.
        if who not in (OURS, ON_CPU) or device.type != "cpu":
            contender.optimizer.step()
    return made


def measure(name: str, device: torch.device, rounds: int, repeats: int) -> tuple[list[Row], dict[str, Any]]:
    """The host times of all shapes, and where fusedopt's go."""
    rows: list[Row] = []
    profiles: dict[str, Any] = {}
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    stopwatch = host_stopwatch(wait_for(device), clock)
    for shape in SHAPES:
        made = contenders(name, shape, device)
        with emptied_kernels() if device.type == "cpu" else nullcontext() as calls:
            for change in CHANGES:
                works = {who: each.work(change) for who, each in made.items()}
                times = interleaved(works, stopwatch, rounds, repeats)
                for who, samples in times.items():
                    spread = asdict(Spread.of(samples))
                    rows.append(Row(*shape, change, who, **spread, kernels=count(works[who].run, calls)))
            if shape in PROFILED:
                key = f"{shape[0]} tensors, {shape[1]} groups" if shape[1] > 1 else f"{shape[0]} tensors, 1 group"
                profiles[key] = {change: own_times(made[OURS].work(change), rounds * repeats) for change in CHANGES}
        ours, fused = (row.median for row in rows[-len(CHANGES) * len(made) :][:2])
        print(
            f"{shape[0]:>5} tensors, {shape[1]:>3} groups: {1e6 * ours:8.1f} µs, torch fused {1e6 * fused:8.1f} µs",
            flush=True,
        )
    return rows, profiles


def count(step: Call, calls: Counter[str] | None) -> int:
    """How many kernels a step asks for: those that are launched, or calls of what is emptied."""
    if calls is None:
        return launches(step)
    calls.clear()
    step()
    return sum(calls.values())


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
    """For each aim what was measured: fusedopt's median as a share of torch fused's."""
    medians = {(row.tensors, row.groups, row.change, row.contender): row.median for row in rows}
    return [
        {
            "tensors": tensors,
            "groups": groups,
            "change": change,
            "aim": aim,
            "measured": medians[tensors, groups, change, OURS] / medians[tensors, groups, change, FUSED],
        }
        for (tensors, groups), aim in AIMS.items()
        for change in CHANGES
    ]


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
    if options.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # else the kernels refuse tensors on the CPU; read when Triton is imported
    if not triton_is_installed():
        print(
            "python -m bench.host_time: error: Triton is not installed, without which fusedopt has no kernels",
            file=sys.stderr,
        )
        return 2
    result = circumstances("python -m bench.host_time", options.device)
    rows, profiles = measure(options.optimizer, options.device, options.rounds, options.repeats)
    result |= {
        "optimizer": options.optimizer,
        "kernels": "emptied" if options.device.type == "cpu" else "real",
        "changes": CHANGES,
        "rows": list(map(asdict, rows)),
        "aims": aims(rows),
        "profiles": profiles,
    }
    path = options.out / f"host-time-{file_name(options.device)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Numbers: {path}", flush=True)
    try:
        from .report import draw, markdown
    except ImportError as error:
        print(f"No table and no figure: {error.name} is not installed", file=sys.stderr)
        return 0
    path.with_suffix(".md").write_text(markdown(result))
    draw(result, path.with_suffix(".png"))
    print(f"\n{markdown(result)}\nTable: {path.with_suffix('.md')}, figure: {path.with_suffix('.png')}")
    return 0
