"""Which comparisons there are: optimizers, shapes and dtypes, the important ones first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fusedopt.engines.choice import numba_is_installed
from tests.cases import CASES, Case

from .compare import COPY, Row, Setting, compare, same_step, step_makers
from .machine import CPU_ELEMENTS, Machine
from .peers import COMPILED, FOREACH, FUSED, OURS, PEERS, REFERENCE, STOCHASTIC
from .pipelines import CASE, pipeline_makers, same_pipeline
from .shapes import (
    GPT2,
    GPT2_ON_CPU,
    GROUPS_ON_CPU,
    LARGE,
    LISTS,
    LLAMA,
    ONE,
    THIRTY,
    THOUSAND,
    elements_curve,
    tensors_curve,
)

CONTENDERS = [OURS, STOCHASTIC, REFERENCE, *PEERS, COPY]
FP32, BF16 = torch.float32, torch.bfloat16
COMPILED_ON_CPU = [ONE, THIRTY, LARGE]  # longer lists take torch.compile minutes


@dataclass(frozen=True)
class Comparison:
    """A setting and who is compared in it."""

    kind: str  # step, pipeline or scale
    setting: Setting
    contenders: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.setting.id

    def run(self, machine: Machine, wanted: set[str]) -> list[Row]:
        """Compare those who are wanted, and fusedopt."""
        if self.kind == "pipeline":
            makers, check = pipeline_makers(machine), same_pipeline
        else:
            makers, check = step_makers(self.setting, machine), same_step
        makers = {name: make for name, make in makers.items() if name in wanted | {OURS}}
        return compare(self.setting, makers, machine, check)


def left_out_on_cpu() -> list[str]:
    """What a GPU would have measured besides."""
    lines = [
        "launches, memory, all-zero gradients",
        f"shapes of more than {CPU_ELEMENTS:,} elements: larger tensors are divided until they fit",
        f"{COMPILED}, but for AdamW in fp32 with {', '.join(shape.name for shape in COMPILED_ON_CPU)}",
    ]
    if not numba_is_installed():
        lines.insert(0, f"the compiled engine: numba is not installed, and {OURS} is its reference")
    return lines


def one_of_each() -> list[Case]:
    """For every optimizer the first case of each set of states."""
    found: dict[tuple[object, ...], Case] = {}
    for case in CASES:
        optimizer = case.make([torch.zeros(1)])
        used = tuple(optimizer.uses(name, optimizer.param_groups[0]) for name in optimizer.states)
        found.setdefault((case.optimizer, used), case)
    return list(found.values())


def case_of(optimizer: str, **options: object) -> Case:
    """The first case of an optimizer with these options."""
    return next(case for case in CASES if case.optimizer == optimizer and options.items() <= case.options.items())


def steps(*, gpu: bool) -> list[Comparison]:
    """One large tensor with every optimizer, lists of tensors with some."""
    return _steps_on_gpu() if gpu else _steps_on_cpu()


def _steps_on_gpu() -> list[Comparison]:
    adamw, momentum = case_of("AdamW"), case_of("SGD", momentum=0.9)
    settings = [Setting(case, LARGE, FP32) for case in one_of_each()]
    settings += [Setting(adamw, shape, FP32) for shape in LISTS] + [Setting(adamw, LLAMA, BF16)]
    settings += [Setting(momentum, shape, FP32) for shape in LISTS]
    settings += [Setting(case, LARGE, BF16) for case in one_of_each()]
    zeros = [(adamw, FP32), (adamw, BF16), (case_of("Adagrad"), FP32)]
    settings += [Setting(case, LARGE, dtype, gradients="zero") for case, dtype in zeros]
    return [_comparison("step", setting, [OURS, *PEERS]) for setting in settings]


def _steps_on_cpu() -> list[Comparison]:
    """Every optimizer with lists of tensors too: what a step costs besides memory differs from class to class."""
    adamw = case_of("AdamW")
    first_of_each = [case_of(name) for name in dict.fromkeys(case.optimizer for case in CASES)]
    settings = [Setting(adamw, shape, FP32) for shape in (ONE, THIRTY, GROUPS_ON_CPU)]
    settings += [Setting(case, shape, FP32) for shape in (GPT2_ON_CPU, THOUSAND) for case in first_of_each]
    settings += [Setting(case, LARGE, FP32) for case in one_of_each()]
    settings += [Setting(adamw, shape, BF16) for shape in (GPT2_ON_CPU, THOUSAND, LARGE)]
    compiled = [Setting(adamw, shape, FP32) for shape in COMPILED_ON_CPU]
    found = []
    for setting in settings:
        peers = [peer for peer in PEERS if peer != COMPILED or setting in compiled]
        found.append(_comparison("step", setting, [OURS, REFERENCE, *peers]))
    return with_threads(found)


def with_threads(comparisons: list[Comparison]) -> list[Comparison]:
    """All of them with one thread, then with as many as torch takes."""
    counts = sorted({1, torch.get_num_threads()})
    return [replace(each, setting=replace(each.setting, threads=count)) for count in counts for each in comparisons]


def pipelines(*, gpu: bool) -> list[Comparison]:
    settings = [Setting(CASE, shape, FP32) for shape in (GPT2 if gpu else GPT2_ON_CPU, THOUSAND)]
    found = [_comparison("pipeline", setting, [OURS, FUSED, FOREACH]) for setting in settings]
    return found if gpu else with_threads(found)


def scale(*, gpu: bool) -> list[Comparison]:
    """How time grows with the number of elements, and of tensors."""
    shapes = [shape for shape in (*elements_curve(), *tensors_curve()) if gpu or shape.elements <= CPU_ELEMENTS]
    settings = [Setting(case_of("AdamW"), shape, FP32) for shape in shapes]
    found = [_comparison("scale", setting, [OURS, FUSED, FOREACH]) for setting in settings]
    return found if gpu else with_threads(found)


def _comparison(kind: str, setting: Setting, contenders: list[str]) -> Comparison:
    stochastic = [STOCHASTIC] * (setting.dtype == BF16)
    return Comparison(kind, setting, (*contenders, *stochastic, COPY))
