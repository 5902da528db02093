"""What tests of the engine for the CPU step and start."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from torch.nn import Parameter

import fusedopt
from tests.twins import bits

ROOT = Path(__file__).resolve().parents[2]

RULE = """
import math
import torch
from types import SimpleNamespace
from fusedopt import FusedOptimizer
from fusedopt.kernels.language import tl, triton

FACTOR = tl.constexpr({factor}) if hasattr(tl, "float32") else {factor}
TABLE = {{"three": [{table}]}}
OBJECT = SimpleNamespace(three=3.0)


@triton.jit
def helper(x, TIMES: tl.constexpr):
    for _ in tl.static_range(TIMES):
        x = {helper}
    return x


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    {update}
"""
PLAIN = {
    "factor": 2.0,
    "table": 1.0,
    "helper": "x * FACTOR",
    "update": "return param - scalars[0] * helper(grad, 3), ()",
}


def stepped(cls=fusedopt.SGD, backend="auto", **options):
    param = Parameter(torch.arange(5.0))
    optimizer = cls([param], backend=backend, **options)
    param.grad = torch.linspace(-1, 1, 5)
    optimizer.step()
    return bits(param)


def runs(optimizer):
    return repr(optimizer).splitlines()[1]


def run(code, **environment):
    """What a process of its own prints."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FUSEDOPT_DEBUG")}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=180,
        env={**inherited, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()
