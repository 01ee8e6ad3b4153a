"""What every Triton kernel here is made of: tiles of rows by columns, their addresses in any layout, bit planes.

x is seen as N samples of P rows of Q elements (walk.py): P = C, Q = L, or P = L, Q = C in channels_last order. A tile
is (R, B): R rows, as numbers n * P + p, by B columns, and in memory R rows of W words (bits.py). Sizes and strides are
run-time integers that Triton does not specialise on; what makes an access 16 bytes wide is told by ALIGN, which divides
Q and the row strides: every kernel is given Q / ALIGN and multiplies (see `offsets`).
"""

import triton
import triton.language as tl

from .bits import nibble, octet, octets_of, of_bits, spread, to_bits


@triton.jit
def plain(v):
    """The integer that walk.opaque wrote as v."""
    return (v >> 1) - 1


@triton.jit
def _decode(index, sizes, strides):
    """Offset of a flat index over dimensions with these strides, outermost first; sizes leaves the outermost out."""
    offset = index * 0
    for d in tl.static_range(len(sizes)):
        size = plain(sizes[len(sizes) - d - 1])
        offset += (index % size) * plain(strides[len(sizes) - d])
        index = index // size
    return offset + index * plain(strides[0])


@triton.jit
def offsets(row, q, row_sizes, q_sizes, strides, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets of an operand: of rows, shape (R,), and of columns q, shape (B,).

    strides is (*row dimensions, *q dimensions). Where columns are adjacent (UNIT) those of rows come divided by ALIGN:
    the product below is how the compiler learns that a row starts at a multiple of ALIGN, without a specialisation for
    the value. Rows of 1000 or 196 elements get 16-byte accesses that way, where Triton's own specialisation (divisible
    by 16 or nothing) gives 4 or 2 bytes.
    """
    ROW_DIMS: tl.constexpr = len(row_sizes) + 1
    rows = _decode(row, row_sizes, strides[:ROW_DIMS])
    if UNIT:
        rows = rows * ALIGN
        columns = q
    else:
        columns = _decode(q, q_sizes, strides[ROW_DIMS:])
    return rows, columns


@triton.jit
def tile(
    t, N, P, Q, splits, R: tl.constexpr, B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Tile t of this program: its sample, rows (R,), its number along q, q (B,), and the masks of rows and columns.

    rows walk: t counts along q, a program's rows are R of the N * P, of any sample. channels_last: t counts rows of
    one sample, R at a time, and its columns are B channels. SPLIT: there is more than one t. REVERSE runs through the
    tensor backwards: what was touched last is still in L2.
    """
    block = tl.program_id(0)
    if REVERSE:
        block = tl.num_programs(0) - 1 - block
    total = N * P
    if WIDE:
        block = block.to(tl.int64)
        total = N.to(tl.int64) * P
    if SPLIT:
        block = block // splits
    if CHANNELS_LAST:
        blocks = tl.cdiv(Q, B)
        n = block // blocks
        column = block % blocks
        p = t * R + tl.arange(0, R)
        row = n * P + p
        rows_live = p < P
    else:
        n = 0
        column = t
        row = block * R + tl.arange(0, R)
        rows_live = row < total
    q = column * B + tl.arange(0, B)
    return n, row, column, q, rows_live, q < Q


