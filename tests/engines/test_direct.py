"""Launches without Triton's dispatch: each gives the launcher what Triton would, and none is kept too long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEVICE
from tests.once import once

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="imitates a GPU")

CASES = [
    "every_argument_is_what_triton_gives",
    "numbers_and_gradients_change",
    "another_stream",
    "hooks_of_a_profiler",
    "a_function_in_place_of_the_hooks",
    "hook_before_a_run",
    "hook_that_inspects_stages",
    "debug",
    "debug_of_a_kernel",
    "instrumentation",
    "another_driver",
    "another_dispatch",
    "a_dispatch_that_asks_more",
    "a_constant_of_a_kernel",
    "other_dtypes_later",
]
# What also holds for launches that are kept for ever.
UNAFFECTED = {
    "every_argument_is_what_triton_gives",
    "numbers_and_gradients_change",
    "another_stream",
    "a_dispatch_that_asks_more",
    "other_dtypes_later",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    pytest.importorskip("triton")
    return json.loads(once(tmp_path_factory, "direct_steps.json", _run_all))


def _run_all(directory):
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FUSEDOPT_DEBUG")}
    command = [sys.executable, "-m", "tests.engines.direct_steps"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("case", CASES)
def test_launches_are_as_good_as_tritons(case, told):
    assert told["fusedopt"][case] is None


@pytest.mark.parametrize("case", sorted(set(CASES) - UNAFFECTED))
def test_launches_that_are_kept_too_long_are_caught(case, told):
    jit = pytest.importorskip("triton.runtime.jit")
    if (
        case == "hook_that_inspects_stages"
        and "add_stages_inspection_hook" not in jit.JITFunction.run.__code__.co_names
    ):
        pytest.skip("this Triton has no such hook")
    assert told["kept for ever"][case] is not None


def test_every_case_is_told(told):
    assert set(told["fusedopt"]) == set(told["kept for ever"]) == set(CASES)
