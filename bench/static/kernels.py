"""Which kernels there are to compile: those that a step of any optimizer, dtype and option launches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedopt import FusedOptimizer
from fusedopt.engines.signature import THREADS, Signature, rule
from fusedopt.engines.tables import PREPARE_BLOCK_SIZE, squares_constants
from fusedopt.matrices.batches import direction_dtype
from fusedopt.options import option
from fusedopt.step.hyper import count_numbers, count_scalars
from fusedopt.storage.precision import NOTHING, QUANTIZED_FROM, code_of, is_stochastic, kept_state, state_dtype
from fusedopt.storage.quantized import BLOCK, CODES

# Parameter, gradient and states.
SIGNATURES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "bf16-fp32states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32-bf16grad": (torch.float32, torch.bfloat16, torch.float32),
}
SCALE_BYTES = torch.float32.itemsize / BLOCK  # of an element
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Kernel(ABC):
    """A kernel as a launch asks for it, but for its numbers and addresses."""

    id: str
    integers: tuple[str, ...]  # the arguments that may be any number

    @property
    @abstractmethod
    def function(self) -> Any:
        """The function of `fusedopt.kernels`."""

    @property
    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """Its compile-time arguments."""

    @property
    def read(self) -> list[torch.dtype]:
        """The streams of elements that it loads."""
        return []

    @property
    def written(self) -> list[torch.dtype]:
        """The streams of elements that it stores."""
        return []

    @property
    def scales(self) -> int:
        """How many of the streams are states in 8 bits, of which a block has a scale, read and written."""
        return sum(dtype in CODES for dtype in self.read)

    @property
    def bytes_per_element(self) -> float:
        """What it is declared to move."""
        return sum(dtype.itemsize for dtype in [*self.read, *self.written]) + self.scales * 2 * SCALE_BYTES

    @property
    def full_bytes_per_element(self) -> float:
        """What it would move with states of fp32 in place of 8 bits."""
        return self.bytes_per_element + self.scales * 2 * (torch.float32.itemsize - 1 - SCALE_BYTES)

    @property
    def elements(self) -> int:
        """How many elements of each stream a thread has in one turn of the loop."""
        return self.constants["BLOCK_SIZE"] // THREADS

    def accesses(self) -> Counter[str]:
        """What these take, as {"load 16": 8}: accesses of 16 bytes for the widest stream.

        Of a narrower stream an access has as many elements, so that a thread has the same ones of all.
        """
        together = min(self.elements, 16 // max(dtype.itemsize for dtype in self.read))
        needed: Counter[str] = Counter()
        for access, dtypes in (("load", self.read), ("store", self.written)):
            for dtype in dtypes:
                needed[f"{access} {together * dtype.itemsize}"] += self.elements // together
            needed[f"{access} {torch.float32.itemsize}"] += self.scales
        return +needed


@dataclass(frozen=True)
class Update(Kernel):
    """The `update` of an optimizer's rule for one signature."""

    optimizer: type[FusedOptimizer]
    signature: Signature
    dtypes: str  # a key of SIGNATURES, or the id of a mode
    n_hyper: int
    unscale: bool = False  # where they lie, the gradients

    integers = ("first_tensor",)

    @property
    def rule(self) -> str:
        """The module of the rule and the states that its options call for, as a test is named."""
        present = [n for n, dtype in zip(self.optimizer.states, self.signature.states, strict=True) if dtype]
        function = f"_{self.signature.update}" * (self.signature.update != "update")
        return "-".join([self.optimizer.kernel + function, *present])

    @property
    def id(self) -> str:
        return f"{self.rule}-{self.dtypes}" + "-unscale" * self.unscale

    @property
    def function(self) -> Any:
        from fusedopt.kernels import multi_tensor

        return multi_tensor.update

    @property
    def constants(self) -> dict[str, Any]:
        mine = {
            "UPDATE": rule(self.optimizer, self.signature.update)[1],
            "N_SCALARS": self.n_scalars,
            "UNSCALE": self.unscale,
        }
        return mine | self.signature.constants

    @property
    def n_scalars(self) -> int:
        return count_scalars(self.optimizer, self.n_hyper)

    @property
    def read(self) -> list[torch.dtype]:
        """All streams, but no direction where that is what is computed."""
        return self.signature.streams[self.signature.update == "direction" :]

    @property
    def written(self) -> list[torch.dtype]:
        """All streams, but the gradient only where it is unscaled."""
        param, grad, *others = self.signature.streams
        return [param, *[grad] * self.unscale, *others]


