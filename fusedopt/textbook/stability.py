"""Ill-conditioning: how large a learning rate may be, and where each optimizer converges, crawls or diverges.

All on quadratics h(x) = ½ Σ λᵢ xᵢ², the book's form after a rotation, from xᵢ = 1. Gradient descent shrinks xᵢ if
ηλᵢ < 2, momentum if ηλᵢ < 2 + 2β: the largest λ bounds the learning rate, and the smallest is left with slow progress.

The map judges a run by the largest distance from the minimum in the last quarter of its steps, since many runs circle:

    converges  at most 1 % of the distance at the start
    diverges   more than the distance at the start, or not finite
    crawls     between the two: too slow, or circling the minimum in steps that stay large
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn
from tqdm import tqdm

from . import forms, report
from .report import BLUE, RED, YELLOW, UsageError

VERDICTS = ("converges", "crawls", "diverges")
NEAR = 0.01
MAPPED = ("gd", "momentum", "adagrad", "rmsprop", "adadelta", "adam")
RATES, CONDITIONS = 81, 61  # columns and rows of the map
MARGIN = 0.01  # how far below and above the bound the check runs


@dataclass
class Limit:
    """The largest stable learning rate of a method, and what came of running it just below and just above."""

    form: str
    hyper: dict[str, float]
    rate: float
    steps: int
    below: float  # distance from the minimum at the end, as a share of that at the start
    above: float

    @property
    def holds(self) -> bool:
        """Whether the runs say the same as the formula."""
        return self.below < 1 < self.above


def distance(form: str, hyper: dict[str, float], eigenvalues: Sequence[float], steps: int) -> float:
    """How far from the minimum the optimizer ends, as a share of where it began."""
    curvature = torch.tensor(eigenvalues, dtype=torch.float64)
    x = nn.Parameter(torch.ones_like(curvature))
    optimizer = forms.FORMS[form]([x], **hyper)
    for _ in range(steps):
        x.grad = curvature * x.detach()
        optimizer.step()
    share = (x.norm() / len(eigenvalues) ** 0.5).item()
    return share if math.isfinite(share) else math.inf


def limits(eigenvalues: Sequence[float], momentum: float) -> list[Limit]:
    """2/λmax for gradient descent and 2(1+β)/λmax for momentum, and the runs that check them."""
    # Momentum shrinks by √β a step at worst: enough steps for that to show.
    steps = 1000 + math.ceil(20 / (1 - momentum))
    found = []
    for form, hyper, rate in [
        ("gd", {}, 2 / max(eigenvalues)),
        ("momentum", {"momentum": momentum}, 2 * (1 + momentum) / max(eigenvalues)),
    ]:
        below, above = (
            distance(form, {"lr": factor * rate, **hyper}, eigenvalues, steps) for factor in (1 - MARGIN, 1 + MARGIN)
        )
        found.append(Limit(form, hyper, rate, steps, below, above))
    return found


def scan(form: str, hyper: dict[str, float], smallest: float, rates: Tensor, conditions: Tensor, steps: int) -> Tensor:
    """The verdict, an index of `VERDICTS`, for every learning rate (column) and condition number (row).

    Each cell is a quadratic with two eigenvalues, λmin and κ λmin. Each learning rate is a param group whose one
    parameter holds the quadratics of all κ: optimizers that are element-wise step them independently of each other.
    For the same reason those that scale each coordinate by itself hardly see κ; a rotated quadratic they would.
    """
    curvature = smallest * torch.stack([torch.ones_like(conditions), conditions])
    columns = [nn.Parameter(torch.ones_like(curvature)) for _ in rates]
    groups = [{"params": [x], "lr": rate} for x, rate in zip(columns, rates.tolist(), strict=True)]
    optimizer = forms.FORMS[form](groups, **hyper)
    share = torch.zeros(len(conditions), len(rates), dtype=torch.float64)
    for step in range(steps):
        for x in columns:
            x.grad = curvature * x.detach()
        optimizer.step()
        if step >= steps * 3 // 4:  # maximum keeps NaN
            share = torch.maximum(share, torch.stack([x.detach().norm(dim=0) for x in columns], dim=1) / 2**0.5)
    verdict = torch.ones_like(share, dtype=torch.int64)
    verdict[share <= NEAR] = 0
    verdict[~(share <= 1)] = 2
    return verdict


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Check the bounds and draw the map; see `cli`."""
    if options.eigenvalues and (options.a or options.b):
        raise UsageError("argument --eigenvalues: not together with --a or --b, which stand for 2A and 2B")
    eigenvalues = options.eigenvalues or [2 * (options.a or 0.1), 2 * (options.b or 2.0)]
    condition = max(eigenvalues) / min(eigenvalues)
    checked = limits(eigenvalues, options.momentum)
    # From where even the smallest λ moves too little to where it moves too far.
    rates = torch.logspace(-4, 1, RATES, dtype=torch.float64) / min(eigenvalues)
    conditions = torch.logspace(0, 3, CONDITIONS, dtype=torch.float64)
    hypers = {
        form: {"momentum": options.momentum} if form == "momentum" else {} for form in options.optimizer or MAPPED
    }
    maps = {
        form: scan(form, hyper, min(eigenvalues), rates, conditions, options.steps)
        for form, hyper in tqdm(hypers.items(), unit="map")
    }
    figure = options.out / "textbook-stability.png"
    draw(maps, hypers, rates, conditions, eigenvalues, options.steps, figure)
    document = {
        "eigenvalues": eigenvalues,
        "condition_number": condition,
        "limits": [
            {
                "optimizer": each.form,
                "hyperparameters": each.hyper,
                "largest_stable_lr": each.rate,
                "steps": each.steps,
                "distance_below": each.below,
                "distance_above": each.above,
                "holds": each.holds,
            }
            for each in checked
        ],
        "map": {
            "steps": options.steps,
            "verdicts": VERDICTS,
            "lr": rates.tolist(),
            "condition_numbers": conditions.tolist(),
            "optimizers": {form: verdict.tolist() for form, verdict in maps.items()},
        },
        "figure": str(figure),
    }
    return document, text(eigenvalues, checked), 0 if all(each.holds for each in checked) else 1


