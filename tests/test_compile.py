"""Every kernel compiles for every target without a GPU, and its machine code is what the design promises.

The compilation runs once, in a process of its own: an interpreted function cannot be compiled.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import CASES
from compiled_kernels import EVERY_MODE, GRADIENTS, compiled_for

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine_code import TARGETS, kernels_of

KERNELS = kernels_of(CASES, EVERY_MODE)
COMPILED = [(kernel, target) for kernel in KERNELS for target in compiled_for(kernel)]
NAMES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
RULES = sorted({kernel.optimizer.kernel for kernel in KERNELS})


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The reports by "<kernel> <target>". The workers of pytest-xdist share them."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    result = directory / "compiled_kernels.json"
    with open(directory / "compiled_kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(_compile_all(directory / "triton_cache"))
    return json.loads(result.read_text())


def _compile_all(cache):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DISABLE_LINE_INFO": "1"}  # half the time
    script = Path(__file__).with_name("compiled_kernels.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(params=COMPILED, ids=lambda pair: f"{pair[0].id}-{pair[1]}")
def pair(request):
    return request.param


@pytest.fixture
def kernel(pair):
    return pair[0]


@pytest.fixture
def target(pair):
    return pair[1]


@pytest.fixture
def report(compiled, kernel, target):
    return compiled[f"{kernel.id} {target}"]


def elements_of_a_thread(kernel, target):
    """One block of 1,024 elements (512 beside fp64) among 4 warps."""
    block = 512 if torch.float64 in kernel.signature.streams else 1024
    return block // (4 * TARGETS[target][2])


def test_every_stream_has_wide_accesses(report, kernel, target):
    """16 bytes for the widest dtype; a narrower one beside it has as many elements in each access."""
    elements = elements_of_a_thread(kernel, target)
    assert report["elements"] == elements
    together = min(elements, 16 // max(dtype.itemsize for dtype in kernel.signature.streams))
    expected = Counter()
    for access, dtypes in (("load", kernel.signature.streams), ("store", kernel.written)):
        for dtype in dtypes:
            expected[f"{access} {together * dtype.itemsize}"] += elements // together
    assert report["loops"][0] == expected
    moved = sum(int(access.split()[1]) * count for access, count in report["loops"][0].items())
    assert moved == elements * kernel.bytes_per_element


def test_no_wide_access_where_nothing_is_aligned(report, kernel):
    """The tail loop, which also steps unaligned parameters, goes element by element: anything wider would fault."""
    assert len(report["loops"]) >= 3  # ptxas may unroll the last one
    narrow = {f"load {dtype.itemsize}" for dtype in kernel.signature.streams}
    narrow |= {f"store {dtype.itemsize}" for dtype in kernel.written}
    assert all(loop.keys() == narrow for loop in report["loops"][2:])


def test_unaligned_gradient_leaves_the_rest_wide(report, kernel, target):
    aligned, unaligned = report["loops"][:2]
    stores = {key: count for key, count in aligned.items() if key.startswith("store")}
    assert stores == {key: count for key, count in unaligned.items() if key.startswith("store")}
    if not target.startswith("sm_"):
        return  # gfx942 may read wide at any address
    elements = report["elements"]
    size = kernel.signature.grad.itemsize
    together = min(elements, 16 // max(dtype.itemsize for dtype in kernel.signature.streams))
    expected = Counter(aligned)
    expected[f"load {together * size}"] -= elements // together
    expected[f"load {size}"] += elements
    assert unaligned == +expected


def test_nothing_but_registers(report):
    """No spills, no shared memory (of a conversion between layouts), hence nothing to wait for."""
    assert report["local_bytes"] == 0
    assert report["shared_bytes"] == 0
    assert report["barriers"] == 0


def test_maxima_keep_nan(report):
    """Which the interpreter's always do, so that no test of numbers sees it without a GPU."""
    assert report["nan_dropping_maxima"] == 0


def test_tables_are_read_before_the_loop(report):
    assert report["table_loads"] == 0


def test_readable_name(report, kernel):
    assert report["name"] == f"fusedopt_{kernel.optimizer.kernel}_update"


# In the code of the aligned loop; 47, 50, 78, 86, 59 and 60 with Triton 3.7, and room for other versions.
@pytest.mark.parametrize(
    ("dtypes", "limit"),
    [
        ("fp32", 55),
        ("bf16", 58),
        ("fp64", 90),
        ("bfloat16-rounding=stochastic", 109),  # the budget of 14 bytes at which memory is still the limit
        ("bfloat16-master_weights", 70),
        ("bfloat16-kahan", 70),
    ],
)
def test_instructions_of_adam(compiled, dtypes, limit):
    assert compiled[f"adam-exp_avg-exp_avg_sq-{dtypes} sm_90"]["instructions"] < limit


@pytest.mark.parametrize("hyper_tensors", ["False", "True"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", TARGETS)
def test_prepare(compiled, rule, hyper_tensors, target):
    report = compiled[f"{rule} {target} {hyper_tensors}"]
    assert report["name"] == f"fusedopt_prepare_{rule}_scalars"
    assert report["local_bytes"] == 0
    assert report["shared_bytes"] <= 64  # in which the warps add up the sums of squares


@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("target", TARGETS)
def test_sum_squares(compiled, grad, target):
    """Two loops, of 16-byte accesses and of single elements; shared memory for the warps to add up their sums only."""
    report = compiled[f"sum_squares {grad} {target}"]
    assert report["name"] == f"fusedopt_sum_squares_{NAMES[grad]}"
    assert report["local_bytes"] == 0
    assert report["shared_bytes"] <= 64
    elements = 1024 // (4 * TARGETS[target][2])
    size = getattr(torch, grad).itemsize
    wide = min(16, elements * size)
    assert report["loops"] == [{f"load {wide}": elements * size // wide}, {f"load {size}": elements}]


@pytest.mark.parametrize("target", TARGETS)
def test_counts_are_no_key_of_a_compilation(compiled, target):
    """However many tensors there are: Triton would tell 1, multiples of 16 and 2**31 from other integers."""
    first, *others = compiled["specializations"][target]
    assert all(other == first for other in others)
