"""`python -m bench.muon`: what is counted and timed, and the tables."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fusedopt
from bench.muon import cli, counts, measure, symmetric, workloads
from bench.muon.measure import PRODUCTS, TORCH
from bench.muon.workloads import Workload
from fusedopt.engines.compiled import CompiledKernels
from fusedopt.engines.tables import TritonKernels
from tests.bench.fake_gpu import fake_machine
from tests.conftest import DEVICE

TINY = Workload("96 matrices", ((8, 16), (16, 8), (3, 8, 8), (2, 2, 5, 9)))
ITERATIONS = 5


@pytest.fixture(autouse=True)
def ordinary_steps(monkeypatch):
    """Steps that make no tables to compare, beside no peer but torch."""
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)
    monkeypatch.setattr(measure, "PYTORCH_OPTIMIZER", "no_such_library")


def stepped(workload, make, device):
    params = measure.make_parameters(workload, device)
    optimizer = make(params)
    optimizer.step()
    return optimizer


def test_flops_are_those_that_torch_counts(device):
    """Of its own Muon, which has a parameter for each matrix."""
    optimizer = stepped(TINY, lambda params: torch.optim.Muon(measure.as_matrices(params)), device)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert TINY.flops(ITERATIONS) == counter.get_total_flops()


@pytest.mark.parametrize("size", [(8, 24), (24, 8), (16, 16), (3, 8, 24)], ids=str)
def test_flops_of_ours_and_by_hand(size, device):
    """No side needs padding, which would be computed too."""
    workload = Workload("one", (size,))
    optimizer = stepped(workload, fusedopt.Muon, device)
    with FlopCounterMode(display=False) as counter:
        measure.products(optimizer)()
    n, m = sorted(size[-2:])
    by_hand = math.prod(size[:-2]) * ITERATIONS * n * n * (4 * m + 2 * n)
    assert workload.flops(ITERATIONS) == counter.get_total_flops() == by_hand


def test_bytes_of_both_passes(device):
    """Gradient, momentum twice and direction; then direction and parameter twice."""
    optimizer = stepped(TINY, fusedopt.Muon, device)
    assert measure.elementwise_bytes(optimizer, TINY) == TINY.elements * (4 + 8 + 2 + 2 + 8)


def test_workloads():
    shapes, gpt2, experts, *curve = workloads.workloads(scale=1)
    assert len(shapes.matrices) == len(shapes.sizes) == 96
    assert len(set(shapes.sizes)) == 4
    assert gpt2.sizes == 12 * ((2304, 768), (768, 768), (3072, 768), (768, 3072))
    assert gpt2.elements == 12 * 12 * 768**2
    assert len(experts.sizes) == 2
    assert len(experts.matrices) == 2 * 32
    assert [len(each.matrices) for each in curve] == [10, 100, 1000]
    names = [each.name for each in workloads.workloads(scale=8)]
    assert names == ["96 matrices", "gpt2 / 8", "experts / 8", "10 small", "100 small", "1,000 small"]
    assert workloads.gpt2(8).elements * 64 == gpt2.elements
    assert workloads.experts(8).sizes[0] == (32, 384, 96)
    assert workloads.gpt2(1000).sizes[:2] == ((2, 1), (1, 1))


def test_matrices_of_batches_are_the_same_memory(device):
    params = measure.make_parameters(TINY, device)
    matrices = measure.as_matrices(params)
    assert [tuple(matrix.shape) for matrix in matrices] == TINY.matrices
    torch.optim.SGD(matrices, lr=1.0).step()
    before = measure.make_parameters(TINY, device)
    for param, other in zip(params, before, strict=True):
        assert torch.equal(param.detach(), other.detach() - other.grad)


def test_launches_do_not_grow_with_the_number_of_matrices(device):
    found = []
    for count in (10, 30):
        params = measure.make_parameters(workloads.small(count), device)
        ours, theirs = fusedopt.Muon(params), torch.optim.Muon(params)
        for optimizer in (ours, theirs):
            optimizer.step()
        assert counts.operators(ours.step) == counts.operators(measure.products(ours))
        found.append((counts.operators(ours.step), counts.operators(theirs.step) / count))
    assert found[0] == found[1]
    assert found[0][1] > 3 * ITERATIONS  # that many products a matrix, and what is around them


def test_kernels_are_counted_and_then_no_more(device):
    before = [vars(engine).copy() for engine in (CompiledKernels, TritonKernels)]
    params = measure.make_parameters(TINY, device)
    backend, *_ = measure.backends(device)
    expected = {} if backend == "eager" else {"prepare": 2, "update": 2}
    assert counts.kernels(lambda: fusedopt.Muon(params)) == expected
    assert counts.kernels(lambda: fusedopt.Muon(params, backend="eager")) == {}
    assert before == [vars(engine) for engine in (CompiledKernels, TritonKernels)]


def test_views_and_allocations_compute_nothing(device):
    x = torch.ones(4, 6, device=device)
    assert counts.operators(lambda: (x.mT, x[1:], x.view(-1), torch.empty_like(x), x.detach())) == 0
    assert counts.operators(lambda: (x.add_(1), x @ x.mT, torch._foreach_add([x, x], 1))) == 3


def test_a_comparison(device):
    """On a GPU that is not there: its events and counters are asked."""
    rows, told = measure.measure(TINY, fake_machine(device), 1)
    ours = [f"fusedopt, {backend}" for backend in measure.backends(device)]
    assert [row.contender for row in rows] == [TORCH, *ours, PRODUCTS]
    assert (told["parameters"], told["matrices"], told["iterations"]) == (4, 1 + 1 + 3 + 4, ITERATIONS)
    assert told["shapes"] == [list(size) for size in TINY.sizes]
    medians = {row.contender: row.time["median"] for row in rows}
    for row in rows:
        assert row.flops_per_second == pytest.approx(TINY.flops(ITERATIONS) / row.time["median"])
        assert row.launches == 2
        assert row.host_time["median"] > 0
        assert row.waited is True
        assert row.operators > 0
        is_ours = row.contender in ours
        assert row.products_share == (medians[PRODUCTS] / medians[row.contender] if is_ours else None)
        assert row.of_torch == (None if row.contender == PRODUCTS else medians[row.contender] / medians[TORCH])


def test_another_library_is_measured_where_it_is(device, monkeypatch):
    def make(groups):
        (group,) = groups
        assert group["use_muon"]
        return torch.optim.Muon(group["params"])

    monkeypatch.setitem(sys.modules, "imagined_library", SimpleNamespace(Muon=make))
    monkeypatch.setattr(measure, "PYTORCH_OPTIMIZER", "imagined_library")
    rows, _ = measure.measure(TINY, fake_machine(device), 1)
    (row,) = (row for row in rows if row.contender == "imagined_library")
    assert row.of_torch > 0
    assert row.products_share is None


def test_a_step_that_is_not_torchs_is_an_error(device, monkeypatch):
    monkeypatch.setattr("fusedopt.matrices.batches.orthogonalize_", lambda *args: None)
    with pytest.raises(AssertionError, match="it is not torch's"):
        measure.measure(TINY, fake_machine(device), 1)


def run(monkeypatch, folder):
    """The program with two small workloads, one of them of the curve."""
    monkeypatch.setattr(cli, "workloads", lambda scale: [TINY, workloads.small(10)])
    arguments = ["--seconds", "0", "--device", DEVICE, "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", ["muon", *arguments])
    assert cli.main() == 0
    (path,) = folder.glob("muon-*.json")
    return path


def test_result_tables_and_figure(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    threads = torch.get_num_threads()
    path = run(monkeypatch, tmp_path)
    assert torch.get_num_threads() == threads
    result = json.loads(path.read_text())
    assert {"command", "commit", "cpu", "cores", "date", "torch", "triton"} <= result.keys()
    assert [each["name"] for each in result["workloads"]] == [TINY.name, "10 small"]
    rows = {(row["workload"], row["contender"]): row for row in result["rows"]}
    assert len(rows) == 2 * (2 + len(measure.backends(torch.device(DEVICE))))
    first = f"fusedopt, {measure.backends(torch.device(DEVICE))[0]}"
    (aim,) = result["aims"]
    assert (aim["contender"], aim["measured"]) == (first, rows[TINY.name, first]["of_torch"])
    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    from bench.muon.report import milliseconds

    for (workload, contender), row in rows.items():
        begin = f"| {workload} | {contender} | {milliseconds(row['time']['median'])} ("
        assert any(line.startswith(begin) for line in lines)
        assert any(f" | {contender} | " in line and f" | {row['operators']:,} |" in line for line in lines)
    assert f"| {rows[TINY.name, first]['products_share']:.0%} |" in " ".join(lines)
    for each in result["workloads"]:
        intensity = each["flops"] / each["bytes_moved"]
        assert any(line.startswith(f"| {each['name']} | ") and line.endswith(f" {intensity:,.0f} |") for line in lines)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(1.2345e-5, "0.0123"), (0.12345, "123"), (0.9994, "999"), (0.9999, "1,000"), (1.5678, "1,568")],
)
def test_times_have_three_digits_or_more(seconds, told):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    from bench.muon.report import milliseconds

    assert milliseconds(seconds) == told


@pytest.mark.parametrize(("measured", "judged"), [(0.61, "missed by 0.010"), (0.6, "met")])
def test_aims_are_judged(measured, judged):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    from bench.muon.report import _aims

    spread = {"lowest": 1.0, "median": 1.0, "p90": 1.0}
    names = ("fusedopt, compiled", "fusedopt, eager")
    rows = [measure.Row(measure.AIMED, 2, name, spread, None, of_torch=measured, products_share=0.5) for name in names]
    *_, line = _aims({"aims": measure.aims(rows)}).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0].startswith("fusedopt, compiled, 96 matrices, 2 threads")
    assert cells[1:] == ["≤ 0.6", f"{measured:.3f}", judged]


def test_without_matplotlib_there_are_numbers(monkeypatch, tmp_path, capsys):
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "bench.muon.report", raising=False)
    path = run(monkeypatch, tmp_path)
    assert "No table and no figure" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def product_by_torch(x, *, out, c=None, alpha=1.0, beta=0.0):
    """Stands in for the kernel."""
    return torch.bmm(x, x.mT, out=out) if c is None else torch.baddbmm(c, x, x.mT, beta=beta, alpha=alpha, out=out)


def test_symmetric_products_are_checked_and_timed(monkeypatch, device):
    chosen = []

    def recorded(x, **options):
        chosen.append(tuple(x.shape))
        return product_by_torch(x, **options)

    for module in ("symmetric", "newton_schulz"):
        monkeypatch.setattr(f"fusedopt.matrices.{module}.symmetric_product", recorded)
    is_chosen = symmetric.newton_schulz.is_chosen
    trials = []
    for pair in symmetric.pairs(16, device, elements=3 * 16**2):
        chosen.clear()
        trials.append(symmetric.attempt(pair, fake_machine(device)))
        assert len(set(chosen)) == (2 if pair.what.startswith("all") else 1)
        assert all(shape[:2] == (3, 16) for shape in chosen)
        with FlopCounterMode(display=False) as counter:
            pair.calls[symmetric.TORCH]()
        assert counter.get_total_flops() == pair.flops
    assert symmetric.newton_schulz.is_chosen is is_chosen
    assert {trial.matrices for trial in trials} == {3}
    heading, *lines = symmetric.table(trials).splitlines()
    assert {len(line) for line in lines} == {len(heading)}
    assert [line.startswith(trial.what) for line, trial in zip(lines, trials, strict=True)] == len(trials) * [True]


def test_symmetric_products_that_are_wrong_are_an_error(monkeypatch, device):
    monkeypatch.setattr("fusedopt.matrices.symmetric.symmetric_product", lambda x, out, **options: out.fill_(1))
    pair = next(symmetric.pairs(16, device, elements=16**2))
    with pytest.raises(AssertionError, match="of side 16 is off by"):
        symmetric.attempt(pair, fake_machine(device))


def test_symmetric_products_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["muon", "--symmetric", "--device", "cpu"])
    assert cli.main() == 2
    assert capsys.readouterr().err == "python -m bench.muon: error: --symmetric needs a GPU\n"


@pytest.mark.parametrize(
    "arguments",
    [("--scale", "0"), ("--scale", "x"), ("--device", "meta"), ("--out", "no/such/folder"), ("--x",)],
    ids=" ".join,
)
def test_bad_arguments(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["muon", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert arguments[0] in printed.err
