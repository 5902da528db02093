"""What the kernels are to reach, and what a run reached: all against the same run's copy and peers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..steps.compare import COPY
from ..steps.peers import FOREACH, FUSED, OURS, PEERS
from ..steps.shapes import GPT2, LARGE, ONE, THIRTY, THOUSAND

# On a GPU.
SHARE_OF_COPY = 0.95  # of the copy bandwidth, on the large tensor
SPEEDUPS = {"Adadelta": 3.5, "NAdam": 2.8, "RAdam": 2.8, "Rprop": 4.5}  # against torch foreach, fp32, large tensor
BEYOND_COPY = 15e-6  # seconds more than the copy for the 1,000 × 1,000 list, fp32

# On a CPU, at most this share of the time of torch's AdamW, of other classes where torch has no fused, and of a copy.
OF_FUSED = {ONE.name: 1.0, THIRTY.name: 0.6, GPT2.name: 0.7, THOUSAND.name: 0.45, LARGE.name: 1.0}
OF_FOREACH = {GPT2.name: 0.2, THOUSAND.name: 0.1, LARGE.name: 0.3}
OF_COPY = {LARGE.name: 1.0}

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Aim:
    """One number to reach. `missed_by` is empty where it is reached."""

    what: str
    aim: str
    measured: str
    missed_by: str


def comparisons(rows: Iterable[dict[str, Any]]) -> list[Rows]:
    """The rows of each comparison by contender."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        key = tuple(row[name] for name in ("case", "shape", "dtype", "gradients", "shrunk", "threads"))
        found.setdefault(key, {})[row["contender"]] = row
    return list(found.values())


def title(rows: Rows) -> str:
    """What is compared."""
    row = rows[OURS]
    zero = "" if row["gradients"] == "random" else f", {row['gradients']} gradients"
    return f"{row['case']}, {shape_of(row)}, {row['dtype']}{zero}{threads_of(row)}"


def shape_of(row: dict[str, Any]) -> str:
    return row["shape"] if row["shrunk"] == 1 else f"{row['shape']} ÷ {row['shrunk']}"


def threads_of(row: dict[str, Any]) -> str:
    """Said only of several."""
    return "" if row["threads"] == 1 else f", {row['threads']} threads"


def median(row: dict[str, Any] | None) -> float | None:
    return row["time"]["median"] if row is not None and row["time"] is not None else None


def aims(result: dict[str, Any]) -> list[Aim]:
    """Every aim beside what was measured."""
    steps = [rows for rows in comparisons(result["rows"]["step"]) if COPY in rows and median(rows[OURS]) is not None]
    if result["device"] == "cpu":
        return [*_of_fused(steps), *_of_foreach(steps), *_of_copy(steps)]
    return [*_bandwidth(steps), *_speedups(steps), *_beyond_copy(steps), *_not_slower(steps)]


def _bandwidth(steps: list[Rows]) -> Iterator[Aim]:
    for rows in steps:
        share = rows[OURS]["share_of_copy"]
        if rows[OURS]["shape"] == LARGE.name and rows[OURS]["gradients"] == "random":
            missed = f"{SHARE_OF_COPY - share:.1%}" if share < SHARE_OF_COPY else ""
            yield Aim(f"share of copy bandwidth: {title(rows)}", f"≥ {SHARE_OF_COPY:.0%}", f"{share:.1%}", missed)


def _speedups(steps: list[Rows]) -> Iterator[Aim]:
    for rows in steps:
        row = rows[OURS]
        foreach = median(rows.get(FOREACH))
        if row["shape"] == LARGE.name and row["dtype"] == "float32" and row["optimizer"] in SPEEDUPS and foreach:
            aim, measured = SPEEDUPS[row["optimizer"]], foreach / median(row)
            missed = f"{aim - measured:.2f}" if measured < aim else ""
            yield Aim(f"times as fast as {FOREACH}: {title(rows)}", f"≥ {aim}", f"{measured:.2f}", missed)


def _beyond_copy(steps: list[Rows]) -> Iterator[Aim]:
    for rows in steps:
        if rows[OURS]["shape"] == THOUSAND.name and rows[OURS]["dtype"] == "float32":
            beyond = median(rows[OURS]) - median(rows[COPY])
            missed = f"{1e6 * (beyond - BEYOND_COPY):.1f} µs" if beyond > BEYOND_COPY else ""
            aim = f"≤ {1e6 * BEYOND_COPY:.0f} µs"
            yield Aim(f"longer than the copy: {title(rows)}", aim, f"{1e6 * beyond:.1f} µs", missed)


def _not_slower(steps: list[Rows]) -> Iterator[Aim]:
    for rows in steps:
        times = {name: time for name in PEERS if (time := median(rows.get(name))) is not None}
        if times:
            fastest = min(times, key=times.__getitem__)
            ratio = median(rows[OURS]) / times[fastest]
            missed = f"{ratio - 1:.1%}" if ratio > 1 else ""
            what = f"time beside the fastest peer's, {fastest}: {title(rows)}"
            yield Aim(what, "≤ 100.0%", f"{ratio:.1%}", missed)


def _of_fused(steps: list[Rows]) -> Iterator[Aim]:
    for rows in steps:
        if rows[OURS]["optimizer"] == "AdamW" and rows[OURS]["dtype"] == "float32":
            yield from _share(rows, FUSED, OF_FUSED)


def _of_foreach(steps: list[Rows]) -> Iterator[Aim]:
    for rows in steps:
        if FUSED in rows and median(rows[FUSED]) is None:
            yield from _share(rows, FOREACH, OF_FOREACH)


def _of_copy(steps: list[Rows]) -> Iterator[Aim]:
    for rows in steps:
        yield from _share(rows, COPY, OF_COPY)


def _share(rows: Rows, other: str, aims: dict[str, float]) -> Iterator[Aim]:
    """fusedopt's time as a share of another's, if there is an aim for the shape."""
    aim, time = aims.get(rows[OURS]["shape"]), median(rows.get(other))
    if aim is not None and time is not None:
        share = median(rows[OURS]) / time
        missed = f"{share - aim:.3f}" if share > aim else ""
        yield Aim(f"time beside {other}'s: {title(rows)}", f"≤ {aim}", f"{share:.3f}", missed)
