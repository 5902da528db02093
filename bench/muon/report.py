"""The tables and the figure of `python -m bench.muon`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from tabulate import tabulate

from ..common import circumstances_in_words
from .measure import AIM, PRODUCTS, PYTORCH_OPTIMIZER, TORCH
from .workloads import CURVE, small

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    TORCH: "#0072B2",
    "fusedopt, triton": "#E69F00",
    "fusedopt, compiled": "#E69F00",
    "fusedopt, eager": "#D55E00",
    PYTORCH_OPTIMIZER: "#009E73",
    PRODUCTS: "0.6",
}
READING = """Times are medians (lowest–90th percentile) by turns. On a GPU they are the device's, and beside them stands
the host's until `step()` returns; "waits": the device waited for the host, so its time is the host's too. GFLOP/s: what
the products compute, in the time of the whole step. Products: those of fusedopt's step, called alone, as a share of
its time. A first step of fusedopt was compared with torch's before anything was timed."""
ABOUT_LAUNCHES = """Kernels are fusedopt's own: what prepares numbers, and what updates elements. Operators are
torch's that compute something, neither views nor allocations; on a GPU most of them launch one kernel."""


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result."""
    libraries = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    parts = ["# Muon", f"{circumstances_in_words(result)}. Peers: {libraries}.", READING, "## Aim", _aims(result)]
    parts += ["## What is stepped", _workloads(result)]
    for threads in dict.fromkeys(row["threads"] for row in result["rows"]):
        heading = "## Time" if result["device"] != "cpu" else f"## Time, {_threads(threads)}"
        parts += [heading, _times([row for row in result["rows"] if row["threads"] == threads])]
    parts += ["## Launches of a step", ABOUT_LAUNCHES, _launches(result)]
    return "\n\n".join(parts) + "\n"


def _aims(result: dict[str, Any]) -> str:
    cells = []
    for aim in result["aims"]:
        missed = aim["measured"] - aim["aim"]
        judged = f"missed by {missed:.3f}" if missed > 0 else "met"
        what = f"{aim['contender']}, {aim['workload']}, {_threads(aim['threads'])}: of {TORCH}'s time"
        cells.append([what, f"≤ {aim['aim']:g}", f"{aim['measured']:.3f}", judged])
    return _table(["", "aim", "measured", ""], cells, "lrrr")


def _workloads(result: dict[str, Any]) -> str:
    cells = []
    for each in result["workloads"]:
        shapes = ", ".join("×".join(map(str, shape)) for shape in each["shapes"])
        numbers = [each["parameters"], each["matrices"], each["elements"]]
        cells.append(
            [
                each["name"],
                shapes,
                *(f"{number:,}" for number in numbers),
                f"{each['flops'] / 1e9:,.2f}",
                f"{each['bytes_moved'] / 2**20:,.1f}",
                f"{each['flops'] / each['bytes_moved']:,.0f}",
            ]
        )
    headers = ["", "shapes", "parameters", "matrices", "elements", "GFLOP of products", "MiB of the other passes"]
    iterations = ", ".join(map(str, sorted({each["iterations"] for each in result["workloads"]})))
    table = _table([*headers, "FLOP a byte"], cells, "llrrrrrr")
    return f"{table}\n\nNewton-Schulz iterations: {iterations}."


def _times(rows: Sequence[dict[str, Any]]) -> str:
    headers = ["", "", "time", "host", f"of {TORCH}'s", "GFLOP/s", "products"]
    cells = [
        [
            row["workload"],
            row["contender"],
            _spread(row["time"]) + " waits" * bool(row["waited"]),
            "" if row["host_time"] is None else _spread(row["host_time"]),
            "" if row["of_torch"] is None else f"{row['of_torch']:.2f}",
            f"{row['flops_per_second'] / 1e9:,.0f}",
            "" if row["products_share"] is None else f"{row['products_share']:.0%}",
        ]
        for row in rows
    ]
    filled = [i for i in range(len(headers)) if i < 2 or any(row[i] for row in cells)]
    alignment = "".join("llrrrrr"[i] for i in filled)
    return _table([headers[i] for i in filled], [[row[i] for i in filled] for row in cells], alignment)


def _launches(result: dict[str, Any]) -> str:
    """One row a workload and contender, which are the same for any number of threads."""
    threads = result["rows"][0]["threads"]
    headers = ["", "matrices", "", "kernels: prepare", "update", "torch's operators", "all launches"]
    matrices = {each["name"]: f"{each['matrices']:,}" for each in result["workloads"]}
    cells = [
        [
            row["workload"],
            matrices[row["workload"]],
            row["contender"],
            *(f"{row['kernels'].get(name, '')}" for name in ("prepare", "update")),
            f"{row['operators']:,}",
            "" if row["launches"] is None else f"{row['launches']:,}",
        ]
        for row in result["rows"]
        if row["threads"] == threads
    ]
    width = len(headers) if any(row[-1] for row in cells) else len(headers) - 1
    return _table(headers[:width], [row[:width] for row in cells], "lrlrrrr"[:width])


def _table(headers: Sequence[str], cells: Iterable[Sequence[str]], alignment: str) -> str:
    sides = {"l": "left", "r": "right"}
    return tabulate(list(cells), headers, "github", disable_numparse=True, colalign=[sides[a] for a in alignment])


def _spread(spread: dict[str, float]) -> str:
    lowest, median, p90 = (milliseconds(spread[key]) for key in ("lowest", "median", "p90"))
    return f"{median} ({lowest}–{p90}) ms"


def milliseconds(seconds: float) -> str:
    """Three digits of small numbers, all of those before the point of large ones."""
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:,.0f}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def draw(result: dict[str, Any], path: Path) -> None:
    """Times beside torch's, and how time and launches grow with the number of matrices; of the most threads."""
    threads = max(row["threads"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["threads"] == threads]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure = Figure(figsize=(15, 5), layout="constrained")
    bars, times, launches = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    _bars(bars, rows, names)
    curve = {small(count).name: count for count in CURVE}
    for name in names:
        mine = [row for row in rows if row["contender"] == name and row["workload"] in curve]
        counts = [curve[row["workload"]] for row in mine]
        style = {"color": COLORS[name], "marker": "o", "linewidth": 2}
        times.loglog(counts, [1e3 * row["time"]["median"] for row in mine], **style)
        launches.loglog(counts, [sum(row["kernels"].values()) + row["operators"] for row in mine], **style)
    for panel, title in ((times, "time (ms)"), (launches, "kernels and operators of a step")):
        panel.set_title(title, fontsize=12, loc="left")
        panel.set_xlabel("small matrices", fontsize=12)
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=12)
    where = f"{result['cpu']}, {_threads(threads)}" if result["device"] == "cpu" else result["device"]
    figure.supxlabel(where, fontsize=11)
    figure.savefig(path, format="png", dpi=150)


def _bars(panel: Axes, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A group of bars for each workload, in torch's time."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    medians = {(row["workload"], row["contender"]): row["time"]["median"] for row in rows}
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        x = [i + width * (place - (len(names) - 1) / 2) for i in range(len(workloads))]
        heights = [medians[workload, name] / medians[workload, TORCH] for workload in workloads]
        panel.bar(x, heights, width, color=COLORS[name], label=name)
    panel.axhline(AIM, color="0.4", linewidth=1, linestyle=":")
    panel.set_xticks(range(len(workloads)), workloads, fontsize=10)
    panel.set_title(f"time: {TORCH} = 1 (dotted: {AIM:g})", fontsize=12, loc="left")
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
