"""Nothing that changes between steps makes Triton compile anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODES = [
    {},
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "master_weights": True},
    {"max_grad_norm": 1.0, "ema_decay": 0.9},
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_one_compilation_for_each_signature(options):
    """Numbers, seeds, counts, sizes, alignments, groups, scales and missing gradients change; the kernels do not.

    `warmup` compiles all of them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled_steps.py")
    command = [sys.executable, script, json.dumps(options)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    kernels = {"fusedopt_prepare_adam_scalars", "fusedopt_adam_update"}
    if "max_grad_norm" in options:
        kernels.add("fusedopt_sum_squares_bf16")
    assert result["launches"].keys() == kernels
    assert min(result["launches"].values()) > 40
    assert result["ahead"] == result["compiled"] == dict.fromkeys(kernels, 1)
