"""Everything there is to measure on this machine, one program after the other: `make bench`.

On a GPU: the tests that need one, if asked for; the host time of steps; Muon; all comparisons; the report. What one of
them lacks or fails at keeps the others from nothing, and the results of each are written as soon as they are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import datetime, timezone
from importlib.util import find_spec

import torch

from .common import RESULTS, ROOT, Parser, default_device, file_name, writable_folder


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--out", type=writable_folder, default=RESULTS, metavar="DIR", help="of all results (default: %(default)s)")
    add("--budget", type=float, metavar="SECONDS", help="begin no comparison after that time (default: no end)")
    add("--gpu-tests", action="store_true", help="first run the tests that need a GPU")
    return parser.parse_args()


def main() -> int:
    """How many programs failed."""
    options = parse_arguments()
    out = options.out.resolve()
    if out.is_relative_to(ROOT):
        out = out.relative_to(ROOT)  # for the command that a result tells
    today = datetime.now(timezone.utc).date().isoformat()
    result = out / f"{file_name(torch.device(default_device()))}-{today}.json"
    budget = [] if options.budget is None else ["--budget", str(options.budget)]
    failed = 0
    if options.gpu_tests:
        failed += not run("pytest", "tests", "-m", "gpu", "-q", needs="pytest")
    failed += not run("bench.host_time", "--out", str(out), needs="triton")
    failed += not run("bench.muon", "--out", str(out), needs="")
    failed += not run("pytest", "bench", "-q", "--results", str(result), *budget, needs="pytest")
    if (ROOT / result).exists():
        failed += not run("bench.report", str(result), needs="tabulate matplotlib")
    return failed


def run(module: str, *arguments: str, needs: str) -> bool:
    """Whether a program of Python ran to its end; True if it cannot run here, which is said."""
    missing = [name for name in needs.split() if find_spec(name) is None]
    print(f"\n=== python -m {' '.join([module, *arguments])}", flush=True)
    if missing:
        print(f"left out: {', '.join(missing)} not installed", flush=True)
        return True
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
