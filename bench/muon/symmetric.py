"""Products of `fusedopt.matrices.symmetric` beside torch's by turns, by which it is decided where they are used."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import fusedopt
from fusedopt.matrices import newton_schulz, symmetric
from fusedopt.matrices.batches import DTYPE
from fusedopt.matrices.newton_schulz import NewtonSchulz, Workspace, orthogonalize_

from ..common import circumstances, file_name
from ..steps.machine import Machine, gpu
from ..timing import Call, Spread, Work, interleaved
from .measure import TOLERANCE
from .workloads import product_flops

SIDES = (256, 512, 1024, 2048, 4096)
WIDER = 4  # columns of a matrix for each row, as in an MLP
ELEMENTS = 2**24  # of the squares together: enough matrices to fill a GPU
TORCH, SYMMETRIC = "torch", "symmetric"


@dataclass(frozen=True)
class Pair:
    """The same by torch's products and by symmetric ones. Both return their result."""

    what: str
    matrices: int
    side: int
    flops: int  # of torch's
    calls: dict[str, Call]


@dataclass(frozen=True)
class Trial:
    """The times of a pair, in seconds."""

    what: str
    matrices: int
    side: int
    flops: int
    torch: Spread
    symmetric: Spread

    @property
    def of_torch(self) -> float:
        return self.symmetric.median / self.torch.median


def pairs(side: int, device: torch.device, elements: int = ELEMENTS) -> Iterator[Pair]:
    """What the iterations multiply in matrices whose short side this is, and a whole orthogonalization."""
    count = max(1, elements // side**2)
    torch.manual_seed(0)
    for name, columns, is_tall in (
        ("square", side, False),
        ("wide", WIDER * side, False),
        ("tall", WIDER * side, True),
    ):
        x = torch.randn(count, *((columns, side) if is_tall else (side, columns)), device=device, dtype=DTYPE)
        yield _gram(name, x.mT if is_tall else x)
    yield _polynomial(count, side, device)
    for name, shape in {"wide": (side, WIDER * side), "tall": (WIDER * side, side)}.items():
        yield _whole(name, torch.randn(count, *shape, device=device, dtype=DTYPE))


def _gram(name: str, x: Tensor) -> Pair:
    count, side, columns = x.shape
    outs = [x.new_empty(count, side, side) for _ in range(2)]
    calls: dict[str, Call] = {
        TORCH: lambda: torch.bmm(x, x.mT, out=outs[0]),
        SYMMETRIC: lambda: symmetric.symmetric_product(x, out=outs[1]),
    }
    return Pair(f"XXᵀ, {name}", count, side, 2 * count * side * side * columns, calls)


def _polynomial(count: int, side: int, device: torch.device) -> Pair:
    root = torch.randn(count, side, side, device=device) / side**0.5
    gram = (root @ root.mT).to(DTYPE)
    outs = [torch.empty_like(gram) for _ in range(2)]
    _, b, c = fusedopt.Muon([torch.zeros(1, 1)]).param_groups[0]["ns_coefficients"]
    calls: dict[str, Call] = {
        TORCH: lambda: torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=outs[0]),
        SYMMETRIC: lambda: symmetric.symmetric_product(gram, out=outs[1], c=gram, alpha=c, beta=b),
    }
    return Pair("bA + cA²", count, side, 2 * count * side**3, calls)


def _whole(name: str, x: Tensor) -> Pair:
    shape = x.shape[0], x.shape[1], x.shape[2]
    group = fusedopt.Muon([torch.zeros(1, 1)]).param_groups[0]
    iterations = NewtonSchulz.of((group["ns_coefficients"],), group["ns_steps"], group["eps"])
    other, gram = Workspace.sizes(shape)
    workspace = Workspace(x.new_empty(other), (x.new_empty(gram), x.new_empty(gram)))
    copies = {TORCH: x, SYMMETRIC: x.clone()}

    def call(which: str) -> Call:
        def run() -> Tensor:
            with _chosen(which == SYMMETRIC):
                orthogonalize_(copies[which], iterations, 1.0, workspace)
            return copies[which]

        return run

    flops = shape[0] * product_flops(*shape[1:], group["ns_steps"])
    return Pair(f"all iterations, {name}", shape[0], min(shape[1:]), flops, {each: call(each) for each in copies})


@contextmanager
def _chosen(is_chosen: bool) -> Iterator[None]:
    """Within the context iterations multiply by symmetric products, or do not."""
    before = newton_schulz.is_chosen
    newton_schulz.is_chosen = lambda device: is_chosen
    try:
        yield
    finally:
        newton_schulz.is_chosen = before


def attempt(pair: Pair, machine: Machine) -> Trial:
    """Compare the results, then time both.

    Raises:
        AssertionError: the results are not the same, but for rounding.
    """
    expected, actual = (pair.calls[name]().float() for name in (TORCH, SYMMETRIC))
    off = ((actual - expected).norm() / expected.norm()).item()
    if not off <= TOLERANCE:
        raise AssertionError(f"{pair.what} of side {pair.side} is off by {off:.3g} of its length")
    works = {name: Work(call) for name, call in pair.calls.items()}
    for work in works.values():
        machine.settle(work)
    times = {
        name: Spread.of(samples) for name, samples in interleaved(works, machine.stopwatch, machine.rounds).items()
    }
    return Trial(pair.what, pair.matrices, pair.side, pair.flops, times[TORCH], times[SYMMETRIC])


def table(trials: list[Trial]) -> str:
    lines = ["what                   side  matrices  torch µs (best)        symmetric µs (best)    of torch's  TFLOP/s"]
    for trial in trials:
        by_torch, by_symmetric = (
            f"{1e6 * time.median:,.1f} ({1e6 * time.lowest:,.1f})" for time in (trial.torch, trial.symmetric)
        )
        lines.append(
            f"{trial.what:<21}  {trial.side:>4}  {trial.matrices:>8}  {by_torch:<21}  {by_symmetric:<21}"
            f"  {trial.of_torch:>10.2f}  {trial.flops / trial.symmetric.median / 1e12:>7,.0f}"
        )
    return "\n".join(lines)


def main(options: argparse.Namespace) -> int:
    if options.device.type != "cuda":
        print("python -m bench.muon: error: --symmetric needs a GPU", file=sys.stderr)
        return 2
    machine = gpu(options.device)
    result = circumstances("python -m bench.muon", options.device)
    trials = [attempt(pair, machine) for side in SIDES for pair in pairs(side, options.device)]
    path = options.out / f"symmetric-{file_name(options.device)}.json"
    told = [asdict(trial) | {"of_torch": trial.of_torch} for trial in trials]
    path.write_text(json.dumps(result | {"trials": told}, indent=1) + "\n")
    print(f"{table(trials)}\n\nTFLOP/s: what torch computes, in the time of symmetric products.\nNumbers: {path}")
    return 0
