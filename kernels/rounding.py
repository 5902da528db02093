"""Conversion between the stored dtype of a stream and the dtype of the arithmetic.

The interpreter truncates fp32 → bf16 and mistreats subnormal bf16, so there bf16 goes through its bits.
Compiled code uses the hardware's conversion, which rounds to nearest even.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load(ptrs, mask, COMPUTE: tl.constexpr):
    if INTERPRET and ptrs.dtype.element_ty == tl.bfloat16:
        bits = tl.load(ptrs.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    return tl.load(ptrs, mask=mask).to(COMPUTE)


@triton.jit
def store(ptrs, value, mask):
    if INTERPRET and ptrs.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        bits = tl.where(value == value, nearest, quiet_nan).to(tl.uint16)
        tl.store(ptrs.to(tl.pointer_type(tl.uint16), bitcast=True), bits, mask=mask)
    else:
        tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)
