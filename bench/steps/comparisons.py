"""Which comparisons there are: optimizers, shapes and dtypes, the important ones first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from tests.cases import CASES, Case

from .compare import COPY, Row, Setting, compare, same_step, step_makers
from .machine import CPU_ELEMENTS, Machine
from .peers import COMPILED, FOREACH, FUSED, OURS, PEERS, STOCHASTIC
from .pipelines import CASE, pipeline_makers, same_pipeline
from .shapes import GPT2, LARGE, LISTS, LLAMA, THOUSAND, elements_curve, tensors_curve

CONTENDERS = [OURS, STOCHASTIC, *PEERS, COPY]
FP32, BF16 = torch.float32, torch.bfloat16
LEFT_OUT_ON_CPU = [
    "everything that the kernels do: without a GPU it is the reference that steps",
    "launches, memory, share of the copy bandwidth, bf16, all-zero gradients, torch.compile",
    f"shapes of more than {CPU_ELEMENTS:,} elements: larger tensors are divided until they fit",
]


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
    large = partial(Setting, shape=LARGE)
    adamw, momentum = case_of("AdamW"), case_of("SGD", momentum=0.9)
    settings = [large(case, dtype=FP32) for case in one_of_each()]
    lists = [Setting(adamw, shape, FP32) for shape in LISTS]
    if gpu:
        lists += [Setting(adamw, LLAMA, BF16)] + [Setting(momentum, shape, FP32) for shape in LISTS]
        settings += lists + [large(case, dtype=BF16) for case in one_of_each()]
        zeros = [(adamw, FP32), (adamw, BF16), (case_of("Adagrad"), FP32)]
        settings += [large(case, dtype=dtype, gradients="zero") for case, dtype in zeros]
    else:
        settings += lists
    peers = [peer for peer in PEERS if gpu or peer != COMPILED]  # which takes minutes to compile for small steps
    return [_comparison("step", setting, [OURS, *peers], gpu) for setting in settings]


def pipelines(*, gpu: bool) -> list[Comparison]:
    shapes = [GPT2, THOUSAND] if gpu else [THOUSAND]
    return [_comparison("pipeline", Setting(CASE, shape, FP32), [OURS, FUSED, FOREACH], gpu) for shape in shapes]


def scale(*, gpu: bool) -> list[Comparison]:
    """How time grows with the number of elements, and of tensors."""
    shapes = [*elements_curve(), *tensors_curve()]
    if not gpu:
        shapes = [shape for shape in shapes if shape.elements <= CPU_ELEMENTS]
    settings = [Setting(case_of("AdamW"), shape, FP32) for shape in shapes]
    return [_comparison("scale", setting, [OURS, FUSED, FOREACH], gpu) for setting in settings]


def _comparison(kind: str, setting: Setting, contenders: list[str], gpu: bool) -> Comparison:
    stochastic = [STOCHASTIC] * (setting.dtype == BF16)
    return Comparison(kind, setting, (*contenders, *stochastic, *[COPY] * gpu))
