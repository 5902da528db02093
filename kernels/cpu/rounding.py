"""How 16-bit numbers are rounded, and what keeps the part that is lost. Twin of kernels/rounding.py."""

import numpy as np

from .memory import from_bits, nearest, store, to_bits, where

TILE = 1024  # elements whose random numbers are on the stack at once


def with_master(param, master_param, DTYPE):
    """The master, unless the parameter is not its rounding: then somebody has written it since."""
    return where(nearest(master_param, DTYPE) == param, master_param, param)


def with_compensation(param, kahan_comp, DTYPE):
    """The parameter and what its rounding lost, unless that is more than it can have lost."""
    is_its = nearest(param + np.float32(0.99951171875) * kahan_comp, DTYPE) == param
    return param - where(is_its & (kahan_comp != 0), -kahan_comp, np.float32(0))  # -0.0 - 0.0 is -0.0, plus it is 0.0


def random_bits(address, draw, stream, count):
    """Write 16 random bits for each of `count` elements, the first of which begins a group of eight.

    Eight elements share one call of Philox: its four words in memory are their bits, one after the other.
    """
    seed, tensor, step, group = draw
    for i in range((count + 7) // 8):
        key0, key1 = np.uint32(seed), np.uint32(seed >> 32)
        a, b, c, d = np.uint32(group + i), np.uint32(tensor), np.uint32(step), np.uint32(stream)
        for _ in range(10):
            of_a, of_c = np.uint64(a) * np.uint64(0xD2511F53), np.uint64(c) * np.uint64(0xCD9E8D57)
            a, b = np.uint32(of_c >> np.uint64(32)) ^ b ^ key0, np.uint32(of_c)
            c, d = np.uint32(of_a >> np.uint64(32)) ^ d ^ key1, np.uint32(of_a)
            key0, key1 = np.uint32(key0 + np.uint32(0x9E3779B9)), np.uint32(key1 + np.uint32(0xBB67AE85))
        store(address, 4 * i, a, "uint32")
        store(address, 4 * i + 1, b, "uint32")
        store(address, 4 * i + 2, c, "uint32")
        store(address, 4 * i + 3, d, "uint32")


def stochastic(value, random, DTYPE):
    """Round to one of the two neighbours in a 16-bit type, to each with the probability that makes the mean right."""
    bits = to_bits(value)
    magnitude = abs(value)
    if DTYPE == "bfloat16":
        rounded = from_bits(np.uint32(bits + random) & np.uint32(0xFFFF0000))
        is_between = magnitude < np.float32(3.3895313892515355e38)
    else:
        # Units of 2^-16 of the spacing, which below the normal numbers is 2^-24 throughout.
        small = magnitude < np.float32(6.103515625e-05)
        units = np.uint32(np.int32(where(small, magnitude * np.float32(2.0**40), np.float32(0)))) + random
        tiny = np.float32(np.int32(np.uint32(units) >> np.uint32(16))) * np.float32(2.0**-24)
        rounded = from_bits(np.uint32(to_bits(magnitude) + (random >> np.uint32(3))) & np.uint32(0xFFFFE000))
        rounded = where(small, tiny, rounded)
        rounded = where((bits >> np.uint32(31)) != 0, -rounded, rounded)
        is_between = magnitude < np.float32(65504.0)
    # What is not finite, and what lies beyond the largest number and has but one finite neighbour, goes to the nearest.
    return where(is_between, rounded, value)
