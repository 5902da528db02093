"""States in 8 bits. Twin of fusedopt/storage/quantized.py, which tells what a code means.

A tile is [repetitions, lanes]. 32 threads hold whole blocks of it, so that a warp finds the largest number of a block
by itself. Products that are summed are exact, or have gone through a minimum: fusing them changes no bit.
"""

import triton
import triton.language as tl

from .arithmetic import div

BLOCK = tl.constexpr(256)  # numbers that share a scale
_FIFTEEN = tl.constexpr(130 << 23 | 7 << 20)  # its bits: what the largest code means with a scale of 1
_FIFTEENTH = tl.constexpr(0.06666668504476547)  # and a little more, so that 15 times a scale gives this scale again
_SMALLEST_SCALE = tl.constexpr(31 << 23)  # the bits of 2^-96


@triton.jit
def tile(BLOCK_SIZE: tl.constexpr, CONTIGUITY: tl.constexpr):
    """The offsets of a tile: a row of 32 threads, each with so many numbers that lie together, once or more a block."""
    WIDTH: tl.constexpr = 32 * CONTIGUITY
    REPETITIONS: tl.constexpr = BLOCK // WIDTH
    lanes = tl.arange(0, BLOCK_SIZE // REPETITIONS)
    offsets = tl.arange(0, REPETITIONS)[:, None] * WIDTH + (lanes // WIDTH * BLOCK + lanes % WIDTH)[None, :]
    # That each number has a neighbour is true of every tile: else Triton 3.6 lays the threads of a warp along a column.
    NEIGHBOURS: tl.constexpr = 2 if CONTIGUITY == 1 else CONTIGUITY
    return tl.max_contiguous(tl.multiple_of(offsets, [1, CONTIGUITY]), [1, NEIGHBOURS])


@triton.jit
def first_scale(numel):
    """Where in the memory of a state the scales begin."""
    return (numel + 15) // 16 * 16


@triton.jit
def load_scales(address, start, stop, offsets):
    """The scales of the blocks of a tile."""
    blocks = tl.arange(0, offsets.numel // BLOCK)
    ptr = address.to(tl.pointer_type(tl.float32)) + start // BLOCK
    return tl.load(ptr + blocks, mask=start + blocks * BLOCK < stop)


@triton.jit
def store_scales(address, start, stop, scales):
    """Where `load_scales` read. One thread of the 32 that have it writes a scale: another would have to be given it."""
    blocks = start + tl.arange(0, scales.numel)[:, None] * BLOCK
    threads = tl.arange(0, 32)[None, :]
    # With `threads`, of which only 0 stores, those of a warp lie along a row: Triton 3.6 asks for a reason.
    ptrs = address.to(tl.pointer_type(tl.float32)) + blocks // BLOCK + threads
    tl.store(ptrs, tl.broadcast_to(scales[:, None], ptrs.shape), mask=(blocks < stop) & (threads == 0))


@triton.jit
def decode(codes, scales, CODE: tl.constexpr):
    """The numbers, in fp32."""
    OFFSET: tl.constexpr = (99 if CODE == tl.uint8 else 115) << 23
    NORMAL: tl.constexpr = 2.0**-27 if CODE == tl.uint8 else 2.0**-11
    code = codes.to(tl.int32)
    bits = ((code & (0xFF if CODE == tl.uint8 else 0x7F)) << 20) + OFFSET
    bits = tl.minimum(bits, (2 * bits.to(tl.float32, bitcast=True) - NORMAL).to(tl.int32, bitcast=True))
    if CODE == tl.int8:
        bits |= code & -0x80000000
    return bits.to(tl.float32, bitcast=True) * _spread(scales, codes)


@triton.jit
def encode(values, mask, random, CODE: tl.constexpr, WHOLE: tl.constexpr):
    """Codes and scales of numbers.

    `random` is 16 random bits for each number, or None to round to the nearest, ties away from 0. WHOLE says that
    the mask takes whole blocks.
    """
    OFFSET: tl.constexpr = (99 if CODE == tl.uint8 else 115) << 23
    NORMAL: tl.constexpr = 2.0**-27 if CODE == tl.uint8 else 2.0**-11
    values = values.to(tl.float32)
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not WHOLE:
        magnitudes = tl.where(mask, magnitudes, 0)
    largest = _largest(magnitudes)
    scale = (largest.to(tl.float32, bitcast=True) * _FIFTEENTH).to(tl.int32, bitcast=True) & -16
    scale = tl.maximum(scale, _SMALLEST_SCALE)
    inverse = div(tl.full(scale.shape, 1.0, tl.float32), scale.to(tl.float32, bitcast=True))
    bits = (tl.abs(values) * _spread(inverse, values)).to(tl.uint32, bitcast=True)  # of a NaN they are the largest
    bits = tl.minimum(bits, _FIFTEEN).to(tl.int32, bitcast=True)
    half = 0.5 * bits.to(tl.float32, bitcast=True) + NORMAL / 2
    bits = tl.maximum(bits, half.to(tl.int32, bitcast=True)) - OFFSET
    if random is None:
        codes = (bits + 0x80000) >> 20
    else:
        codes = (bits + (random.to(tl.int32) << 4) + 8) >> 20  # what is a code already stays it
    if CODE == tl.uint8:
        codes = tl.maximum(codes, tl.minimum(magnitudes, 1))
    else:
        codes |= (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return codes.to(CODE), tl.where(largest == 0, 0, scale).to(tl.float32, bitcast=True)


@triton.jit
def _largest(x):
    """Of each block of a tile."""
    rows = tl.max(x, axis=0)
    return tl.max(tl.reshape(rows, [x.numel // BLOCK, x.shape[1] * BLOCK // x.numel]), axis=1)


@triton.jit
def _spread(x, like):
    """For each number of a tile what its block has."""
    BLOCKS: tl.constexpr = like.numel // BLOCK
    rows = tl.reshape(tl.broadcast_to(x[:, None], [BLOCKS, like.shape[1] // BLOCKS]), [1, like.shape[1]])
    return tl.broadcast_to(rows, like.shape)
