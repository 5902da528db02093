"""The README's code runs, and its tables, and that of low precision, say what the classes declare."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch

import fusedopt
from bench.eight_bits.training import CONTENDERS, Run
from bench.static.kernels import updates_in, updates_of
from tests.cases import AVERAGED, CASES, MATRIX_CASES, MODES, Case, Mode
from tests.kernels.compiled_kernels import compiled_for

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LOW_PRECISION = (ROOT / "docs" / "low-precision.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODE = re.compile(r"^\| (fp32|bf16) \| (.*?) ?\|" + r" (\d+(?:\.\d+)?) \|" * 4 + "$", re.MULTILINE)
MODE_ROWS = MODE.findall(LOW_PRECISION)
OPTIMIZERS = {name for name in fusedopt.__all__ if isinstance(getattr(fusedopt, name), type)}
ROWS = re.findall(r"^\| (`\w+`.*?) \| (.*?) \| (\d+) \| ", README, re.MULTILINE)


def test_import_and_example_come_early():
    lines = README.splitlines()
    assert lines.index("import fusedopt") < 40
    assert next(i for i, line in enumerate(lines) if "optimizer = fusedopt." in line) < 40


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 160


def test_code_runs():
    """The blocks run one after the other, as a reader would."""
    assert BLOCKS
    namespace: dict = {}
    for block in BLOCKS:
        exec(block, namespace)


@pytest.mark.parametrize(("classes", "states", "bytes_moved"), ROWS, ids=[row[0] for row in ROWS])
def test_table_of_optimizers(classes, states, bytes_moved):
    """Each row's states are those of a case, and its bytes are parameter and states twice, gradient once."""
    names = re.findall(r"`(\w+)`", states)
    direction = 2 * 2 if "Muon" in classes else 0  # in bf16, written and read
    assert int(bytes_moved) == 4 * (2 + 1 + 2 * len(names)) + direction
    for name in re.findall(r"`(\w+)`", classes):
        cases = [case for case in [*CASES, *MATRIX_CASES] if case.optimizer == name]
        assert any(_states(case) == set(names) for case in cases), f"{name} never has {names}"


BY_STATES = [
    Case("SGD"),
    Case("SGD", {"momentum": 0.9}),
    Case("AdamW"),
    Case("AdamW", {"amsgrad": True}),
]


@pytest.mark.parametrize(("weights", "options", "bytes_moved"), [(w, o, b) for w, o, *b in MODE_ROWS])
def test_table_of_modes(weights, options, bytes_moved):
    """The bytes follow from the declaration. The kernels are among those whose machine code is counted."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    mode = Mode(dtype, eval(f"dict({options.strip('`')})", {"torch": torch}))
    kernels = [kernel for case in BY_STATES for kernel in updates_in(case, mode)]
    assert [round(kernel.bytes_per_element, 1) for kernel in kernels] == list(map(float, bytes_moved))
    compiled = {
        (kernel.optimizer.kernel, kernel.signature) for kernel in updates_of(CASES, MODES) if compiled_for(kernel)
    }
    assert compiled.issuperset((kernel.optimizer.kernel, kernel.signature) for kernel in kernels)


def test_every_mode_of_the_table_is_read():
    assert len(MODE_ROWS) == 12


@pytest.mark.parametrize("mode", AVERAGED, ids=lambda mode: mode.id)
def test_bytes_of_an_average(mode):
    plain = Mode(mode.dtype, {key: value for key, value in mode.options.items() if key != "ema_decay"})
    for case in BY_STATES[1:]:
        (with_it,), (without,) = (updates_in(case, kind) for kind in (mode, plain))
        assert with_it.bytes_per_element == without.bytes_per_element + 8
    assert "8 bytes more" in (ROOT / "docs" / "around-the-step.md").read_text()


def test_table_of_states_in_8_bits():
    """It says what the committed result says."""
    result = json.loads((ROOT / "bench" / "results" / "eight-bits-cpu.json").read_text())
    runs = [Run(**run) for run in result["runs"]]
    rows = re.findall(r"^\| ([\w ,]+) \| (\d\.\d{3}) \| (\d\.\d{3}) \| (\d\.\d\d) \|$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == [c.name for c in CONTENDERS if c.name != "torch.optim, fp32"]
    assert [str(tuple(betas)) for betas in result["betas"]] == re.findall(r"loss, `betas=(\(.*?\))`", README)
    for name, *cells in rows:
        of = [[run for run in runs if (run.contender, run.betas) == (name, betas)] for betas in result["betas"]]
        assert cells[:2] == [f"{fmean(run.final for run in found):.3f}" for found in of]
        assert cells[2] == f"{of[0][0].state_bytes / of[0][0].parameters:.2f}"


def test_every_optimizer_is_in_the_table():
    listed = {name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])}
    assert listed == OPTIMIZERS - {"FusedOptimizer"}


def test_papers_are_told():
    for name in OPTIMIZERS:
        assert ".. math::" in getattr(fusedopt, name).__doc__ or name in ("FusedOptimizer", "AdamW")


def _states(case):
    param = torch.nn.Parameter(torch.ones(1, 2))
    optimizer = case.make([param])
    param.grad = torch.ones(1, 2)
    optimizer.step()
    return {name for name, value in optimizer.state_dict()["state"].get(0, {}).items() if value.dim()}
