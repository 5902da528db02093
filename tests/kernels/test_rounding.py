"""How 16-bit numbers are rounded: the kernels' functions and their torch twins, against numpy and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import rounding_oracle
from tests.rules.test_reference import name_of, seeded

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fusedopt.engines.signature import launch_options  # noqa: E402
from fusedopt.engines.tables import launch  # noqa: E402
from fusedopt.kernels import rounding as kernels  # noqa: E402
from fusedopt.storage import rounding  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
BLOCK_SIZE = 1 << 14
OPTIONS = launch_options(warp_size=32)


@triton.jit
def convert(source_ptr, target_ptr, n, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n
    kernels.store(target_ptr + offsets, kernels.load(source_ptr + offsets, mask, tl.float32), mask)


def converted(source: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(source.shape, dtype=dtype, device=source.device)
    launch(convert, triton.cdiv(len(source), BLOCK_SIZE), source, target, len(source), BLOCK_SIZE=BLOCK_SIZE, **OPTIONS)
    return target


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    integer = torch.int32 if actual.dtype == FP32 else torch.int16
    same = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
    wrong = (~same).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} wrong, first {wrong[0]}: {actual[wrong[0]]!r} instead of {expected[wrong[0]]!r}"


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16).to(torch.uint16).view(dtype)


def around_ties(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit type, the fp32 between it and the next, and the neighbours of both."""
    exact_values = every_pattern(dtype).float().numpy()
    with np.errstate(all="ignore"):
        next_values = every_pattern(dtype).roll(-1).float().numpy()
        points = np.concatenate([exact_values, exact_values / 2 + next_values / 2])
        points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return torch.from_numpy(points)


@both_dtypes
def test_every_16_bit_number_widens(dtype, device):
    source = every_pattern(dtype)
    assert_same_bits(converted(source.to(device), FP32).cpu(), source.float())


def many_numbers(dtype: torch.dtype, seed: int) -> Tensor:
    """All that a rounding may meet: ties, their neighbours, random patterns, edges, NaN of several kinds."""
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(seed))
    largest = torch.finfo(dtype).max
    edges = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.4028235e38, 1e-45, 1e-40, largest, -largest]
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, 0x477FEFFF, 0x477FF000, 0x477FF001])
    bits = torch.cat([random, patterns]).to(torch.int32).view(FP32)
    return torch.cat([around_ties(dtype), bits, torch.tensor(edges)])


@seeded
@both_dtypes
def test_rounds_to_nearest_even(dtype, device, seed):
    source = many_numbers(dtype, seed)
    assert_same_bits(converted(source.to(device), dtype).cpu(), source.to(dtype))
    assert_same_bits(rounding.nearest(source, dtype), source.to(dtype).float())


