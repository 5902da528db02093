"""Whom fusedopt is compared with: torch.optim's ways to step, and other libraries. Any may be missing or fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from tests.cases import Case

from ..timing import Call, Work

OURS = "fusedopt"
REFERENCE = "fusedopt, reference"
STOCHASTIC = "fusedopt, stochastic"
FOREACH, FUSED, COMPILED = "torch foreach", "torch fused", "torch compiled"
OPTIMI, FLASHOPTIM = "torch-optimi", "flashoptim"

Groups = list[dict[str, Any]]


class UnavailableError(Exception):
    """Why a peer has no number."""


@dataclass(frozen=True)
class Contender:
    """An optimizer and how it is stepped."""

    optimizer: torch.optim.Optimizer
    step: Call
    prepare: Call = lambda: None
    is_one_pass: bool = True  # or does more than `bytes_moved` tells

    @property
    def work(self) -> Work:
        return Work(self.step, self.prepare)


def ours(case: Case, groups: Groups, backend: str, **options: Any) -> Contender:
    optimizer = case.make(groups, backend=backend, **options)
    return Contender(optimizer, optimizer.step)


def torch_optim(case: Case, groups: Groups, **options: Any) -> Contender:
    """torch.optim with `foreach` or `fused`."""
    optimizer = torch_class(case, *options)(groups, **case.options, **options)
    return Contender(optimizer, optimizer.step)


def compiled(case: Case, groups: Groups) -> Contender:
    """torch.optim's step through torch.compile."""
    torch.compiler.reset()  # else it gives up compiling after some optimizers
    options: dict[str, Any] = {"foreach": True}
    capturable = "capturable" in inspect.signature(torch_class(case)).parameters
    if capturable and groups[0]["params"][0].device.type != "cpu":
        options["capturable"] = True  # keeps the step counts on the device, which the compiler asks for
    optimizer = torch_class(case)(groups, **case.options, **options)
    return Contender(optimizer, torch.compile(lambda: optimizer.step()))


def optimi(case: Case, groups: Groups) -> Contender:
    """torch-optimi, which adds Kahan's compensation to 16-bit parameters unless told not to."""
    optimizer = library_class("optimi", case.optimizer, case)(groups, **case.options, kahan_sum=False)
    return Contender(optimizer, optimizer.step)


def flashoptim(case: Case, groups: Groups) -> Contender:
    """FlashOptim as it comes: with states of 8 bits."""
    optimizer = library_class("flashoptim", f"Flash{case.optimizer}", case)(groups, **case.options)
    return Contender(optimizer, optimizer.step)


PEERS: dict[str, Callable[[Case, Groups], Contender]] = {
    FOREACH: partial(torch_optim, foreach=True),
    FUSED: partial(torch_optim, fused=True),
    COMPILED: compiled,
    OPTIMI: optimi,
    FLASHOPTIM: flashoptim,
}


def torch_class(case: Case, *options: str) -> type[torch.optim.Optimizer]:
    """The class of torch.optim that has the case and these options besides."""
    if not case.in_torch:
        raise UnavailableError(f"torch.optim has no {case.id}")
    found = getattr(torch.optim, case.optimizer)
    missing = [name for name in options if name not in inspect.signature(found).parameters]
    if missing:
        raise UnavailableError(f"torch.optim.{case.optimizer} has no {missing[0]}")
    return found


def library_class(library: str, name: str, case: Case) -> type[torch.optim.Optimizer]:
    """A class of another library that has the options of the case."""
    try:
        module = import_module(library)
    except Exception as error:  # a package that does not fit this torch fails in its own way
        raise UnavailableError(f"cannot import {library}: {error}") from None
    found = getattr(module, name, None)
    if found is None:
        raise UnavailableError(f"{library} has no {name}")
    missing = [option for option in case.options if option not in inspect.signature(found).parameters]
    if missing:
        raise UnavailableError(f"{library}.{name} has no {missing[0]}")
    return found


def version(name: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def bytes_moved(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step moves in one pass: parameters and states are read and written, gradients are read."""
    moved = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            states = sum(tensor.nbytes for tensor in _tensors(optimizer.state[param]) if tensor.dim())  # no step counts
            moved += param.grad.nbytes + 2 * (param.nbytes + states)
    return moved


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    """Those in the state of a parameter, also where they are kept in an object."""
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            yield from (tensor for tensor in vars(value).values() if isinstance(tensor, Tensor))
