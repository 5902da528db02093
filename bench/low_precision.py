"""A small network learns with weights in fp32, and in bf16 in every way that fusedopt has: a table, a figure and JSON.

Both also with states in 8 bits, where parameters are large enough: the weights of the two hidden layers are.

All runs of a seed begin with the same weights, which bf16 can hold, and get the same batches. The learning rate is so
small that rounding to nearest loses most updates. In the end all weights are judged alike: widened to fp32, by the loss
of the whole training set in fp32. With master weights, too, it is the bf16 parameters that are judged.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from tabulate import tabulate
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fusedopt

from .common import Parser, default_device, device_name, usable_device, writable_file
from .demo import BATCH_SIZE, Data, backend_of, evaluate, load_data, make_network

OPTIMIZERS: dict[str, dict[str, float]] = {
    "AdamW": {"lr": 2e-4},
    "SGD": {"lr": 0.005, "momentum": 0.9},
    "Lion": {"lr": 2e-5},
}
HIDDEN = 128  # units of a hidden layer
NEAREST = "bf16 nearest"
CLOSE = 5  # percent of fp32's final loss

# Colours of Okabe and Ito's palette, which colour-blind readers can tell apart.
GREY, ORANGE, BLUE, GREEN, PINK, RED, SKY = "0.75", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
WIDTHS = {"fp32": 8, "bf16 + Kahan": 4.5}  # of lines that others lie upon
LINES: dict[Any, Any] = {None: (0, (4, 2)), torch.float32: "solid", "8bit": (0, (1, 1))}  # by the states' dtype


@dataclass(frozen=True)
class Mode:
    """A way to store the weights, and the options of the optimizer that ask for it."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    color: str

    def with_states(self, dtype: torch.dtype | str) -> Mode:
        return Mode(self.name, self.dtype, {**self.options, "state_dtype": dtype}, self.color)

    @property
    def line(self) -> Any:
        """The style of its line, by what its states are stored in."""
        return LINES[self.options.get("state_dtype", None if self.dtype == torch.bfloat16 else torch.float32)]

    @property
    def label(self) -> str:
        """The options as Python."""
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


FP32 = Mode("fp32", torch.float32, {}, GREY)
FP32_8BIT = [
    Mode("fp32, states nearest", torch.float32, {"state_dtype": "8bit"}, RED),
    Mode("fp32, states stochastic", torch.float32, {"state_dtype": "8bit", "rounding": "stochastic"}, SKY),
]
BF16 = [
    Mode(NEAREST, torch.bfloat16, {}, ORANGE),
    Mode("bf16 + Kahan", torch.bfloat16, {"kahan": True}, BLUE),
    Mode("bf16 + stochastic", torch.bfloat16, {"rounding": "stochastic"}, GREEN),
    Mode("bf16 + master weights", torch.bfloat16, {"master_weights": True}, PINK),
]
# States are stored as the parameter is, unless one asks for something else.
MODES = [
    FP32,
    *FP32_8BIT,
    *(row for mode in BF16 for row in (mode, mode.with_states(torch.float32), mode.with_states("8bit"))),
]


@dataclass
class Row:
    """What all runs of a mode leave behind: one curve and one accuracy a seed."""

    mode: str
    options: str
    bytes: float = 0  # that a step moves for each element of the first parameter
    curves: list[list[float]] = field(default_factory=list)  # of the training loss: at the start, after every epoch
    accuracies: list[float] = field(default_factory=list)  # on the test set, at the end

    @property
    def final(self) -> list[float]:
        return [curve[-1] for curve in self.curves]


def bytes_per_element(optimizer: torch.optim.Optimizer) -> float:
    """Bytes that a step moves for an element: parameter and states are read and written, the gradient is read."""
    param = optimizer.param_groups[0]["params"][0]
    states = [state for state in optimizer.state[param].values() if state.shape == param.shape]  # not step counts
    moved = param.grad.nbytes + 2 * sum(tensor.nbytes for tensor in (param, *states))
    return moved / param.numel()


def train(mode: Mode, row: Row, seed: int, data: tuple[Data, Data], options: argparse.Namespace, bar: tqdm) -> str:
    """Train a new network, enter into the row what comes of it, and return the backend."""
    (x, y), test = data
    network = make_network(seed, options.device, HIDDEN).bfloat16().to(mode.dtype)
    make = getattr(fusedopt, options.optimizer)
    optimizer = make(network.parameters(), **OPTIMIZERS[options.optimizer], **mode.options, seed=seed)
    shuffler = torch.Generator().manual_seed(seed)
    images = x.to(mode.dtype)
    curve = [evaluate(deepcopy(network).float(), (x, y))[0]]
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x), generator=shuffler).to(options.device).split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(network(images[rows]), y[rows]).backward()
            optimizer.step()
        curve.append(evaluate(deepcopy(network).float(), (x, y))[0])
        bar.update()
    row.curves.append(curve)
    row.accuracies.append(evaluate(deepcopy(network).float(), test)[1])
    row.bytes = bytes_per_element(optimizer)
    return backend_of(optimizer)