@triton.jit
def convert_stochastic(source_ptr, random_ptr, target_ptr, n, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n
    random = tl.load(random_ptr + offsets, mask=mask).to(tl.uint32)
    bits = kernels.to_bits_stochastic(tl.load(source_ptr + offsets, mask=mask), random, target_ptr.dtype.element_ty)
    kernels.store_bits(target_ptr + offsets, bits, mask)


def by_kernel(source: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    target = torch.empty(source.shape, dtype=dtype, device=source.device)
    tensors = source, random.to(torch.int32), target
    programs = triton.cdiv(len(source), BLOCK_SIZE)
    launch(convert_stochastic, programs, *tensors, len(source), BLOCK_SIZE=BLOCK_SIZE, **OPTIONS)
    return target


def by_reference(source: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    rounded = rounding.stochastic(source, dtype, random)
    assert_same_bits(rounded.to(dtype).float(), rounded)
    return rounded.to(dtype)


both_ways = pytest.mark.parametrize("convert", [by_kernel, by_reference])


@seeded
@both_ways
@both_dtypes
def test_stochastic_rounding_bit_for_bit(convert, dtype, device, seed):
    """Every kind of number with random bits, and with those that round down and up whatever can be."""
    source = many_numbers(dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    for random in (
        torch.randint(1 << 16, source.shape, generator=generator),
        torch.zeros(source.shape, dtype=torch.int64),
        torch.full(source.shape, 0xFFFF),
    ):
        with np.errstate(invalid="ignore"):  # signalling NaN
            values = source.numpy().astype(np.longdouble)
        expected = rounding_oracle.stochastic(values, dtype, random.numpy())
        expected = torch.from_numpy(expected.astype(np.float32)).to(dtype)  # exact
        assert_same_bits(convert(source.to(device), dtype, random.to(device)).cpu(), expected)


@both_ways
@both_dtypes
def test_what_needs_no_rounding_stays(convert, dtype, device):
    source = every_pattern(dtype)
    for random in (0, 1, 0x7FFF, 0xFFFF):
        bits = torch.full(source.shape, random, device=device)
        assert_same_bits(convert(source.float().to(device), dtype, bits).cpu(), source)


@seeded
@both_ways
@both_dtypes
def test_only_to_the_two_neighbours(convert, dtype, device, seed):
    source = many_numbers(dtype, seed)
    source = source[source.isfinite() & (source.abs() <= torch.finfo(dtype).max)]
    random = torch.randint(1 << 16, source.shape, generator=torch.Generator().manual_seed(seed))
    rounded = convert(source.to(device), dtype, random.to(device)).cpu().double()
    numbers = every_pattern(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    below = numbers[torch.searchsorted(numbers, source.double(), right=True) - 1]
    above = numbers[torch.searchsorted(numbers, source.double())]
    assert ((rounded == below) | (rounded == above)).all()


@both_ways
@both_dtypes
def test_finite_numbers_become_infinite_only_where_nearest_does(convert, dtype, device):
    largest = torch.finfo(dtype).max
    half = largest * torch.finfo(dtype).eps / 4  # to the next number, were there one
    source = torch.tensor([largest, largest + 0.99 * half, largest + 1.01 * half, -largest - 0.99 * half])
    for random in (0, 0xFFFF):
        bits = torch.full(source.shape, random, device=device)
        assert convert(source.to(device), dtype, bits).tolist() == [largest, largest, math.inf, -largest]


DRAWS = 1_000_000


@pytest.mark.parametrize("share", [1 / 65536, 0.01, 0.5, 0.75, 1 - 1 / 65536], ids=str)
@pytest.mark.parametrize("at", [-1.5, 3e4, 1e-7], ids=str)
@both_ways
@both_dtypes
def test_unbiased(convert, dtype, at, share, device):
    """Over a million draws the mean is the number, within 4 standard errors."""
    low = torch.tensor(at).to(dtype)
    high = torch.nextafter(low, torch.tensor(math.inf, dtype=dtype))
    step = high.double() - low.double()
    value = (low.double() + share * step).float()
    share = ((value.double() - low.double()) / step).item()  # as fp32 has it
    random = rounding.random_bits(1, 2, 3, 4, DRAWS, device)
    rounded = convert(value.expand(DRAWS).contiguous().to(device), dtype, random).cpu()
    assert rounded.unique().tolist() == [low.item(), high.item()] or share in (0, 1)
    ups = (rounded == high).sum().item() / DRAWS
    least = 2**-16 if dtype == FP16 and abs(value) < torch.finfo(FP16).tiny else 0  # smaller shares count as none
    assert abs(ups - share) <= 4 * math.sqrt(share * (1 - share) / DRAWS) + least


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    """Those that the authors of the paper publish with Random123."""
    first, *others = counter
    words = rounding.philox((torch.tensor([first]), *others), (key & 0xFFFFFFFF, key >> 32))
    assert [int(word) for word in words] == list(expected)
    words = rounding_oracle.philox((np.array([first]), *others), key)
    assert [int(word[0]) for word in words] == list(expected)


@triton.jit
def write_random_bits(target_ptr, seed: tl.int64, tensor, step, stream, first, BLOCK_SIZE: tl.constexpr):
    lanes = tl.arange(0, BLOCK_SIZE)
    bits = kernels.random_bits((seed, tensor, step, 1), stream, first - 8, lanes)
    tl.store(target_ptr + first + lanes, bits.to(tl.int32))


@pytest.mark.parametrize(("seed", "tensor", "step", "stream"), [(0, 0, 1, 0), (2**63 - 1, 5, 70000, 3), (-1, 1, 2, 1)])
def test_random_bits_are_those_of_the_counter(seed, tensor, step, stream, device):
    count = 4 * 256
    expected = rounding_oracle.random_bits(seed % 2**64, tensor, step, stream, count)
    assert rounding.random_bits(seed % 2**64, tensor, step, stream, count - 3, device).tolist() == list(expected[:-3])
    after_2_35 = rounding.random_bits(seed % 2**64, tensor, step, stream, 100, device, first=2**35 + 3)
    assert after_2_35.tolist() == list(expected[3:103])  # a word of Philox counts groups of eight
    written = torch.zeros(count, dtype=torch.int32, device=device)
    for first in (256, 264, 768):
        launch(write_random_bits, 1, written, seed, tensor, step, stream, first, BLOCK_SIZE=256, **OPTIONS)
    assert written.tolist() == [0] * 256 + list(expected[256:520]) + [0] * 248 + list(expected[768:])


def test_random_bits_are_independent(device):
    """Of another seed, tensor, step or stream, and of the next element: as many bits agree as by chance."""
    count = DRAWS // 16
    base = (1, 2, 3, 4)
    first = rounding.random_bits(*base, count, device)
    others = [rounding.random_bits(*(n + (i == j) for j, n in enumerate(base)), count, device) for i in range(4)]
    for other in [*others, first.roll(1), first.roll(8), others[0].roll(8)]:
        differing = first ^ other
        ones = sum((differing >> bit & 1).sum().item() for bit in range(16))
        assert abs(ones - 8 * count) <= 4 * math.sqrt(16 * count) / 2
    assert len(first.unique()) > 0.6 * min(count, 1 << 16)
