r"""States in 8 bits, in plain torch. Twin of kernels/quantized.py.

A block is 256 numbers that follow each other in memory. It has one scale :math:`s`, in fp32, and a code of 8 bits for
each number: a sign, 4 bits of exponent and 3 of mantissa, or 5 and 3 for numbers that are never negative. With
exponent :math:`e \le E` and mantissa :math:`m` a code means

.. math:: (8 + m) \, 2^{e - E} s \text{ for } e > 0, \qquad m \, 2^{1 - E} s \text{ for } e = 0.

The scale is a fifteenth of the largest magnitude, so that this has the largest code, cut to 20 bits: then every product
is exact. Only what finds the code of a number rounds, and it does so in the same way in every backend.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
SIGNED, UNSIGNED = torch.int8, torch.uint8  # the dtype of the memory says which code it holds
PIECE = 1 << 24  # numbers that are encoded at once
CODES = frozenset({SIGNED, UNSIGNED})

_FIFTEEN = 130 << 23 | 7 << 20  # its bits: what the largest code means with a scale of 1
_FIFTEENTH = 0.06666668504476547  # and a little more, so that 15 times a scale gives this scale again
_SMALLEST_SCALE = 31 << 23  # the bits of 2^-96: with it the smallest code is still a normal number


def size(numel: int) -> int:
    """Bytes of so many numbers: the codes, up to a multiple of 16, then the scales."""
    return _first_scale(numel) + 4 * -(-numel // BLOCK)


def decode(memory: Tensor, numel: int) -> Tensor:
    """The numbers, in fp32.

    Args:
        memory: codes and scales, of dtype `SIGNED` or `UNSIGNED`.
        numel: how many numbers.
    """
    values = torch.empty(numel, dtype=torch.float32, device=memory.device)
    codes, scales = _parts(memory, numel)
    for piece, *coded in _pieces(values, codes, scales):
        piece.copy_(_decoded(*coded))
    return values


def encode(values: Tensor, code: torch.dtype, random: Tensor | None = None) -> Tensor:
    """Codes and scales of numbers.

    What is not 0 in fp32 never becomes 0 where numbers are never negative: of squares that are divided by, even the
    smallest is far nearer than none. A block with an infinite or NaN number keeps it, and none of its others is finite
    any more. Where all are less than 3e-28 the scale stays that of 3e-28.

    Args:
        values: in fp32, flat.
        code: `SIGNED` or `UNSIGNED`.
        random: 16 random bits for each, as int64; without them numbers are rounded to the nearest, ties away from 0.
    """
    numel = values.numel()
    memory = torch.zeros(size(numel), dtype=code, device=values.device)
    codes, scales = _parts(memory, numel)
    for piece, bits, *coded in _pieces(values, values if random is None else random, codes, scales):
        for target, found in zip(coded, _encoded(piece, code, None if random is None else bits), strict=True):
            target.copy_(found)
    return memory


def _pieces(*numbers_and_scales: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of numbers and, last, their scales: all at once would take ten times their memory in between."""
    *numbers, scales = numbers_and_scales
    return zip(*(tensor.split(PIECE) for tensor in numbers), scales.split(PIECE // BLOCK), strict=True)


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    offset, normal = _exponent(codes.dtype)
    code = codes.to(torch.int32)
    bits = ((code & (0xFF if codes.dtype == UNSIGNED else 0x7F)) << 20) + offset
    bits = torch.minimum(bits, (2 * bits.view(torch.float32) - normal).view(torch.int32))
    if codes.dtype == SIGNED:
        bits |= code & -0x80000000
    return bits.view(torch.float32) * _spread(scales, codes.numel())


def _encoded(values: Tensor, code: torch.dtype, random: Tensor | None) -> tuple[Tensor, Tensor]:
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    largest = pad(magnitudes, (0, -values.numel() % BLOCK)).view(-1, BLOCK).amax(1)
    scale = ((largest.view(torch.float32) * _FIFTEENTH).view(torch.int32) & -16).clamp(min=_SMALLEST_SCALE)

    offset, normal = _exponent(code)
    bits = (values * _spread(1 / scale.view(torch.float32), values.numel())).view(torch.int32)
    bits = (bits & 0x7FFFFFFF).clamp(max=_FIFTEEN)
    bits = torch.maximum(bits, (0.5 * bits.view(torch.float32) + normal / 2).view(torch.int32)) - offset
    codes = (bits + (0x80000 if random is None else (random.to(torch.int32) << 4) + 8)) >> 20
    if code == UNSIGNED:
        codes = torch.maximum(codes, magnitudes.clamp(max=1))
    else:
        codes = torch.where(values.view(torch.int32) < 0, codes - 128, codes)  # sets the bit of the sign
    return codes.to(code), torch.where(largest == 0, 0, scale).view(torch.float32)


def repeated(memory: Tensor, numel: int) -> Tensor:
    """Codes and scales of so many numbers which are all the one that is stored in `memory`."""
    whole = memory.new_zeros(size(numel))
    for target, source in zip(_parts(whole, numel), _parts(memory, 1), strict=True):
        target.copy_(source)
    return whole


def blocks(memory: Tensor, numel: int, begin: int, end: int) -> tuple[Tensor, int]:
    """Codes and scales of some of the blocks of so many numbers, in new memory; how many numbers these are."""
    codes, scales = _parts(memory, numel)
    codes = codes[begin * BLOCK : end * BLOCK]
    part = memory.new_zeros(size(codes.numel()))
    for target, source in zip(_parts(part, codes.numel()), (codes, scales[begin:end]), strict=True):
        target.copy_(source)
    return part, codes.numel()


def set_blocks(memory: Tensor, numel: int, begin: int, end: int, part: Tensor) -> None:
    """Write what `blocks` reads."""
    codes, scales = _parts(memory, numel)
    codes = codes[begin * BLOCK : end * BLOCK]
    for target, source in zip((codes, scales[begin:end]), _parts(part, codes.numel()), strict=True):
        target.copy_(source)


def _parts(memory: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Views of the codes and of the scales."""
    return memory[:numel], memory[_first_scale(numel) :].view(torch.float32)


def _first_scale(numel: int) -> int:
    return -(-numel // 16) * 16


def _spread(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:numel]


def _exponent(code: torch.dtype) -> tuple[int, float]:
    """What is added to a code in the bits of an fp32 to make it its number; the smallest number with e > 0.

    Both for a scale of 1. Below that number the steps do not become smaller any more: there `value` has half of what is
    missing to it, which `decode` doubles and `encode` halves.
    """
    exponents = 32 if code == UNSIGNED else 16
    return 131 - exponents << 23, 2.0 ** (5 - exponents)
