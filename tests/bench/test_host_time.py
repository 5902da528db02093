"""`python -m bench.host_time`: what it times, what it empties, and the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt.engines.threads
from bench.host_time import cli as host_time
from bench.host_time.contenders import CHANGES, CLIPPED, DISPATCHED, EMPTIED, FUSED, ON_CPU, OURS, REAL, contenders
from bench.host_time.emptied import emptied_kernels
from fusedopt.engines.choice import numba_is_installed
from tests.conftest import DEVICE


@pytest.mark.parametrize("change", CHANGES)
def test_contenders_step_and_change(change, device):
    """The emptied kernels are asked for, and nothing is computed."""
    made = contenders("AdamW", (6, 3), device, EMPTIED)
    with host_time.launching(EMPTIED, int) as count:
        for who, contender in made.items():
            before = [param.detach().clone() for param in contender.params]
            work = contender.work(change)
            for _ in range(2):
                addresses = [param.grad.data_ptr() for param in contender.params]
                work.prepare()
                moved = [param.grad.data_ptr() for param in contender.params]
                assert all((a != b) == ("gradients" in change) for a, b in zip(addresses, moved, strict=True))
                kernels = count(work.run)
                assert kernels == 2 if who in (OURS, ON_CPU) else kernels >= 2 * 3
            lrs = {group["lr"] for group in contender.optimizer.param_groups}
            assert lrs == {1e-3 * 0.999**2} if "lr" in change else lrs == {1e-3}
            assert all(map(torch.equal, before, contender.params))


def test_what_was_emptied_is_back():
    direct = pytest.importorskip("fusedopt.engines.direct")
    bound, run = direct.TritonKernel.bound, fusedopt.engines.threads.run
    with emptied_kernels():
        assert direct.TritonKernel.bound is not bound
        assert fusedopt.engines.threads.run is not run
    assert (direct.TritonKernel.bound, fusedopt.engines.threads.run) == (bound, run)
    with emptied_kernels(ours=False):
        assert (direct.TritonKernel.bound, fusedopt.engines.threads.run) == (bound, run)
    assert sys.modules["torch.optim.adam"].torch is torch


SMALL = """
import sys
{before}
from bench.host_time import cli
cli.SHAPES, cli.PROFILED = [(1, 1), (2, 1), (4, 4)], [(2, 1)]
cli.AIMS = [cli.Aim(4, 4, "nothing", 0.1), cli.Aim(1, 1, "nothing", 1e-9, is_share=False)]
sys.exit(cli.main())
"""


def run(folder, before="", environment=None):
    """Triton's dispatch is timed in a process in which nothing is interpreted."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | (environment or {})
    arguments = ["--rounds", "1", "--repeats", "1", "--device", DEVICE, "--out", str(folder)]
    command = [sys.executable, "-c", SMALL.format(before=before), *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("compiler", "launcher"), [(None, "Triton's launcher in C"), ("/nowhere/cc", "in Python")])
def test_result_table_and_figure(compiler, launcher, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    if compiler and DEVICE != "cpu":
        pytest.skip("the launcher of a GPU is Triton's")
    done = run(tmp_path, environment={"CC": compiler} if compiler else None)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("host-time-*.json")
    result = json.loads(path.read_text())
    assert {"command", "commit", "cpu", "cores", "date", "torch", "triton"} <= result.keys()
    expected = {DISPATCHED: {OURS, CLIPPED, FUSED}, EMPTIED: {OURS, FUSED, "torch foreach"}}
    if numba_is_installed():
        expected[EMPTIED].add(ON_CPU)
    expected = expected if DEVICE == "cpu" else {REAL: {OURS, CLIPPED, FUSED, "torch foreach"}}
    assert launcher in result["launcher"] or DEVICE != "cpu"
    rows = result["rows"]
    assert {kind: {row["contender"] for row in rows if row["launches"] == kind} for kind in expected} == expected
    assert len(rows) == 3 * 3 * sum(map(len, expected.values()))
    assert all(0 < row["lowest"] <= row["median"] <= row["p90"] for row in rows)
    kernels = {(row["contender"], row["kernels"]) for row in rows if row["contender"] in (OURS, CLIPPED)}
    assert kernels == {(OURS, 2), (CLIPPED, 3)}
    functions = [each["function"] for each in result["profiles"]["2 tensors, 1 group"]["nothing"]]
    assert any(name.startswith("fusedopt.plan.") for name in functions)
    table = path.with_suffix(".md").read_text()
    for kind in expected:
        (ours,) = [row for row in rows if list(row.values())[:5] == [kind, 4, 4, "gradients", OURS]]
        assert f"{1e6 * ours['median']:,.0f} (" in table
    assert table in done.stdout
    assert "`max_grad_norm` adds" in table
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_missed_aims_are_told():
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    from bench.host_time.report import _aims

    seconds = {OURS: 1.5, FUSED: 1.0, CLIPPED: 1.5 + 30e-6}
    rows = [
        host_time.Row(DISPATCHED, aim.tensors, aim.groups, aim.change, who, time, time, time, 1, 2)
        for aim in host_time.AIMS
        for who, time in seconds.items()
    ]
    lines = _aims({"aims": host_time.aims(rows)}).splitlines()[2:]
    expected = [f"{1.5 / aim.most - 1:.0%}" if aim.is_share else "100%" for aim in host_time.AIMS]
    assert [line.split("|")[-2].strip() for line in lines] == expected


def test_without_matplotlib_there_are_numbers(tmp_path):
    done = run(tmp_path, before='sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None')
    assert done.returncode == 0, done.stderr
    assert "No table and no figure" in done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is not interpreted")
def test_the_interpreter_is_refused(tmp_path):
    done = run(tmp_path, environment={"TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
