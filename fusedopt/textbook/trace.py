"""The book's two-dimensional runs: f(x) = a x₁² + b x₂² from (−5, −2), 20 steps, in float64."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import nn

from . import forms, report
from .report import BLUE, NONE, ORANGE, UsageError

BOOK_F = {"a": 0.1, "b": 2.0, "start": (-5.0, -2.0), "steps": 20}
# Optimizer, hyperparameters and what the book prints. It prints no line for the last ones.
BOOK: list[tuple[str, dict[str, float], str | None]] = [
    ("gd", {"lr": 0.4}, "epoch 20, x1 -0.943467, x2 -0.000073"),
    ("gd", {"lr": 0.6}, "epoch 20, x1 -0.387814, x2 -1673.365109"),
    ("momentum", {"lr": 0.4, "momentum": 0.5}, "epoch 20, x1 -0.062843, x2 0.001202"),
    ("momentum", {"lr": 0.6, "momentum": 0.5}, "epoch 20, x1 0.007188, x2 0.002553"),
    ("adagrad", {"lr": 0.4}, "epoch 20, x1 -2.382563, x2 -0.158591"),
    ("adagrad", {"lr": 2.0}, "epoch 20, x1 -0.002295, x2 -0.000000"),
    ("rmsprop", {"lr": 0.4, "alpha": 0.9}, "epoch 20, x1 -0.010599, x2 0.000000"),
    ("average", {"lr": 0.4, "momentum": 0.5}, None),
    ("average", {"lr": 0.6, "momentum": 0.5}, None),
    ("adadelta", {"rho": 0.9}, None),
    ("adam", {"lr": 0.4}, None),
]


@dataclass
class Trace:
    """One run."""

    form: str
    hyper: dict[str, float]
    book: str | None
    path: np.ndarray  # of shape (steps + 1, 2)

    @property
    def printed(self) -> str:
        """The line that the book prints after a run."""
        x1, x2 = self.path[-1]
        return f"epoch {len(self.path) - 1}, x1 {x1:f}, x2 {x2:f}"


def descend(
    form: str,
    hyper: dict[str, float],
    a: float,
    b: float,
    start: tuple[float, float],
    steps: int,
    backend: str = "auto",
    device: str = "cpu",
) -> np.ndarray:
    """The points that an optimizer passes on its way down f(x) = a x₁² + b x₂²."""
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64, device=device))
    optimizer = forms.FORMS[form]([x], backend=backend, **hyper)
    path = [x.tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        f = a * x[0] ** 2 + b * x[1] ** 2
        f.backward()
        optimizer.step()
        path.append(x.tolist())
    return np.array(path)


def choose(wanted: list[str] | None, changed: dict[str, float]) -> list[tuple[str, dict[str, float], str | None]]:
    """The book's rows, or those of the wanted optimizers, with these hyperparameters changed where there are such.

    A row that is no longer the book's has no line of the book beside it.
    """
    for form in wanted or []:
        for name in changed:
            if name not in forms.defaults(form):
                raise UsageError(f"{form} has no {name}: it has {', '.join(forms.defaults(form))}")
    printed = {key(form, hyper): line for form, hyper, line in BOOK}
    rows = {}  # by key, so that rows which the changes make the same are one
    for form, hyper, _ in BOOK:
        if wanted is None or form in wanted:
            mine = {**hyper, **{name: changed[name] for name in forms.defaults(form) if name in changed}}
            rows[key(form, mine)] = form, mine, printed.get(key(form, mine))
    return list(rows.values())


def key(form: str, hyper: dict[str, float]) -> tuple[Any, ...]:
    """An optimizer with all its hyperparameters."""
    return form, *{**forms.defaults(form), **hyper}.items()


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Trace every optimizer; see `cli`."""
    report.check_backend(options.backend, torch.float64)
    f = {"a": options.a, "b": options.b, "start": tuple(options.start), "steps": options.steps}
    changed = {name: vars(options)[name] for name in forms.SYMBOLS if vars(options)[name] is not None}
    traces = [
        Trace(form, hyper, book if f == BOOK_F else None, descend(form, hyper, **f, backend=options.backend))
        for form, hyper, book in choose(options.optimizer, changed)
    ]
    figure = options.out / "textbook-trace.png"
    draw(traces, options.a, options.b, figure)
    wrong = [each for each in traces if each.book not in (None, each.printed)]
    document = {
        "f": f,
        "backend": options.backend,
        "traces": [
            {
                "optimizer": each.form,
                "hyperparameters": {**forms.defaults(each.form), **each.hyper},
                "printed": each.printed,
                "book": each.book,
                "path": each.path.tolist(),
            }
            for each in traces
        ],
        "figure": str(figure),
    }
    return document, text(traces, f), 1 if wrong else 0


