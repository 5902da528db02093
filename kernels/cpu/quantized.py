"""States in 8 bits, a block after the other. Twin of kernels/quantized.py."""

import numpy as np

from .memory import from_bits, load, store, to_bits, where

BLOCK = 256  # numbers that share a scale
CODES = ("int8", "uint8")
_OFFSET = {"int8": 115 << 23, "uint8": 99 << 23}
_NORMAL = {"int8": 2.0**-11, "uint8": 2.0**-27}
_FIFTEEN = 130 << 23 | 7 << 20  # its bits: what the largest code means with a scale of 1
_FIFTEENTH = 0.06666668504476547  # and a little more, so that 15 times a scale gives this scale again
_SMALLEST_SCALE = 31 << 23  # the bits of 2^-96


def first_scale(numel):
    """Where in the memory of a state the scales begin."""
    return (numel + 15) // 16 * 16


def decode(address, offset, scale, CODE):
    """A number, in fp32."""
    code = load(address, offset, "uint8")
    magnitude = code if CODE == "uint8" else code & np.uint32(0x7F)
    bits = np.uint32((magnitude << np.uint32(20)) + np.uint32(_OFFSET[CODE]))
    bits = min(bits, to_bits(np.float32(2) * from_bits(bits) - np.float32(_NORMAL[CODE])))
    if CODE == "int8":
        bits |= np.uint32((code & np.uint32(0x80)) << np.uint32(24))
    return from_bits(np.uint32(bits)) * scale


def encode(address, scale_address, values, random, first, count, CODE, STOCHASTIC):
    """Store the codes and the scale of a block: `count` numbers that lie at `values`, of which `first` is the place.

    At `random` lie 16 random bits for each number.
    """
    largest = np.uint32(0)
    for i in range(count):
        magnitude = to_bits(load(values, i, "float32")) & np.uint32(0x7FFFFFFF)
        largest = max(magnitude, largest)
    scale = to_bits(from_bits(largest) * np.float32(_FIFTEENTH)) & np.uint32(0xFFFFFFF0)
    scale = from_bits(max(scale, np.uint32(_SMALLEST_SCALE)))
    store(scale_address, first // BLOCK, where(largest == 0, np.float32(0), scale), "float32")
    inverse = np.float32(1) / scale
    for i in range(count):
        value = load(values, i, "float32")
        bits = min(to_bits(abs(value) * inverse), np.uint32(_FIFTEEN))
        bits = max(bits, to_bits(np.float32(0.5) * from_bits(bits) + np.float32(_NORMAL[CODE] / 2)))
        rounding = (load(random, i, "uint16") << np.uint32(4)) + np.uint32(8) if STOCHASTIC else np.uint32(0x80000)
        code = np.uint32(np.uint32(bits - np.uint32(_OFFSET[CODE])) + rounding) >> np.uint32(20)
        if CODE == "uint8":
            code = max(code, min(to_bits(value) & np.uint32(0x7FFFFFFF), np.uint32(1)))
        else:
            code = code | ((to_bits(value) >> np.uint32(24)) & np.uint32(0x80))
        store(address, first + i, np.uint32(code), "uint8")
