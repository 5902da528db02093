"""The report of a benchmark: its tables, its figures, and what it says of the aims. And a run, from end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("matplotlib", "tabulate"):
    pytest.importorskip(package, reason=f"the report needs {package}: pip install -e .[bench]")


from bench import __main__ as everything
from bench.common import ROOT
from bench.report import cli as report
from bench.report.aims import aims
from bench.report.plots import draw_times
from bench.steps.compare import COPY, Row
from bench.steps.peers import FLASHOPTIM, FOREACH, FUSED, OURS
from bench.steps.shapes import GPT2_ON_CPU, LARGE, ONE, THOUSAND, elements_curve, tensors_curve


def row(optimizer, shape, contender, seconds=None, threads=1, **figures):
    """A row of a run on a GPU; the copy of as many bytes takes a millisecond for each 2^28 elements."""
    made = Row(
        case=f"{optimizer}-lr=0.01",
        optimizer=optimizer,
        shape=shape.name,
        shrunk=shape.shrunk,
        tensors=len(shape.sizes),
        groups=shape.groups,
        elements=shape.elements,
        dtype="float32",
        gradients="random",
        threads=threads,
        contender=contender,
        **figures,
    )
    if seconds is not None:
        spread = {"lowest": 0.9 * seconds, "median": seconds, "p90": 1.2 * seconds, "samples": 20}
        made.time = made.host_time = spread
        made.launches, made.extra_bytes, made.bytes_moved = 2, 3 * 2**20, 28 * shape.elements
        made.share_of_copy = shape.elements / 2**28 * 1e-3 / seconds
    return made.record()


@pytest.fixture
def result():
    steps = [
        *(row("AdamW", LARGE, who, s) for who, s in {OURS: 1.02e-3, FUSED: 1e-3, FOREACH: 4e-3, COPY: 1e-3}.items()),
        row("AdamW", LARGE, FLASHOPTIM, error="cannot import flashoptim: no"),
        *(row("NAdam", LARGE, who, s) for who, s in {OURS: 1.25e-3, FOREACH: 3e-3, COPY: 1e-3}.items()),
        *(row("Rprop", LARGE, who, s) for who, s in {OURS: 1e-3, FOREACH: 5e-3, COPY: 1e-3}.items()),
        *(row("AdamW", THOUSAND, who, s) for who, s in {OURS: 35e-6, FOREACH: 90e-6, COPY: 10e-6}.items()),
    ]
    curves = [*elements_curve(), *tensors_curve()]
    scale = [row("AdamW", shape, who, 1e-5 + 1e-11 * shape.elements) for shape in curves for who in (OURS, COPY)]
    return {
        "command": "pytest bench",
        "date": "2026-01-01",
        "commit": "abc",
        "device": "imagined",
        "driver": "1.2",
        "cpu": "processor",
        "cores": 2,
        "python": "3",
        "torch": "2",
        "triton": "3",
        "peers": {"flashoptim": "not installed"},
        "left_out": ["the rest"],
        "rows": {"step": steps, "pipeline": [], "scale": scale},
    }


def test_aims_and_by_how_much_they_are_missed(result):
    told = {aim.what: (aim.aim, aim.measured, aim.missed_by) for aim in aims(result)}
    large = "one tensor, float32"
    assert told == {
        f"share of copy bandwidth: AdamW-lr=0.01, {large}": ("≥ 95%", "98.0%", ""),
        f"share of copy bandwidth: NAdam-lr=0.01, {large}": ("≥ 95%", "80.0%", "15.0%"),
        f"share of copy bandwidth: Rprop-lr=0.01, {large}": ("≥ 95%", "100.0%", ""),
        f"times as fast as torch foreach: NAdam-lr=0.01, {large}": ("≥ 2.8", "2.40", "0.40"),
        f"times as fast as torch foreach: Rprop-lr=0.01, {large}": ("≥ 4.5", "5.00", ""),
        "longer than the copy: AdamW-lr=0.01, 1,000 × 1,000, float32": ("≤ 15 µs", "25.0 µs", "10.0 µs"),
        f"time beside the fastest peer's, torch fused: AdamW-lr=0.01, {large}": ("≤ 100.0%", "102.0%", "2.0%"),
        f"time beside the fastest peer's, torch foreach: NAdam-lr=0.01, {large}": ("≤ 100.0%", "41.7%", ""),
        f"time beside the fastest peer's, torch foreach: Rprop-lr=0.01, {large}": ("≤ 100.0%", "20.0%", ""),
        "time beside the fastest peer's, torch foreach: AdamW-lr=0.01, 1,000 × 1,000, float32": (
            "≤ 100.0%",
            "38.9%",
            "",
        ),
    }


def test_without_a_copy_there_are_no_aims(result):
    result["rows"]["step"] = [each for each in result["rows"]["step"] if each["contender"] != COPY]
    assert aims(result) == []


def test_report(result, monkeypatch, capsys, tmp_path):
    path = tmp_path / "imagined-2026-01-01.json"
    path.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    assert report.main() == 0
    text = path.with_suffix(".md").read_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert (
        "imagined, driver 1.2; processor, 2 cores; Python 3, torch 2, Triton 3; commit abc, 2026-01-01: `pytest bench`."
        in text
    )
    assert "- the rest" in lines
    assert "| AdamW-lr=0.01, one tensor, float32 | 98.0% | | | 25.0% | 100.0% | | | | 100.0% |" in lines
    assert "| time beside the fastest peer's, torch fused: AdamW-lr=0.01, one tensor, float32 " in text
    assert "| AdamW-lr=0.01, one tensor, float32 | 1.02 (0.918–1.22) ms | 0.26 | 1.02 | 1.02 |" in lines
    spread = "1.02 (0.918–1.22) ms"
    line = f"| AdamW-lr=0.01 | one tensor | float32 | 1 | fusedopt | {spread} | {spread}"
    line += " | 2 | 3.0 MiB | 28.0 | 7,369 | 98.0% |"
    assert line in lines
    assert "| flashoptim | cannot import flashoptim: no | AdamW-lr=0.01, one tensor, float32 |" in lines
    figures = sorted(file.name for file in tmp_path.glob("*.png"))
    assert figures == ["imagined-2026-01-01-scale.png", "imagined-2026-01-01-share.png"]
    assert all(name in capsys.readouterr().out for name in figures[:1])


@pytest.fixture
def on_cpu(result):
    """The same with one thread and with two, where the large tensor is an eighth."""
    times = {
        ("AdamW", LARGE.shrink(2**25)): {OURS: 0.9e-3, FUSED: 1e-3, FOREACH: 4e-3, COPY: 1e-3},
        ("AdamW", ONE): {OURS: 60e-6, FUSED: 50e-6, FOREACH: 100e-6, COPY: 1e-6},
        ("NAdam", GPT2_ON_CPU): {OURS: 1e-3, FUSED: None, FOREACH: 4e-3, COPY: 1e-3},
        ("Lion", LARGE.shrink(2**25)): {OURS: 1.5e-3, FUSED: None, FOREACH: None, COPY: 1e-3},
    }
    result["device"] = "cpu"
    result["rows"]["step"] = [
        row(optimizer, shape, who, None if seconds is None else seconds / threads, threads=threads)
        for threads in (1, 2)
        for (optimizer, shape), each in times.items()
        for who, seconds in each.items()
    ]
    return result


def test_aims_on_a_cpu(on_cpu):
    told = {aim.what: (aim.aim, aim.measured, aim.missed_by) for aim in aims(on_cpu)}
    once = {
        "torch fused's: AdamW-lr=0.01, one tensor ÷ 8, float32": ("≤ 1.0", "0.900", ""),
        "torch fused's: AdamW-lr=0.01, 1 × 1,000, float32": ("≤ 1.0", "1.200", "0.200"),
        "torch foreach's: NAdam-lr=0.01, GPT-2 small ÷ 128, float32": ("≤ 0.2", "0.250", "0.050"),
        "copy's: AdamW-lr=0.01, one tensor ÷ 8, float32": ("≤ 1.0", "0.900", ""),
        "copy's: Lion-lr=0.01, one tensor ÷ 8, float32": ("≤ 1.0", "1.500", "0.500"),
    }
    assert told == {f"time beside {what}{more}": each for what, each in once.items() for more in ("", ", 2 threads")}


def test_report_of_a_cpu(on_cpu, monkeypatch, tmp_path):
    path = tmp_path / "cpu-2026-01-01.json"
    path.write_text(json.dumps(on_cpu))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    assert report.main() == 0
    lines = [" ".join(line.split()) for line in path.with_suffix(".md").read_text().splitlines()]
    large = "one tensor ÷ 8, float32"
    assert f"| time beside copy's: Lion-lr=0.01, {large}, 2 threads | ≤ 1.0 | 1.500 | missed by 0.500 |" in lines
    assert f"| time beside copy's: AdamW-lr=0.01, {large} | ≤ 1.0 | 0.900 | met |" in lines
    begin = lines.index("## Time of fusedopt's step beside the others', 2 threads")
    assert "| AdamW-lr=0.01, 1 × 1,000, float32 | 30 (27–36) µs | 0.60 | 1.20 | 60.00 |" in lines[begin:]
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [
        "cpu-2026-01-01-scale.png",
        "cpu-2026-01-01-time.png",
    ]


def test_bars_are_times_in_copies_and_in_torchs_fused(on_cpu):
    above, below = draw_times(on_cpu).axes

    def heights(panel):
        return {bars.get_label(): pytest.approx([bar.get_height() for bar in bars]) for bars in panel.containers}

    assert heights(above) == {OURS: [0.9, 1.5], FUSED: [1, 0], FOREACH: [4, 0]}
    assert heights(below) == {OURS: [0.9, 1.2], FOREACH: [4, 2]}


@pytest.mark.parametrize("arguments", [["no/such/file.json"], []], ids=str)
def test_bad_argument(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("plugin", [["-p", "no:benchmark"], []], ids=["without pytest-benchmark", "with"])
def test_a_run_from_end_to_end(plugin, tmp_path):
    """`pytest bench` writes what `python -m bench.report` reads, whoever is asked for."""
    if not plugin:
        pytest.importorskip("pytest_benchmark")
    path = tmp_path / "result.json"
    scale = "bench/steps/test_scale.py::test_scale[AdamW-lr=0.01-2^10 elements-float32"
    chosen = [f"{scale}-{who}]" for who in (OURS, FOREACH)]
    # The worker of pytest-xdist that runs this test is none for those below.
    unset = ("FUSEDOPT_DEBUG", "TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    command = [sys.executable, "-m", "pytest", *chosen, "--results", path, *plugin]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(path.read_text())
    assert {each["contender"] for each in result["rows"]["scale"]} - {COPY} == {OURS, FOREACH}
    assert all(each["time"]["median"] > 0 for each in result["rows"]["scale"])
    assert result["command"].startswith("pytest 'bench/steps/test_scale.py::")
    if plugin:
        assert "pytest-benchmark is not installed" in ran.stdout
    else:
        assert "benchmark 'AdamW-lr=0.01, 2^10 elements, float32': 2 tests" in ran.stdout
    assert "# Benchmark on " in report.markdown(result)


def test_what_the_time_did_not_suffice_for_is_told(tmp_path):
    path = tmp_path / "result.json"
    left_out = "scale AdamW-lr=0.01-2^10 elements-float32"
    chosen = f"bench/steps/test_scale.py::test_scale[{left_out.removeprefix('scale ')}-fusedopt]"
    command = [sys.executable, "-m", "pytest", chosen, "--results", path, "--budget", "0"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=300).returncode == 0
    result = json.loads(path.read_text())
    assert result["left_out"][-1] == f"{left_out}: the time was over"
    assert not any(result["rows"].values())


def test_what_is_missing_keeps_nobody_else_from_running(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr(everything, "find_spec", lambda name: None if name == "triton" else True)

    def run(command, **options):
        ran.append(command[2])
        if "--results" in command:
            Path(command[command.index("--results") + 1]).touch()
        return subprocess.CompletedProcess(command, returncode=int(command[2] == "pytest"))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench", "--gpu-tests", "--budget", "5", "--out", str(tmp_path)])
    assert everything.main() == 2
    assert ran == ["pytest", "bench.muon", "pytest", "bench.report"]
    assert "left out: triton not installed" in capsys.readouterr().out


def test_results_that_the_readme_shows_are_there():
    shown = re.findall(r"\]\((bench/results/[^)]+)\)", (ROOT / "README.md").read_text())
    assert shown
    assert [path for path in shown if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "results").glob("*-20??-??-??.json")), ids=lambda path: path.stem
)
def test_a_committed_report_is_that_of_its_result(path):
    assert report.markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()
