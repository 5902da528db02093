"""Tables and figures of what `pytest bench --results FILE` wrote: Markdown and PNGs beside the file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..common import Parser, circumstances_in_words
from ..steps.comparisons import CONTENDERS
from ..steps.peers import OURS
from ..steps.shapes import LARGE
from .aims import Aim, aims, comparisons, median, shape_of, threads_of, title
from .plots import draw_scale, draw_shares, draw_times

KINDS = {
    "step": "One step",
    "pipeline": "Unscale, clip, step and average: in fusedopt's step, and by torch's calls",
    "scale": "More and more elements, and tensors",
}
READING = """Times are medians (lowest–90th percentile) by turns, of the device, and of the host until `step()`
returns. "waits": the step itself waits for the device or keeps it waiting, so its time is the host's too. Bytes for an
element are what one pass over parameters, gradients and states moves; torch's foreach optimizers make several. Share:
of the bandwidth of a copy of as many bytes on the device, in the same run. Memory: what a step takes at its peak
beside what it has. "÷ n": every tensor has an n-th of its elements. Where no number of threads is told, torch and
fusedopt take one on the host, and so does a copy on the CPU."""


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result."""
    libraries = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    parts = [f"# Benchmark on {result['device']}", f"{circumstances_in_words(result)}. Peers: {libraries}.", READING]
    if result["left_out"]:
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in result["left_out"]))
    told = [[aim.what, aim.aim, aim.measured, _judged(aim)] for aim in aims(result)]
    if told:
        parts += ["## Aims", _table(["", "aim", "measured", ""], told, "lrrr")]
    for threads in dict.fromkeys(row["threads"] for row in result["rows"]["step"]):
        parts += [f"## Time of fusedopt's step beside the others', {_threads(threads)}", _ratios(result, threads)]
    if any(row["share_of_copy"] for row in result["rows"]["step"] if row["shape"] == LARGE.name):
        parts += ["## Share of the copy bandwidth, one large tensor", _shares(result)]
    for kind, heading in KINDS.items():
        if result["rows"][kind]:
            parts += [f"## {heading}", _numbers(result["rows"][kind])]
    without = _without_number(result)
    if without:
        parts += ["## Who has no number, and why", without]
    return "\n\n".join(parts) + "\n"


def _judged(aim: Aim) -> str:
    return f"missed by {aim.missed_by}" if aim.missed_by else "met"


def _ratios(result: dict[str, Any], threads: int) -> str:
    """One row a comparison, one column for each other contender: fusedopt's time as a multiple of its."""
    found = comparisons(row for row in result["rows"]["step"] if row["threads"] == threads)
    found = [rows for rows in found if OURS in rows and median(rows[OURS]) is not None]
    others = [name for name in CONTENDERS if name != OURS and any(median(rows.get(name)) for rows in found)]
    cells = []
    for rows in found:
        times = [median(rows.get(name)) for name in others]
        ratios = ["" if time is None else f"{median(rows[OURS]) / time:.2f}" for time in times]
        cells.append([title(rows).removesuffix(threads_of(rows[OURS])), _spread(rows[OURS]["time"]), *ratios])
    return _table(["", OURS, *(f"of {name}'s" for name in others)], cells, "lr" + "r" * len(others))


def _shares(result: dict[str, Any]) -> str:
    """One row an optimizer and dtype, one column a contender."""
    rows = [rows for rows in comparisons(result["rows"]["step"]) if next(iter(rows.values()))["shape"] == LARGE.name]
    cells = [
        [title(each), *(_percent(each[name]["share_of_copy"]) if name in each else "" for name in CONTENDERS)]
        for each in rows
    ]
    return _table(["", *CONTENDERS], cells, "l" + "r" * len(CONTENDERS))


def _numbers(rows: Sequence[dict[str, Any]]) -> str:
    headers = ["case", "shape", "dtype", "threads", "", "device", "host"]
    headers += ["launches", "memory", "bytes", "GB/s", "share"]
    cells = []
    for row in rows:
        if row["time"] is None:
            continue
        per_second = None if row["bytes_moved"] is None else row["bytes_moved"] / row["time"]["median"] / 1e9
        gradients = "" if row["gradients"] == "random" else f", {row['gradients']} gradients"
        cells.append(
            [
                row["case"] + gradients,
                shape_of(row),
                row["dtype"],
                str(row["threads"]),
                row["contender"],
                _spread(row["time"]) + " waits" * bool(row["waited"]),
                _spread(row["host_time"]),
                "" if row["launches"] is None else f"{row['launches']:,}",
                "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:,.1f} MiB",
                "" if row["bytes_moved"] is None else f"{row['bytes_moved'] / row['elements']:.1f}",
                "" if per_second is None else f"{per_second:,.0f}",
                _percent(row["share_of_copy"]),
            ]
        )
    filled = [i for i in range(len(headers)) if i < 5 or any(row[i] for row in cells)]
    alignment = "".join("lllrlrrrrrrr"[i] for i in filled)
    return _table([headers[i] for i in filled], [[row[i] for i in filled] for row in cells], alignment)


def _without_number(result: dict[str, Any]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for rows in result["rows"].values():
        for row in rows:
            if row["error"] is not None:
                where = f"{row['case']}, {shape_of(row)}, {row['dtype']}{threads_of(row)}"
                reasons.setdefault((row["contender"], row["error"]), []).append(where)
    cells = [
        [contender, error, places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"]
        for (contender, error), places in reasons.items()
    ]
    return _table(["", "why", "where"], cells, "lll") if cells else ""


def _table(headers: Sequence[str], cells: Any, alignment: str) -> str:
    sides = {"l": "left", "r": "right"}
    return tabulate(list(cells), headers, "github", disable_numparse=True, colalign=[sides[a] for a in alignment])


def _spread(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ""
    factor, unit = (1e6, "µs") if spread["median"] < 1e-3 else (1e3, "ms")
    times = (factor * spread[key] for key in ("lowest", "median", "p90"))
    lowest, middle, p90 = (f"{time:.3g}" if time < 999.5 else f"{time:,.0f}" for time in times)
    return f"{middle} ({lowest}–{p90}) {unit}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def result_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"cannot read {text!r}")
    return path


def main() -> int:
    parser = Parser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("result", type=result_file, metavar="FILE", help="what pytest bench --results FILE wrote")
    path = parser.parse_args().result
    result = json.loads(path.read_text())
    written = [path.with_suffix(".md")]
    written[0].write_text(markdown(result))
    for name, draw in (("share", draw_shares), ("time", draw_times), ("scale", draw_scale)):
        figure = draw(result)
        if figure is not None:
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            figure.savefig(written[-1], format="png", dpi=150)
    print("Report:", ", ".join(map(str, written)))
    return 0
