"""`python -m bench.eight_bits`, and what its committed result says."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import CASES

for package in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"the benchmark needs {package}: pip install -e .[demo]")

from bench.eight_bits import cli, report, sizes, training
from bench.eight_bits.training import CONTENDERS, FP32, Contender, Run
from bench.steps.shapes import GPT2, Shape

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "eight-bits-cpu.json"
COMMITTED = json.loads(RESULT.read_text())
ONE_RUN = argparse.Namespace(device=torch.device("cpu"), steps=3)
TEXT = bytes(range(97, 123)) * 10
MANY, FEW = 4096, 4095  # elements of a parameter: 8 bits hold its states, or do not


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model of a few thousand parameters, and one class whose bytes are counted."""
    monkeypatch.setattr(training, "WIDTH", 32)
    monkeypatch.setattr(training, "LAYERS", 1)
    monkeypatch.setattr(sizes, "CASES", [case for case in CASES if case.optimizer in ("RMSprop", "Lion")])
    monkeypatch.setattr(sizes, "MILLION", Shape("one tensor", ((64, 64),)))
    monkeypatch.setattr(cli, "GPT2", Shape("GPT-2 small", ((MANY,), (FEW,))))


def committed_runs(name, betas):
    (contender,) = (each for each in CONTENDERS if each.name == name)
    return report.runs_of([Run(**run) for run in COMMITTED["runs"]], contender, betas)


def quantized(numel):
    return numel + 4 * numel // 256


@pytest.mark.usefixtures("small_states_are_full")
def test_trains_counts_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["eight_bits", "--steps", "3", "--seeds", "2", "--out", str(tmp_path)])
    monkeypatch.setattr(training, "CONTENDERS", [each for each in CONTENDERS if each.library in ("fusedopt", "torch")])
    monkeypatch.setattr(report, "CONTENDERS", training.CONTENDERS)
    assert cli.main() == 0
    result = json.loads((tmp_path / "eight-bits-cpu.json").read_text())
    assert result["command"] == f"python -m bench.eight_bits --steps 3 --seeds 2 --out {tmp_path}"
    runs = [Run(**run) for run in result["runs"]]
    assert len(runs) == len(training.CONTENDERS) * len(training.BETAS) * 2
    for seed in range(2):
        assert len({run.losses[0] for run in runs if run.seed == seed}) == 1, "not the same weights and batches"
        losses_of = {(run.contender, *run.betas): run.losses for run in runs if run.seed == seed}
        assert len({losses[2] for losses in losses_of.values()}) > len(training.BETAS), (
            "all contenders are one and the same"
        )
        for losses in losses_of.values():
            assert losses == pytest.approx(losses_of["fp32", 0.9, 0.95], rel=0.01)
    for run in runs:
        assert len(run.losses) == 3
        assert run.losses == pytest.approx([math.log(256)] * 3, rel=0.1)  # of bytes that nothing is known of yet
    table = (tmp_path / "eight-bits-cpu.md").read_text()
    assert table in capsys.readouterr().out
    assert f"{(2 * quantized(MANY) + 8 * FEW + 8) / (MANY + FEW):.4f} in 8 bits" in table
    assert (tmp_path / "eight-bits-cpu.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_rows_of_bytes():
    rows = sizes.all_bytes()
    found = {(row["optimizer"], row["options"]): [row[name] for name in sizes.STATE_DTYPES] for row in rows}
    step = 4 / MANY
    assert found["Lion", ""] == [4, 2, 1 + 4 / 256]
    assert found["RMSprop", ""] == [4 + step, 2 + step, 1 + 4 / 256 + step]
    assert found["RMSprop", "momentum=0.9"] == [8 + step, 4 + step, 2 + 8 / 256 + step]
    assert found["RMSprop", "centered=True"] == [8 + step, 4 + step, 8 + step]  # a variance is never in 8 bits
    assert found["RMSprop", "centered=True, momentum=0.1"] == [12 + step, 6 + step, 9 + 4 / 256 + step]
    assert len(rows) == len(found) == 5


def test_bytes_that_states_share_count_once():
    class Halves(torch.Tensor):
        @staticmethod
        def __new__(cls, low, high):
            made = torch.Tensor._make_wrapper_subclass(cls, (8,), dtype=torch.float32)
            made.low, made.high = low, high
            return made

        def __tensor_flatten__(self):
            return ["low", "high"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    shared = torch.zeros(256)
    params = [torch.nn.Parameter(torch.zeros(8)) for _ in range(2)]
    optimizer = torch.optim.SGD(params)
    optimizer.state[params[0]] = {"step": 3, "a": Halves(torch.zeros(8, dtype=torch.uint8), shared), "b": shared[:16]}
    optimizer.state[params[1]] = {"c": torch.zeros(5, dtype=torch.bfloat16)[1:], "d": shared}
    assert sizes.stored_bytes(optimizer) == 8 + 4 * 256 + 2 * 5


def test_other_libraries_may_be_missing_or_fail_but_ours_may_not():
    def run(*arguments, **options):
        return training.train(Contender("x", *arguments, **options), (0.9, 0.95), 0, TEXT, ONE_RUN)

    assert run("no_such_library").why_not == "not installed"
    failed = run("numpy")  # which is installed, but has no AdamW
    assert failed.why_not.startswith("does not run here: module 'numpy' has no attribute")
    assert failed.losses == []
    with pytest.raises(ValueError, match="state_dtype"):
        run("fusedopt", options={"state_dtype": "7bit"})


def test_a_missing_library_is_told_in_the_table():
    runs = [Run(each.name, (0.9, 0.95), 0, losses=[2.0], parameters=1) for each in CONTENDERS[:-1]]
    runs.append(Run(CONTENDERS[-1].name, (0.9, 0.95), 0, why_not="not installed"))
    last = report.losses_table(runs, (0.9, 0.95)).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == ["bitsandbytes", "not installed", *[""] * 5]


def test_table_tells_means_and_differences(monkeypatch):
    ours = Contender("ours", "fusedopt")
    monkeypatch.setattr(report, "CONTENDERS", [FP32, ours])
    finals = {"fp32": (1.0, 2.0, 3.0), "ours": (1.01, 2.0, 2.97)}
    runs = [
        Run(name, (0.9, 0.95), seed, losses=[9.0] * 18 + [loss - 0.5, loss + 0.5], parameters=4, state_bytes=9)
        for name, losses in finals.items()
        for seed, loss in enumerate(losses)
    ]
    last = report.losses_table(runs, (0.9, 0.95)).splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells == ["ours", "1.9933", "1.0100–2.9700", "+0.00 %", "-1.00 to +1.00 %", "yes", "2.250"]


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (9, 1), (20, 2), (400, 40)])
def test_the_last_tenth(steps, last):
    run = Run("x", (0.9, 0.95), 0, losses=[100.0] * (steps - last) + [float(place) for place in range(last)])
    assert run.final == (last - 1) / 2


