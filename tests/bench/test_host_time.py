"""`python -m bench.host_time`: what it times, what it empties, and the table."""

import json
import sys

import pytest
import torch

import fusedopt.engines.tables
import fusedopt.engines.threads
from bench.host_time import cli as host_time
from fusedopt.engines.choice import numba_is_installed
from tests.conftest import DEVICE


@pytest.mark.parametrize("change", host_time.CHANGES)
def test_contenders_step_and_change(change, device):
    """The emptied kernels are asked for, and nothing is computed."""
    made = host_time.contenders("AdamW", (6, 3), device)
    with host_time.emptied_kernels() as calls:
        for who, contender in made.items():
            before = [param.detach().clone() for param in contender.params]
            work = contender.work(change)
            for _ in range(2):
                addresses = [param.grad.data_ptr() for param in contender.params]
                work.prepare()
                moved = [param.grad.data_ptr() for param in contender.params]
                assert all((a != b) == ("gradients" in change) for a, b in zip(addresses, moved, strict=True))
                kernels = host_time.count(work.run, calls)
                assert kernels == 2 if who in (host_time.OURS, host_time.ON_CPU) else kernels >= 2 * 3
            lrs = {group["lr"] for group in contender.optimizer.param_groups}
            assert lrs == {1e-3 * 0.999**2} if "lr" in change else lrs == {1e-3}
            assert all(map(torch.equal, before, contender.params))


def test_what_was_emptied_is_back():
    launch, run = fusedopt.engines.tables.launch, fusedopt.engines.threads.run
    with host_time.emptied_kernels():
        assert fusedopt.engines.tables.launch is not launch
        assert fusedopt.engines.threads.run is not run
    assert (fusedopt.engines.tables.launch, fusedopt.engines.threads.run) == (launch, run)
    assert sys.modules["torch.optim.adam"].torch is torch


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(host_time, "SHAPES", [(1, 1), (2, 1), (4, 4)])
    monkeypatch.setattr(host_time, "PROFILED", [(2, 1)])
    monkeypatch.setattr(host_time, "AIMS", {(4, 4): 0.1})
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)
    arguments = ["--rounds", "1", "--repeats", "1", "--device", DEVICE, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["host_time", *arguments])


def test_result_table_and_figure(small, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    assert host_time.main() == 0
    (path,) = tmp_path.glob("host-time-*.json")
    result = json.loads(path.read_text())
    assert result["kernels"] == ("emptied" if DEVICE == "cpu" else "real")
    assert {"command", "commit", "cpu", "cores", "date", "torch", "triton"} <= result.keys()
    contenders = host_time.makers("AdamW", torch.device(DEVICE))
    assert len(result["rows"]) == 3 * 3 * len(contenders)
    assert (host_time.ON_CPU in contenders) == (DEVICE == "cpu" and numba_is_installed())
    assert all(0 < row["lowest"] <= row["median"] <= row["p90"] for row in result["rows"])
    functions = [each["function"] for each in result["profiles"]["2 tensors, 1 group"]["nothing"]]
    assert any(name.startswith("fusedopt.plan.") for name in functions)
    table = path.with_suffix(".md").read_text()
    (ours,) = [row for row in result["rows"] if list(row.values())[:4] == [4, 4, "gradients", "fusedopt"]]
    assert f"{1e6 * ours['median']:,.0f} (" in table
    assert table in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_missed_aims_are_told():
    rows = [
        host_time.Row(*shape, change, who, seconds, seconds, seconds, 1, 2)
        for shape in host_time.AIMS
        for change in host_time.CHANGES
        for who, seconds in {host_time.OURS: 0.75, host_time.FUSED: 1.0}.items()
    ]
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    from bench.host_time.report import _aims

    lines = _aims({"aims": host_time.aims(rows)}).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["50%"] * 3 + ["650%"] * 3


def test_without_matplotlib_there_are_numbers(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "bench.host_time.report", raising=False)
    assert host_time.main() == 0
    assert "No table and no figure" in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
