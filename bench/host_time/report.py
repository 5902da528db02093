"""The table and the figure of `python -m bench.host_time`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter
from tabulate import tabulate

from ..common import circumstances_in_words
from .contenders import CLIPPED, DISPATCHED, EMPTIED, FOREACH, FUSED, ON_CPU, OURS, REAL

# Colours of Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    OURS: "#E69F00",
    CLIPPED: "#CC79A7",
    ON_CPU: "#D55E00",
    FUSED: "#0072B2",
    FOREACH: "#009E73",
}

HOW = {
    REAL: "The steps are real; the device is idle before each, and the time ends when `step()` returns.",
    DISPATCHED: """fusedopt's kernels are compiled for a GPU and launched for real, by {launcher}, above a driver that
runs nothing. torch's steps end where it would launch its own (`torch._fused_*` does nothing), so what its launches cost
is left out. On a GPU come on top, for fusedopt, copies from pinned memory and the choice of the device.""",
    EMPTIED: """Every kernel is emptied (Triton's launches, `fusedopt.engines.threads.run`, torch's `torch._fused_*` and
`torch._foreach_*` do nothing), so these are the times of the bookkeeping. "fusedopt" keeps books for Triton's kernels,
"compiled" is what steps on a CPU.""",
}
ON_CPU_ONLY = "It is the CPU time of the thread: nothing waits in such a step."


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result, and how to read them."""
    kinds = list(dict.fromkeys(row["launches"] for row in result["rows"]))
    tables = "\n\n".join(f"{HOW[kind].format(launcher=result['launcher'])}\n\n{_times(result, kind)}" for kind in kinds)
    return f"""# Host time of `{result["optimizer"]}.step()`

{circumstances_in_words(result)}.

Microseconds: median (lowest–90th percentile), by turns. "kernels": how many a step asks for.
{"" if REAL in kinds else ON_CPU_ONLY}

{tables}

Between two steps {"; or ".join(result["changes"].values())}.

{_aims(result)}

Where fusedopt's time goes: the Python functions in which a step spends most by itself, with the built-in functions that
they call. cProfile makes every call of a Python function dearer, so only the shares count.

{_profiles(result)}
"""


def _times(result: dict[str, Any], launches: str) -> str:
    by_case: dict[tuple[int, int, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["launches"] == launches:
            by_case.setdefault((row["tensors"], row["groups"], row["change"]), {})[row["contender"]] = row
    names = _contenders(result, launches)
    headers = ["tensors", "groups", "changes", *names, "of torch fused's", "kernels"]
    cells = [
        [
            *case,
            *(_spread(rows[name]) for name in names),
            f"{rows[OURS]['median'] / rows[FUSED]['median']:.0%}",
            ", ".join(str(rows[name]["kernels"]) for name in names),
        ]
        for case, rows in by_case.items()
    ]
    alignment = ("right", "right", "left", *["right"] * (2 + len(names)))
    return tabulate(cells, headers, "github", disable_numparse=True, colalign=alignment)


def _contenders(result: dict[str, Any], launches: str) -> list[str]:
    there = {row["contender"] for row in result["rows"] if row["launches"] == launches}
    return [name for name in COLORS if name in there]


def _spread(row: dict[str, Any]) -> str:
    lowest, median, p90 = (1e6 * row[key] for key in ("lowest", "median", "p90"))
    return f"{median:,.0f} ({lowest:,.0f}–{p90:,.0f})"


def _aims(result: dict[str, Any]) -> str:
    headers = ["tensors", "groups", "changes", "aim", "measured", "missed by"]
    cells = []
    for aim in result["aims"]:
        words = "{:.0%} of torch fused's" if aim["is_share"] else "`max_grad_norm` adds {:.0f} µs"
        most, measured = (words.format(aim[key] * (1 if aim["is_share"] else 1e6)) for key in ("most", "measured"))
        missed = f"{aim['measured'] / aim['most'] - 1:.0%}" if aim["measured"] > aim["most"] else ""
        cells.append([aim["tensors"], aim["groups"], aim["change"], most, measured, missed])
    alignment = ("right", "right", "left", *["right"] * 3)
    return tabulate(cells, headers, "github", disable_numparse=True, colalign=alignment)


def _profiles(result: dict[str, Any]) -> str:
    parts = []
    for shape, changes in result["profiles"].items():
        for change, functions in changes.items():
            headers = [f"{shape}, changes: {change}", "calls", "µs", "share"]
            cells = [
                [
                    f"`{each['function']}`",
                    f"{each['calls']:.0f}",
                    f"{1e6 * each['seconds']:.1f}",
                    f"{each['share']:.0%}",
                ]
                for each in functions
            ]
            alignment = ("left", "right", "right", "right")
            parts.append(tabulate(cells, headers, "github", disable_numparse=True, colalign=alignment))
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """Host time against the number of tensors in one group."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    styles = dict(zip(result["changes"], ("-", "--", ":"), strict=True))
    launches = result["rows"][0]["launches"]
    names = _contenders(result, launches)
    for name in names:
        for change, style in styles.items():
            rows = [row for row in result["rows"] if row["groups"] == 1 and row["launches"] == launches]
            rows = [row for row in rows if (row["contender"], row["change"]) == (name, change)]
            x, y = [row["tensors"] for row in rows], [1e6 * row["median"] for row in rows]
            panel.loglog(x, y, color=COLORS[name], linestyle=style, marker="o", markersize=4, linewidth=2)
    handles = [Line2D([], [], color=COLORS[name], linewidth=3, label=name) for name in names]
    handles += [
        Line2D([], [], color="0.4", linestyle=style, linewidth=2, label=f"changes: {change}")
        for change, style in styles.items()
    ]
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.set_xlabel("tensors, in one group", fontsize=12)
    kernels = result["device"] if launches == REAL else "launched above a driver that runs nothing"
    panel.set_title(f"host time of {result['optimizer']}.step() (µs), {kernels}", fontsize=12, loc="left")
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(handles=handles, frameon=False, fontsize=11)
    figure.savefig(path, format="png", dpi=150)
