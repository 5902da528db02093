"""Tries block sizes, chunk sizes, threads and cache hints of the `update` kernel on a GPU: a table, fastest first.

Each choice steps an optimizer of its own through the ordinary launches, is checked before it is timed, and stands
beside a copy of as many bytes, timed by turns. First every block size with every chunk size and number of threads, then
every hint with the best of these. What is in force stands in `fusedopt.engines.signature`, and stays what it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from types import ModuleType

import torch

from fusedopt.engines import signature
from fusedopt.engines.signature import Signature
from tests.cases import CASES

from ..common import RESULTS, Parser, circumstances, file_name, writable_folder
from ..static.kernels import DTYPES
from ..steps.compare import COPY, Setting, make_parameters, same_step
from ..steps.comparisons import case_of
from ..steps.machine import Machine, gpu
from ..steps.peers import bytes_moved, ours
from ..steps.shapes import LARGE, Shape
from ..timing import Spread, Work, interleaved

BLOCK_SIZES = (512, 1024, 2048)
BLOCKS = (1, 2, 4, 8, 16)  # of a chunk
THREADS = (128, 256)
HINTS = ("", "evict_first", "evict_last")


@dataclass(frozen=True)
class Choice:
    """What a launch may choose freely, since it changes no number."""

    block_size: int
    blocks: int  # of a chunk
    threads: int  # of a program
    hint: str = ""  # how the cache is to treat what is loaded


@dataclass(frozen=True)
class Trial:
    """A choice and its times in seconds."""

    choice: Choice
    time: Spread
    share_of_copy: float


def tune(setting: Setting, choices: list[Choice], hints: tuple[str, ...], machine: Machine) -> list[Trial]:
    """All choices, then the best of them with every hint; fastest first."""
    trials = [attempt(setting, choice, machine) for choice in choices]
    best = max(trials, key=lambda trial: trial.share_of_copy).choice
    trials += [attempt(setting, replace(best, hint=hint), machine) for hint in hints if hint != best.hint]
    return sorted(trials, key=lambda trial: -trial.share_of_copy)


def attempt(setting: Setting, choice: Choice, machine: Machine) -> Trial:
    """Step with a choice, check the first step, and time the others."""
    with chosen(choice):
        groups, params = make_parameters(setting.shape, setting, machine.device)
        check = same_step(setting, params)
        contender = ours(setting.case, groups, machine.backend)
        contender.step()
        check(contender)
        moved = bytes_moved(contender.optimizer)
        works = {"step": contender.work, COPY: Work(machine.copy(moved))}
        for work in works.values():
            machine.settle(work)
        times = interleaved(works, machine.stopwatch, machine.rounds)
    step, copy = Spread.of(times["step"]), Spread.of(times[COPY])
    return Trial(choice, step, copy.median / step.median)


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Within the context new optimizers launch with a choice."""
    package, kernels = import_module("fusedopt.kernels"), import_module("fusedopt.kernels.multi_tensor")
    tiling, threads = Signature.tiling, signature.THREADS
    Signature.tiling = property(lambda self: (choice.block_size, choice.block_size * choice.blocks))
    signature.THREADS = choice.threads
    if choice.hint:
        package.multi_tensor = _hinting(kernels, choice.hint)
    try:
        yield
    finally:
        Signature.tiling = tiling
        signature.THREADS = threads
        package.multi_tensor = kernels


def _hinting(kernels: ModuleType, hint: str) -> ModuleType:
    """The module of the generic kernels once more, with loads that carry a hint."""
    spec = importlib.util.spec_from_file_location(f"{kernels.__name__}_{hint}", kernels.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.load = getattr(import_module("bench.tune.hinted_loads"), hint)
    return copy


def table(trials: list[Trial]) -> str:
    lines = ["block size  blocks  threads  hint          median µs  (lowest – p90)          of copy"]
    for trial in trials:
        choice, time = trial.choice, trial.time
        lowest, median, p90 = (f"{1e6 * seconds:,.1f}" for seconds in (time.lowest, time.median, time.p90))
        lines.append(
            f"{choice.block_size:>10}  {choice.blocks:>6}  {choice.threads:>7}  {choice.hint or '-':<12}  {median:>9}  "
            f"{f'({lowest} – {p90})':<22}  {trial.share_of_copy:>6.1%}"
        )
    return "\n".join(lines)


def in_force(setting: Setting) -> Choice:
    """What launches choose by themselves."""
    groups, _ = make_parameters(Shape("one element", ((1,),)), setting, torch.device("cpu"))
    optimizer = setting.case.make(groups)
    group = optimizer.param_groups[0]
    states = tuple(setting.dtype if optimizer.uses(name, group) else None for name in optimizer.states)
    block_size, chunk_size = Signature(setting.dtype, setting.dtype, states).tiling
    return Choice(block_size, chunk_size // block_size, signature.THREADS)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.tune", description=__doc__)
    add = parser.add_argument
    names = sorted({case.optimizer for case in CASES})
    add("--optimizer", choices=names, default="AdamW", help="in its plainest form (default: %(default)s)")
    add("--momentum", type=float, metavar="BETA", help="for SGD, which has no state without")
    add("--dtype", choices=DTYPES, default="fp32", help="of parameters, gradients and states (default: %(default)s)")
    add("--elements", type=int, default=LARGE.elements, metavar="N", help="of the tensor (default: %(default)s)")
    add("--out", type=writable_folder, default=RESULTS, metavar="DIR", help="of the JSON (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if not torch.cuda.is_available():
        print("python -m bench.tune: error: there is no GPU to tune for", file=sys.stderr)
        return 2
    machine = gpu(torch.device("cuda"))
    case = case_of(options.optimizer, **({} if options.momentum is None else {"momentum": options.momentum}))
    setting = Setting(case, Shape("one tensor", ((options.elements,),)), DTYPES[options.dtype])
    result = circumstances("python -m bench.tune", machine.device) | {"case": case.id, "dtype": options.dtype}
    choices = [Choice(*choice) for choice in itertools.product(BLOCK_SIZES, BLOCKS, THREADS)]
    trials = tune(setting, choices, HINTS, machine)
    path = options.out / f"tune-{file_name(machine.device)}-{case.id}-{options.dtype}.json"
    result |= {"in_force": asdict(in_force(setting)), "trials": list(map(asdict, trials))}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{table(trials)}\n\nIn force: {in_force(setting)}\nNumbers: {path}")
    return 0
