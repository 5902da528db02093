"""`python -m bench.low_precision`, what its committed result says, and the copy of it in docs/low-precision.md."""

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt

for package in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"the benchmark needs {package}: pip install -e .[demo]")

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads((ROOT / "bench" / "results" / "low-precision-cpu.json").read_text())
FP32_STATES, EIGHT_BITS = "state_dtype=torch.float32", "state_dtype='8bit'"


@pytest.fixture
def low_precision(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.low_precision")


def final(mode, options):
    """The final losses of a committed row, one a seed."""
    (row,) = (row for row in COMMITTED["rows"] if (row["mode"], row["options"]) == (mode, options))
    return [curve[-1] for curve in row["curves"]]


def test_trains_prints_draws_and_records(tmp_path):
    env = {key: value for key, value in os.environ.items() if key not in ("FUSEDOPT_DEBUG", "TRITON_INTERPRET")}
    arguments = ["--epochs", "1", "--seeds", "1", "--optimizer", "SGD", "--out", str(tmp_path / "curves.png")]
    command = [sys.executable, "-m", "bench.low_precision", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "15/15" in result.stderr  # the progress bar
    recorded = json.loads((tmp_path / "curves.json").read_text())
    assert recorded["command"].startswith("python -m bench.low_precision --epochs 1 --seeds 1")
    assert (recorded["torch"], recorded["optimizer"], recorded["epochs"]) == (torch.__version__, "SGD", 1)
    assert [row["mode"] for row in recorded["rows"]] == [row["mode"] for row in COMMITTED["rows"]]
    starts = {row["curves"][0][0] for row in recorded["rows"]}
    assert len(starts) == 1, "not all began with the same weights"
    for row in recorded["rows"]:
        ((start, end),) = row["curves"]
        assert 0 < end < start
        assert f"{end:.4f}" in result.stdout
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("fp32, states stochastic", f"{EIGHT_BITS}, rounding='stochastic'"),
        ("bf16 + Kahan", f"kahan=True, {FP32_STATES}"),
        ("bf16 + stochastic", "rounding='stochastic'"),
        ("bf16 + stochastic", f"rounding='stochastic', {FP32_STATES}"),
        ("bf16 + stochastic", f"rounding='stochastic', {EIGHT_BITS}"),
        ("bf16 + master weights", f"master_weights=True, {FP32_STATES}"),
    ],
)
def test_committed_run_follows_fp32(mode, options):
    for loss, fp32 in zip(final(mode, options), final("fp32", ""), strict=True):
        assert loss == pytest.approx(fp32, rel=0.05)


@pytest.mark.parametrize("options", ["", FP32_STATES, EIGHT_BITS])
def test_committed_run_stalls_when_rounded_to_nearest(options):
    """By more than the seeds differ, too."""
    assert min(final("bf16 nearest", options)) > 1.05 * max(final("fp32", ""))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("fp32, states nearest", EIGHT_BITS),
        ("bf16 + Kahan", f"kahan=True, {EIGHT_BITS}"),
        ("bf16 + master weights", f"master_weights=True, {EIGHT_BITS}"),
    ],
)
def test_committed_run_takes_longer_steps_with_8_bits_to_the_nearest(mode, options):
    """As the page says. No seed follows fp32."""
    for loss, fp32 in zip(final(mode, options), final("fp32", ""), strict=True):
        assert loss < 0.95 * fp32


def test_committed_run_is_the_default_one(low_precision, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["low_precision"])
    options = low_precision.parse_arguments()
    for name in ("optimizer", "epochs", "seeds"):
        assert COMMITTED[name] == getattr(options, name)
    assert COMMITTED["hyperparameters"] == low_precision.OPTIMIZERS[options.optimizer]
    assert [row["options"] for row in COMMITTED["rows"]] == [mode.label for mode in low_precision.MODES]


def test_its_page_shows_the_committed_run(low_precision):
    page = (ROOT / "docs" / "low-precision.md").read_text()
    table = low_precision.table([low_precision.Row(**row) for row in COMMITTED["rows"]], "github")
    assert table in page, f"the page should say\n{table}"
    assert COMMITTED["command"] in page
    for number in (COMMITTED["torch"].partition("+")[0], f"lr={COMMITTED['hyperparameters']['lr']:g}"):
        assert number in page


def test_table_tells_median_range_and_difference(low_precision):
    fp32 = low_precision.Row("fp32", "", 28, [[2.0, 0.5], [2.0, 1.0], [2.0, 2.0]], [0.5, 0.6, 0.9])
    row = low_precision.Row("bf16", "x=1", 14, [[2.0, 0.55], [2.0, 0.9], [2.0, 1.0]], [0.5, 0.7, 0.75])
    last = low_precision.table([fp32, row]).splitlines()[-1]
    assert last.split() == ["bf16", "x=1", "14", "0.9000", "0.5500–1.0000", "-10.00", "%", "-50.00", "%", "70.0%"]
    assert statistics.median(row.final) == 0.9


@pytest.mark.parametrize(
    ("name", "dtype", "options", "expected"),
    [
        ("AdamW", torch.bfloat16, {}, 2 + 2 * (2 + 2 + 2)),
        ("AdamW", torch.bfloat16, {"kahan": True, "state_dtype": torch.float32}, 2 + 2 * (2 + 2 + 4 + 4)),
        ("SGD", torch.bfloat16, {"momentum": 0.9, "master_weights": True}, 2 + 2 * (2 + 2 + 4)),
        ("Lion", torch.float32, {}, 4 + 2 * (4 + 4)),
        ("AdamW", torch.float32, {"state_dtype": "8bit"}, 4 + 2 * (4 + 2 * (1 + 4 / 256))),
        ("Lion", torch.bfloat16, {"state_dtype": "8bit"}, 2 + 2 * (2 + 1 + 4 / 256)),
    ],
)
def test_bytes(name, dtype, options, expected, low_precision):
    param = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = getattr(fusedopt, name)([param], lr=0.1, **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert low_precision.bytes_per_element(optimizer) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ("--epochs", "0"),
        ("--seeds", "0"),
        ("--optimizer", "LBFGS"),
        ("--device", "meta"),
        ("--out", "no/such/folder/curves.png"),
        ("--out", "curves.json"),
        ("--learn",),
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments, low_precision, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["low_precision", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        low_precision.main()
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert arguments[0] in printed.err
