"""`python -m fusedopt.textbook`: the book's numbers, what the book only states, and the command line."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("matplotlib", "tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"the textbook needs {package}: pip install -e .[demo]")

from fusedopt.textbook import average, cli, stability, trace

ROOT = Path(__file__).resolve().parents[2]

# As the book prints them.
PRINTED = {
    ("gd", 0.4): ("-0.943467", "-0.000073"),
    ("gd", 0.6): ("-0.387814", "-1673.365109"),
    ("momentum", 0.4): ("-0.062843", "0.001202"),
    ("momentum", 0.6): ("0.007188", "0.002553"),
    ("adagrad", 0.4): ("-2.382563", "-0.158591"),
    ("adagrad", 2.0): ("-0.002295", "-0.000000"),
    ("rmsprop", 0.4): ("-0.010599", "0.000000"),
}
LINES = {key: f"epoch 20, x1 {x1}, x2 {x2}" for key, (x1, x2) in PRINTED.items()}


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Whatever the environment of these tests says."""
    monkeypatch.delenv("FUSEDOPT_AIRFOIL", raising=False)


@pytest.fixture
def textbook(tmp_path, capsys):
    """Run a command in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        try:
            code = cli.main([*map(str, arguments), "--out", str(tmp_path / "out")])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def document(textbook):
    """What a command that succeeds prints as JSON."""

    def run(*arguments):
        code, out, err = textbook(*arguments, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    return run


def check_picture(path):
    content = Path(path).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"IEND" in content[-12:]
    assert len(content) < 150_000


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_traces_are_the_books(backend, device):
    compared = []
    for form, hyper, line in trace.BOOK:
        if line is not None:
            path = trace.descend(form, hyper, 0.1, 2.0, (-5.0, -2.0), 20, backend, device)
            run = trace.Trace(form, hyper, line, path)
            assert run.printed == LINES[form, hyper["lr"]] == line
            compared.append((form, hyper["lr"]))
    assert compared == list(LINES)


def by_hand(update):
    """Twenty steps of an update of the book, in numpy."""
    x, states = np.array([-5.0, -2.0]), dict.fromkeys(["v", "s", "delta"], 0.0)
    for t in range(1, 21):
        x = update(x, np.array([0.2, 4.0]) * x, states, t)
    return x


def momentum(x, g, states, t):
    states["v"] = 0.5 * states["v"] + 0.6 * g
    return x - states["v"]


def adadelta(x, g, states, t):
    states["s"] = 0.9 * states["s"] + 0.1 * g**2
    step = np.sqrt((states["delta"] + 1e-5) / (states["s"] + 1e-5)) * g
    states["delta"] = 0.9 * states["delta"] + 0.1 * step**2
    return x - step


def adam(x, g, states, t):
    states["v"] = 0.9 * states["v"] + 0.1 * g
    states["s"] = 0.999 * states["s"] + 0.001 * g**2
    return x - 0.4 * (states["v"] / (1 - 0.9**t)) / (np.sqrt(states["s"] / (1 - 0.999**t)) + 1e-6)


@pytest.mark.parametrize(
    ("form", "lr", "update"), [("average", 0.6, momentum), ("adadelta", 1, adadelta), ("adam", 0.4, adam)]
)
def test_traces_that_the_book_does_not_print_are_its_equations(form, lr, update, document):
    found = document("trace", "--optimizer", form)["traces"]
    (one,) = [each for each in found if each["hyperparameters"]["lr"] == lr]
    assert one["book"] is None
    assert one["path"][-1] == pytest.approx(by_hand(update), rel=1e-10)


def test_trace_prints_the_lines_side_by_side(textbook):
    code, out, _ = textbook("trace")
    assert code == 0
    for (form, lr), line in LINES.items():
        (row,) = [row for row in out.splitlines() if row.count(line) == 2]
        assert row.lower().startswith(form if form != "gd" else "gradient descent")
        assert f"η = {lr:g}" in row
        assert row.rstrip().endswith("yes")
    check_picture(out.splitlines()[-1].partition(": ")[2])


def test_trace_through_the_kernels_on_the_command_line(tmp_path):
    """In a process of its own, since Triton's interpreter is chosen when Triton is imported; all lines are above."""
    command = [sys.executable, "-m", "fusedopt.textbook", "trace", "--backend", "triton", "--optimizer", "momentum"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--json", "--out", tmp_path],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = {each["hyperparameters"]["lr"]: each["printed"] for each in json.loads(result.stdout)["traces"]}
    assert lines == {lr: line for (form, lr), line in LINES.items() if form == "momentum"}


def test_trace_of_another_function(document):
    """Against the closed form x ← (1 − 2ηa) x, and without the book's values."""
    arguments = ["--optimizer", "gd", "--a", 0.3, "--b", 1.5, "--lr", 0.1, "--start", -1, 4, "--steps", 7]
    (only,) = document("trace", *arguments)["traces"]
    expected = [-((1 - 2 * 0.1 * 0.3) ** 7), 4 * (1 - 2 * 0.1 * 1.5) ** 7]
    assert only["path"][0] == [-1, 4]
    assert len(only["path"]) == 8
    assert only["path"][-1] == pytest.approx(expected, rel=1e-12)
    assert only["book"] is None
    assert only["printed"] == f"epoch 7, x1 {expected[0]:f}, x2 {expected[1]:f}"


@pytest.mark.parametrize(
    "changed", [["--a", 0.2], ["--b", 1], ["--start", -5, -1], ["--steps", 19], ["--eps", 1e-3]], ids=str
)
def test_no_value_of_the_book_beside_what_is_not_the_books(changed, textbook):
    code, out, _ = textbook("trace", "--optimizer", "adagrad", *changed)
    assert code == 0
    rows = [row for row in out.splitlines() if row.startswith("AdaGrad")]
    assert len(rows) == 2
    assert all("yes" not in row and "–" in row for row in rows)


def test_a_changed_hyperparameter_finds_the_books_row(document):
    """Both of the book's runs become one, which is the second."""
    (only,) = document("trace", "--optimizer", "gd", "--lr", 0.6)["traces"]
    assert only["book"] == only["printed"] == LINES["gd", 0.6]


def test_trace_that_is_not_the_books_is_told_by_the_exit_code(textbook, monkeypatch):
    monkeypatch.setattr(trace, "BOOK", [("gd", {"lr": 0.4}, "epoch 20, x1 -0.943467, x2 -0.000074")])
    code, out, _ = textbook("trace")
    assert code == 1
    assert out.count(" NO") == 1


def test_trace_that_overflows(document):
    (only,) = document("trace", "--optimizer", "gd", "--lr", 1e200)["traces"]
    assert only["path"][-1] == [None, None]
    assert only["path"][1][0] == pytest.approx(2 * 0.1 * 5 * 1e200)


HEAVY = [(0.0, "gd", []), (0.5, "momentum", []), (0.9, "momentum", ["--momentum", 0.9])]


def iteration_matrix(rate, beta, eigenvalue):
    """What one step of momentum does to (v, x)."""
    return np.array([[beta, eigenvalue], [-rate * beta, 1 - rate * eigenvalue]])


@pytest.mark.parametrize(("beta", "form", "options"), HEAVY, ids=lambda value: str(value))
def test_limits_are_where_the_iteration_begins_to_grow(beta, form, options, document):
    eigenvalues = [0.03, 0.7, 5.0]
    found = document("stability", "--eigenvalues", *eigenvalues, "--optimizer", "gd", "--steps", 1, *options)
    assert found["condition_number"] == pytest.approx(5 / 0.03)
    (limit,) = [each for each in found["limits"] if each["optimizer"] == form]

    def growth(factor):
        matrices = [iteration_matrix(factor * limit["largest_stable_lr"], beta, each) for each in eigenvalues]
        return max(abs(np.linalg.eigvals(matrix)).max() for matrix in matrices)

    assert growth(0.9999) < 1 < growth(1.0001)
    assert limit["holds"]
    assert limit["distance_below"] < 1
    assert limit["distance_above"] is None or limit["distance_above"] > 1


def test_checks_run_at_both_sides_of_the_limit():
    """Against powers of the iteration matrix."""
    for limit in stability.limits([0.2, 4.0], 0.3):
        beta = limit.hyper.get("momentum", 0.0)
        for factor, share in ((0.99, limit.below), (1.01, limit.above)):
            steps = [
                np.linalg.matrix_power(iteration_matrix(factor * limit.rate, beta, each), limit.steps)
                for each in (0.2, 4.0)
            ]
            expected = math.hypot(*(step[1, 1] for step in steps)) / math.sqrt(2)
            assert share == pytest.approx(expected, rel=1e-6)


def test_a_limit_that_does_not_hold_is_told_by_the_exit_code(textbook, monkeypatch):
    limits = [stability.Limit("gd", {}, 0.6, 100, 3.0, 5.0)]
    monkeypatch.setattr(stability, "limits", lambda *given: limits)
    code, out, _ = textbook("stability", "--optimizer", "gd", "--steps", 1)
    assert code == 1
    assert out.count(" NO") == 1


def verdict(distances):
    """From the distances in the last quarter of the steps; and whether they are clear of the thresholds."""
    far = np.nan_to_num(np.max(distances, axis=0), nan=np.inf).clip(1e-300)
    threshold = np.minimum(abs(np.log(far / 0.01)), abs(np.log(far)))
    return np.where(far <= 0.01, 0, np.where(far <= 1, 1, 2)), threshold > 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_map_is_what_the_equations_give(document):
    """All cells at once, in numpy."""
    forms = ["gd", "momentum", "adagrad"]
    found = document("stability", "--optimizer", *forms, "--steps", 60, "--momentum", 0.8)["map"]
    rates, conditions = np.array(found["lr"]), np.array(found["condition_numbers"])
    eigenvalues = 0.2 * np.stack([np.ones_like(conditions), conditions])[:, :, None]
    assert [*found["optimizers"]] == forms
    for form in forms:
        x, m, s = np.ones((2, len(conditions), len(rates))), 0.0, 0.0
        distances = []
        for _ in range(60):
            g = eigenvalues * x
            m, s = 0.8 * m + rates * g, s + g**2
            x = x - {"gd": rates * g, "momentum": m, "adagrad": rates * g / np.sqrt(s + 1e-6)}[form]
            distances.append(np.sqrt((x**2).mean(axis=0)))
        expected, clear = verdict(distances[45:])
        assert clear.mean() > 0.99
        assert (np.array(found["optimizers"][form]) == expected)[clear].all(), form
        assert set(np.unique(expected)) == ({0, 1} if form == "adagrad" else {0, 1, 2})


@pytest.mark.parametrize("form", stability.MAPPED)
def test_a_cell_of_the_map_is_a_run_of_its_own(form):
    rates, conditions = torch.tensor([0.02, 0.3, 3.0]).double(), torch.tensor([1.0, 30.0]).double()
    cells = stability.scan(form, {}, 0.2, rates, conditions, 24)
    for (row, condition), (column, rate) in itertools.product(enumerate(conditions), enumerate(rates)):
        eigenvalues = [0.2, 0.2 * condition.item()]
        runs = [stability.distance(form, {"lr": rate.item()}, eigenvalues, steps) for steps in range(19, 25)]
        assert cells[row, column] == verdict(np.array(runs))[0], (condition, rate)


def test_averages(document):
    """Adam's state against βᵏ(1−β) and 1/(1−βᵗ)."""
    found = document("average", "--betas", 0, 0.75, 0.9)
    for each, beta, window in zip(found["averages"], [0, 0.75, 0.9], [1, 4, 10], strict=True):
        assert each["window"] == pytest.approx(window)
        weights = (1 - beta) * beta ** np.arange(30.0)
        np.testing.assert_allclose(each["weights"], weights, rtol=1e-9)
        np.testing.assert_allclose(each["bias_corrections"], 1 / np.cumsum(weights), rtol=1e-9)
        assert each["share_inside_window"] == pytest.approx(1 - beta**window)
    check_picture(found["figure"])


def test_average_prints_the_effective_window(textbook):
    code, out, _ = textbook("average", "--betas", 0.9)
    assert code == 0
    (row,) = [row.split() for row in out.splitlines() if row.strip().startswith("0.9 ")]
    lost = 0.9**10
    expected = ["0.9", "10", "0.100000", f"{0.1 * lost:.6f}", f"{1 - lost:.1%}", "10", *[f"{1 / (1 - lost):.6g}"] * 2]
    assert row == expected


def test_every_weight_is_recorded_for_its_own_beta():
    gradients = np.array([3.0, -1.0, 0.5])
    recorded = average.record([0.5, 0.9], gradients)
    for column, beta in enumerate((0.5, 0.9)):
        v = 0.0
        for row, gradient in enumerate(gradients):
            v = beta * v + (1 - beta) * gradient
            assert recorded[row, column] == pytest.approx(v, rel=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "--optimizer", "lbfgs"],
        ["trace", "--optimizer", "adagrad", "--momentum", "0.5"],
        ["trace", "--lr", "-0.1"],
        ["trace", "--lr", "nan"],
        ["trace", "--lr", "fast"],
        ["trace", "--momentum", "1"],
        ["trace", "--a", "0"],
        ["trace", "--steps", "0"],
        ["trace", "--steps", "2.5"],
        ["trace", "--start", "1"],
        ["trace", "--start", "1", "inf"],
        ["train", "--seeds", "0"],
        ["train", "--seeds", "-1"],
        ["train", "--data", "no/such/file"],
        ["stability", "--eigenvalues", "1", "-2"],
        ["stability", "--eigenvalues", "1", "nan"],
        ["stability", "--eigenvalues", "1", "2", "--a", "3"],
        ["stability", "--optimizer", "average"],
        ["stability", "--momentum", "1"],
        ["average", "--betas", "1"],
        ["average", "--betas", "-0.5"],
        ["average", "--betas"],
        ["train", "--epochs", "3"],
        ["optimize"],
        [],
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert "error" in line
    assert any(each in line for each in arguments[1:] or arguments or ["COMMAND"]), line


@pytest.mark.parametrize("command", ["trace", "train", "stability", "average"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--json", f"textbook-{command}.png"))


@pytest.mark.parametrize("command", ["trace", "train", "stability", "average"])
def test_folder_that_cannot_be_written(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--out", str(out)])
        printed = capsys.readouterr()
        assert end.value.code == 2
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert "--out" in line
        assert str(out) in line


def test_folder_without_the_right_to_write(tmp_path, capsys, monkeypatch):
    """Asked of the system, since root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(SystemExit) as end:
        cli.main(["average", "--out", str(tmp_path)])
    assert end.value.code == 2
    assert "Permission denied" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["matplotlib", "tabulate", "tqdm"])
def test_without_the_extra(missing):
    code = f"import sys, runpy; sys.modules[{missing!r}] = None; runpy.run_module('fusedopt.textbook', alter_sys=True)"
    result = subprocess.run(
        [sys.executable, "-c", code, "trace"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [f"fusedopt.textbook needs {missing}: pip install fusedopt[demo]"]


def test_kernels_that_cannot_run_are_told_in_one_line(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusedopt.textbook", "trace", "--backend", "triton", "--out", tmp_path]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "--backend" in line
    assert "TRITON_INTERPRET=1" in line