def train_all(options: argparse.Namespace) -> tuple[list[Row], str]:
    """A row for every mode, fp32 first, and the backend of the bf16 ones."""
    rows = [Row(mode.name, mode.label) for mode in MODES]
    with tqdm(total=options.seeds * len(MODES) * options.epochs, unit="epoch") as bar:
        for seed in range(options.seeds):
            data = load_data(seed, options.device)
            for mode, row in zip(MODES, rows, strict=True):
                bar.set_description(f"seed {seed}, {mode.name:23}")
                backend = train(mode, row, seed, data, options, bar)
    return rows, backend


def differences(row: Row, fp32: Row, epoch: int = -1) -> list[float]:
    """By how many percent the loss is above fp32's, seed by seed."""
    return [100 * (a[epoch] / b[epoch] - 1) for a, b in zip(row.curves, fp32.curves, strict=True)]


def table(rows: list[Row], style: str = "simple") -> str:
    headers = ["weights", "options", "bytes", "loss", "lowest–highest", "above fp32", "largest", "accuracy"]
    cells = []
    for row in rows:
        above = differences(row, rows[0])
        cells.append([row.mode, row.options, f"{row.bytes:.4g}", f"{statistics.median(row.final):.4f}"])
        cells[-1] += [f"{min(row.final):.4f}–{max(row.final):.4f}"]
        cells[-1] += (
            [f"{statistics.median(above):+.2f} %", f"{max(above, key=abs):+.2f} %"] if row is not rows[0] else ["", ""]
        )
        cells[-1] += [f"{statistics.median(row.accuracies):.1%}"]
    return tabulate(cells, headers, style, disable_numparse=True, colalign=("left", "left", *["right"] * 6))


def note(rows: list[Row]) -> str:
    """How to read the table."""
    far = [
        f"{row.mode} ({row.options or 'states in bf16'})"
        for row in rows
        if not all(abs(above) <= CLOSE for above in differences(row, rows[0]))  # NaN is far too
    ]
    return (
        "Bytes that a step moves for an element; loss on the training set: median, lowest and highest "
        f"(seeds: {len(rows[0].curves)});\n"
        "above fp32: median and largest of the seeds' differences; accuracy on the test set: median.\n"
        f"More than {CLOSE} % from fp32 with one seed or more: {'; '.join(far) or 'none'}."
    )


def draw(rows: list[Row], path: Path) -> None:
    """The loss of every mode, and how far above fp32's it is where it follows; medians of the seeds."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for mode, row in zip(MODES, rows, strict=True):
        line = {"color": mode.color, "linewidth": WIDTHS.get(mode.name, 2), "linestyle": mode.line}
        panels[0].plot([statistics.median(losses) for losses in zip(*row.curves, strict=True)], **line)
        if mode.name != NEAREST:  # it would leave no room for the others
            above = [statistics.median(differences(row, rows[0], epoch)) for epoch in range(len(row.curves[0]))]
            panels[1].plot(above, **line)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter("")
    panels[0].set_title("training loss (cross-entropy)", fontsize=12, loc="left")
    panels[1].set_title(f"above fp32's (%), without {NEAREST}", fontsize=12, loc="left")
    for panel in panels:
        panel.set_xlabel("epoch", fontsize=12)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        panel.tick_params(labelsize=11)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=mode.color, linewidth=3, label=mode.name) for mode in (FP32, *FP32_8BIT, *BF16)]
    handles += [
        Line2D([], [], color="0.4", linewidth=2, linestyle=style, label=f"states in {name}")
        for name, style in zip(("bf16", "fp32", "8 bits"), LINES.values(), strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=11, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def record(rows: list[Row], backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """The result with what it takes to make it again."""
    return {
        "command": shlex.join(["python", "-m", "bench.low_precision", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "device": device_name(options.device),
        "backend": backend,
        "optimizer": options.optimizer,
        "hyperparameters": OPTIMIZERS[options.optimizer],
        "hidden": HIDDEN,
        "batch_size": BATCH_SIZE,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "rows": [asdict(row) for row in rows],
    }


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.low_precision", description=__doc__)
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="AdamW", help="of fusedopt (default: %(default)s)")
    add("--epochs", type=int, default=40, metavar="N", help="passes over the training set (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="how often to train each (default: %(default)s)")
    out_help = "the figure; the numbers go beside it, into a .json (default: %(default)s)"
    add("--out", type=writable_file, default="low-precision.png", metavar="PNG", help=out_help)
    add("--device", type=usable_device, default=default_device(), help="where to train (default here: %(default)s)")
    options = parser.parse_args()
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    if options.out.suffix != ".png":
        parser.error("argument --out: must end in .png")
    return options


def main() -> int:
    options = parse_arguments()
    # Layers this small gain nothing from more threads, which lose much where other programs keep the cores busy.
    torch.set_num_threads(1)
    hyper = ", ".join(f"{key}={value:g}" for key, value in OPTIMIZERS[options.optimizer].items())
    print(f"{options.optimizer}({hyper}) on {device_name(options.device)}, torch {torch.__version__}", flush=True)
    rows, backend = train_all(options)
    print(f"\n{table(rows)}\n\n{note(rows)}")
    draw(rows, options.out)
    numbers = options.out.with_suffix(".json")
    numbers.write_text(json.dumps(record(rows, backend, options), indent=1) + "\n")
    print(f"Loss curves: {options.out}, numbers: {numbers}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
