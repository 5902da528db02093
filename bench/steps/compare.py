"""One comparison: the same tensors stepped by fusedopt and its peers by turns, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import Case

from ..timing import Spread, Work, interleaved
from .machine import MAX_TEMPORARIES, Machine
from .peers import OURS, PEERS, REFERENCE, STOCHASTIC, Contender, Groups, UnavailableError, bytes_moved, ours
from .shapes import Shape

COPY = "copy"
CHECKED = 4096  # elements at each end of a tensor that are compared with torch's
CHECKED_TENSORS = 16
Makers = Mapping[str, Callable[[Groups], Contender]]
Params = list[nn.Parameter]
Check = Callable[[Contender], None]  # raises AssertionError unless a contender's first step was right


@dataclass(frozen=True)
class Setting:
    """What is stepped, and how."""

    case: Case
    shape: Shape
    dtype: torch.dtype
    gradients: str = "random"  # or zero: embeddings have such rows, on which roots and divisions are slow
    threads: int = 1  # of torch on the host, for everybody and the copy

    @property
    def id(self) -> str:
        parts = [self.case.id, self.shape.name, str(self.dtype).removeprefix("torch.")]
        parts += [f"{self.gradients} gradients"] * (self.gradients != "random")
        return "-".join(parts + [f"{self.threads} threads"] * (self.threads != 1))


@dataclass
class Row:
    """What was measured of one contender; None for what was not, or cannot be here. Times are in seconds."""

    case: str
    optimizer: str
    shape: str
    shrunk: int
    tensors: int
    groups: int
    elements: int
    dtype: str
    gradients: str
    threads: int
    contender: str
    error: str | None = None
    time: dict[str, float] | None = None  # of the device
    waited: bool | None = None  # the device for the host, within the step: then `time` is the host's
    host_time: dict[str, float] | None = None
    launches: int | None = None
    extra_bytes: int | None = None
    bytes_moved: int | None = None
    share_of_copy: float | None = None  # bytes a second, as a share of the copy's
    samples: list[float] = field(default_factory=list)  # of `time`

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes_moved / self.time["median"] if self.time and self.bytes_moved else None

    def record(self) -> dict[str, Any]:
        """For JSON: all but the samples."""
        return {key: value for key, value in asdict(self).items() if key != "samples"}


def step_makers(setting: Setting, machine: Machine) -> Makers:
    """Everybody who can be asked to step, fusedopt first."""
    case = setting.case
    makers: dict[str, Callable[[Groups], Contender]] = {
        OURS: lambda groups: ours(case, groups, machine.backend),
        REFERENCE: lambda groups: ours(case, groups, "eager"),
    }
    if setting.dtype == torch.bfloat16:
        makers[STOCHASTIC] = lambda groups: ours(case, groups, machine.backend, rounding="stochastic")
    return makers | {name: partial(make, case) for name, make in PEERS.items()}


def compare(setting: Setting, makers: Makers, machine: Machine, check: Callable[[Setting, Params], Check]) -> list[Row]:
    """A row for each contender, and one for the copy.

    Args:
        check: asked before anything is stepped for what looks at fusedopt after its first step.

    Raises:
        AssertionError: the first step of fusedopt is wrong, so that its time says nothing.
    """
    torch.set_num_threads(setting.threads)
    shape = fitted(setting, len(makers), machine)
    groups, params = make_parameters(shape, setting, machine.device)
    common = {
        "case": setting.case.id,
        "optimizer": setting.case.optimizer,
        "shape": shape.name,
        "shrunk": shape.shrunk,
        "tensors": len(shape.sizes),
        "groups": shape.groups,
        "elements": shape.elements,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "gradients": setting.gradients,
        "threads": setting.threads,
    }
    rows = {name: Row(**common, contender=name) for name in makers}
    contenders = {}
    for name, make in makers.items():
        look = check(setting, params) if name == OURS else None
        try:
            contender = make([dict(group) for group in groups])
            contender.prepare()
            contender.step()
        except UnavailableError as error:
            rows[name].error = str(error)
        except Exception as error:
            if name == OURS:
                raise
            rows[name].error = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            contenders[name] = contender
        if look is not None:
            look(contender)
    rows[COPY] = Row(**common, contender=COPY, bytes_moved=bytes_moved(contenders[OURS].optimizer))
    _measure(rows, contenders, machine)
    return list(rows.values())


def fitted(setting: Setting, n_contenders: int, machine: Machine) -> Shape:
    """The shape, made smaller if that is what it takes to hold everybody's states."""
    optimizer = setting.case.make([torch.zeros(1)])
    n_states = sum(optimizer.uses(name, optimizer.param_groups[0]) for name in optimizer.states)
    streams = 2 + MAX_TEMPORARIES + n_contenders * n_states
    return setting.shape.shrink(machine.max_elements(streams * setting.dtype.itemsize))