@dataclass(frozen=True)
class Prepare(Kernel):
    """The `prepare` of an optimizer's rule, which has but one signature."""

    of: Update
    hyper_tensors: bool

    integers = ("n_tensors", "n_partials", "rounding_advance")

    @property
    def id(self) -> str:
        return f"prepare-{self.of.optimizer.kernel}" + "-hyper_tensors" * self.hyper_tensors

    @property
    def function(self) -> Any:
        from fusedopt.kernels import multi_tensor

        return multi_tensor.prepare

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "SCALARS": rule(self.of.optimizer)[0],
            "N_HYPER": self.of.n_hyper,
            "N_SCALAR_STATES": len(self.of.optimizer.scalar_states),
            "N_SCALARS": self.of.n_scalars,
            "HYPER_TENSORS": self.hyper_tensors,
            "BLOCK_SIZE": PREPARE_BLOCK_SIZE,
        }


@dataclass(frozen=True)
class SumSquares(Kernel):
    """The kernel that reads gradients before a step, for one dtype of theirs: a key of DTYPES."""

    dtype: str

    integers = ("n_chunks",)

    @property
    def id(self) -> str:
        return f"sum_squares-{self.dtype}"

    @property
    def grad(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def function(self) -> Any:
        from fusedopt.kernels import gate

        return gate.sum_squares

    @property
    def constants(self) -> dict[str, Any]:
        return squares_constants(self.grad)

    @property
    def read(self) -> list[torch.dtype]:
        return [self.grad]

    @property
    def elements(self) -> int:
        return super().elements * self.constants["UNROLL"]


def updates_of(cases: Iterable[Any], modes: Iterable[Any] = ()) -> list[Update]:
    """Every distinct `update` of the given cases, in every dtype signature and every mode of low precision."""
    cases = list(cases)
    found = [
        kernel
        for dtypes, (param, grad, state) in SIGNATURES.items()
        for case in cases
        for kernel in _updates(case.make([torch.zeros(1, 1)]), dtypes, param, grad, state)
    ]
    found += [
        kernel
        for mode in modes
        for case in cases
        if not mode.asks_for_nothing(case)
        for kernel in updates_in(case, mode)
    ]
    distinct: dict[tuple[Any, Signature], Update] = {}
    for kernel in found:
        distinct.setdefault((kernel.optimizer.kernel, kernel.signature), kernel)
    return list(distinct.values())


def unscaling(updates: Iterable[Update]) -> list[Update]:
    """The same in a step that is given a `grad_scale`."""
    return [replace(kernel, unscale=True) for kernel in updates]


def updates_in(case: Any, mode: Any) -> list[Update]:
    """Those of a case in a mode of low precision, with gradients of the parameter's dtype."""
    param = torch.zeros(1, max(1, QUANTIZED_FROM), dtype=mode.dtype)
    optimizer = case.make([param], **mode.options)
    state = state_dtype(param, optimizer.param_groups[0])
    return _updates(optimizer, mode.id, mode.dtype, mode.dtype, state)


def prepares_of(updates: Iterable[Update]) -> list[Prepare]:
    """Every `prepare` that goes with these, with numbers from the host and from the device."""
    rules = {kernel.optimizer.kernel: kernel for kernel in updates}
    return [Prepare(kernel, hyper_tensors) for kernel in rules.values() for hyper_tensors in (False, True)]


def _updates(
    optimizer: FusedOptimizer, name: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> list[Update]:
    """One update, or the two around a product."""
    (group,) = optimizer.param_groups
    (tensor,) = group["params"]
    signature = Signature(
        param,
        grad,
        tuple(
            code_of(optimizer, name, tensor, group) or state if optimizer.uses(name, group) else None
            for name in optimizer.states
        ),
        kept_state(torch.empty(0, dtype=param), group),
        is_stochastic(group),
        option(group, "ema_decay") is not None,
    )
    values = {**optimizer.optional, **optimizer.defaults}
    n_hyper = count_numbers(values[name] for name in optimizer.hyperparameters)
    signatures = [signature]
    if optimizer.product(group) is not None:
        direction = direction_dtype(param)
        before = replace(signature, param=direction, kept=NOTHING, averaged=False, update="direction")
        after = replace(signature, grad=direction, states=(None,) * len(optimizer.states), update="descent")
        signatures = [before, after]
    return [Update(type(optimizer), each, name, n_hyper) for each in signatures]
