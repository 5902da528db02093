"""What states in 8 bits should be, in numpy: by the table of all numbers that a code can mean."""

from __future__ import annotations

import numpy as np
import torch

from fusedopt.storage.quantized_tensor import Quantized
from tests.bounded import Array

BLOCK = 256


def table(exponent_bits: int) -> Array:
    """What each code without a sign means, with a scale of 1."""
    largest = 2**exponent_bits - 1
    codes = [(exponent, mantissa) for exponent in range(largest + 1) for mantissa in range(8)]
    return np.array(
        [(8 + m) * 2.0 ** (e - largest) if e else m * 2.0 ** (1 - largest) for e, m in codes], dtype=np.longdouble
    )


SIGNED, UNSIGNED = table(4), table(5)


def blocks_of(values: Array) -> Array:
    return np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)


def scales_of(values: Array) -> Array:
    """A fifteenth of the largest magnitude of each block, cut to 20 bits; not below 2^-96 but for zeros."""
    largest = np.abs(blocks_of(values)).max(1)
    mantissa, exponent = np.frexp(largest / 15)
    cut = np.ldexp(np.floor(np.ldexp(mantissa, 20)), exponent - 20)
    return np.where(largest == 0, 0, np.maximum(cut, np.ldexp(np.longdouble(1), -96)))


def rounded(values: Array, scales: Array, codes: Array, random: Array | None = None) -> Array:
    """The nearest number that there is with these scales, the larger one of two; or by 16 random bits one of two."""
    scale = np.repeat(scales, BLOCK)[: len(values)]
    ratio = np.minimum(np.abs(values) / np.where(scale == 0, 1, scale), codes[-1])
    below = np.minimum(np.searchsorted(codes, ratio, side="right") - 1, len(codes) - 2)
    share = (ratio - codes[below]) / (codes[below + 1] - codes[below])
    up = share >= 0.5 if random is None else np.floor(share * 65536) + random >= 65536
    place = below + up
    if codes is UNSIGNED:
        place = np.where(values != 0, np.maximum(place, 1), place)
    return np.copysign(codes[place], values) * scale


def parts_of(state: Quantized) -> tuple[Array, Array]:
    """The numbers that a state means, in the order of its memory, and its scales; by its codes and the table."""
    numel = state.numel() * (2 if state.is_complex() else 1)
    memory = state.memory.cpu()
    scales = memory[-(-numel // 16) * 16 :].view(torch.float32).numpy().astype(np.longdouble)
    codes = memory[:numel].view(torch.uint8).numpy()
    if memory.dtype == torch.uint8:
        values = UNSIGNED[codes]
    else:
        values = np.where(codes >= 128, -1, 1) * SIGNED[codes & 127]
    return values * np.repeat(scales, BLOCK)[:numel], scales
