"""The figures of a benchmark's result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ..steps.compare import COPY
from ..steps.comparisons import CONTENDERS, case_of
from ..steps.peers import COMPILED, FLASHOPTIM, FOREACH, FUSED, OPTIMI, OURS, REFERENCE, STOCHASTIC
from ..steps.shapes import LARGE
from .aims import Rows, comparisons, median, shape_of, threads_of

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    OURS: "#E69F00",
    STOCHASTIC: "#F0E442",
    REFERENCE: "0.75",
    FOREACH: "#009E73",
    FUSED: "#0072B2",
    COMPILED: "#56B4E9",
    OPTIMI: "#CC79A7",
    FLASHOPTIM: "#D55E00",
    COPY: "0.4",
}
TIMED = (OURS, FUSED, FOREACH, COMPILED, OPTIMI)  # the bars of times
ADAMW = case_of("AdamW")


def draw_shares(result: dict[str, Any]) -> Figure | None:
    """Bars: the share of a GPU's copy bandwidth on the large tensor, a panel for each dtype; None without a copy."""
    large = [row for row in result["rows"]["step"] if row["shape"] == LARGE.name and row["gradients"] == "random"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in large if row["share_of_copy"] is not None))
    if not dtypes or result["device"] == "cpu":
        return None
    figure = Figure(figsize=(14, 4.5 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), squeeze=False)[:, 0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        groups = comparisons(row for row in large if row["dtype"] == dtype)
        _bars(panel, groups, CONTENDERS, _share)
        panel.axhline(1, color=COLORS[COPY], linewidth=1.5)
        _name_groups(panel, groups, _case)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.set_title(f"share of the copy bandwidth, {dtype}, {result['device']}", fontsize=12, loc="left")
    panels[0].legend(frameon=False, ncols=len(COLORS), loc="lower center", bbox_to_anchor=(0.5, 1.06))
    return figure


def _share(rows: Rows, name: str) -> float:
    return rows[name]["share_of_copy"] or 0 if name in rows else 0


def draw_times(result: dict[str, Any]) -> Figure | None:
    """Bars: times on a CPU with one thread, of every class beside a copy's, of AdamW's beside torch fused's."""
    rows = [row for row in result["rows"]["step"] if row["threads"] == 1 and row["dtype"] == "float32"]
    found = [each for each in comparisons(rows) if OURS in each]
    large = [each for each in found if each[OURS]["shape"] == LARGE.name and median(each.get(COPY)) is not None]
    lists = [each for each in found if each[OURS]["case"] == ADAMW.id and median(each.get(FUSED)) is not None]
    if result["device"] != "cpu" or not large or not lists:
        return None
    figure = Figure(figsize=(14, 9), layout="constrained")
    above, below = figure.subplots(2)
    _relative(above, large, COPY)
    _name_groups(above, large, _case)
    above.set_title(f"{large[0][OURS]['elements']:,} elements: a copy of the same bytes = 1", fontsize=13, loc="left")
    _relative(below, lists, FUSED)
    _name_groups(below, lists, lambda rows: shape_of(rows[OURS]))
    below.set_title(f"{ADAMW.optimizer}: {FUSED} = 1", fontsize=13, loc="left")
    handles = [Patch(color=COLORS[name], label=name) for name in TIMED]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(TIMED), frameon=False, fontsize=12)
    figure.supylabel(f"time of a step, fp32, one thread, {result['cpu']}", fontsize=12)
    return figure


def _relative(panel: Axes, groups: Sequence[Rows], unit: str) -> None:
    """Bars of times, in those of `unit`."""

    def height(rows: Rows, name: str) -> float:
        return (median(rows.get(name)) or 0) / median(rows[unit])

    _bars(panel, groups, [name for name in TIMED if name != unit], height)
    panel.axhline(1, color=COLORS[unit], linewidth=2)


def _bars(panel: Axes, groups: Sequence[Rows], names: Sequence[str], height: Callable[[Rows, str], float]) -> None:
    """A group of bars for each comparison, one for each contender that is in any of them."""
    drawn = [name for name in names if name != COPY and any(name in rows for rows in groups)]
    width = 0.85 / len(drawn)
    for place, name in enumerate(drawn):
        x = [i + width * (place - (len(drawn) - 1) / 2) for i in range(len(groups))]
        panel.bar(x, [height(rows, name) for rows in groups], width, color=COLORS[name], label=name)
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _name_groups(panel: Axes, groups: Sequence[Rows], name: Callable[[Rows], str]) -> None:
    panel.set_xticks(range(len(groups)), list(map(name, groups)), fontsize=9)
    panel.margins(x=0.01)


def _case(rows: Rows) -> str:
    """The class, and the options that give it states."""
    optimizer, *options = next(iter(rows.values()))["case"].split("-")
    names = [option.partition("=")[0] for option in options]
    return "\n".join([optimizer, *(name for name in names if name in ("momentum", "centered", "amsgrad"))])


def draw_scale(result: dict[str, Any]) -> Figure | None:
    """Time against the number of elements, and host time against the number of tensors; None if that was not run."""
    rows = [row for row in result["rows"]["scale"] if row["time"] is not None]
    if not rows:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    elements, tensors = figure.subplots(1, 2)
    host_time = "host_time" if any(row["host_time"] for row in rows) else "time"
    one = [row for row in rows if row["tensors"] == 1 and row["elements"] != 1000]
    many = [row for row in rows if row["elements"] == 1000 * row["tensors"]]
    for threads, style in zip(dict.fromkeys(row["threads"] for row in rows), ("-", ":"), strict=False):
        _lines(elements, [row for row in one if row["threads"] == threads], "elements", "time", style)
        _lines(tensors, [row for row in many if row["threads"] == threads], "tensors", host_time, style)
    case = rows[0]["case"]
    elements.set_title(f"time (µs) of a step of {case} on {result['device']}", fontsize=11, loc="left")
    elements.set_xlabel("elements of one tensor", fontsize=12)
    tensors.set_title(f"{host_time.replace('_', ' ')} (µs)", fontsize=11, loc="left")
    tensors.set_xlabel("tensors of 1,000 elements", fontsize=12)
    elements.legend(frameon=False, fontsize=10)
    return figure


def _lines(panel: Axes, rows: list[dict[str, Any]], x: str, y: str, style: str) -> None:
    for name in CONTENDERS:
        mine = [row for row in rows if row["contender"] == name and row[y] is not None]
        if mine:
            times = [1e6 * row[y]["median"] for row in mine]
            label = f"{name}{threads_of(mine[0])}"
            panel.plot([row[x] for row in mine], times, style, color=COLORS[name], marker="o", label=label)
    panel.set_xscale("log", base=2 if x == "elements" else 10)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
