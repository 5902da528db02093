"""The chapter's linear regression: batches of 10, 2 epochs, loss (ŷ − y)²/2, many seeds, and torch.optim beside it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import fusedopt

from . import data, forms, report
from .report import BLUE, NONE, ORANGE, RED

EPOCHS = 2
LOOKS = 15  # at the loss of all rows, in each epoch
SCRATCH, CLASS = "from scratch", "PyTorch's class"

# How far weights may lie apart that should be the same: roundings make 1.2e-7 over 20 seeds. Where ε stands shows as
# little; that is for the traces to tell.
BOUND = 2e-6


class Stepper(Protocol):
    """What a training needs of an optimizer."""

    def step(self) -> Any:
        """Update the parameters from their gradients."""


class Written:
    """AdaGrad and RMSProp written out from the book: torch.optim has no form with ε under the root."""

    def __init__(self, params: Iterable[Tensor], lr: float, keep: float, add: float, eps: float = 1e-6) -> None:
        self.lr, self.keep, self.add, self.eps = lr, keep, add, eps
        self.states = [(x, torch.zeros_like(x)) for x in params]

    @torch.no_grad()
    def step(self) -> None:
        for x, s in self.states:
            assert x.grad is not None
            s[:] = self.keep * s + self.add * x.grad**2
            x -= self.lr * x.grad / torch.sqrt(s + self.eps)


@dataclass
class Experiment:
    """A training of the book, and how it went here over the seeds."""

    optimizer: str
    hyper: dict[str, float]
    form: str  # SCRATCH or CLASS
    book: float  # the loss that it prints
    ours: Callable[..., Stepper]
    theirs: Callable[..., Stepper]
    losses: list[np.ndarray] = field(default_factory=list)  # one curve a seed
    their_losses: list[np.ndarray] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)  # of the weights at the end, one a seed
    seconds: list[float] = field(default_factory=list)  # per epoch
    their_seconds: list[float] = field(default_factory=list)

    @property
    def final(self) -> np.ndarray:
        """Our loss at the end, for every seed."""
        return np.array([losses[-1] for losses in self.losses])

    @property
    def written_out(self) -> bool:
        """Whether the other side is the book's update itself, since torch.optim lacks this form."""
        return getattr(self.theirs, "func", None) is Written

    @property
    def beside(self) -> str:
        """What the other side is."""
        return "written out" if self.written_out else "torch.optim"

    @property
    def difference(self) -> float:
        """The largest difference between two weights that should be the same; NaN if one of them is."""
        return float(np.max(self.differences))


def scratch(name: str, hyper: dict[str, float], book: float, theirs: Callable[..., Stepper]) -> Experiment:
    """A form of the book's own code."""
    ours = partial(forms.FORMS[name], **hyper)
    return Experiment(forms.title(name), hyper, SCRATCH, book, ours, theirs)


def concise(name: str, hyper: dict[str, float], book: float) -> Experiment:
    """A form of the class that the book takes from PyTorch."""
    ours, theirs = (partial(getattr(library, name), **hyper) for library in (fusedopt, torch.optim))
    return Experiment(name, hyper, CLASS, book, ours, theirs)


def experiments() -> list[Experiment]:
    """The chapter's trainings with the losses that it prints."""
    optim = torch.optim  # its momentum is the book's as long as η stays the same
    return [
        *(
            scratch("momentum", hyper, book, partial(optim.SGD, lr=hyper["lr"], momentum=hyper["momentum"]))
            for hyper, book in [
                ({"lr": 0.02, "momentum": 0.5}, 0.243582),
                ({"lr": 0.02, "momentum": 0.9}, 0.259612),
                ({"lr": 0.004, "momentum": 0.9}, 0.245829),
            ]
        ),
        scratch("adagrad", {"lr": 0.1}, 0.242153, partial(Written, lr=0.1, keep=1, add=1)),
        concise("Adagrad", {"lr": 0.1}, 0.243112),
        scratch("rmsprop", {"lr": 0.01, "alpha": 0.9}, 0.245276, partial(Written, lr=0.01, keep=0.9, add=0.1)),
        concise("RMSprop", {"lr": 0.01, "alpha": 0.9}, 0.241931),
        scratch("adadelta", {"rho": 0.9}, 0.243681, partial(optim.Adadelta, lr=1.0, rho=0.9, eps=1e-5)),
        concise("Adadelta", {"rho": 0.9}, 0.263684),
        scratch("adam", {"lr": 0.01}, 0.244049, partial(optim.Adam, lr=0.01, eps=1e-6)),
        concise("Adam", {"lr": 0.01}, 0.244502),
    ]


