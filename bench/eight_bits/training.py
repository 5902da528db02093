"""Training with each contender: AdamW of fusedopt, and of other libraries that may be missing or fail."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..demo import backend_of
from ..low_precision import BLUE, GREEN, GREY, ORANGE, PINK
from ..steps.peers import version
from ..transformer import Transformer, as_tensor, batches, loss_of
from .sizes import stored_bytes

WIDTH, HEADS, LAYERS, BATCH_SIZE = 128, 4, 4, 4
HYPER = {"lr": 2e-3, "weight_decay": 0.1}
BETAS = [(0.9, 0.95), (0.9, 0.999)]  # of training transformers, and torch's
MAX_GRAD_NORM = 0.5
DASHED = (0, (4, 2))


@dataclass(frozen=True)
class Contender:
    """AdamW of some library, the options that say how it stores its states, and its line in the figure."""

    name: str
    module: str
    cls: str = "AdamW"
    options: dict[str, Any] = field(default_factory=dict)
    color: str = GREY
    style: Any = "solid"

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    def make(self, params: Iterable[Tensor], seed: int, **hyper: Any) -> torch.optim.Optimizer:
        seeded = {"seed": seed} if self.library == "fusedopt" else {}
        return getattr(import_module(self.module), self.cls)(params, **hyper, **self.options, **seeded)


STOCHASTIC = {"rounding": "stochastic"}
FP32 = Contender("fp32", "fusedopt")
CONTENDERS = [
    FP32,
    Contender("torch.optim, fp32", "torch.optim"),
    Contender("bf16, nearest", "fusedopt", options={"state_dtype": torch.bfloat16}, color=ORANGE, style=DASHED),
    Contender("bf16, stochastic", "fusedopt", options={"state_dtype": torch.bfloat16, **STOCHASTIC}, color=ORANGE),
    Contender("8 bits, nearest", "fusedopt", options={"state_dtype": "8bit"}, color=BLUE, style=DASHED),
    Contender("8 bits, stochastic", "fusedopt", options={"state_dtype": "8bit", **STOCHASTIC}, color=BLUE),
    Contender("torchao", "torchao.optim", "AdamW8bit", color=GREEN),
    Contender("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", color=PINK),
]


@dataclass
class Run:
    """What one training leaves behind."""

    contender: str
    betas: tuple[float, float]
    seed: int
    backend: str = ""
    losses: list[float] = field(default_factory=list)  # of every step, in nats a byte
    parameters: int = 0
    state_bytes: int = 0
    why_not: str | None = None  # why another library has no numbers

    @property
    def final(self) -> float:
        """The mean of the last tenth of the steps."""
        return self.mean_loss(min(len(self.losses) * 9 // 10, len(self.losses) - 1), len(self.losses))

    def mean_loss(self, start: int, stop: int) -> float:
        return statistics.fmean(self.losses[start:stop])


def train(contender: Contender, betas: tuple[float, float], seed: int, text: bytes, options: argparse.Namespace) -> Run:
    """Train a new model. Whatever happens to another library's optimizer is its result."""
    # One thread each: several keep each other waiting, above all where a library brings another OpenMP.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Transformer(WIDTH, HEADS, LAYERS).to(options.device)
    run = Run(contender.name, betas, seed, parameters=sum(param.numel() for param in model.parameters()))
    try:
        optimizer = contender.make(model.parameters(), seed, betas=betas, **HYPER)
        for batch in batches(as_tensor(text).to(options.device), options.steps, seed, BATCH_SIZE):
            loss = loss_of(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
    except Exception as error:
        if contender.library in ("fusedopt", "torch"):
            raise
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        installed = version(contender.library) != "not installed"
        run.losses, run.why_not = [], f"does not run here: {reason}" if installed else "not installed"
        return run
    run.backend, run.state_bytes = backend_of(optimizer), stored_bytes(optimizer)
    return run


def train_all(text: bytes, options: argparse.Namespace) -> list[Run]:
    jobs = [
        (contender, betas, seed, text, options)
        for betas in BETAS
        for contender in CONTENDERS
        for seed in range(options.seeds)
    ]
    shown = {"total": len(jobs), "unit": "run"}
    if options.jobs == 1:
        return [train(*job) for job in tqdm(jobs, **shown)]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        return list(tqdm(pool.map(train, *zip(*jobs, strict=True)), **shown))