def text(eigenvalues: list[float], checked: list[Limit]) -> str:
    """The condition number, and the bounds beside the runs."""
    formulas = {"gd": "2/λmax", "momentum": "2(1+β)/λmax"}
    rows = [
        [
            f"{forms.title(each.form)} {forms.settings(each.hyper)}".rstrip(),
            f"{formulas[each.form]} = {each.rate:.6g}",
            f"{each.steps}",
            f"{each.below:.2g}",
            f"{each.above:.2g}",
            "yes" if each.holds else "NO",
        ]
        for each in checked
    ]
    headers = ["optimizer", "largest stable η", "steps", f"{MARGIN:.0%} below", f"{MARGIN:.0%} above", "holds"]
    listed = ", ".join(f"{each:g}" for each in eigenvalues)
    return (
        f"Eigenvalues {listed}: condition number κ = λmax/λmin = {max(eigenvalues) / min(eigenvalues):g}\n\n"
        f"{report.table(headers, rows, left=2)}\n\n"
        "Below and above: how far from the minimum a run ends, as a multiple of where it began."
    )


def draw(
    maps: dict[str, Tensor],
    hypers: dict[str, dict[str, float]],
    rates: Tensor,
    conditions: Tensor,
    eigenvalues: list[float],
    steps: int,
    path: Path,
) -> None:
    """The map, a panel for each optimizer."""
    figure, axes = report.panels(len(maps), min(3, len(maps)), (3.9, 3.3))
    colours = ListedColormap([BLUE, YELLOW, RED])
    smallest, largest = min(eigenvalues), max(eigenvalues)
    for panel, (form, verdict) in zip(axes, maps.items(), strict=True):
        panel.pcolormesh(
            rates.numpy(),
            conditions.numpy(),
            verdict.numpy(),
            cmap=colours,
            vmin=0,
            vmax=2,
            shading="nearest",
            rasterized=True,
        )
        panel.set_xscale("log")
        panel.set_yscale("log")
        bound = {"gd": 2.0, "momentum": 2 * (1 + hypers[form].get("momentum", 0))}.get(form)
        if bound is not None:
            panel.plot((bound / (smallest * conditions)).numpy(), conditions.numpy(), color="black", linestyle="--")
        if conditions[0] <= largest / smallest <= conditions[-1]:
            panel.axhline(largest / smallest, color="black", linewidth=1, linestyle=":")
        panel.set_xlim(rates[0].item(), rates[-1].item())
        panel.set_title(f"{forms.title(form)} {forms.settings(hypers[form])}".rstrip(), fontsize=13)
    labels = [
        f"converges: to {NEAR:.0%} of the distance",
        "crawls or circles: between the two",
        "diverges: farther than at first",
    ]
    handles: list[Any] = [Patch(facecolor=colours(i), label=label) for i, label in enumerate(labels)]
    handles.append(Line2D([], [], color="black", linestyle="--", label="2/λmax, with momentum 2(1+β)/λmax"))
    handles.append(Line2D([], [], color="black", linewidth=1, linestyle=":", label="κ of the given quadratic"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=11, frameon=False)
    figure.supxlabel(f"learning rate η (λmin = {smallest:g}, λmax = κ λmin; {steps} steps)", fontsize=13)
    figure.supylabel("condition number κ", fontsize=13)
    report.save(figure, path)
