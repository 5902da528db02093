"""Comparisons as on a GPU, with kernels in the interpreter and clocks that are told what time it is."""

import dataclasses
import json
import sys

import pytest
import torch

import fusedopt.engines.tables
from bench.steps import comparisons, machine, peers, pipelines
from bench.steps.compare import COPY, Setting, compare, fitted, make_parameters, same_step, step_makers
from bench.steps.comparisons import Comparison, case_of
from bench.steps.peers import COMPILED, FLASHOPTIM, FOREACH, FUSED, OPTIMI, OURS, REFERENCE, STOCHASTIC
from bench.steps.shapes import GPT2, LARGE, ONE, THIRTY, THOUSAND, Shape
from bench.timing import LEAST_ROUNDS
from tests.bench.fake_gpu import fake_machine
from tests.cases import CASES

SHAPE = Shape("tiny", ((40, 50), (1,), (17,)), groups=2)
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def ordinary_steps(monkeypatch):
    """Without FUSEDOPT_DEBUG, under which every step makes its tables anew."""
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)


@pytest.fixture
def gpu(device):
    """The GPU's ways to measure, on whatever there is."""
    return fake_machine(device)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_figure_is_there(gpu, dtype):
    setting = Setting(case_of("AdamW"), SHAPE, dtype)
    wanted = {OURS, STOCHASTIC, FOREACH, COPY}
    rows = {row.contender: row for row in Comparison("step", setting, tuple(wanted)).run(gpu, wanted)}
    assert rows.keys() == (wanted if dtype == BF16 else wanted - {STOCHASTIC})
    elements = 2000 + 1 + 17
    for name, row in rows.items():
        assert row.error is None
        assert (row.tensors, row.groups, row.elements, row.shrunk) == (3, 2, elements, 1)
        assert row.time["samples"] == len(row.samples) == 2
        assert row.time["median"] > 0
        assert row.bytes_moved == dtype.itemsize * elements * (1 + 2 * 3)
        if name != COPY:
            assert (row.launches, row.extra_bytes) == (2, 23)
            assert row.host_time["samples"] == 2
    assert rows[COPY].share_of_copy == 1.0
    assert rows[OURS].share_of_copy == pytest.approx(rows[COPY].time["median"] / rows[OURS].time["median"])
    json.dumps([row.record() for row in rows.values()])


@pytest.mark.parametrize("case", comparisons.one_of_each(), ids=lambda case: case.id)
def test_first_step_of_every_optimizer_passes_the_check(gpu, case):
    setting = Setting(case, SHAPE, BF16)
    groups, params = make_parameters(SHAPE, setting, gpu.device)
    check = same_step(setting, params)
    contender = peers.ours(case, groups, gpu.backend)
    contender.step()
    check(contender)
    if case.in_torch:
        with torch.no_grad():
            params[-1][-1] *= 1.02
        with pytest.raises(AssertionError, match="it is not torch's"):
            check(contender)


def test_a_wrong_step_is_not_timed(gpu, monkeypatch):
    monkeypatch.setattr(fusedopt.engines.tables, "launch", lambda *args, **options: None)
    setting = Setting(case_of("AdamW"), SHAPE, FP32)
    with pytest.raises(AssertionError, match="it is not torch's"):
        compare(setting, step_makers(setting, gpu), gpu, same_step)