def same_step(setting: Setting, params: Params) -> Check:
    """Whether some elements of the parameters are what torch makes of them in float64, if it has the optimizer."""
    values = [value.double() for param in _some(params) for value in _ends(param.detach())]
    grads = [grad.double() for param in _some(params) for grad in _ends(param.grad)]
    stepped = [nn.Parameter(value.clone()) for value in values]
    for param, grad in zip(stepped, grads, strict=True):
        param.grad = grad
    if setting.case.in_torch:
        setting.case.make_torch(stepped).step()
    # At the scale of the parameter before and after, one rounding to 16 bits; in fp32 some more than float64 knows of.
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(setting.dtype, 1e-5)

    def check(contender: Contender) -> None:
        actual = [part for param in _some(params) for part in _ends(param.detach())]
        for mine, before, after in zip(actual, values, stepped, strict=True):
            error = (mine - after.detach()).abs()
            if not (error <= tolerance * (before.abs() + after.detach().abs())).all():
                raise AssertionError(
                    f"a step of {setting.id} is off by up to {error.max().item():.3g}: it is not torch's"
                )

    return check if setting.case.in_torch else lambda contender: None


def _some(params: Params) -> Params:
    """Not more than CHECKED_TENSORS, the last among them."""
    return params[-1 :: -max(1, len(params) // CHECKED_TENSORS)][:CHECKED_TENSORS]


def _ends(tensor: Tensor) -> list[Tensor]:
    flat = tensor.reshape(-1)
    return [flat] if len(flat) <= 2 * CHECKED else [flat[:CHECKED], flat[-CHECKED:]]


def make_parameters(shape: Shape, setting: Setting, device: torch.device) -> tuple[Groups, Params]:
    """Random parameters, which all contenders share, with their gradients."""
    torch.manual_seed(0)
    make = torch.zeros if setting.gradients == "zero" else torch.randn
    params = [nn.Parameter(torch.randn(size, dtype=setting.dtype, device=device)) for size in shape.sizes]
    for param in params:
        param.grad = make(param.shape, dtype=setting.dtype, device=device)
    return [{"params": params[i :: shape.groups]} for i in range(shape.groups)], params


def _measure(rows: dict[str, Row], contenders: dict[str, Contender], machine: Machine) -> None:
    """Enter all figures into the rows."""
    works = {name: contender.work for name, contender in contenders.items()}
    everything = {**works, COPY: Work(machine.copy(rows[COPY].bytes_moved))}
    for work in everything.values():
        machine.settle(work)
    times = interleaved(everything, machine.stopwatch, machine.rounds, seconds=machine.seconds)
    for name, samples in times.items():
        rows[name].samples = samples
        rows[name].time = asdict(Spread.of(samples))
        rows[name].waited = machine.waited(everything[name].run)
    if machine.is_gpu:  # else it is the same
        for name, samples in interleaved(works, machine.host_stopwatch, machine.rounds).items():
            rows[name].host_time = asdict(Spread.of(samples))
    for name, contender in contenders.items():
        rows[name].bytes_moved = bytes_moved(contender.optimizer) if contender.is_one_pass else None
        for figure in ("launches", "extra_bytes"):
            count: Any = getattr(machine, figure)
            if count is not None:
                contender.prepare()
                setattr(rows[name], figure, count(contender.step))
    for row in rows.values():
        if row.bytes_per_second is not None:
            row.share_of_copy = row.bytes_per_second / rows[COPY].bytes_per_second
