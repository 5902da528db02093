"""`load` of the kernels with a hint for the cache, for `bench.tune`."""

import triton
import triton.language as tl

from fusedopt.kernels.rounding import INTERPRET, load


@triton.jit
def evict_first(ptrs, mask, COMPUTE: tl.constexpr):
    if INTERPRET:
        return load(ptrs, mask, COMPUTE)
    return tl.load(ptrs, mask=mask, eviction_policy="evict_first").to(COMPUTE)


@triton.jit
def evict_last(ptrs, mask, COMPUTE: tl.constexpr):
    if INTERPRET:
        return load(ptrs, mask, COMPUTE)
    return tl.load(ptrs, mask=mask, eviction_policy="evict_last").to(COMPUTE)
