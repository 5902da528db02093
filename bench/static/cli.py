"""Compiles every kernel for GPUs that are not there, and tells what their machine code is like: no GPU needed.

For every optimizer, dtype and option in tests/cases.py: the bytes loaded and stored for an element beside those that
are declared, the widths of loads and stores, registers, spills, shared memory, occupancy, and instructions beside the
budget at which the memory still is the limit. Prints tables and writes static.json and static.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context

import torch

from fusedopt.engines.choice import triton_interprets, triton_is_installed
from tests.cases import AVERAGED, CASES, MATRIX_CASES, MODES

from ..common import RESULTS, Parser, circumstances, circumstances_in_words, writable_folder
from .kernels import DTYPES, SIGNATURES, Kernel, SumSquares, prepares_of, unscaling, updates_of
from .report import Report, markdown, reports
from .targets import TARGETS

TOGETHER = 8  # kernels that a process compiles and disassembles in one go


def all_kernels() -> list[Kernel]:
    """Every kernel that any row of tests/cases.py launches; of those that unscale, in the ordinary dtypes only."""
    updates = updates_of([*CASES, *MATRIX_CASES], [*MODES, *AVERAGED])
    unscaled = unscaling(kernel for kernel in updates if kernel.dtypes in SIGNATURES)
    return [*updates, *unscaled, *map(SumSquares, DTYPES), *prepares_of(updates)]


def reports_of(pairs: Sequence[tuple[Kernel, str]], jobs: int) -> Iterator[Report]:
    """The report of each kernel for each target, from several processes, in any order."""
    by_target: dict[str, list[Kernel]] = {}
    for kernel, target in pairs:
        by_target.setdefault(target, []).append(kernel)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(_reports, same[start : start + TOGETHER], target)
            for target, same in by_target.items()
            for start in range(0, len(same), TOGETHER)
        ]
        try:
            for future in as_completed(futures):
                yield from future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _reports(kernels: Sequence[Kernel], target: str) -> list[Report]:
    import triton

    triton.knobs.compilation.disable_line_info = True  # which takes half of the time
    return reports(kernels, TARGETS[target])


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.static", description=__doc__)
    add = parser.add_argument
    add("--target", choices=TARGETS, action="append", help="compile for this one only (may be repeated)")
    add("-k", dest="text", metavar="TEXT", help="only kernels whose name contains this; writes files if --out is given")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: %(default)s)")
    add("--out", type=writable_folder, metavar="DIR", help=f"of the files (default: {RESULTS})")
    return parser.parse_args()


def why_impossible() -> str | None:
    """The reason why nothing can be compiled in this process, None if it can."""
    if not triton_is_installed():
        return "Triton is not installed"
    if triton_interprets():
        return "what Triton interprets cannot be compiled: unset TRITON_INTERPRET"
    return None


def main() -> int:
    from tqdm import tqdm

    options = parse_arguments()
    reason = why_impossible()
    if reason is not None:
        print(f"python -m bench.static: error: {reason}", file=sys.stderr)
        return 2
    targets = list(dict.fromkeys(options.target or TARGETS))
    kernels = [kernel for kernel in all_kernels() if (options.text or "") in kernel.id]
    pairs = [(kernel, target) for target in targets for kernel in kernels]
    if not pairs:
        print(f"python -m bench.static: error: no kernel's name contains {options.text!r}", file=sys.stderr)
        return 2
    order = {(kernel.id, target): i for i, (kernel, target) in enumerate(pairs)}
    found = list(tqdm(reports_of(pairs, options.jobs), total=len(pairs), unit="kernel", disable=None))
    found.sort(key=lambda report: order[report.kernel, report.target])
    result = circumstances("python -m bench.static", torch.device("cpu"))
    text = markdown(found, circumstances_in_words(result) + ".")
    print(text)
    out = options.out or (RESULTS if options.text is None else None)
    if out is not None:
        name = "static" if options.text is None else f"static-{options.text}"
        rows = ",\n".join(json.dumps(asdict(report)) for report in found)
        head = json.dumps(result | {"targets": {name: asdict(TARGETS[name]) for name in targets}}, indent=1)
        (out / f"{name}.json").write_text(f'{head[:-2]},\n "reports": [\n{rows}\n]}}\n')
        (out / f"{name}.md").write_text(text)
        print(f"Written: {out / name}.json, {out / name}.md")
    return 0
