"""Symmetric products against float64, bit for bit symmetric, in half of the work; and what they are compiled to."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bounded import exact
from tests.once import compiled_by, once
from tests.tolerance import ulp

pytest.importorskip("triton")
from fusedopt.matrices import symmetric
from fusedopt.matrices.symmetric import BLOCK_SIZE, is_chosen, symmetric_product

ROOT = Path(__file__).parents[2]
BF16, FP32 = torch.bfloat16, torch.float32
GUARD = 16  # elements: whole 16 bytes
VALUE = 0.75  # of what nobody may write


def random(shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def random_symmetric(batch, rows, dtype, device):
    upper = random((batch, rows, rows), dtype, device, seed=1).triu()
    return upper + upper.triu(1).mT


def guarded(batch, rows, dtype, device, shift=0, row_gap=0):
    """A result, in the midst of a buffer of which nothing else may be written."""
    row, first = rows + row_gap, GUARD + shift
    buffer = torch.full((first + batch * rows * row + GUARD,), VALUE, dtype=dtype, device=device)
    return buffer, buffer.as_strided((batch, rows, rows), (rows * row, row, 1), first)


def check(x, c, alpha=1.0, beta=0.0, **where):
    """Within what fp32 sums of as many products, and one rounding, may lose at the scale of the absolute values."""
    batch, rows, columns = x.shape
    buffer, out = guarded(batch, rows, x.dtype, x.device, **where)
    version = out._version
    assert symmetric_product(x, out=out, c=c, alpha=alpha, beta=beta) is out
    assert torch.equal(out, out.mT)
    assert out._version > version or not out.numel()

    exact_x = exact(x).reshape(x.shape)
    products = np.float64(exact_x) @ np.float64(exact_x).swapaxes(1, 2)
    bound = abs(alpha) * (np.float64(abs(exact_x)) @ np.float64(abs(exact_x)).swapaxes(1, 2))
    expected = alpha * products
    if beta:
        exact_c = exact(c).reshape(c.shape)
        expected, bound = expected + beta * exact_c, bound + abs(beta * exact_c)
    # Every product and every sum is rounded once, and so are alpha, beta and what they multiply.
    lost = (columns + 6) * 2.0**-24 * bound
    error = abs(exact(out).reshape(out.shape) - expected)
    assert (error <= lost + ulp(abs(expected) + lost, x.dtype) / 2).all()

    rest = buffer.clone()
    rest.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(VALUE)
    assert (rest == VALUE).all()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("batch", "rows", "columns"),
    [(1, 1, 1), (3, 8, 200), (2, 3, 0), (0, 4, 4), (2, 0, 3), (1, 130, 1), (1, BLOCK_SIZE, 64), (1, 272, 72)],
)
def test_sizes(batch, rows, columns, dtype, device):
    c = random_symmetric(batch, rows, dtype, device)
    check(random((batch, rows, columns), dtype, device), c, alpha=-1.5, beta=0.7)
    check(random((batch, columns, rows), dtype, device).mT, None)


VIEWS = {
    "rows": lambda rows, columns, make: make((3, rows, columns)),
    "columns": lambda rows, columns, make: make((3, columns, rows)).mT,
    "rows with gaps": lambda rows, columns, make: make((3, rows, columns + 8))[:, :, 3 : columns + 3],
    "columns with gaps": lambda rows, columns, make: make((3, columns, rows + 8))[:, :, :rows].mT,
    "elements with gaps": lambda rows, columns, make: make((3, rows, 2 * columns))[:, :, ::2],
    "one for all": lambda rows, columns, make: make((1, rows, columns)).expand(3, -1, -1),
    "the batch last": lambda rows, columns, make: make((rows, columns, 3)).permute(2, 0, 1),
}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, dtype, device):
    """Of three matrices each, of whole tiles and parts of tiles; no view touches what lies between its elements."""

    def make(shape):
        return random(shape, dtype, device)

    check(view(136, 24, make), random_symmetric(3, 136, dtype, device), beta=2.0)
    check(view(131, 5, make), None)


@pytest.mark.parametrize("where", [{"shift": 1}, {"row_gap": 8}, {"row_gap": 3}], ids=str)
def test_results_in_larger_buffers(where, device):
    check(random((2, 136, 16), BF16, device), random_symmetric(2, 136, BF16, device), beta=1.0, **where)


def test_a_transposed_result_and_c(device):
    """A symmetric matrix is its transpose, so that either of their dimensions may be the one without gaps."""
    x, c = random((2, 20, 7), BF16, device), random_symmetric(2, 20, BF16, device)
    results = [torch.empty(2, 20, 24, dtype=BF16, device=device)[:, :, :20] for _ in range(2)]
    symmetric_product(x, out=results[0], c=c, beta=0.5)
    symmetric_product(x, out=results[1].mT, c=c.mT, beta=0.5)
    assert torch.equal(*results)


def test_bf16_is_rounded_to_nearest(device):
    """1 + 2⁻⁸ lies between two numbers of bf16, 1 + 3 · 2⁻⁸ too: each goes to the even one."""
    few, many = [1.0, 2.0**-4, 0.0, 0.0], [1.0, 2.0**-4, 2.0**-4, 2.0**-4]
    x = torch.tensor([[few], [many]]).to(device, BF16)
    out = torch.empty(2, 1, 1, dtype=BF16, device=device)
    assert symmetric_product(x, out=out).flatten().tolist() == [1.0, 1 + 2**-6]


def test_nan_and_infinity_go_where_they_belong(device):
    x = random((1, 5, 6), BF16, device)
    x[0, 1, 2], x[0, 3, 0] = float("nan"), float("inf")
    out = symmetric_product(x, out=torch.empty(1, 5, 5, dtype=BF16, device=device))[0]
    assert out[1].isnan().all()
    assert out[:, 1].isnan().all()
    assert out[3, [0, 2, 3, 4]].isinf().all()
    assert out[[0, 2, 4]][:, [0, 2, 4]].isfinite().all()


def test_without_beta_c_is_not_read(device):
    x, nan = random((1, 4, 3), BF16, device), torch.full((1, 4, 4), float("nan"), dtype=BF16, device=device)
    assert symmetric_product(x, out=torch.empty_like(nan), c=nan).isfinite().all()


def test_below_the_diagonal_of_c_nothing_is_read(device):
    x, c = random((1, 300, 8), BF16, device), random_symmetric(1, 300, BF16, device)
    expected = symmetric_product(x, out=torch.empty_like(c), c=c, beta=1.0)
    spoilt = torch.where(torch.ones_like(c, dtype=torch.bool).triu(), c, float("nan"))
    assert torch.equal(symmetric_product(x, out=torch.empty_like(c), c=spoilt, beta=1.0), expected)


def test_no_program_for_a_tile_below_the_diagonal(device, monkeypatch):
    """Nor two for one: every tile is right, of even and odd numbers of tiles, with as many programs as are needed."""
    launched = []
    launch = symmetric.launch

    def counting(kernel, programs, *args, **options):
        launched.append(programs)
        return launch(kernel, programs, *args, **options)

    monkeypatch.setattr(symmetric, "launch", counting)
    for n_tiles in (2, 3, 4, 5):
        check(random((1, n_tiles * BLOCK_SIZE - 96, 8), BF16, device), None)
    assert launched == [3, 6, 10, 15]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(4, 3)}, "x must be"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.float64)}, "x must be"),
        ({"out": torch.zeros(2, 4, 3)}, "out must be"),
        ({"out": torch.zeros(2, 4, 4, dtype=BF16)}, "out must be"),
        ({"c": torch.zeros(1, 4, 4)}, "c must be"),
        ({"out": torch.zeros(2, 4, 8)[:, :, ::2]}, "without gaps"),
        ({"c": torch.zeros(4, 4, 2).permute(2, 0, 1)}, "without gaps"),
    ],
)
def test_wrong_tensors_are_refused(change, complaint):
    given = {"x": torch.zeros(2, 4, 3), "out": torch.zeros(2, 4, 4), "c": torch.zeros(2, 4, 4), **change}
    with pytest.raises(ValueError, match=complaint):
        symmetric_product(given.pop("x"), **given, beta=1.0)


def test_it_is_chosen_by_the_environment():
    """At the import, which leaves Triton alone. On the CPU never."""
    code = """
