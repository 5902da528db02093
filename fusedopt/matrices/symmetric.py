"""alpha · X Xᵀ + beta · C for a batch of matrices, in about half of the work: the result is symmetric."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.choice import warp_size, why_not_triton
from ..engines.tables import launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A tile of the result. No machine has measured others yet: this is the size that matrix products usually take. Where
# elements are loaded alone, each takes a register for its address, and there are not enough for so large a tile.
BLOCK_SIZE = 128
BLOCK_SIZE_UNALIGNED = 64
BLOCK_BYTES = 128  # of a row of X that are multiplied at once: as many as shared memory has banks for
STAGES = {32: 3, 64: 2}  # blocks on their way at once, by the warp size: AMD's processors share less memory

_asked_for = os.environ.get("FUSEDOPT_SYMMETRIC_PRODUCTS", "0") not in ("", "0")


class Arguments(NamedTuple):
    """What a launch is given."""

    programs: int
    values: tuple[Any, ...]
    options: dict[str, Any]


@cache
def is_chosen(device: torch.device) -> bool:
    """Whether products on a device should go through `symmetric_product`.

    Off, because no GPU has measured it yet: only where FUSEDOPT_SYMMETRIC_PRODUCTS was set to something but "" and "0"
    when this module was imported, and where Triton drives the device.
    """
    return _asked_for and why_not_triton(torch.empty(0, dtype=torch.float32, device=device)) is None


def symmetric_product(
    x: Tensor, *, out: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """Write alpha · X Xᵀ + beta · C into `out`, bit for bit symmetric, and return it.

    Sums are in fp32, of products that are exact for 16 bits, and are rounded once.

    Args:
        x: [batch, rows, columns], of any strides; fastest where the rows or the columns lie together, and sizes,
            strides and addresses are multiples of 16 bytes.
        out: [batch, rows, rows], of the dtype of `x`, with elements of a row or of a column side by side. Shares no
            memory with `x` and `c`.
        c: [batch, rows, rows], symmetric, else as `out`. What is below its diagonal may be left unread. Not read if
            `beta` is 0.
        alpha: of the product.
        beta: of `c`.
    """
    _check(x, out, c)
    if out.numel():
        programs, values, options = arguments(x, out, c, alpha, beta, warp_size(x.device))
        from ..kernels import symmetric

        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
            launch(symmetric.symmetric_product, programs, *values, **options)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    return out


def arguments(x: Tensor, out: Tensor, c: Tensor | None, alpha: float, beta: float, threads: int) -> Arguments:
    """What the kernel is launched with on a device with so many threads in a warp."""
    if beta == 0:
        c = None
    batch, rows, columns = x.shape
    _, row_stride, column_stride = x.stride()
    transposed = columns > 1 and column_stride != 1
    if transposed and rows > 1 and row_stride != 1:
        x, transposed = x.contiguous(), False
    stride, row_stride, column_stride = x.stride()
    results = [out] if c is None else [c, out]
    out_strides, c_strides = _strides(out), (0, 0) if c is None else _strides(c)
    vector = 16 // x.itemsize
    multiples = (rows, columns, stride, column_stride if transposed else row_stride, *out_strides, *c_strides)
    aligned = all(number % vector == 0 for number in multiples)
    aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensor in (x, *results))
    block_size = BLOCK_SIZE if aligned else BLOCK_SIZE_UNALIGNED
    n_tiles = -(-rows // block_size)
    return Arguments(
        batch * (n_tiles * (n_tiles + 1) // 2),
        (
            x,
            c,
            out,
            float(alpha),
            float(beta),
            rows,
            columns,
            stride,
            row_stride,
            column_stride,
            *c_strides,
            *out_strides,
        ),
        {
            "TRANSPOSED": transposed,
            "ALIGNED": aligned,
            "BLOCK_SIZE": block_size,
            "BLOCK_COLUMNS": BLOCK_BYTES // x.itemsize,
            "num_warps": 256 // threads,
            "num_stages": STAGES[threads],
            "enable_fp_fusion": True,
        },
    )


def _strides(matrices: Tensor) -> tuple[int, int]:
    """Those of the batch and of the rows, or of the columns: a symmetric matrix is its transpose."""
    stride, *strides = matrices.stride()
    return stride, max(strides)


def _check(x: Tensor, out: Tensor, c: Tensor | None) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"x must be a batch of matrices in 16 or 32 bits, not {list(x.shape)} in {x.dtype}")
    square = (x.shape[0], x.shape[1], x.shape[1])
    for name, matrices in {"out": out, "c": c}.items():
        if matrices is None:
            continue
        if matrices.shape != square or matrices.dtype != x.dtype or matrices.device != x.device:
            raise ValueError(
                f"{name} must be {list(square)} in {x.dtype} on {x.device}, not {list(matrices.shape)} in "
                f"{matrices.dtype} on {matrices.device}"
            )
        if square[1] > 1 and min(matrices.stride()[1:]) != 1:
            raise ValueError(f"{name} must have rows or columns without gaps, not strides {matrices.stride()}")
