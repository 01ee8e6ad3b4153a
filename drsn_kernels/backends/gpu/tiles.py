"""What every Triton kernel here is made of: tiles of rows by columns, their addresses in any layout, bit planes.

x is seen as N samples of P rows of Q elements (walk.py): P = C, Q = L, or P = L, Q = C in channels_last order. A tile
is (R, B): R rows, as numbers in n * P + p, by B columns. Sizes and strides are run-time integers that Triton does not
specialise on; what makes an access 16 bytes wide is told by ALIGN, which divides Q and the row strides: every kernel is
given Q / ALIGN and multiplies (see `offsets`).
"""

import triton
import triton.language as tl


@triton.jit
def plain(v):
    """The integer that walk.opaque wrote as v."""
    return (v >> 1) - 1


@triton.jit
def _decode(index, sizes, strides):
    """Offset of a flat index over dimensions with these strides, outermost first; sizes leaves the outermost out."""
    offset = index * 0
    for d in tl.static_range(len(sizes)):
        inner: tl.constexpr = len(sizes) - d
        size = plain(sizes[inner - 1])
        offset += (index % size) * plain(strides[inner])
        index = index // size
    return offset + index * plain(strides[0])


@triton.jit
def offsets(n, p, q, p_sizes, q_sizes, strides, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Element offsets of an operand: of rows (n, p), shape (R,), and of columns q, shape (B,).

    strides is (n, *p dimensions, *q dimensions). Where columns are adjacent (UNIT) the strides of n and p come divided
    by ALIGN: the product below is how the compiler learns that a row starts at a multiple of ALIGN, without a
    specialisation for the value. Rows of 1000 or 196 elements get 16-byte accesses that way, where Triton's own
    specialisation (divisible by 16 or nothing) gives 4 or 2 bytes.
    """
    P_DIMS: tl.constexpr = len(p_sizes) + 1
    rows = n * plain(strides[0]) + _decode(p, p_sizes, strides[1 : 1 + P_DIMS])
    if UNIT:
        rows = rows * ALIGN
        columns = q
    else:
        columns = _decode(q, q_sizes, strides[1 + P_DIMS :])
    return rows, columns


@triton.jit
def pack(mask, UNIT_BITS: tl.constexpr):
    """(R, B) of 0 and 1, int32 -> (R, B / UNIT_BITS): units of a bit plane, little-endian, in int32."""
    R: tl.constexpr = mask.shape[0]
    B: tl.constexpr = mask.shape[1]
    bits = mask.reshape(R, B // UNIT_BITS, UNIT_BITS) << tl.arange(0, UNIT_BITS)[None, None, :]
    return tl.sum(bits, 2)


@triton.jit
def unpack(units, UNIT_BITS: tl.constexpr):
    """(R, K) units of a bit plane -> (R, K * UNIT_BITS) of bool."""
    R: tl.constexpr = units.shape[0]
    K: tl.constexpr = units.shape[1]
    bits = (units[:, :, None].to(tl.int32) >> tl.arange(0, UNIT_BITS)[None, None, :]) & 1
    return bits.reshape(R, K * UNIT_BITS) != 0


@triton.jit
def sign_bit(x):
    """1 where the sign bit is set (-0.0 and NaN included), in int32. x is float32 or float64."""
    if x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) < 0).to(tl.int32)
    else:
        return (x.to(tl.int32, bitcast=True) < 0).to(tl.int32)


@triton.jit
def soft_threshold(x, tau):
    """sign(x) * relu(|x| - tau), NaN kept; negative tau expands."""
    left = tl.abs(x) - tau
    left = tl.where(left <= 0, 0.0, left)  # NaN stays: it fails the comparison
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)  # not copysign: 0 * left is 0 at x == 0
    return sign * left


@triton.jit
def piecewise(x, tau, INSIDE: tl.constexpr, OFFSET: tl.constexpr):
    """x - sign(x) * OFFSET * tau outside of |x| <= tau, NaN included; INSIDE * x elsewhere, and where x is 0."""
    shift = OFFSET * tau
    outside = (x != 0) & ((tl.abs(x) <= tau) == 0)
    return tl.where(outside, tl.where(x < 0, x + shift, x - shift), INSIDE * x)


@triton.jit
def tile(
    t, N, P, Q, splits, R: tl.constexpr, B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """This program's tile at step t: n, p (R,), q (B,), the first q, and the masks of rows and columns.

    rows walk: t is a column, a program's rows are R of the N * P. channels_last: t is a row of sample n (a scalar), and
    its columns are B channels. REVERSE runs through the tensor backwards: what was touched last is still in L2.
    """
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    total = N * P
    if WIDE:
        pid = pid.to(tl.int64)
        total = N.to(tl.int64) * P
    block = pid // splits
    if CHANNELS_LAST:
        blocks = tl.cdiv(Q, B)
        n = block // blocks
        first = (block % blocks) * B
        p = t + tl.arange(0, R)
        rows_live = p < P
    else:
        row = block * R + tl.arange(0, R)
        n = row // P
        p = row % P
        first = t
        rows_live = row < total
    q = first + tl.arange(0, B)
    return n, p, q, first, rows_live, q < Q


@triton.jit
def length_of_rows(QA, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Q, as a product with ALIGN."""
    if WIDE:
        return QA.to(tl.int64) * ALIGN
    else:
        return QA * ALIGN


@triton.jit
def piece(extent, splits, length, STEP: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr):
    """Where this program's piece of its rows (channels_last: of its sample) starts and stops.

    It is `length` tiles long: by the product with STEP the compiler knows where a tile starts, and the accesses are 16
    bytes wide; with a length in elements they were 4.
    """
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    first = (pid % splits) * length
    if WIDE:
        first = first.to(tl.int64)
    first = first * STEP
    return first, tl.minimum(first + length * STEP, extent)


@triton.jit
def by_channel(n, p, q, P, Q, rows_live, columns_live, CHANNELS_LAST: tl.constexpr):
    """Offsets into a contiguous (N, C) of a tile's rows (channels_last: of its columns), and their mask."""
    if CHANNELS_LAST:
        return n * Q + q, columns_live
    else:
        return n * P + p, rows_live


@triton.jit
def plane(planes, plane_units, row: tl.constexpr):
    """Where this plane starts."""
    if row == 0:
        return planes
    else:
        return planes + plane_units.to(tl.int64) * row


@triton.jit
def units(n, p, first, P, UNITS, rows_live, B: tl.constexpr, UNIT_BITS: tl.constexpr):
    """Offsets into a bit plane of a tile's units, and their mask, (R, B / UNIT_BITS)."""
    column = first // UNIT_BITS + tl.arange(0, B // UNIT_BITS)
    return ((n * P + p) * UNITS)[:, None] + column[None, :], rows_live[:, None] & (column < UNITS)[None, :]
