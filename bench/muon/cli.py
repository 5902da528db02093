"""Muon's step beside torch.optim.Muon's: time by turns, the share of the products, and launches.

The matrices of GPT-2 small and batches of experts, with their sides divided by 8 on a CPU, 96 matrices of four shapes,
and 10, 100 and 1,000 small ones. torch.optim.Muon gets a parameter for each matrix of a batch. A first step is compared
with torch's before anything is timed. `--symmetric` measures something else, on a GPU: the products of
`fusedopt.matrices.symmetric` beside torch's, by which it is decided whether they are used.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import torch

from ..common import RESULTS, Parser, circumstances, default_device, file_name, usable_device, writable_folder, write
from ..steps.machine import Machine, cpu, gpu
from ..steps.peers import version
from . import symmetric
from .measure import PYTORCH_OPTIMIZER, Row, aims, measure
from .workloads import ON_CPU, workloads

SECONDS = 1.0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.muon", description=__doc__)
    add = parser.add_argument
    add("--scale", type=int, metavar="N", help=f"divide the sides by it (default: {ON_CPU} on a CPU, 1 on a GPU)")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help="after which a comparison on a CPU begins no round (default: %(default)s)",
    )
    add("--device", type=usable_device, default=default_device(), help="where to step (default here: %(default)s)")
    add("--symmetric", action="store_true", help="measure symmetric products instead")
    add(
        "--out", type=writable_folder, default=RESULTS, metavar="DIR", help="of table, JSON, PNG (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.device.type not in ("cpu", "cuda"):
        parser.error("argument --device: must be a CPU or a GPU of CUDA or ROCm")
    if options.scale is None:
        options.scale = ON_CPU if options.device.type == "cpu" else 1
    if options.scale < 1:
        parser.error("argument --scale: must be at least 1")
    return options


def main() -> int:
    options = parse_arguments()
    if options.symmetric:
        return symmetric.main(options)
    is_gpu = options.device.type == "cuda"
    machine = gpu(options.device) if is_gpu else replace(cpu(), seconds=options.seconds)
    result = circumstances("python -m bench.muon", options.device)
    rows: list[Row] = []
    told = []
    threads = torch.get_num_threads()
    try:
        for workload in workloads(options.scale):
            for count in [threads] if is_gpu else sorted({1, threads}):
                measured, facts = measure(workload, machine, count)
                rows += measured
                _tell(measured, machine)
            told.append(facts)
    finally:
        torch.set_num_threads(threads)
    result |= {
        "peers": {PYTORCH_OPTIMIZER: version("pytorch-optimizer")},
        "workloads": told,
        "rows": list(map(asdict, rows)),
        "aims": aims(rows),
    }
    path = options.out / f"muon-{file_name(options.device)}.json"
    write(result, path, "bench.muon.report")
    return 0


def _tell(rows: list[Row], machine: Machine) -> None:
    """One line, so that one sees it move."""
    threads = "" if machine.is_gpu else f", threads: {rows[0].threads}"
    times = ", ".join(f"{row.contender} {1e3 * row.time['median']:.3g} ms" for row in rows)
    print(f"{rows[0].workload}{threads}: {times}", flush=True)
