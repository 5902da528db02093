"""bench/train_fsdp.py as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import on_one_worker

for package in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"the example needs {package}: pip install -e .[demo]")

ROOT = Path(__file__).resolve().parents[2]


@on_one_worker
@pytest.mark.parametrize(("optimizer", "ranks", "differs"), [("adamw", 2, 2e-4), ("muon", 2, 2e-3), ("muon", 1, 2e-3)])
def test_both_libraries_learn_the_same(tmp_path, optimizer, ranks, differs):
    """Muon's products are in bf16, which the libraries add up in different orders."""
    out = tmp_path / "curves.png"
    env = {key: value for key, value in os.environ.items() if key not in ("FUSEDOPT_DEBUG", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*command, "bench/train_fsdp.py", "--optimizer", optimizer, "--steps", "4", "--out", out],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    rows = [row for row in map(str.split, result.stdout.splitlines()) if len(row) == 3]
    losses = {row[0]: [float(loss) for loss in row[1:]] for row in rows if row[0] in ("1", "4", "test")}
    for ours, theirs in losses.values():
        assert ours == pytest.approx(theirs, abs=differs)
    assert losses["4"][0] < losses["1"][0]
    assert "4/4" in result.stderr  # the progress bar
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
