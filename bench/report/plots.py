"""The figures of a benchmark's result."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ..steps.compare import COPY
from ..steps.comparisons import CONTENDERS
from ..steps.peers import COMPILED, FLASHOPTIM, FOREACH, FUSED, OPTIMI, OURS, STOCHASTIC
from ..steps.shapes import LARGE
from .aims import comparisons

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    OURS: "#E69F00",
    STOCHASTIC: "#F0E442",
    FOREACH: "#009E73",
    FUSED: "#0072B2",
    COMPILED: "#56B4E9",
    OPTIMI: "#CC79A7",
    FLASHOPTIM: "#D55E00",
    COPY: "0.4",
}


def draw_shares(result: dict[str, Any]) -> Figure | None:
    """Bars: the share of the copy bandwidth on the large tensor, a panel for each dtype; None without a copy."""
    large = [row for row in result["rows"]["step"] if row["shape"] == LARGE.name and row["gradients"] == "random"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in large if row["share_of_copy"] is not None))
    if not dtypes:
        return None
    figure = Figure(figsize=(14, 4.5 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), squeeze=False)[:, 0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        groups = comparisons(row for row in large if row["dtype"] == dtype)
        drawn = [name for name in CONTENDERS if name != COPY and any(name in rows for rows in groups)]
        width = 0.85 / len(drawn)
        for place, name in enumerate(drawn):
            heights = [rows[name]["share_of_copy"] or 0 if name in rows else 0 for rows in groups]
            x = [i + width * (place - (len(drawn) - 1) / 2) for i in range(len(groups))]
            panel.bar(x, heights, width, color=COLORS[name], label=name)
        panel.axhline(1, color=COLORS[COPY], linewidth=1.5)
        labels = [next(iter(rows.values()))["case"].replace("-", "\n", 1).replace("-", " ") for rows in groups]
        panel.set_xticks(range(len(groups)), labels, fontsize=8, rotation=30, ha="right")
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.set_title(f"share of the copy bandwidth, {dtype}, {result['device']}", fontsize=12, loc="left")
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, ncols=len(COLORS), loc="lower center", bbox_to_anchor=(0.5, 1.06))
    return figure


def draw_scale(result: dict[str, Any]) -> Figure | None:
    """Time against the number of elements, and host time against the number of tensors; None if that was not run."""
    rows = [row for row in result["rows"]["scale"] if row["time"] is not None]
    if not rows:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    elements, tensors = figure.subplots(1, 2)
    host_time = "host_time" if any(row["host_time"] for row in rows) else "time"
    one = [row for row in rows if row["tensors"] == 1 and row["elements"] != 1000]
    _lines(elements, one, "elements", "time")
    _lines(tensors, [row for row in rows if row["elements"] == 1000 * row["tensors"]], "tensors", host_time)
    case = rows[0]["case"]
    elements.set_title(f"time (µs) of a step of {case} on {result['device']}", fontsize=11, loc="left")
    elements.set_xlabel("elements of one tensor", fontsize=12)
    tensors.set_title("host time (µs)", fontsize=11, loc="left")
    tensors.set_xlabel("tensors of 1,000 elements", fontsize=12)
    elements.legend(frameon=False, fontsize=10)
    return figure


def _lines(panel: Axes, rows: list[dict[str, Any]], x: str, y: str) -> None:
    for name in CONTENDERS:
        mine = [row for row in rows if row["contender"] == name and row[y] is not None]
        if mine:
            style = "--" if name == COPY else "-"
            times = [1e6 * row[y]["median"] for row in mine]
            panel.plot([row[x] for row in mine], times, style, color=COLORS[name], marker="o", label=name)
    panel.set_xscale("log", base=2 if x == "elements" else 10)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
