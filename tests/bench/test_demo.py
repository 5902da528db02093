"""`make demo` as a user runs it: in a process of its own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"the demo needs {package}: pip install -e .[demo]")

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW"]


def run_demo(*arguments):
    # Not what conftest sets for the tests: no self-checks, and no interpreter.
    env = {key: value for key, value in os.environ.items() if key not in ("FUSEDOPT_DEBUG", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "bench.demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_trains_prints_and_draws(tmp_path):
    out = tmp_path / "curves.png"
    result = run_demo("--epochs", 1, "--out", out)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows if len(row) == 9 and row[0] in NAMES] == NAMES
    assert "torch" in result.stdout.splitlines()[0]
    assert "12/12" in result.stderr  # the progress bar
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"IEND" in content[-12:]


def test_bad_argument_ends_the_process_and_writes_nothing(tmp_path):
    out = tmp_path / "curves.png"
    result = run_demo("--out", out, "--epochs", 0)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--epochs", "0"),
        ("--epochs", "many"),
        ("--seed", "-1"),
        ("--device", "abacus"),
        ("--device", "meta"),
        ("--out", "no/such/folder/curves.png"),
        ("--out", "."),
        ("--learn",),
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments, monkeypatch, capsys):
    """In this process: a new one takes seconds to import everything."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    demo = importlib.import_module("bench.demo")
    with pytest.raises(SystemExit) as exit_info:
        demo.main()
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert arguments[0] in printed.err


@pytest.mark.parametrize("drift", [2e-4, float("nan")])
def test_weights_that_drift_are_an_error(drift, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    demo = importlib.import_module("bench.demo")
    runs = [demo.Run("eager", [2.0, 1.0], [0.001], 0.5, torch.tensor([1.0, weight])) for weight in (1.0 + drift, 1.0)]
    monkeypatch.setattr(demo, "train_all", lambda options: {name: tuple(runs) for name in NAMES})
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "curves.png")])
    assert demo.main() == 1
    assert "the weights differ" in capsys.readouterr().err
