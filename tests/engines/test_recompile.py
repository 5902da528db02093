"""Nothing that changes between steps makes Triton compile anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One of `update` for the steps that unscale, one for the others.
ADAM = {"fusedopt_prepare_adam_scalars": 1, "fusedopt_adam_update": 2}
ROOT = Path(__file__).parents[2]
RUNS = [
    ("SGD", {"momentum": 0.9}, ["float32"], {"fusedopt_prepare_sgd_scalars": 1, "fusedopt_sgd_update": 2}),
    ("Adam", {"tensor_lr": True}, ["float32"], ADAM),
    ("AdamW", {"rounding": "stochastic"}, ["bfloat16"], ADAM),
    (
        "AdamW",
        {"max_grad_norm": 1.0, "ema_decay": 0.9, "master_weights": True},
        ["bfloat16", "float32"],
        {**ADAM, "fusedopt_adam_update": 4, "fusedopt_sum_squares_bf16": 1, "fusedopt_sum_squares_fp32": 1},
    ),
]


@pytest.mark.parametrize(("optimizer", "options", "dtypes", "versions"), RUNS, ids=str)
def test_one_compilation_for_each_signature(optimizer, options, dtypes, versions):
    """Numbers, seeds, counts, sizes, alignments, groups, scales and missing gradients change; the kernels do not.

    `warmup` compiles all of them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engines.compiled_steps", json.dumps([optimizer, options, dtypes])]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "FP_FUSION" not in run.stderr  # Triton 3.9 warns of launches that leave it to the default
    result = json.loads(run.stdout)
    assert result["steps"] >= 50
    assert result["launches"].keys() == versions.keys()
    assert min(result["launches"].values()) >= result["steps"]
    assert result["ahead"] == result["compiled"] == versions
