"""What the four commands share: tables, JSON, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image  # which matplotlib brings
from tabulate import tabulate

from ..engines.choice import why_not

# From Okabe and Ito's palette, which colour-blind readers can tell apart.
ORANGE, BLUE, GREEN, YELLOW, RED = "#E69F00", "#0072B2", "#009E73", "#F0E442", "#D55E00"
NONE = "–"  # in a cell of a table that has no value


class UsageError(Exception):
    """What the user asked for cannot be done, for the reason that the message tells in one line."""


def check_backend(backend: str, dtype: torch.dtype) -> None:
    """Raise where the kernels are asked for and cannot step a parameter of this dtype."""
    why = why_not(backend, torch.empty(1, dtype=dtype))
    if why is not None:
        raise UsageError(f"argument --backend: no kernels for this parameter: {why}")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table of texts, whose first columns are aligned left, the others right."""
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def to_json(document: Any) -> str:
    """Strict JSON, which has no word for infinity and NaN: null stands for both."""
    return json.dumps(_finite(document), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def panels(
    count: int, columns: int, size: tuple[float, float], *, legend: bool = False, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each of this size in inches, and an empty one for a legend if asked for."""
    rows = -(-(count + legend) // columns)
    figure = Figure((columns * size[0], rows * size[1]), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for blank in axes[count:]:
        blank.set_axis_off()
    # A shared axis is labelled at the lowest panel that is drawn, also where the last row ends early.
    for panel in axes[max(0, count - columns) : count]:
        panel.tick_params(labelbottom=True)
    return figure, axes[: count + legend]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours, a third of the size of one of all colours."""
    full = BytesIO()
    figure.savefig(full, format="png", dpi=110)
    Image.open(full).convert("RGB").quantize(64).save(path, format="png", optimize=True)