import importlib, os, sys, torch
for told in (None, "", "0", "1"):
    os.environ.pop("FUSEDOPT_SYMMETRIC_PRODUCTS", None)
    if told is not None:
        os.environ["FUSEDOPT_SYMMETRIC_PRODUCTS"] = told
    symmetric = importlib.import_module("fusedopt.matrices.symmetric")
    print(symmetric._asked_for, symmetric.is_chosen(torch.device("cpu")), "triton" in sys.modules)
    del sys.modules["fusedopt.matrices.symmetric"]
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines() == [*["False False False"] * 3, "True False False"], run.stderr


def test_it_is_chosen_where_triton_drives_the_device(monkeypatch):
    monkeypatch.setattr(symmetric, "_asked_for", True)
    is_chosen.cache_clear()
    assert is_chosen(torch.device("cuda" if torch.cuda.is_available() else "cpu")) == torch.cuda.is_available()
    assert not is_chosen(torch.device("meta"))
    is_chosen.cache_clear()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """What `compiled_products` reports."""
    return json.loads(
        once(tmp_path_factory, "compiled_products.json", partial(compiled_by, "tests.kernels.compiled_products"))
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kind", ["rows", "columns", "unaligned"])
def test_machine_code(compiled, kind, target):
    """Tensor cores, nothing spilled; what is aligned has accesses of 16 bytes, which bring X to shared memory."""
    report = compiled[f"{kind} {target}"]
    assert report["name"] == "fusedopt_symmetric_product"
    assert report["tensor core"]
    assert report["spilled"] == report["local"] == 0
    assert report["shared"] <= {"sm_80": 163, "sm_90": 227, "gfx942": 64}[target] << 10
    if kind != "unaligned":
        assert report["load 16"] == report["load"] > 0
        assert report["store 16"] == report["store"] > 0
        if target != "gfx942":
            assert report["async 16"] == report["async"] > 0


def test_sizes_are_no_key_of_a_compilation(compiled):
    first, *others = compiled["specializations"]
    assert all(other == first for other in others)
