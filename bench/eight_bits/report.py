"""Tables and a figure of the result."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from ..common import circumstances_in_words
from ..low_precision import GREY
from ..steps.shapes import GPT2
from ..transformer import CONTEXT
from .sizes import MILLION, STATE_DTYPES
from .training import CONTENDERS, FP32, Contender, Run

CLOSE = 0.5  # percent of fp32's loss
PARTS = 20  # of a run, in the figure


def runs_of(runs: list[Run], contender: Contender, betas: Any) -> list[Run]:
    """One a seed."""
    return [run for run in runs if run.contender == contender.name and list(run.betas) == list(betas)]


def differences(runs: list[Run], fp32: list[Run], of: Callable[[Run], float]) -> list[float]:
    """By how many percent a loss is above fp32's, seed by seed."""
    return [100 * (of(ours) / of(theirs) - 1) for ours, theirs in zip(runs, fp32, strict=True)]


def losses_table(runs: list[Run], betas: Any) -> str:
    fp32 = runs_of(runs, FP32, betas)
    cells = []
    for contender in CONTENDERS:
        found = runs_of(runs, contender, betas)
        missing = next((run.why_not for run in found if run.why_not), None)
        if missing:
            cells.append([contender.name, missing])
            continue
        finals = [run.final for run in found]
        above = differences(found, fp32, lambda run: run.final)
        mean = statistics.fmean(above)
        cells.append([contender.name, f"{statistics.fmean(finals):.4f}", f"{min(finals):.4f}–{max(finals):.4f}"])
        if contender is FP32:
            cells[-1] += ["", "", ""]
        else:
            within = "yes" if abs(mean) <= CLOSE else "no"  # NaN is not
            cells[-1] += [f"{mean:+.2f} %", f"{min(above):+.2f} to {max(above):+.2f} %", within]
        cells[-1] += [f"{found[0].state_bytes / found[0].parameters:.3f}"]
    headers = ["states", "loss", "lowest–highest", "above fp32", "seeds", f"within {CLOSE} %", "bytes"]
    return tabulate(cells, headers, "github", disable_numparse=True, colalign=("left", *["right"] * 6))


def bytes_table(rows: list[dict[str, Any]]) -> str:
    cells = [[row["optimizer"], row["options"], *(f"{row[name]:.4g}" for name in STATE_DTYPES)] for row in rows]
    headers = ["optimizer", "options", *STATE_DTYPES]
    return tabulate(cells, headers, "github", disable_numparse=True, colalign=("left", "left", *["right"] * 3))


def markdown(result: dict[str, Any]) -> str:
    runs = [Run(**run) for run in result["runs"]]
    libraries = ", ".join(f"{name} {found}" for name, found in result["peers"].items())
    hyper = ", ".join(f"{key}={value:g}" for key, value in result["hyperparameters"].items())
    parts = [
        "# States in 8 bits",
        f"{circumstances_in_words(result)}. {libraries}.",
        f"""A transformer of {result["model"]["parameters"]:,} parameters learns {result["text"]["bytes"]:,} bytes of
licences and descriptions of Python packages, in {result["steps"]} steps of {result["batch_size"]} × {CONTEXT} bytes
with AdamW({hyper}), gradients clipped to {result["max_grad_norm"]:g}. Loss in nats a byte, the mean of the last tenth
of the steps: mean, lowest and highest of the seeds ({result["seeds"]}). Above fp32: mean, lowest and highest of the
seeds' differences. "torch.optim, fp32" differs from "fp32" by rounding only. Bytes: of `optimizer.state`, a parameter;
small parameters keep full states in all libraries.""",
    ]
    for betas in result["betas"]:
        parts += [f"## Loss, betas = ({', '.join(map(str, betas))})", losses_table(runs, betas)]
    gpt2 = result["gpt2"]
    missed = gpt2["8 bits"] - gpt2["most"]
    judged = f"missed by {missed:.4f}" if missed > 0 else "met"
    parts += [
        "## Bytes of states an element",
        f"Measured in `optimizer.state` of one parameter of {MILLION.elements:,} elements.",
        bytes_table(result["bytes"]),
        f"""AdamW of all {gpt2["tensors"]} parameters of {GPT2.name}, {gpt2["parameters"]:,} elements:
{gpt2["fp32"]:.4f} bytes an element in fp32, {gpt2["bf16"]:.4f} in bf16, {gpt2["8 bits"]:.4f} in 8 bits. Aim:
{gpt2["most"]:g} at most, {judged}.""",
    ]
    return "\n\n".join(parts) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """How far above fp32's the losses are in each part of the run, means of the seeds."""
    runs = [Run(**run) for run in result["runs"]]
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(result["betas"]), sharey=True, squeeze=False)[0]
    size = max(1, result["steps"] // PARTS)
    starts = range(0, result["steps"] - size + 1, size)
    for panel, betas in zip(panels, result["betas"], strict=True):
        panel.axhspan(-CLOSE, CLOSE, color="0.93")
        for contender in CONTENDERS[1:]:
            found = runs_of(runs, contender, betas)
            if any(run.why_not for run in found):
                continue
            fp32 = runs_of(runs, FP32, betas)
            above = [
                statistics.fmean(differences(found, fp32, lambda run, start=start: run.mean_loss(start, start + size)))
                for start in starts
            ]
            line = {"color": contender.color, "linestyle": contender.style, "label": contender.name}
            panel.plot([start + size for start in starts], above, linewidth=4 if contender.color == GREY else 2, **line)
        panel.set_title(f"loss above fp32's (%), betas = ({', '.join(map(str, betas))})", fontsize=12, loc="left")
        panel.set_xlabel("step", fontsize=12)
        panel.tick_params(labelsize=11)
        panel.grid(color="0.85")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=panels[0].get_lines(), loc="outside upper center", ncols=4, fontsize=11, frameon=False)
    figure.savefig(path, format="png", dpi=150)
