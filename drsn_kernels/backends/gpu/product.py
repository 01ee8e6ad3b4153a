"""Tiles of matrix products, for the gate's kernels (gate.py, gate_grad.py, linear_grad.py).

What is summed over is walked in steps, of one tile or of several slices of it, which different warps multiply. Tiles
are loaded as rows or transposed, from matrices that lie row by row; what is beyond their ends is 0.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b in their own dtype, as torch's Linear computes it without TF32.

    "ieee": in float32 a chain of fma, which tl.dot asks for by name: compiled without contraction (launch.py) it stays
    one. What several threads hold of a product each makes by the same chain, so it has the same bits in all of them.
    float64 runs on tensor cores. "tf32x3": float32 on tensor cores, each factor in two parts, three of the four
    products; tests/test_gpu.py holds what comes of it to 4 times the error of torch's float32.
    """
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def held(tile, HELD: tl.constexpr):
    """tile, which up to here stays in the registers that it was loaded to.

    Where a product, or another distribution over threads, takes it through shared memory, Triton does so at its load.
    There threads meet, which no load passes by, so each tile was waited for by itself.
    HELD of a kernel: 0 nowhere; 1 outside of loops of products, where loads are under way for several steps, as those
    go to shared memory by themselves; 2 in loops of one step too.
    """
    if not HELD:
        return tile
    elif tile.dtype == tl.float64:
        return tl.inline_asm_elementwise("mov.f64 $0, $1;", "=d,d", [tile], dtype=tl.float64, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [tile], dtype=tl.float32, is_pure=False, pack=1)


# A long product is shared by the warps of a program: each makes SLICES-th of it, and the slices are added at the end.
# Then the index that is summed over is (slices, depth), the tiles that have it as rows or columns are (slices, rows,
# columns), and everything else is broadcast. With one slice there is no such dimension.
#
# What a thread loads, four numbers side by side, it also multiplies: a product may sum in any order, and in that of
# ordered() a thread of a tensor core holds just these. In ascending order each went through shared memory by itself.


@triton.jit
def steps_of(start, SLICES: tl.constexpr, DEPTH: tl.constexpr):
    """What one step of a product sums over, ascending from start on: (depth,) or (slices, depth)."""
    if SLICES == 1:
        return start + tl.arange(0, DEPTH)
    else:
        return (start + tl.arange(0, SLICES) * DEPTH)[:, None] + tl.arange(0, DEPTH)[None, :]


@triton.jit
def ordered(k):
    """The same as they stand in tiles: of each sixteen, (slices, depth), 0 4 8 12 1 5 9 13 ..."""
    if len(k.shape) == 1:
        return k
    else:
        return k // 16 * 16 + k % 4 * 4 + k // 4 % 4


@triton.jit
def nothing(SLICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """What a product is added to."""
    if SLICES == 1:
        return tl.zeros((ROWS, COLUMNS), dtype)
    else:
        return tl.zeros((SLICES, ROWS, COLUMNS), dtype)


@triton.jit
def halved(tile):
    """(rows, columns, 2 k) -> (rows, columns, k), pairs added up."""
    a, b = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2)))
    return a + b


@triton.jit
def added_slices(total):
    """By tl.sum, which meets in shared memory one number a thread at a time, 512 sums of 8 took 3 us."""
    if len(total.shape) == 2:
        return total
    else:
        tile = tl.permute(total, (1, 2, 0))
        tile = halved(tile)
        if total.shape[0] >= 4:
            tile = halved(tile)
        if total.shape[0] >= 8:
            tile = halved(tile)
        if total.shape[0] >= 16:
            tile = halved(tile)
        return tl.reshape(tile, (total.shape[1], total.shape[2]))


@triton.jit
def across(column):
    """Something of each column, for all rows of a tile."""
    if len(column.shape) == 1:
        return column[None, :]
    else:
        return column[:, None, :]


@triton.jit
def down(row):
    """Something of each row, for all columns of a tile."""
    if len(row.shape) == 1:
        return row[:, None]
    else:
        return row[:, :, None]


@triton.jit
def sixteens(matrix, row, end, column, columns, EVEN: tl.constexpr):
    """matrix[row, column] of columns (slices, depth): (rows, slices, depth / 16, 4, 4). EVEN: all columns are there.

    With the slices in front, lanes met in a bank where warps read the tile again: 17 us instead of 9.
    """
    live = (row < end)[:, None, None]
    if not EVEN:
        live &= (column < columns)[None, :, :]
    tile = tl.load(matrix + (row * columns)[:, None, None] + column[None, :, :], live, 0.0)
    return tl.reshape(tile, (row.shape[0], column.shape[0], column.shape[1] // 16, 4, 4))


@triton.jit
def rows(matrix, row, end, column, columns, EVEN: tl.constexpr = False):
    """matrix[row, column] (rows, columns) of what lies before row `end`, else 0.

    EVEN: what is summed over, rows that come in slices or else columns, is a multiple of a step. Without its masks, an
    access to the tile takes half the instructions.
    """
    if len(column.shape) == 2:
        tile = tl.permute(sixteens(matrix, row, end, column, columns, EVEN), (1, 0, 2, 4, 3))
        return tl.reshape(tile, (column.shape[0], row.shape[0], column.shape[1]))
    else:
        live = across(column < columns)
        if not (EVEN and len(row.shape) == 2):
            live = down(row < end) & live
        return tl.load(matrix + down(row * columns) + across(column), live, 0.0)


@triton.jit
def transposed(matrix, row, end, column, columns, EVEN: tl.constexpr = False):
    """The same, (columns, rows)."""
    if len(column.shape) == 2:
        tile = tl.permute(sixteens(matrix, row, end, column, columns, EVEN), (1, 2, 4, 3, 0))
        return tl.reshape(tile, (column.shape[0], column.shape[1], row.shape[0]))
    else:
        live = (row < end)[None, :] & (column < columns)[:, None]
        return tl.load(matrix + (row * columns)[None, :] + column[:, None], live, 0.0)


@triton.jit
def store_rows(matrix, value, row, end, column, columns):
    live = down(row < end) & across(column < columns)
    tl.store(matrix + down(row * columns) + across(column), value, live)


@triton.jit
def added_up(partial, row, end, column, columns, parts, SPLIT: tl.constexpr, EVEN: tl.constexpr = False):
    """rows() of a sum over `parts` of them, (parts, end, columns), four of which are loaded together.

    One after the other, as steps of the product's loop, nine parts took 29 us where one takes 5.
    """
    total = rows(partial, row, end, column, columns, EVEN)
    if SPLIT:
        for first in range(1, parts, 4):
            for k in tl.static_range(4):
                live = tl.where(first + k < parts, end, 0)
                total += rows(partial + (first + k) * (end * columns), row, live, column, columns, EVEN)
    return total