def regression(features: int, seed: int, form: str) -> nn.Linear:
    """ŷ = xw + b at its start: w ~ N(0, 0.01²) and b = 0 from scratch, what nn.Linear draws in the class's form."""
    torch.manual_seed(seed)
    network = nn.Linear(features, 1)
    if form == SCRATCH:
        nn.init.normal_(network.weight, std=0.01)
        nn.init.zeros_(network.bias)
    return network


def train(make: Callable[..., Stepper], network: nn.Linear, on: data.Data, seed: int) -> tuple[np.ndarray, float]:
    """One training, in batches that the seed draws: the loss of all rows as it goes, and seconds per epoch."""
    random = torch.Generator().manual_seed(seed)
    optimizer = make(network.parameters())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ((network(x)[:, 0] - y) ** 2 / 2).mean()

    def evaluate() -> float:
        with torch.no_grad():
            return loss(on.features, on.labels).item()

    losses, seconds = [evaluate()], 0.0
    for _ in range(EPOCHS):
        batches = torch.randperm(len(on.labels), generator=random).split(data.BATCH_SIZE)
        for batch, rows in enumerate(batches, 1):
            start = time.perf_counter()
            network.zero_grad()
            loss(on.features[rows], on.labels[rows]).backward()
            optimizer.step()
            seconds += time.perf_counter() - start
            if batch * LOOKS // len(batches) > (batch - 1) * LOOKS // len(batches):
                losses.append(evaluate())
    return np.array(losses), seconds / EPOCHS


