"""The chapter's data: airfoil self-noise, or a synthetic set of the same shape."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .report import UsageError

ROWS, COLUMNS = 1503, 6  # five features and the label
USED = 1500  # the book trains on the first ones
BATCH_SIZE = 10

# Of the numbers of the file that the book downloads, so that its losses stand beside no others.
AIRFOIL = "11fab2c660f61031935f9995d27929df39a175d3551271b397c8aa254b19b6b6"


@dataclass
class Data:
    """What the regression is made on."""

    source: str
    is_the_books: bool
    features: Tensor
    labels: Tensor


def load(path: Path | None) -> Data:
    """Read a file of six columns of numbers, or make a synthetic set where there is none.

    As the book does: every column minus its mean, over its standard deviation (of the population, all rows counted);
    then the first 1500 rows, or as many whole batches as there are.
    """
    table = synthetic() if path is None else read(path)
    deviation = table.std(axis=0)
    if not deviation.all():
        raise UsageError(f"{path}: column {int(deviation.argmin()) + 1} is constant, which leaves nothing to scale by")
    scaled = (table - table.mean(axis=0)) / deviation
    used = torch.tensor(scaled[: min(USED, len(table) // BATCH_SIZE * BATCH_SIZE)], dtype=torch.float32)
    is_the_books = hashlib.sha256(table.tobytes()).hexdigest() == AIRFOIL
    source = str(path) if path else "SYNTHETIC numbers in the airfoil data's shape (give --data or FUSEDOPT_AIRFOIL)"
    return Data(source, is_the_books, used[:, :-1], used[:, -1])


def read(path: Path) -> np.ndarray:
    """The table in a file; a `UsageError` that says what is wrong with it."""
    try:
        with warnings.catch_warnings(), path.open(encoding="utf-8") as file:
            warnings.simplefilter("ignore")  # NumPy's, about a file without numbers
            table = np.loadtxt(file, ndmin=2)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition(";")[0]
        raise UsageError(f"cannot read {path}: {' '.join(reason.split())}") from None
    if table.size == 0:
        raise UsageError(f"{path} is empty")
    if table.shape[1] != COLUMNS:
        raise UsageError(f"{path} has {table.shape[1]} columns, not {COLUMNS} (five features and the label)")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0] + 1
        raise UsageError(f"{path}: {table[row - 1, column - 1]} in row {row}, column {column}")
    if len(table) < BATCH_SIZE:
        raise UsageError(f"{path} has {len(table)} rows, fewer than the {BATCH_SIZE} of one batch")
    return table


def synthetic() -> np.ndarray:
    """Labels that are linear in normal features, up to noise which leaves half of their variance unexplained."""
    random = np.random.default_rng(0)
    features = random.standard_normal((ROWS, COLUMNS - 1))
    explained = features @ np.linspace(-1, 1, COLUMNS - 1)
    return np.column_stack([features, explained + explained.std() * random.standard_normal(ROWS)])


def least_squares(data: Data) -> float:
    """The smallest loss (ŷ − y)²/2 that any w and b reach."""
    features = np.column_stack([data.features.double().numpy(), np.ones(len(data.labels))])
    labels = data.labels.double().numpy()
    solution, *_ = np.linalg.lstsq(features, labels)
    return float(np.mean((features @ solution - labels) ** 2) / 2)
