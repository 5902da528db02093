"""Six optimizers train a small network, once from fusedopt and once from torch.optim: a table and a figure.

Both sides get the same weights and the same batches, so all that may differ is the rounding of a step and its time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import fusedopt

from .common import Parser, default_device, device_name, triton_version, usable_device, writable_file

Data: TypeAlias = tuple[Tensor, Tensor]  # images, labels
Pairs: TypeAlias = "dict[str, tuple[Run, Run]]"  # for every optimizer fusedopt's run and torch's

OPTIMIZERS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "Adagrad": {"lr": 0.01},
    "RMSprop": {"lr": 0.001},
    "Adadelta": {"lr": 1.0},
    "Adam": {"lr": 0.001},
    "AdamW": {"lr": 0.001},
}
BATCH_SIZE = 64
N_TEST = 360  # of 1797
HIDDEN = 256

# The two sides may round differently (the kernels fuse multiplications and additions), and training amplifies that.
# Simulated by a random error of up to one unit in the last place in every weight after every step: after 20 epochs the
# weights differ by up to 3e-6. The bound leaves a factor of 30; AdamW without its decay, a small mistake, would show
# as 9e-4. Two conditions: the network is smooth (with ReLU, where a rounding error can switch a unit on, the same
# simulation gives up to 0.1), and no more than 20 epochs (RMSprop later divides by gradients that have all but
# vanished: 0.001 after 50 epochs, 0.3 after 200).
BOUND = 1e-4
COMPARED_EPOCHS = 20

# Two colours of Okabe and Ito's palette, which colour-blind readers can tell apart.
ORANGE, BLUE = "#E69F00", "#0072B2"


@dataclass
class Run:
    """What one training leaves behind."""

    backend: str
    losses: list[float]  # on the whole training set: at the start and after every epoch
    step_times: list[float]  # seconds
    accuracy: float  # on the test set, at the end
    weights: Tensor  # after COMPARED_EPOCHS or the last epoch


def load_data(seed: int, device: torch.device) -> tuple[Data, Data]:
    """Handwritten digits of 64 grey values from 0 to 1, to train with and to test with."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32, device=device) / 16
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(device)
    test, train = order[:N_TEST], order[N_TEST:]
    return (x[train], y[train]), (x[test], y[test])


def make_network(seed: int, device: torch.device, hidden: int = HIDDEN) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers).to(device)


def backend_of(optimizer: torch.optim.Optimizer) -> str:
    """What steps the parameters: triton, compiled, eager, or nothing to tell for torch's optimizers."""
    return repr(optimizer).partition("backend: ")[2].partition(" (")[0]