@triton.jit
def length_of_rows(QA, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Q, as a product with ALIGN."""
    if WIDE:
        return QA.to(tl.int64) * ALIGN
    else:
        return QA * ALIGN


@triton.jit
def piece(
    extent, splits, length, STEP: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Numbers of the first tile of this program's piece, `length` tiles, and of the one behind its last.

    Numbers of tiles, because by their product with STEP the compiler knows where a tile starts, and the accesses are 16
    bytes wide; with elements they were 4.
    """
    if SPLIT:
        pid = tl.program_id(0)
        if REVERSE:
            pid = tl.num_programs(0) - 1 - pid
        first = (pid % splits) * length
        if WIDE:
            first = first.to(tl.int64)
        return first, tl.minimum(first + length, tl.cdiv(extent, STEP))
    else:
        return 0, 1


@triton.jit
def over_length(v, L, scale, ACC: tl.constexpr):
    """v / L. In float32 by a product with 1 / L, half an ulp more: the division looks out for numbers that L is not."""
    if ACC == tl.float64:
        return v / L.to(ACC)
    else:
        return v * scale


@triton.jit
def by_channel(n, row, q, Q, rows_live, columns_live, CHANNELS_LAST: tl.constexpr):
    """Offsets into a contiguous (N, C) of a tile's rows (channels_last: of its columns), and their mask."""
    if CHANNELS_LAST:
        return n * Q + q, columns_live
    else:
        return row, rows_live


# ---- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def _addresses(
    x, row, column, rows_live, QA, row_sizes, q_sizes, strides, UNIT: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Pointers to the words of a tile, (R, W), and their mask."""
    EACH: tl.constexpr = 2 if GROUP == 8 else 1  # elements in a word
    word = column * (B // EACH) + tl.arange(0, B // EACH)
    rows, columns = offsets(row, word, row_sizes, q_sizes, strides, UNIT, ALIGN // EACH)
    if EACH == 2:
        x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    live = rows_live[:, None] & (word < length_of_rows(QA, ALIGN // EACH, WIDE))[None, :]
    return x + rows[:, None] + columns[None, :], live


@triton.jit
def load(
    x, row, column, rows_live, QA, row_sizes, q_sizes, strides, UNIT: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr = False,
    PAST_L1: tl.constexpr = False,
):  # fmt: skip
    """A tile of an operand, in words. LAST: nothing reads it after this, so that it leaves the caches first.
    PAST_L1: the L1 may hold older lines, as before await_previous."""
    eviction: tl.constexpr = "evict_first" if LAST and not PAST_L1 else ""
    modifier: tl.constexpr = ".cg" if PAST_L1 else ""
    at, live = _addresses(
        x, row, column, rows_live, QA, row_sizes, q_sizes, strides, UNIT, B, ALIGN, WIDE, GROUP
    )  # fmt: skip
    if GROUP == 8:
        return tl.load(at, live, 0, cache_modifier=modifier, eviction_policy=eviction)
    else:
        return to_bits(tl.load(at, live, 0.0, cache_modifier=modifier, eviction_policy=eviction).to(ACC))


@triton.jit
def store(
    y, w, row, column, rows_live, QA, row_sizes, q_sizes, strides, UNIT: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at, live = _addresses(
        y, row, column, rows_live, QA, row_sizes, q_sizes, strides, UNIT, B, ALIGN, WIDE, GROUP
    )  # fmt: skip
    if GROUP == 8:
        tl.store(at, w, live)
    else:
        tl.store(at, of_bits(w).to(y.dtype.element_ty), live)


@triton.jit
def plane(planes, plane_bytes, row: tl.constexpr):
    """Where this plane starts."""
    if row == 0:
        return planes
    else:
        return planes + plane_bytes.to(tl.int64) * row


@triton.jit
def _in_plane(row, column, row_bytes, rows_live, B: tl.constexpr, EACH: tl.constexpr):
    """For every EACH elements of a tile, (R, B / EACH): the byte of a plane that they are in, the mask, the shift."""
    unit = column * (B // EACH) + tl.arange(0, B // EACH)
    byte = unit // (8 // EACH)
    at = (row * row_bytes)[:, None] + byte[None, :]
    shift = (tl.arange(0, B // EACH) % (8 // EACH)) * EACH
    return at, rows_live[:, None] & (byte < row_bytes)[None, :], shift[None, :]


@triton.jit
def store_planes(
    planes, plane_bytes, a, b, c, row, column, row_bytes, rows_live,
    B: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Planes 0, 1 and, if there is a c, 2 of a tile: from the top bits of its words."""
    if GROUP == 1:
        code = octets_of(a, b, c)
        at, live, _ = _in_plane(row, column, row_bytes, rows_live, B, 8)
        tl.store(planes + at, code.to(tl.int8), live)
        tl.store(plane(planes, plane_bytes, 1) + at, (code >> 8).to(tl.int8), live)
        if c is not None:
            tl.store(plane(planes, plane_bytes, 2) + at, (code >> 16).to(tl.int8), live)
    else:
        at, live, shift = _in_plane(row, column, row_bytes, rows_live, B, GROUP)
        _store_plane(planes + at, a, live, shift, GROUP, PTX)
        _store_plane(plane(planes, plane_bytes, 1) + at, b, live, shift, GROUP, PTX)
        if c is not None:
            _store_plane(plane(planes, plane_bytes, 2) + at, c, live, shift, GROUP, PTX)


@triton.jit
def _store_plane(at, t, live, shift, GROUP: tl.constexpr, PTX: tl.constexpr):
    if GROUP == 8:
        tl.store(at, octet(t, PTX).to(tl.int8), live)
    else:  # two neighbours make a byte, both have it then, and the even one stores it
        R: tl.constexpr = at.shape[0]
        K: tl.constexpr = at.shape[1]
        byte = tl.sum((nibble(t, PTX) << shift).reshape(R, K // 2, 2), 2)
        both = tl.broadcast_to(byte[:, :, None], (R, K // 2, 2)).reshape(R, K)
        tl.store(at, both.to(tl.int8), live & (shift == 0))


@triton.jit
def load_plane(
    planes, plane_bytes, row, column, row_bytes, rows_live,
    ROW: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr, PAST_L1: tl.constexpr = False,
):  # fmt: skip
    """A tile of a plane, as top bits of words; of elements that are not there anything. PAST_L1: as in load."""
    at, live, shift = _in_plane(row, column, row_bytes, rows_live, B, GROUP)
    modifier: tl.constexpr = ".cg" if PAST_L1 else ""
    byte = tl.load(plane(planes, plane_bytes, ROW) + at, live, cache_modifier=modifier).to(tl.int32) & 0xFF
    return spread(byte >> shift, GROUP, PTX)
