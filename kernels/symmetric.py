"""alpha · X Xᵀ + beta · C for a batch of matrices, of which only the tiles on and above the diagonal are computed."""

import triton
import triton.language as tl

from .rounding import INTERPRET, load, store


@triton.jit
def tile_of(pid, n_tiles):
    """Row and column of the tile of a program, row ≤ column, in whole numbers.

    Row r of the triangle has n_tiles - r tiles. With the rows from the other end it makes rows of one length.
    """
    odd = n_tiles % 2
    width = n_tiles + 1 - odd
    row, place = pid // width, pid % width
    is_first = place < n_tiles - row
    tile_row = tl.where(is_first, row, n_tiles - 1 - row + odd)
    return tile_row, tile_row + tl.where(is_first, place, place - (n_tiles - row))


@triton.jit
def symmetric_tile(value, lanes):
    """What is above the diagonal in place of what is below: the order of sums may differ within a tensor core."""
    return tl.where(lanes[:, None] <= lanes[None, :], value, tl.trans(value))


@triton.jit(
    repr=lambda specialization: "fusedopt_symmetric_product",
    do_not_specialize=[
        "rows",
        "columns",
        "x_stride",
        "x_row_stride",
        "x_column_stride",
        "c_stride",
        "c_row_stride",
        "out_stride",
        "out_row_stride",
    ],
)
def symmetric_product(
    x_ptr,  # [batch, rows, columns]
    c_ptr,  # [batch, rows, rows], symmetric; None = none
    out_ptr,  # [batch, rows, rows]: written
    alpha,
    beta,
    rows: tl.int64,
    columns: tl.int64,
    x_stride: tl.int64,
    x_row_stride: tl.int64,
    x_column_stride: tl.int64,
    c_stride: tl.int64,
    c_row_stride: tl.int64,
    out_stride: tl.int64,
    out_row_stride: tl.int64,
    TRANSPOSED: tl.constexpr,  # whether in X the elements of a column lie side by side, not those of a row
    ALIGNED: tl.constexpr,  # whether all sizes, strides and addresses are multiples of 16 bytes
    BLOCK_SIZE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute one tile; write it and, on the other side of the diagonal, its transpose."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # The interpreter would multiply the bits of bf16.
    OPERAND: tl.constexpr = tl.float32 if INTERPRET else DTYPE
    if ALIGNED:  # `// VECTOR * VECTOR` tells the compiler what keeps accesses wide
        VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        rows = rows // VECTOR * VECTOR
        columns = columns // VECTOR * VECTOR
        x_stride = x_stride // VECTOR * VECTOR
        x_row_stride = x_row_stride // VECTOR * VECTOR
        x_column_stride = x_column_stride // VECTOR * VECTOR
        c_stride = c_stride // VECTOR * VECTOR
        c_row_stride = c_row_stride // VECTOR * VECTOR
        out_stride = out_stride // VECTOR * VECTOR
        out_row_stride = out_row_stride // VECTOR * VECTOR
    if TRANSPOSED:
        x_row_stride = 1
    else:
        x_column_stride = 1

    n_tiles = tl.cdiv(rows, BLOCK_SIZE)
    n_programs = n_tiles * (n_tiles + 1) // 2
    pid = tl.program_id(0).to(tl.int64)
    matrix = pid // n_programs
    tile_row, tile_column = tile_of(pid % n_programs, n_tiles)
    first, second = tile_row * BLOCK_SIZE, tile_column * BLOCK_SIZE
    lanes = tl.arange(0, BLOCK_SIZE)
    depth = tl.arange(0, BLOCK_COLUMNS)
    first_mask, second_mask = lanes < rows - first, lanes < rows - second

    x_ptr += matrix * x_stride
    left_ptrs = x_ptr + (first + lanes)[:, None] * x_row_stride + depth[None, :] * x_column_stride
    right_ptrs = x_ptr + depth[:, None] * x_column_stride + (second + lanes)[None, :] * x_row_stride
    total = tl.zeros([BLOCK_SIZE, BLOCK_SIZE], tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        left_mask = first_mask[:, None] & (depth < columns - start)[None, :]
        right_mask = (depth < columns - start)[:, None] & second_mask[None, :]
        left = load(left_ptrs + start * x_column_stride, left_mask, OPERAND, 0)
        right = load(right_ptrs + start * x_column_stride, right_mask, OPERAND, 0)
        total = tl.dot(left, right, total, input_precision="ieee")

    total *= alpha
    mask = first_mask[:, None] & second_mask[None, :]
    if c_ptr is not None:
        c_ptr += matrix * c_stride + first * c_row_stride + second
        total += beta * load(c_ptr + lanes[:, None] * c_row_stride + lanes[None, :], mask, tl.float32, 0)
    if not INTERPRET:  # half as much to exchange between threads
        total = total.to(out_ptr.dtype.element_ty)
    out_ptr += matrix * out_stride
    offsets = lanes[:, None] * out_row_stride + lanes[None, :]
    if tile_row == tile_column:
        total = symmetric_tile(total, lanes)
    else:
        mirrored_mask = second_mask[:, None] & first_mask[None, :]
        store(out_ptr + second * out_row_stride + first + offsets, tl.trans(total), mirrored_mask)
    store(out_ptr + first * out_row_stride + second + offsets, total, mask)