def test_committed_run_is_the_default_one(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["eight_bits"])
    options = cli.parse_arguments()
    for name in ("steps", "seeds"):
        assert COMMITTED[name] == getattr(options, name)
    assert COMMITTED["hyperparameters"] == training.HYPER
    assert COMMITTED["batch_size"] == training.BATCH_SIZE
    assert list(map(tuple, COMMITTED["betas"])) == training.BETAS
    for betas in training.BETAS:
        for contender in CONTENDERS:
            runs = committed_runs(contender.name, betas)
            assert [run.seed for run in runs] == list(range(options.seeds))
            assert all(len(run.losses) == options.steps or run.why_not for run in runs)


def test_committed_table_is_that_of_the_numbers(monkeypatch):
    monkeypatch.undo()
    assert report.markdown(COMMITTED) == RESULT.with_suffix(".md").read_text()


def test_committed_bytes_of_gpt2():
    """Counted from the shapes: two states a parameter, and a number of steps for each."""
    numels = list(map(math.prod, GPT2.sizes))
    small = [numel for numel in numels if numel < MANY]
    large = [numel for numel in numels if numel >= MANY]
    codes = sum(-(-numel // 16) * 16 + 4 * -(-numel // 256) for numel in large)
    expected = (2 * codes + 8 * sum(small) + 4 * len(numels)) / sum(numels)
    assert COMMITTED["gpt2"]["8 bits"] == pytest.approx(expected, rel=1e-12)
    assert COMMITTED["gpt2"]["8 bits"] <= COMMITTED["gpt2"]["most"] == 2.04


def test_committed_bytes_are_of_all_classes():
    assert {row["optimizer"] for row in COMMITTED["bytes"]} == {case.optimizer for case in CASES}


@pytest.mark.parametrize("betas", training.BETAS)
def test_committed_run_follows_fp32_with_stochastic_rounding(betas):
    above = report.differences(
        committed_runs("8 bits, stochastic", betas), committed_runs("fp32", betas), lambda run: run.final
    )
    assert max(map(abs, above)) <= report.CLOSE


@pytest.mark.parametrize(
    "arguments",
    [("--steps", "0"), ("--seeds", "0"), ("--jobs", "0"), ("--device", "meta"), ("--out", "no/such/folder"), ("--x",)],
    ids=" ".join,
)
def test_bad_arguments(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eight_bits", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert arguments[0] in printed.err
