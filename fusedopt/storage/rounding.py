"""How 16-bit numbers are rounded, and what keeps the part that is lost. Twin of kernels/rounding.py."""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def with_master(param: Tensor, master_param: Tensor, dtype: torch.dtype) -> Tensor:
    """The master, unless the parameter is not its rounding: then somebody has written it since.

    Args:
        param: the parameter, in the dtype of the arithmetic.
        master_param: its master.
        dtype: the one that the parameter is stored in.
    """
    return torch.where(nearest(master_param, dtype) == param, master_param, param)


def with_compensation(param: Tensor, kahan_comp: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter and what its rounding lost, unless that is more than it can have lost.

    A little less is compared: the compensation is rounded too, and may have become half a unit of the parameter.
    """
    is_its = nearest(param + 0.99951171875 * kahan_comp, dtype) == param
    return torch.where(is_its & (kahan_comp != 0), param + kahan_comp, param)  # where -0.0 stays what it is


def nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of a 16-bit dtype, ties to even."""
    return value.to(dtype).to(value.dtype)


def stochastic(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """One of the two neighbours in a 16-bit dtype, each with the probability that makes the mean right.

    What is not finite, and what lies beyond the largest number, is rounded to nearest.

    Args:
        value: fp32.
        dtype: bf16 or fp16.
        random: 16 random bits an element, as int64. Probabilities are multiples of 2^-16.
    """
    finfo = torch.finfo(dtype)
    power = (value.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, the largest below the value
    unit = power.clamp(min=finfo.tiny) * finfo.eps
    shares = (value.abs() / unit * 65536).long()
    rounded = torch.copysign((shares + random >> 16) * unit, value)
    return torch.where(value.abs() < finfo.max, rounded, nearest(value, dtype))


def random_bits(
    seed: int, tensor: int, step: int, stream: int, count: int, device: torch.device, first: int = 0
) -> Tensor:
    """16 random bits for each of `count` elements of a tensor from the `first` one. Eight share one call of Philox."""
    group = torch.arange(first // 8, -(-(first + count) // 8), device=device) & MASK32
    words = torch.stack(philox((group, tensor, step, stream), (seed & MASK32, seed >> 32)), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)[first % 8 :][:count]


def philox(counter: tuple[Tensor, int, int, int], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four words of 32 random bits for each counter, as int64.

    Salmon et al., `Parallel Random Numbers: As Easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_, 2011.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, device=counter[0].device) for word in counter)
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # the low 64 bits, as they wrap around
        c0, c1 = (b >> 32 & MASK32) ^ c1 ^ k0, b & MASK32
        c2, c3 = (a >> 32 & MASK32) ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]  # of one shape: each round hands that of c0 on
