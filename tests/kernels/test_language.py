"""What rules may say: the same in Triton's interpreter and as machine code of the CPU."""

import pytest
import torch
from torch.nn import Parameter

pytest.importorskip("triton")
pytest.importorskip("numba")

from tests.kernels.test_same_bits import same_bits
from tests.own_rule import own_class

RULE = """
import math

import triton
import triton.language as tl
from fusedopt import FusedOptimizer
from fusedopt.kernels import arithmetic
from fusedopt.kernels.arithmetic import div, lerp, maximum, minimum, power, signum, sqrt

THIRD: tl.constexpr = 1 / 3
COUNT = tl.constexpr(3)


@triton.jit
def horner(x, DEGREE: tl.constexpr, first=0.1):
    sum = first
    for i in tl.static_range(DEGREE):
        sum = sum * x + 0.3 * i
    return sum


@triton.jit
def flagged(x, FLAG: tl.constexpr):
    if FLAG is True:
        return 2.0 * x
    else:
        return 3.0 * x


@triton.jit
def chosen(x, SIDE: tl.constexpr = "left"):
    if SIDE == "left":
        return 0.1 * x
    else:
        return horner(x, 2)


@triton.jit
def update(x, grad, states, scalars, STATES: tl.constexpr):
    lr = scalars[0]
    y = grad
{lines}
    return result, ()
"""

# The interpreter, other than a GPU, has tl.maximum and tl.minimum propagate NaN.
NUMBERS = "x = tl.where(x == x, x, 0.1)\n    y = tl.where(y == y, y, 0.1)\n    result = "
EXACT = [
    "0.1 * x + 1 / 3",
    "1 - x",
    "x - (2 * y - 0.7)",
    "-x * lr",
    "x * THIRD",
    "tl.where(x > y, 0.1, x)",
    "tl.where((x > 0.25) & (y < 0.5) | (x != x), -0.1 * x, y + 1)",
    "tl.where(~(x > 0.25), x, y)",
    f"{NUMBERS}tl.maximum(x, y) - tl.minimum(x, 0.1)",
    "tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)",
    "maximum(x, y) - minimum(x, 0.1)",
    f"{NUMBERS}tl.clamp(x, -0.1, 0.3)",
    "tl.abs(x) + tl.abs(y)",
    "tl.math.abs(x)",
    "sqrt(tl.abs(x)) + tl.sqrt_rn(tl.abs(y))",
    "div(x, y) + tl.div_rn(y, 3.0)",
    "signum(x) * 0.1",
    "lerp(x, y, 0.3)",
    "tl.floor(x) + tl.ceil(y)",
    "tl.zeros_like(x) + tl.full(x.shape, 0.1, tl.float32)",
    "(x.to(tl.float64) * y).to(tl.float32)",
    "horner(x, 4)",
    "horner(y, DEGREE=COUNT, first=x)",
    'chosen(x) + chosen(x, "right")',
    "tl.exp2(1.0) * x",
    "x / y",
    "a = 0.1\n    result = a * x",
    "result = x\n    if COUNT == 3:\n        result = 0.1 * y",
    "result = x if COUNT > 3 else 0.1 * y",
    "result = x\n    for i in tl.static_range(3):\n        result += (x, y, 0.1 * x)[i] * (i + 1)",
    "POWER: tl.constexpr = 0.7\n    result = POWER * x",
    "result = x\n    for i in tl.static_range(2):\n        result += i * y\n    i = result * 2\n    result -= i",
    "result = x\n    i = 5\n    if lr > 5:\n        for i in tl.static_range(2):\n            result += i * y\n"
    "    result += i * y",
    "parts = (x, y, 0.1 * x, lr)\n    first, second = parts[1:3]\n    result = first + second + parts[:1][0]",
    "result = x\n    for i in range(1, 3):\n        result += i * y",
    "result = flagged(x, True) + 10.0 * flagged(x, 1)",
    "(x > 0.25).to(tl.float32) * y",
    "arithmetic.div(x, y)",
]
ROUNDED = [f"tl.{name}(x)" for name in ("exp", "exp2", "sin", "cos", "sigmoid")] + [
    "tl.log(tl.abs(x)) + tl.log2(tl.abs(y))",
    "tl.rsqrt(tl.abs(x))",
    "tl.fma(x, y, 0.1)",
]


def results(line, tmp_path, dtype, backends=("triton", "compiled")):
    rule = RULE.format(lines="    " + (line if "result" in line else f"result = {line}"))
    own = own_class(tmp_path / "rule.py", rule)
    values = torch.tensor([0.0, -0.0, 0.1, -0.3, 1.7, 33.3, 1e-30, float("inf"), -float("inf"), float("nan")])
    found = []
    for backend in backends:
        param = Parameter(values.repeat(len(values)).to(dtype))
        param.grad = values.repeat_interleave(len(values)).to(dtype)
        own([param], backend=backend).step()
        found.append(param.detach())
    return found


@pytest.mark.parametrize("line", EXACT)
def test_arithmetic_is_the_same(line, tmp_path):
    """Also in what dtype: a number that is written down takes that of the arithmetic."""
    assert same_bits(*results(line, tmp_path, torch.float32))


@pytest.mark.parametrize("line", [line for line in EXACT if "_rn" not in line])  # which fp64 has not
def test_arithmetic_is_that_of_fp64(line, tmp_path):
    """But that Triton first rounds some numbers that are written down to fp32."""
    torch.testing.assert_close(*results(line, tmp_path, torch.float64), rtol=1e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("line", ROUNDED)
def test_functions_are_the_same_to_rounding(line, tmp_path):
    torch.testing.assert_close(*results(line, tmp_path, torch.float32), rtol=3e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("line", ["x % 1.0", "x // 0.3", "x.to(tl.int32) * 0.1", "tl.umulhi(x, y)", "x.dtype"])
def test_what_might_mean_something_else_is_refused(line, tmp_path):
    with pytest.raises(RuntimeError, match=r"CPU|Unknown attribute"):
        results(line, tmp_path, torch.float32, backends=["compiled"])