def timed_step(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Seconds from an idle device before the step to an idle device after it."""
    wait = torch.cpu.synchronize if device.type == "cpu" else torch.accelerator.synchronize
    wait(device)
    start = time.perf_counter()
    optimizer.step()
    wait(device)
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(network: nn.Module, data: Data) -> tuple[float, float]:
    """Loss and accuracy."""
    x, y = data
    scores = network(x)
    return cross_entropy(scores, y).item(), (scores.argmax(dim=1) == y).double().mean().item()


def train(library: ModuleType, name: str, data: tuple[Data, Data], options: argparse.Namespace, bar: tqdm) -> Run:
    """Train a new network with the optimizer of this name."""
    (x, y), test = data
    network = make_network(options.seed, options.device)
    optimizer = getattr(library, name)(network.parameters(), **OPTIMIZERS[name])
    if isinstance(optimizer, fusedopt.FusedOptimizer):
        fusedopt.warmup(optimizer)  # a step is timed, compiling it is not
    shuffler = torch.Generator().manual_seed(options.seed)
    losses, step_times = [evaluate(network, (x, y))[0]], []
    for epoch in range(1, options.epochs + 1):
        for rows in torch.randperm(len(x), generator=shuffler).to(options.device).split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(network(x[rows]), y[rows]).backward()
            step_times.append(timed_step(optimizer, options.device))
        losses.append(evaluate(network, (x, y))[0])
        if epoch <= COMPARED_EPOCHS:
            weights = parameters_to_vector(network.parameters()).detach().clone()
        bar.update()
    return Run(backend_of(optimizer), losses, step_times, evaluate(network, test)[1], weights)


def train_all(options: argparse.Namespace) -> Pairs:
    """Every optimizer, from both libraries."""
    pairs = {}
    data = load_data(options.seed, options.device)
    with tqdm(total=2 * options.epochs * len(OPTIMIZERS), unit="epoch") as bar:
        for name in OPTIMIZERS:
            bar.set_description(f"{name:8}")
            ours = train(fusedopt, name, data, options, bar)
            pairs[name] = ours, train(torch.optim, name, data, options, bar)
    return pairs


def difference(pair: tuple[Run, Run]) -> float:
    """The largest difference between two weights that should be the same; NaN if one of them is."""
    return (pair[0].weights - pair[1].weights).abs().max().item()


def table(pairs: Pairs) -> str:
    headers = ["optimizer", "backend", "loss\nfusedopt", "loss\ntorch", "accuracy\nfusedopt", "accuracy\ntorch"]
    headers += ["weights\ndiffer by", "step (ms)\nfusedopt", "step (ms)\ntorch"]
    rows = [
        [name, pair[0].backend]
        + [f"{run.losses[-1]:.5f}" for run in pair]
        + [f"{run.accuracy:.1%}" for run in pair]
        + [f"{difference(pair):.1e}" if difference(pair) else "0"]
        + [f"{1000 * statistics.median(run.step_times):.3f}" for run in pair]
        for name, pair in pairs.items()
    ]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 7))


def draw(pairs: Pairs, path: Path) -> None:
    """The loss curves as a PNG, one panel for each optimizer."""
    figure = Figure(figsize=(10, 6), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    ticks = (1, 3) if min(min(ours.losses) for ours, _ in pairs.values()) > 0.003 else (1,)
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for panel, (name, (ours, theirs)) in zip(panels.flat, pairs.items(), strict=True):
        panel.plot(ours.losses, color=ORANGE, linewidth=5, label=f"fusedopt ({ours.backend})")
        panel.plot(theirs.losses, color=BLUE, linewidth=1.8, linestyle=(0, (5, 3)), label="torch.optim")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=ticks))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        panel.tick_params(labelsize=11)
        panel.set_title(name, fontsize=13, fontweight="bold", loc="left")
        panel.set_title(", ".join(f"{k} = {v:g}" for k, v in OPTIMIZERS[name].items()), fontsize=11, loc="right")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("epoch", fontsize=12)
    figure.supylabel("training loss (cross-entropy)", fontsize=12)
    lines = panels[0, 0].get_lines()
    figure.legend(handles=lines, loc="outside upper center", ncols=2, fontsize=13, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def note(pairs: Pairs, epochs: int) -> str:
    """How to read the table."""
    text = f"Loss on the training set and accuracy on the test set after epoch {epochs}; weights compared after epoch "
    text += f"{min(epochs, COMPARED_EPOCHS)}; median time of optimizer.step().\n"
    if any(ours.backend == "eager" for ours, _ in pairs.values()):
        return text + "fusedopt ran its eager reference here, not its kernels: the times say nothing about the kernels."
    return text + "With so small a network the times are mostly those of starting a step, not of the pass over memory."


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.demo", description=__doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=20, metavar="N", help="passes over the training set (default: %(default)s)")
    add("--out", type=writable_file, default="demo.png", metavar="PNG", help="the figure (default: %(default)s)")
    add("--device", type=usable_device, default=default_device(), help="where to train (default here: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, split and batches (default: %(default)s)")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("argument --epochs: must be at least 1")
    if not 0 <= options.seed < 2**63:
        parser.error("argument --seed: must be at least 0 and less than 2**63")
    return options


def main() -> int:
    """Train, print and draw; 1 if fusedopt's weights are not torch's."""
    options = parse_arguments()
    # Layers this small gain nothing from more threads, which lose much where other programs keep the cores busy.
    torch.set_num_threads(1)
    print(f"Device: {device_name(options.device)}, torch {torch.__version__}, Triton {triton_version()}", flush=True)
    pairs = train_all(options)
    print(f"\n{table(pairs)}\n\n{note(pairs, options.epochs)}")
    draw(pairs, options.out)
    print(f"Loss curves: {options.out}", flush=True)
    drifted = [name for name, pair in pairs.items() if not difference(pair) <= BOUND]  # NaN is drift too
    if drifted:
        print(f"{', '.join(drifted)}: the weights differ from torch's by more than {BOUND:g}", file=sys.stderr)
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