def text(traces: list[Trace], f: dict[str, Any]) -> str:
    """The printed lines, ours beside the book's."""
    start = ", ".join(f"{each:g}" for each in f["start"])
    rows = [
        [
            forms.title(each.form),
            forms.settings(each.hyper),
            each.printed,
            each.book or NONE,
            NONE if each.book is None else "yes" if each.book == each.printed else "NO",
        ]
        for each in traces
    ]
    head = f"f(x) = {f['a']:g} x₁² + {f['b']:g} x₂² from ({start}), {f['steps']} steps, in float64\n\n"
    return head + report.table(["optimizer", "settings", "here", "in the book", "same"], rows, left=5)


def draw(traces: list[Trace], a: float, b: float, path: Path) -> None:
    """The paths on the contours of f, a panel each; all panels show the same part of the plane."""
    columns = min(4, len(traces) + 1)
    figure, axes = report.panels(len(traces), columns, (3.4, 2.7), legend=True)
    start = traces[0].path[0]
    reach = 1.2 * np.where(start == 0, 1.0, np.abs(start))
    x1, x2 = np.meshgrid(np.linspace(-reach[0], reach[0], 201), np.linspace(-reach[1], reach[1], 201))
    f = a * x1**2 + b * x2**2
    levels = f.max() * np.linspace(0.05, 1, 10) ** 2
    for panel, each in zip(axes, traces, strict=False):
        panel.contour(x1, x2, f, levels, colors="0.75", linewidths=0.8)
        drawn = np.nan_to_num(each.path).clip(-1e3 * reach, 1e3 * reach)  # matplotlib overflows before floats do
        panel.plot(*drawn.T, "o-", color=ORANGE, markersize=4, linewidth=1.4)
        panel.plot(0, 0, "*", color=BLUE, markersize=12)
        panel.plot(*start, "s", color=BLUE, markersize=7)
        panel.set_xlim(-reach[0], reach[0])
        panel.set_ylim(-reach[1], reach[1])
        panel.set_title(f"{forms.title(each.form)}\n{forms.settings(each.hyper)}", fontsize=12)
        if not (np.abs(each.path[-1]) <= reach).all():
            x1_end, x2_end = each.path[-1]
            end = f"ends at\n({x1_end:.3g}, {x2_end:.3g})"
            panel.text(0.97, 0.06, end, transform=panel.transAxes, ha="right", backgroundcolor="white")
    legend(axes[-1])
    figure.supxlabel("x₁", fontsize=13)
    figure.supylabel("x₂", fontsize=13)
    report.save(figure, path)


def legend(panel: Axes) -> None:
    """What the marks of the other panels mean, in the panel that is left over."""
    panel.plot([], [], "s", color=BLUE, markersize=7, label="start")
    panel.plot([], [], "o-", color=ORANGE, markersize=4, label="a step")
    panel.plot([], [], "*", color=BLUE, markersize=12, label="minimum")
    panel.plot([], [], color="0.75", label="f is constant")
    panel.legend(loc="center", fontsize=12, frameon=False)
