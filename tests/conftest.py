"""Where the kernels run in these tests: on the GPU if there is one that Triton drives, else in Triton's interpreter.

The choice has to stand in the environment before Triton is imported.
"""

import os

os.environ["FUSEDOPT_DEBUG"] = "1"  # every step makes its tables anew and compares
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # which takes a good part of the time of a compilation

import gc
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

# Machine code of the CPU is kept between two runs, but not among the user's.
os.environ.setdefault("FUSEDOPT_CACHE_DIR", str(Path(tempfile.gettempdir(), f"fusedopt-tests-{os.getuid()}")))

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from tests import interpreter

        interpreter.hurry()

import pytest

from fusedopt.storage import precision
from tests.matrices.exact import exact_products  # noqa: F401

# Most tensors here are smaller than those whose states are worth it.
QUANTIZED_FROM, precision.QUANTIZED_FROM = precision.QUANTIZED_FROM, 0

DEVICE = "cuda" if HAS_GPU else "cpu"

# The tests run side by side, one on each core.
torch.set_num_threads(1)


def pytest_collection_finish():
    """Thousands of tests are no garbage: nobody need look through them each time that a compiler has made objects."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that Triton drives"))


@pytest.fixture
def device():
    """Where the kernels' tensors lie."""
    return torch.device(DEVICE)


@pytest.fixture
def small_states_are_full(monkeypatch):
    """As outside of these tests, 8 bits are for states of 4,096 elements or more."""
    monkeypatch.setattr(precision, "QUANTIZED_FROM", QUANTIZED_FROM)


@pytest.fixture
def fp64_scalars():
    """Keep `step`, `mu_product` … in fp64: torch computes NAdam's in the dtype that it keeps it in, fp32 by default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def poisoned():
    """Fill uninitialised memory with NaN, so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
