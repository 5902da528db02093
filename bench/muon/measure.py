"""One comparison: the same matrices stepped by fusedopt and its peers by turns, and fusedopt's products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt.engines.choice import why_not_compiled, why_not_triton
from fusedopt.matrices.batches import DTYPE

from ..steps.machine import Machine
from ..steps.peers import UnavailableError, bytes_moved
from ..timing import Call, Spread, Work, interleaved
from . import counts
from .workloads import Workload

TORCH = "torch.optim.Muon"
PRODUCTS = "fusedopt, products alone"
PYTORCH_OPTIMIZER = "pytorch_optimizer"
TOLERANCE = 0.05  # of the length of torch's update: products in bf16 that are not summed in one order
AIM, AIMED = 0.6, "96 matrices"  # of torch's time

Params = list[nn.Parameter]
Make = Callable[[], torch.optim.Optimizer]


@dataclass
class Row:
    """What was measured of one contender; None for what was not, or cannot be here. Times are in seconds."""

    workload: str
    threads: int
    contender: str
    time: dict[str, float]  # of the device
    waited: bool | None  # the device for the host, within the step: then `time` is the host's
    host_time: dict[str, float] | None = None  # None where it is the same
    of_torch: float | None = None  # medians
    flops_per_second: float | None = None
    products_share: float | None = None  # of the time
    kernels: dict[str, int] = field(default_factory=dict)  # of fusedopt, launched in a step
    operators: int | None = None  # of torch, called in a step
    launches: int | None = None  # of all kernels, as a GPU has seen them


def backends(device: torch.device) -> list[str]:
    """Those of fusedopt that step here; what "auto" takes comes first."""
    param = torch.empty(0, device=device)
    reasons = {"triton": why_not_triton(param), "compiled": why_not_compiled(param)}
    return [*(name for name, reason in reasons.items() if reason is None), "eager"]


def make_parameters(workload: Workload, device: torch.device) -> Params:
    """Random parameters, which all contenders share, with their gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size, device=device)) for size in workload.sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def as_matrices(params: Params) -> Params:
    """A parameter for each matrix, in the same memory, for optimizers that take no batches."""
    matrices = []
    for param in params:
        if param.dim() == 2:
            matrices.append(param)
            continue
        for matrix, grad in zip(param.detach().flatten(0, -3), param.grad.flatten(0, -3), strict=True):
            matrices.append(nn.Parameter(matrix))
            matrices[-1].grad = grad
    return matrices


def makers(params: Params, device: torch.device) -> dict[str, Make]:
    """Everybody who can be asked to step, torch first, then fusedopt."""
    matrices = as_matrices(params)
    ours = {f"fusedopt, {backend}": partial(fusedopt.Muon, params, backend=backend) for backend in backends(device)}
    return {TORCH: partial(torch.optim.Muon, matrices), **ours, PYTORCH_OPTIMIZER: partial(_other, matrices)}


def _other(matrices: Params) -> torch.optim.Optimizer:
    try:
        found = import_module(PYTORCH_OPTIMIZER).Muon
    except Exception as error:  # a package that does not fit this torch fails in its own way
        raise UnavailableError(str(error)) from None
    return found([{"params": matrices, "use_muon": True}])


def products(optimizer: fusedopt.Muon) -> Call:
    """The products of a step, on the directions that the last one has left."""
    batches = optimizer._stepper.plan._step._batches

    @torch.no_grad()
    def run() -> None:
        batches.run(None)

    return run


def elementwise_bytes(optimizer: fusedopt.Muon, workload: Workload) -> int:
    """Bytes that the passes before and after the products move: directions are written, and read."""
    return bytes_moved(optimizer) + 2 * workload.elements * DTYPE.itemsize


def measure(workload: Workload, machine: Machine, threads: int) -> tuple[list[Row], dict[str, Any]]:
    """A row for each contender and one for the products, and what a step computes and moves.

    Raises:
        AssertionError: the first step of fusedopt is not torch's, so that its time says nothing.
    """
    torch.set_num_threads(threads)
    params = make_parameters(workload, machine.device)
    makes = makers(params, machine.device)
    optimizers = _stepped(makes, params)
    ours = [name for name in optimizers if isinstance(optimizers[name], fusedopt.Muon)]
    first = optimizers[ours[0]]
    iterations = first.param_groups[0]["ns_steps"]
    flops = workload.flops(iterations)

    calls: dict[str, Call] = {name: optimizer.step for name, optimizer in optimizers.items()}
    calls[PRODUCTS] = products(first)
    works = {name: Work(call) for name, call in calls.items()}
    for work in works.values():
        machine.settle(work)
    times = interleaved(works, machine.stopwatch, machine.rounds, seconds=machine.seconds)
    rows = {
        name: Row(workload.name, threads, name, asdict(Spread.of(samples)), machine.waited(calls[name]))
        for name, samples in times.items()
    }
    if machine.is_gpu:  # else it is the same
        for name, samples in interleaved(works, machine.host_stopwatch, machine.rounds).items():
            rows[name].host_time = asdict(Spread.of(samples))
    for name, row in rows.items():
        median = row.time["median"]
        row.flops_per_second = flops / median
        row.operators = counts.operators(calls[name])
        row.launches = None if machine.launches is None else machine.launches(calls[name])
        if name != PRODUCTS:
            row.of_torch = median / rows[TORCH].time["median"]
        if name in ours:
            row.products_share = rows[PRODUCTS].time["median"] / median
            row.kernels = counts.kernels(makes[name])
    told = {
        "name": workload.name,
        "parameters": len(workload.sizes),
        "matrices": len(workload.matrices),
        "shapes": [[*shape] for shape in dict.fromkeys(workload.sizes)],
        "elements": workload.elements,
        "iterations": iterations,
        "flops": flops,
        "bytes_moved": elementwise_bytes(first, workload),
    }
    return list(rows.values()), told


def _stepped(makes: dict[str, Make], params: Params) -> dict[str, torch.optim.Optimizer]:
    """All contenders after a first step from the same parameters, without those that are not there."""
    before = [param.detach().clone() for param in params]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    expected: list[Tensor] = []
    for name, make in makes.items():
        try:
            optimizers[name] = make()
        except UnavailableError:
            continue
        optimizers[name].step()
        if name == TORCH:
            expected = [param.detach().clone() for param in params]
        elif isinstance(optimizers[name], fusedopt.Muon):
            _check(name, params, expected, before)
        with torch.no_grad():
            torch._foreach_copy_(params, before)
    return optimizers


def _check(name: str, params: Params, expected: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Raise unless the parameters are what torch has made of them, but for the rounding of products."""
    off = [(param.detach() - other).norm() for param, other in zip(params, expected, strict=True)]
    steps = [(other - start).norm() for other, start in zip(expected, before, strict=True)]
    worst = (torch.stack(off) / torch.stack(steps)).max().item()
    if not worst <= TOLERANCE:
        raise AssertionError(f"a step of {name} is off by {worst:.3g} of its length: it is not torch's")


def aims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was aimed at, and what was measured of the backend that "auto" takes."""
    found: dict[int, Row] = {}
    for row in rows:
        if row.workload == AIMED and row.products_share is not None:
            found.setdefault(row.threads, row)
    return [
        {"workload": AIMED, "threads": threads, "contender": row.contender, "aim": AIM, "measured": row.of_torch}
        for threads, row in found.items()
    ]
