"""What the programs of bench/ share: their arguments, and what a result tells of the machine that it comes from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from fusedopt.engines.choice import triton_is_installed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, without the usage."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def usable_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {reason}") from None
    return device


def writable_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return path


def writable_folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write into {text!r}")
    return path


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def triton_version() -> str:
    return import_module("triton").__version__ if triton_is_installed() else "not installed"


def cpu_name() -> str:
    """What the processor calls itself, as far as it can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def file_name(device: torch.device) -> str:
    """The device's name as a part of the name of a file."""
    return "-".join(device_name(device).lower().split())


def output_of(*command: str) -> str | None:
    """What a program prints, None if it cannot be run."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def commit() -> str:
    """The commit of the checkout, with "-dirty" if files differ from it; FUSEDOPT_COMMIT where git cannot tell.

    Results do not count: one program of a run writes its own before the next one asks.
    """
    head = output_of("git", "describe", "--always")
    if head is None:
        return os.environ.get("FUSEDOPT_COMMIT", "unknown")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return f"{head}-dirty" if changed else head


def circumstances(program: str, device: torch.device) -> dict[str, Any]:
    """What it takes to make a result again, and to know what it is worth."""
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return {
        "command": shlex.join([*program.split(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "driver": (driver.splitlines() or [None])[0] if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
    }


def circumstances_in_words(result: dict[str, Any]) -> str:
    """The same in a sentence for the reader of a table."""
    driver = f", driver {result['driver']}" if result["driver"] else ""
    return (
        f"{result['device']}{driver}; {result['cpu']}, {result['cores']} cores; Python {result['python']}, "
        f"torch {result['torch']}, Triton {result['triton']}; commit {result['commit']}, {result['date']}: "
        f"`{result['command']}`"
    )


def write(result: dict[str, Any], path: Path, report: str) -> None:
    """Write a result as JSON, and beside it the table and the figure that `markdown` and `draw` of a module make of it.

    Only the numbers where something is missing that draws.
    """
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Numbers: {path}", flush=True)
    try:
        made = import_module(report)
    except ImportError as error:
        print(f"No table and no figure: {error.name} is not installed", file=sys.stderr)
        return
    table, figure = path.with_suffix(".md"), path.with_suffix(".png")
    table.write_text(made.markdown(result))
    made.draw(result, figure)
    print(f"\n{made.markdown(result)}\nTable: {table}, figure: {figure}")
