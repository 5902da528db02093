"""From the stored dtype of a stream to that of the arithmetic, and back. Twin of fusedopt/storage/rounding.py.

The interpreter truncates fp32 → bf16 and mistreats subnormal bf16, so there bf16 goes through its bits.
Compiled code uses the hardware's conversion, which rounds to nearest even.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load(ptrs, mask, COMPUTE: tl.constexpr, OTHER: tl.constexpr = None):
    """In the dtype of the arithmetic; OTHER, 0 if it is asked for, where the mask is False."""
    if INTERPRET and ptrs.dtype.element_ty == tl.bfloat16:
        bits = tl.load(ptrs.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=OTHER)
        return from_bits(bits, tl.bfloat16).to(COMPUTE)
    return tl.load(ptrs, mask=mask, other=OTHER).to(COMPUTE)


@triton.jit
def store(ptrs, value, mask):
    """Round to nearest, ties to even."""
    if INTERPRET and ptrs.dtype.element_ty == tl.bfloat16:
        tl.store(ptrs.to(tl.pointer_type(tl.uint16), bitcast=True), _to_bits(value, tl.bfloat16), mask=mask)
    else:
        tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def store_apart(ptrs, value, mask, CONTIGUITY: tl.constexpr):
    """`store` for addresses of any alignment of which a thread holds so many that lie together.

    Alone, such a store would have the elements lie otherwise: they would go through shared memory.
    """
    if CONTIGUITY == 1:
        store(ptrs, value, mask)
    else:
        PAIRS: tl.constexpr = [value.numel // 2, 2]
        even_ptrs, odd_ptrs = tl.split(tl.reshape(ptrs, PAIRS))
        even, odd = tl.split(tl.reshape(value, PAIRS))
        even_mask, odd_mask = tl.split(tl.reshape(mask, PAIRS))
        store_apart(even_ptrs, even, even_mask, CONTIGUITY // 2)
        store_apart(odd_ptrs, odd, odd_mask, CONTIGUITY // 2)


@triton.jit
def store_bits(ptrs, bits, mask):
    """Store 16-bit numbers that are there as their bits."""
    if INTERPRET:
        tl.store(ptrs.to(tl.pointer_type(tl.uint16), bitcast=True), bits, mask=mask)
    else:
        tl.store(ptrs, bits.to(ptrs.dtype.element_ty, bitcast=True), mask=mask)


@triton.jit
def nearest(value, DTYPE: tl.constexpr):
    """What `store` into a 16-bit type and `load` make of a value."""
    return from_bits(_to_bits(value, DTYPE), DTYPE)


@triton.jit
def with_master(param, master_param, DTYPE: tl.constexpr):
    """The master, unless the parameter is not its rounding: then somebody has written it since."""
    return tl.where(nearest(master_param, DTYPE) == param, master_param, param)


@triton.jit
def with_compensation(param, kahan_comp, DTYPE: tl.constexpr):
    """The parameter and what its rounding lost, unless that is more than it can have lost.

    A little less is compared: the compensation is rounded too, and may have become half a unit of the parameter.
    """
    is_its = nearest(param + 0.99951171875 * kahan_comp, DTYPE) == param
    return param - tl.where(is_its & (kahan_comp != 0), -kahan_comp, 0.0)  # -0.0 - 0.0 is -0.0, plus it is 0.0


@triton.jit
def random_bits(draw, stream, first, lanes):
    """16 random bits for element `8 * group + first + lanes` of a tensor, where `first` is a multiple of 8.

    Eight elements share one call of Philox, and four or eight of them belong to one thread, which computes it once.
    """
    seed, tensor, step, group = draw
    group += (first >> 3) + (lanes >> 3)
    a, b, c, d = tl.philox(seed, group, tensor, step, stream)
    word = tl.where(lanes & 4 == 0, tl.where(lanes & 2 == 0, a, b), tl.where(lanes & 2 == 0, c, d))
    return tl.where(lanes & 1 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _to_bits(value, DTYPE: tl.constexpr):
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return tl.where(value == value, rounded, quiet_nan).to(tl.uint16)
    return value.to(DTYPE).to(tl.uint16, bitcast=True)


@triton.jit
def from_bits(bits, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def to_bits_stochastic(value, random, DTYPE: tl.constexpr):
    """Round to one of the two neighbours in a 16-bit type, to each with the probability that makes the mean right."""
    value = value.to(tl.float32)
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = tl.abs(value)
    if DTYPE == tl.bfloat16:
        LARGEST: tl.constexpr = 3.3895313892515355e38
        rounded = (bits + random) >> 16
    else:
        LARGEST: tl.constexpr = 65504.0
        # Both in units of 2^-16 of the spacing, which below the normal numbers is 2^-24 throughout.
        small = magnitude < 6.103515625e-05
        units = tl.where(small, magnitude * 1099511627776.0, 0.0).to(tl.uint32)
        units = tl.where(small, units, (bits << 3) + 0x40000000)  # without the sign and 112 of the exponent
        rounded = ((units + random) >> 16) | ((bits >> 16) & 0x8000)
    # What is not finite, and what lies beyond the largest number and has but one finite neighbour.
    return tl.where(magnitude < LARGEST, rounded.to(tl.uint16), _to_bits(value, DTYPE))
