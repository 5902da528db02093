"""Whether a step is taken, and what its gradients are multiplied by. Twin of fusedopt/step/gate.py."""

import triton
import triton.language as tl

from .rounding import load


@triton.jit
def squares_tile(squares, not_finite, address, first, start, lanes, stop, GRAD: tl.constexpr, ALIGN: tl.constexpr):
    """Add the squares of one block of elements, in float64, and 1 for each fp64 that is not finite."""
    offsets = start + lanes
    grad_ptr = tl.multiple_of(address.to(tl.pointer_type(GRAD)), ALIGN) + first
    grad = load(grad_ptr + offsets, offsets < stop, tl.float64, OTHER=0)
    if GRAD == tl.float64:
        not_finite += tl.where(tl.abs(grad) < float("inf"), 0, 1)
    return squares + grad * grad, not_finite


@triton.jit(
    repr=lambda specialization: f"fusedopt_sum_squares_{specialization.constants['GRAD']}",
    do_not_specialize=["n_chunks"],
)
def sum_squares(
    rows_ptr,  # int64 [rows, 2]: the tensor, its numel
    grads_ptr,  # int64 [n_tensors]: address of the gradient, 0 = none in this step
    chunks_ptr,  # int32 [n_chunks, 2]: row, index of the chunk in its tensor
    partials_ptr,  # float64 [programs, 2]: written: the sum of squares, not 0 if an element is not finite
    n_chunks: tl.int64,
    GRAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    CONTIGUITY: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks that are loaded before the first is added
):
    """Sum over every so many-th chunk: the order depends on the number of programs alone, not on what runs when."""
    pid = tl.program_id(0).to(tl.int64)
    lanes = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_SIZE), CONTIGUITY), CONTIGUITY)
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    not_finite = tl.zeros([BLOCK_SIZE], tl.int32)
    for i in range(pid, n_chunks, tl.num_programs(0)):
        row = tl.load(chunks_ptr + 2 * i).to(tl.int64)
        first = tl.load(chunks_ptr + 2 * i + 1).to(tl.int64) * CHUNK_SIZE
        address = tl.load(grads_ptr + tl.load(rows_ptr + 2 * row))
        length = tl.minimum(tl.load(rows_ptr + 2 * row + 1) - first, CHUNK_SIZE).to(tl.int32)
        length = tl.where(address == 0, 0, length)
        aligned = tl.where(address % 16 == 0, length // 8 * 8, 0)
        for start in tl.range(0, aligned, BLOCK_SIZE, loop_unroll_factor=UNROLL):
            squares, not_finite = squares_tile(
                squares, not_finite, address, first, start, lanes, aligned, GRAD, ALIGN=16
            )
        for start in range(aligned, length, BLOCK_SIZE):
            squares, not_finite = squares_tile(squares, not_finite, address, first, start, lanes, length, GRAD, ALIGN=1)
    if GRAD != tl.float64:  # whose squares overflow; those of the others and their sums do not
        not_finite = tl.where(squares < float("inf"), 0, 1)
    tl.store(partials_ptr + 2 * pid, tl.sum(squares))
    tl.store(partials_ptr + 2 * pid + 1, tl.sum(not_finite).to(tl.float64))


@triton.jit
def decide(limits, grad_scale_ptr, found_inf_ptr, partials_ptr, n_partials, BLOCK_SIZE: tl.constexpr):
    """(1 / grad_scale, that and clipping, whether the step is skipped, the norm of the gradients)."""
    max_grad_norm, skip_nonfinite, skip_grad_norm = limits
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    not_finite = tl.zeros([BLOCK_SIZE], tl.float64)
    for first in range(0, n_partials, BLOCK_SIZE):
        partials = first + tl.arange(0, BLOCK_SIZE)
        mask = partials < n_partials
        squares += tl.load(partials_ptr + 2 * partials, mask=mask, other=0.0)
        not_finite += tl.load(partials_ptr + 2 * partials + 1, mask=mask, other=0.0)

    unscale = 1 / tl.load(grad_scale_ptr).to(tl.float64)
    grad_norm = tl.sqrt(tl.sum(squares)) * unscale
    clip = max_grad_norm / (grad_norm + 1e-6)
    clip = tl.where((max_grad_norm < 0) | (clip > 1), 1.0, clip)
    skip = (tl.load(found_inf_ptr) != 0) | ((skip_nonfinite != 0) & (tl.sum(not_finite) != 0))
    skip |= grad_norm > skip_grad_norm
    return unscale, unscale * clip, skip, grad_norm
