"""Whether a step is taken, and what its gradients are multiplied by. Twin of kernels/gate.py."""

import numpy as np

from .memory import arguments, load, scratch, store, where

LANES = 64  # sums beside each other, whose order nobody may change; of fewer a compiler makes scalars


def sum_squares(args, program, GRAD, CHUNK_SIZE):
    """Sum over every so many-th chunk: the order depends on the number of programs alone, not on what runs when."""
    rows_ptr, grads_ptr, chunks_ptr, partials_ptr, n_chunks = arguments(args, 5)
    n_programs = load(args, 0, "int64")
    squares, not_finite = scratch(8 * LANES), scratch(8 * LANES)
    for lane in range(LANES):
        store(squares, lane, 0.0, "float64")
        store(not_finite, lane, 0.0, "float64")
    i = program
    while i < n_chunks:
        row = load(chunks_ptr, 2 * i, "int32")
        start = load(chunks_ptr, 2 * i + 1, "int32") * CHUNK_SIZE
        address = load(grads_ptr, load(rows_ptr, 2 * row, "int64"), "int64")
        stop = min(load(rows_ptr, 2 * row + 1, "int64"), start + CHUNK_SIZE)
        if address == 0:
            stop = start
        for first in range(start, stop, LANES):
            for lane in range(min(LANES, stop - first)):
                grad = np.float64(load(address, first + lane, GRAD))
                store(squares, lane, load(squares, lane, "float64") + grad * grad, "float64")
                if GRAD == "float64":  # whose squares overflow; those of the others and their sums do not
                    store(not_finite, lane, load(not_finite, lane, "float64") + (grad - grad), "float64")
        i += n_programs
    sum = sum_not_finite = 0.0
    for lane in range(LANES):
        sum += load(squares, lane, "float64")
        sum_not_finite += load(not_finite, lane, "float64")
    is_finite = sum_not_finite == 0 if GRAD == "float64" else sum < np.inf
    store(partials_ptr, 2 * program, sum, "float64")
    store(partials_ptr, 2 * program + 1, where(is_finite, 0.0, 1.0), "float64")


def decide(limits, grad_scale_ptr, found_inf_ptr, partials_ptr, n_partials):
    """(1 / grad_scale, that and clipping, whether the step is skipped, the norm of the gradients)."""
    max_grad_norm, skip_nonfinite, skip_grad_norm = limits
    squares = not_finite = 0.0
    for i in range(n_partials):
        squares += load(partials_ptr, 2 * i, "float64")
        not_finite += load(partials_ptr, 2 * i + 1, "float64")

    unscale = 1 / np.float64(load(grad_scale_ptr, 0, "float32"))
    grad_norm = np.sqrt(squares) * unscale
    clip = max_grad_norm / (grad_norm + 1e-6)
    clip = where((max_grad_norm < 0) | (clip > 1), 1.0, clip)
    skip = (load(found_inf_ptr, 0, "float32") != 0) | ((skip_nonfinite != 0) & (not_finite != 0))
    skip |= grad_norm > skip_grad_norm
    return unscale, unscale * clip, skip, grad_norm