def compare(experiment: Experiment, on: data.Data, seed: int, backend: str) -> None:
    """Train with our optimizer and with the other one, from the same weights and on the same batches."""
    ours, theirs = (regression(on.features.shape[1], seed, experiment.form) for _ in range(2))
    losses, seconds = train(partial(experiment.ours, backend=backend), ours, on, seed)
    their_losses, their_seconds = train(experiment.theirs, theirs, on, seed)
    difference = parameters_to_vector(ours.parameters()) - parameters_to_vector(theirs.parameters())
    experiment.losses.append(losses)
    experiment.their_losses.append(their_losses)
    experiment.differences.append(difference.abs().max().item())
    experiment.seconds.append(seconds)
    experiment.their_seconds.append(their_seconds)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Run every training for every seed; see `cli`."""
    report.check_backend(options.backend, torch.float32)
    on = data.load(options.data)
    if options.data is None:
        print(f"train: {on.source}", file=sys.stderr)
    torch.set_num_threads(1)  # a batch of 10 gains nothing from more
    done = experiments()
    with tqdm(total=len(done) * options.seeds, unit="seed") as bar:
        for experiment in done:
            bar.set_description(f"{experiment.optimizer}, {experiment.form}")
            for seed in range(options.seeds):
                compare(experiment, on, seed, options.backend)
                bar.update()
    figure = options.out / "textbook-train.png"
    draw(done, on, figure)
    drifted = [f"{each.optimizer} ({each.form})" for each in done if not each.difference <= BOUND]  # NaN is drift too
    if drifted:
        print(f"{', '.join(drifted)}: the weights differ by more than {BOUND:g}", file=sys.stderr)
    document = {
        "data": on.source,
        "rows": len(on.labels),
        "seeds": options.seeds,
        "backend": options.backend,
        "least_squares": data.least_squares(on),
        "trainings": [
            {
                "optimizer": each.optimizer,
                "form": each.form,
                "hyperparameters": each.hyper,
                "book": each.book if on.is_the_books else None,
                "losses": each.final.tolist(),
                "beside": each.beside,
                "losses_beside": [float(losses[-1]) for losses in each.their_losses],
                "largest_difference": each.difference,
                "seconds_per_epoch": float(np.median(each.seconds)),
                "seconds_per_epoch_beside": float(np.median(each.their_seconds)),
            }
            for each in done
        ],
        "figure": str(figure),
    }
    return document, text(done, on), 1 if drifted else 0


def text(done: list[Experiment], on: data.Data) -> str:
    """The book's losses and ours."""
    headers = ["optimizer", "settings", "form", "book", "median", "range", "median,\ntorch", "weights\ndiffer by"]
    headers += ["ms/epoch", "ms/epoch,\ntorch"]
    rows = [
        [
            each.optimizer,
            forms.settings(each.hyper),
            each.form,
            f"{each.book:.6f}" if on.is_the_books else NONE,
            f"{np.median(each.final):.6f}",
            f"{each.final.min():.4f}–{each.final.max():.4f}",
            f"{np.median([losses[-1] for losses in each.their_losses]):.6f}" + ("*" if each.written_out else " "),
            f"{each.difference:.1e}" if each.difference else "0",
            f"{1000 * np.median(each.seconds):.1f}",
            f"{1000 * np.median(each.their_seconds):.1f}",
        ]
        for each in done
    ]
    seeds = len(done[0].losses)
    return "\n".join(
        [
            f"Linear regression on {on.source}: {len(on.labels)} rows, batches of {data.BATCH_SIZE}, {EPOCHS} epochs.",
            f"Loss of all rows at the end, over {seeds} seed{'s' if seeds > 1 else ''}; the book's is of one, unknown.",
            f"Least squares gives {data.least_squares(on):.6f}, w = 0 gives {(on.labels**2).mean() / 2:.6f}.",
            "",
            report.table(headers, rows, left=3),
            "",
            "* torch.optim has no ε under the root: the book's update, written out, stands in its place.",
        ]
    )


def draw(done: list[Experiment], on: data.Data, path: Path) -> None:
    """The losses as they fall, a panel for each training."""
    figure, axes = report.panels(len(done), 4, (3.4, 2.6), legend=True)
    best = data.least_squares(on)
    for panel, each in zip(axes, done, strict=False):
        curves = np.array(each.losses)
        epochs = np.linspace(0, EPOCHS, curves.shape[1])
        panel.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=BLUE, alpha=0.25, linewidth=0)
        panel.plot(epochs, np.median(curves, axis=0), color=BLUE, linewidth=2)
        panel.plot(epochs, np.median(each.their_losses, axis=0), color=ORANGE, linewidth=1.6, linestyle=(0, (2, 2)))
        panel.axhline(best, color="0.4", linewidth=1, linestyle=":")
        if on.is_the_books:
            panel.plot(EPOCHS, each.book, "D", color=RED, markersize=7, clip_on=False, zorder=3)
        panel.set_title(f"{each.optimizer}, {each.form}\n{forms.settings(each.hyper)}", fontsize=12)
        panel.set_ylim(best - 0.01, best + 0.16)
        panel.set_xlim(0, EPOCHS)
    legend = axes[-1]
    legend.fill_between([], [], [], color=BLUE, alpha=0.25, label="fusedopt, all seeds")
    legend.plot([], [], color=BLUE, linewidth=2, label="fusedopt, median")
    legend.plot([], [], color=ORANGE, linewidth=1.6, linestyle=(0, (2, 2)), label="torch.optim, median")
    legend.plot([], [], color="0.4", linewidth=1, linestyle=":", label="least squares")
    if on.is_the_books:
        legend.plot([], [], "D", color=RED, markersize=7, label="printed in the book")
    legend.legend(loc="center", fontsize=12, frameon=False)
    figure.supxlabel("epoch", fontsize=13)
    figure.supylabel("loss of all rows", fontsize=13)
    report.save(figure, path)
