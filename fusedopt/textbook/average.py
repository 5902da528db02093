"""Exponential moving averages, v ← βv + (1−β)g: the weight of each past g, and what a start from v = 0 costs.

Unrolled, v = Σ (1−β) βᵏ gₜ₋ₖ: the weights are those of an average over about 1/(1−β) steps. After t steps they sum to
1−βᵗ only, so that Adam divides by it. Both are read off Adam's own average, ``exp_avg``: the weights after one gradient
of 1 and zeros since, their sum after gradients that are all 1.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import Adam
from . import report
from .report import BLUE, GREEN, ORANGE, RED

COLOURS, DASHES = [ORANGE, BLUE, GREEN, RED], ["-", "--", ":"]
LEAST = 1e-6  # weights below that are not drawn


def whole(steps: float) -> int:
    """A number of steps, rounded (2.5 to 3)."""
    return math.floor(steps + 0.5)


@dataclass
class Average:
    """An average and what Adam's state showed of it."""

    beta: float
    weights: np.ndarray  # of the gradient k steps ago, k = 0, 1, …
    sums: np.ndarray  # of the weights after t steps, t = 1, 2, …

    @property
    def window(self) -> float:
        """How many steps the average is over, in effect."""
        return 1 / (1 - self.beta)

    @property
    def edge(self) -> int:
        """The window in whole steps."""
        return whole(self.window)

    def correction(self, t: int) -> float:
        """What the average is multiplied by after t steps."""
        return float(1 / self.sums[t - 1])


def record(betas: list[float], gradients: np.ndarray) -> np.ndarray:
    """Adam's average after each of these gradients, a column for each β: one param group a β."""
    params = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in betas]
    groups = [{"params": [x], "betas": (beta, 0.999)} for x, beta in zip(params, betas, strict=True)]
    optimizer = Adam(groups)
    averages = []
    for gradient in gradients:
        for x in params:
            x.grad = torch.full_like(x, gradient)
        optimizer.step()
        averages.append([optimizer.state[x]["exp_avg"].item() for x in params])
    return np.array(averages)


def measure(betas: list[float]) -> list[Average]:
    """Run Adam until three windows of the longest average have passed."""
    steps = max(10, 3 * whole(1 / (1 - max(betas))))
    impulse = np.zeros(steps)
    impulse[0] = 1
    weights, sums = record(betas, impulse), record(betas, np.ones(steps))
    return [Average(*each) for each in zip(betas, weights.T, sums.T, strict=True)]


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Measure, tabulate and draw; see `cli`."""
    averages = measure(options.betas)
    figure = options.out / "textbook-average.png"
    draw(averages, figure)
    document = {
        "averages": [
            {
                "beta": each.beta,
                "window": each.window,
                "share_inside_window": float(each.weights[: each.edge].sum()),
                "weights": each.weights.tolist(),
                "bias_corrections": (1 / each.sums).tolist(),
            }
            for each in averages
        ],
        "figure": str(figure),
    }
    return document, text(averages), 0


def text(averages: list[Average]) -> str:
    """Weights, window and bias correction."""
    headers = ["β", "window\n1/(1−β)", "weight\nnow", "a window\nago", "share inside\nthe window"]
    headers += [f"correction\nat t = {when}" for when in ("1", "10", "window")]
    rows = [
        [
            f"{each.beta:g}",
            f"{each.window:g}",
            f"{each.weights[0]:.6f}",
            f"{each.weights[each.edge]:.6f}",
            f"{each.weights[: each.edge].sum():.1%}",
            f"{each.correction(1):.6g}",
            f"{each.correction(10):.6g}",
            f"{each.correction(each.edge):.6g}",
        ]
        for each in averages
    ]
    head = (
        "v ← βv + (1−β)g, as Adam's exp_avg. The gradient k steps ago weighs βᵏ(1−β); bias correction is 1/(1−βᵗ).\n\n"
    )
    return head + report.table(headers, rows, left=0)


def draw(averages: list[Average], path: Path) -> None:
    """Weights by age, and bias corrections by step."""
    figure, (left, right) = report.panels(2, 2, (5.2, 3.8), share=False)
    for i, each in enumerate(averages):
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        steps = np.arange(1, len(each.weights) + 1)
        visible = each.weights > LEAST
        left.plot(steps[visible], each.weights[visible], dashes, label=f"β = {each.beta:g}", linewidth=2, color=colour)
        left.plot(each.edge, each.weights[each.edge - 1], "o", markersize=8, color=colour)
        right.plot(steps, 1 / each.sums, dashes, linewidth=2, color=colour)
        right.plot(each.edge, each.correction(each.edge), "o", markersize=8, color=colour)
    left.plot([], [], "o", color="0.5", markersize=8, label="window 1/(1−β)")
    left.set_xlabel("age of a gradient in steps, k + 1", fontsize=12)
    left.set_ylabel("its weight, βᵏ(1−β)", fontsize=12)
    left.set_ylim(LEAST, 1)
    right.set_xlabel("steps since the start, t", fontsize=12)
    right.set_ylabel("bias correction, 1/(1−βᵗ)", fontsize=12)
    for panel in (left, right):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(color="0.9")
    figure.legend(loc="outside upper center", ncols=len(averages) + 1, fontsize=11, frameon=False)
    report.save(figure, path)
