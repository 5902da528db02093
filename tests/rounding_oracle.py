"""What low precision should do, in numpy: random bits, stochastic rounding, master weights and compensations."""

from __future__ import annotations

import numpy as np
import torch

from tests.bounded import Array
from tests.tolerance import overflow, ulp


def philox(counter: tuple[Array, int, int, int], key: int) -> list[Array]:
    """Philox4x32-10 with the key in one number of 64 bits, from the paper's definition, word by word."""
    mask = np.uint64(0xFFFFFFFF)
    words = [np.broadcast_to(np.asarray(word, dtype=np.uint64), np.shape(counter[0])) for word in counter]
    keys = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    for _ in range(10):
        left, right = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (right >> np.uint64(32)) ^ words[1] ^ keys[0],
            right & mask,
            (left >> np.uint64(32)) ^ words[3] ^ keys[1],
            left & mask,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & mask, (keys[1] + np.uint64(0xBB67AE85)) & mask]
    return words


def random_bits(seed: int, tensor: int, step: int, stream: int, count: int) -> Array:
    """For each element 16 bits of the call for its group of eight: the low half of a word before the high half."""
    elements = np.arange(count)
    words = np.array(philox((elements // 8, tensor, step, stream), seed)).reshape(4, count)
    word = words[elements % 8 // 2, elements]
    return np.where(elements % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16)).astype(np.int64)


def nearest(values: Array, dtype: torch.dtype) -> Array:
    """Round to nearest, ties to even."""
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(dtype).double().numpy().astype(np.longdouble)


def stochastic(values: Array, dtype: torch.dtype, random: Array) -> Array:
    """Up where the lost part, in units of 2^-16 of the distance of the neighbours, and the random bits reach 2^16."""
    unit = ulp(np.abs(values), dtype)
    with np.errstate(invalid="ignore"):
        units = np.abs(values) / unit
        down = np.floor(units)
        up = np.floor((units - down) * 65536) + random >= 65536
        rounded = np.copysign((down + up) * unit, values)
        largest = np.longdouble(torch.finfo(dtype).max)
        beyond = np.where(np.abs(values) < overflow(dtype), np.copysign(largest, values), np.copysign(np.inf, values))
        return np.where(np.isnan(values), np.nan, np.where(np.abs(values) < largest, rounded, beyond))


def with_kept(param: Array, kept: dict[str, Array], dtype: torch.dtype) -> Array:
    """The parameter as it was before it was rounded, unless somebody has written it since."""
    if "master_param" in kept:
        return np.where(nearest(kept["master_param"], dtype) == param, kept["master_param"], param)
    if "kahan_comp" in kept:
        # No more than half the distance to the next number can have been lost, which is shorter below a power of two.
        comp = kept["kahan_comp"]
        towards_zero = np.sign(comp) != np.sign(param)
        power = np.ldexp(np.longdouble(0.5), np.frexp(np.abs(param))[1]) == np.abs(param)
        distance = ulp(np.abs(param), dtype)
        below = np.maximum(distance / 2, ulp(np.zeros_like(param), dtype))
        distance = np.where(towards_zero & power, below, distance)
        return np.where(np.abs(comp) <= distance / 2, param + comp, param)
    return param