def test_missing_and_failing_peers_are_rows(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimi", None)
    monkeypatch.setitem(sys.modules, "flashoptim", None)

    def failing(case, groups):
        contender = peers.torch_optim(case, groups, foreach=True)

        def step():
            raise RuntimeError("out of order\n(a hint)")

        return dataclasses.replace(contender, step=step)

    monkeypatch.setitem(peers.PEERS, COMPILED, failing)
    setting = Setting(case_of("NAdam"), SHAPE, FP32)
    rows = {row.contender: row for row in compare(setting, step_makers(setting, gpu), gpu, same_step)}
    errors = {name: row.error for name, row in rows.items() if row.error is not None}
    assert errors.keys() == {FUSED, COMPILED, OPTIMI, FLASHOPTIM}
    assert errors[FUSED] == "torch.optim.NAdam has no fused"
    assert errors[COMPILED] == "RuntimeError: out of order"
    assert errors[OPTIMI].startswith("cannot import optimi: ")
    assert all(rows[name].time is None and rows[name].launches is None for name in errors)
    assert rows[FOREACH].time is not None


def test_what_torch_lacks_has_no_peer_of_torch():
    case = case_of("Lion")
    for name in (FOREACH, FUSED, COMPILED):
        with pytest.raises(peers.UnavailableError, match=r"torch\.optim has no Lion"):
            peers.PEERS[name](case, [{"params": [torch.zeros(1)]}])


def test_shapes_shrink_to_the_memory(device):
    """Parameter, gradient, temporaries, and two states of each of three contenders."""
    needed = 2**20 * 4 * (2 + machine.MAX_TEMPORARIES + 3 * 2)
    setting = Setting(case_of("AdamW"), Shape("large", ((2**20,),)), FP32)
    for bytes_for_states, shrunk in ((needed, 1), (needed - 1000, 2), (needed // 8, 8)):
        free = (bytes_for_states + 2 * machine.COPY_BYTES) / machine.MEMORY_SHARE + 100
        assert fitted(setting, 3, fake_machine(device, free)).shrunk == shrunk
    larger = dataclasses.replace(setting, shape=Shape("larger", ((2**27,),)))
    assert [fitted(each, 3, machine.cpu()).shrunk for each in (setting, larger)] == [1, 4]


def test_copies_move_as_many_bytes(gpu, monkeypatch):
    """Half of them is read; what does not fit the buffers takes several copies."""
    monkeypatch.setattr(machine, "COPY_BYTES", 1024)
    copied = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copied.append(other.nbytes) or copy_(self, other))
    gpu.copy(2 * 2500)()
    assert copied == [1024, 1024, 452]


def test_pipelines_are_the_same(gpu):
    setting = Setting(pipelines.CASE, SHAPE, FP32)
    wanted = {OURS, FUSED, FOREACH}
    rows = Comparison("pipeline", setting, tuple(wanted)).run(gpu, wanted)
    assert {row.contender for row in rows if row.time} == wanted | {COPY}
    assert all(row.share_of_copy is None for row in rows if row.contender != COPY)


def test_a_pipeline_without_clipping_is_not_timed(gpu, monkeypatch):
    options = {key: value for key, value in pipelines.CASE.options.items() if key != "max_grad_norm"}
    monkeypatch.setattr(pipelines, "CASE", dataclasses.replace(pipelines.CASE, options=options))
    monkeypatch.setattr(pipelines, "MAX_GRAD_NORM", 1e-9)  # so small that eps counts: Adam's own scaling hides the rest
    setting = Setting(pipelines.CASE, SHAPE, FP32)
    with pytest.raises(AssertionError, match="not close"):
        Comparison("pipeline", setting, (OURS,)).run(gpu, {OURS})


@pytest.fixture
def two_threads():
    """What torch takes by itself here."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_on_a_cpu_the_copy_has_its_turn_with_as_many_threads(two_threads, monkeypatch):
    """The reference, and the rounds that the time suffices for."""
    told = []
    copy = machine.Machine.copy
    monkeypatch.setattr(
        machine.Machine, "copy", lambda self, moved: told.append(torch.get_num_threads()) or copy(self, moved)
    )
    cpu = dataclasses.replace(machine.cpu(), seconds=0)
    wanted = {OURS, REFERENCE, FOREACH, COPY}
    for threads in (1, 2):
        setting = Setting(case_of("AdamW"), SHAPE, FP32, threads=threads)
        rows = {row.contender: row for row in Comparison("step", setting, tuple(wanted)).run(cpu, wanted)}
        assert rows.keys() == wanted
        assert {row.threads for row in rows.values()} == {threads}
        assert {len(row.samples) for row in rows.values()} == {LEAST_ROUNDS}
        assert all(row.share_of_copy > 0 for row in rows.values())
    assert told == [1, 2]


def test_what_a_cpu_steps(two_threads):
    """All with one thread, then with two; every class as one tensor and in lists; torch.compile where it ends."""
    found = [each for make in (comparisons.steps, comparisons.pipelines, comparisons.scale) for each in make(gpu=False)]
    one, two = ([each.id for each in found if each.setting.threads == threads] for threads in (1, 2))
    assert two == [f"{name}-2 threads" for name in one]
    steps = [each for each in comparisons.steps(gpu=False) if each.setting.threads == 1]
    classes = {case.optimizer for case in CASES}
    for shape in (LARGE, GPT2, THOUSAND):
        assert {step.setting.case.optimizer for step in steps if step.setting.shape.name == shape.name} == classes
    assert {step.setting.shape for step in steps if COMPILED in step.contenders} == {ONE, THIRTY, LARGE}
    stochastic = {step.setting.shape.name for step in steps if STOCHASTIC in step.contenders}
    assert stochastic == {GPT2.name, THOUSAND.name, LARGE.name}
    assert all(REFERENCE in step.contenders for step in steps)


@pytest.mark.parametrize("gpu", [False, True])
def test_lists_of_comparisons(gpu):
    for make in (comparisons.steps, comparisons.pipelines, comparisons.scale):
        found = make(gpu=gpu)
        assert len({each.id for each in found}) == len(found)
        assert all(COPY in each.contenders for each in found)
        assert not gpu or {each.setting.threads for each in found} == {1}
        assert all(set(each.contenders) <= set(comparisons.CONTENDERS) for each in found)
    optimizers = {each.setting.case.optimizer for each in comparisons.steps(gpu=gpu)}
    assert optimizers == {case.optimizer for case in CASES}
