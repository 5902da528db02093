"""Nothing that changes between steps makes Triton compile anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODES = [{}, {"rounding": "stochastic"}, {"rounding": "stochastic", "master_weights": True}]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_one_compilation_for_each_signature(options):
    """Numbers, seeds, counts, sizes, alignments, groups and missing gradients change; the kernels do not."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled_steps.py")
    command = [sys.executable, script, json.dumps(options)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["launches"].keys() == {"fusedopt_prepare_adam_scalars", "fusedopt_adam_update"}
    assert min(result["launches"].values()) > 40
    assert result["compiled"] == dict.fromkeys(result["launches"], 1)
