"""Batch normalisation and an activation, y = act(weight * (x - mean) * rstd + bias) by channel: forward.

    moments_kernel   reads x;  mean and squared deviations of a piece of a channel
    merge_kernel     what the pieces have left, merged where each program of the next launch would merge too much
    norm_kernel      reads x;  y, from statistics that it merges, is given, or takes of a channel that it has on chip

    a channel on chip    norm
    several programs     moments, [merge,] norm
    statistics given     norm

The way back is in norm_grad.py. A tile is R samples of one channel by B columns, channels_last R rows by B channels, so
that what belongs to a channel is a single number a program, or a row of them. Of a tile on chip, statistics are two
passes over registers. Over tiles each lane has its own, by Welford's rule, and lanes and programs are merged by Chan's:
nothing is lost to cancellation. The last launch runs backwards through the tensor: what the first read last is still in
L2. No atomics: the same bits from run to run.

Kept for the way back are x and the statistics. Whether z > 0 is worked out from x again, by the same instructions.
"""

import triton
import triton.language as tl

from .bits import elements, words
from .launch import await_previous, kernel
from .tiles import length_of_rows, load, store

# ---- where a program is ----------------------------------------------------------------------------------------------


@triton.jit
def place(
    P, Q, blocks, BLOCKED: tl.constexpr, B: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """This program's number along the pieces, its block of columns, its channels (1,) or (B,), and their mask.

    Programs side by side have neighbouring channels: together they read whole samples.
    """
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    if WIDE:
        pid = pid.to(tl.int64)
    if CHANNELS_LAST:
        column = pid % blocks
        c = column * B + tl.arange(0, B)
        return pid // blocks, column, c, c < Q
    else:
        number = pid // P
        column = number * 0
        c = pid % P + tl.arange(0, 1)
        if BLOCKED:
            column = number % blocks
            number = number // blocks
        return number, column, c, c < P


@triton.jit
def height(N, P, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a channel."""
    if not CHANNELS_LAST:
        return N
    elif WIDE:
        return N.to(tl.int64) * P
    else:
        return N * P


@triton.jit
def rows_at(t, c, N, P, R: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Group t of the channel's rows, and their mask, (R,) each."""
    own = t * R + tl.arange(0, R)
    live = own < height(N, P, CHANNELS_LAST, WIDE)
    if CHANNELS_LAST:
        return own, live
    else:
        return own * P + c, live


@triton.jit
def across(values, CHANNELS_LAST: tl.constexpr):
    """Of each channel -> what broadcasts with a tile."""
    if CHANNELS_LAST:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def summed(tile, CHANNELS_LAST: tl.constexpr):
    """A tile's sum for each channel."""
    if CHANNELS_LAST:
        return tl.sum(tile, 0)
    else:  # in any order: a thread adds up its own before it meets others
        return tl.sum(tl.reshape(tile, (tile.shape[0] * tile.shape[1],), can_reorder=True), 0, keep_dims=True)


@triton.jit
def offset_of(c, split, channels, splits, CHANNELS_LAST: tl.constexpr):
    """Where a partial result is in the first of their two halves: channels are adjacent, or those of a channel."""
    if CHANNELS_LAST:
        return split * channels + c
    else:
        return c * splits + split


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _moments(mean, spread, count, columns_live, n, CHANNELS_LAST: tl.constexpr):
    """Mean and squared deviations of each channel, of n elements, from those of lanes (R, B) of `count` (R,) each."""
    size = count[:, None] * columns_live.to(mean.dtype)[None, :]
    center = summed(size * mean, CHANNELS_LAST) / n
    off = mean - across(center, CHANNELS_LAST)
    left = size * off
    around = left * off
    if spread is not None:
        around += spread
    return corrected(center, summed(left, CHANNELS_LAST), summed(around, CHANNELS_LAST), n)


@triton.jit
def corrected(center, left, around, n):
    """Mean and squared deviations, of n elements, from a mean that is a few roundings off.

    left: the sum of deviations, which are 0 from the mean itself. Without it a constant channel is off by
    roundings / sqrt(EPS): 8e-5 for 210 elements.
    """
    off = tl.where(left == left, left / n, 0.0)  # of an infinite mean nothing is left
    return center + off, tl.maximum(around - left * off, 0.0, propagate_nan=tl.PropagateNan.ALL)


@kernel(pointers=2, aligned=("x",))
def moments_kernel(
    x, partial, N, P, QA, blocks, splits, piece, row_sizes, q_sizes, xs, X_UNIT: tl.constexpr,
    BLOCKED: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of a piece of a channel."""
    await_previous(DEPENDENT)
    Q = length_of_rows(QA, ALIGN, WIDE)
    DTYPE: tl.constexpr = x.dtype.element_ty
    extent = height(N, P, CHANNELS_LAST, WIDE)
    number, column, c, c_live = place(P, Q, blocks, BLOCKED, B, CHANNELS_LAST, WIDE, False)
    first = number * piece
    n = tl.minimum(piece * R, extent - first * R)
    if LOOP:
        mean = tl.zeros((R, B), ACC)
        spread = tl.zeros((R, B), ACC)
        count = tl.zeros((R,), ACC)
        for t in range(0, tl.cdiv(n, R)):
            row, rows_live = rows_at(first + t, c, N, P, R, CHANNELS_LAST, WIDE)
            w = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC)
            off = elements(w, DTYPE, GROUP) - mean
            live = rows_live.to(ACC)
            turn = live * (1 / tl.full((1,), t + 1, ACC))  # 0 where there is no such row: it changes nothing then
            mean = tl.fma(off, turn[:, None], mean)
            spread = tl.fma(off * (live - turn)[:, None], off, spread)  # not off * off, of which 0 may be left
            count += live
    else:
        row, rows_live = rows_at(first, c, N, P, R, CHANNELS_LAST, WIDE)
        w = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC)
        mean = elements(w, DTYPE, GROUP)
        spread = None
        count = rows_live.to(ACC)
    channels, split = Q, number
    if not CHANNELS_LAST:
        n *= tl.minimum(B, Q - column * B)
        channels, split = P, number * blocks + column
    center, around = _moments(mean, spread, count, column * B + tl.arange(0, B) < Q, n.to(ACC), CHANNELS_LAST)
    at = partial + offset_of(c, split, channels, splits, CHANNELS_LAST)
    tl.store(at, center, c_live)
    tl.store(at + channels * splits, around, c_live)


@triton.jit
def partials(partial, split, c, c_live, channels, splits, CHANNELS_LAST: tl.constexpr):
    """Partial results (splits, channels) of both halves, and which there are."""
    live = (split < splits)[:, None] & c_live[None, :]
    at = partial + offset_of(c[None, :], split[:, None], channels, splits, CHANNELS_LAST)
    return tl.load(at, live, 0.0), tl.load(at + channels * splits, live, 0.0), live


@triton.jit
def _merged(
    partial, split, c, c_live, N, P, Q, blocks, splits, rows, width, BLOCKED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """How many elements the channels have in these pieces of `rows` by `width`, (1,); mean and squared deviations."""
    if WIDE:
        split = split.to(tl.int64)
    means, around, live = partials(partial, split, c, c_live, Q if CHANNELS_LAST else P, splits, CHANNELS_LAST)
    extent = height(N, P, CHANNELS_LAST, WIDE)
    if CHANNELS_LAST:
        count = tl.minimum(rows, extent - split * rows)
    elif BLOCKED:
        count = tl.minimum(rows, extent - split // blocks * rows) * tl.minimum(width, Q - split % blocks * width)
    else:
        count = tl.minimum(rows, extent - split * rows) * Q
    size = tl.where(split < splits, count, 0).to(means.dtype)[:, None]
    n = tl.sum(size, 0)
    mean = tl.sum(size * means, 0) / n
    off = tl.where(live, means - mean[None, :], 0.0)
    left = size * off
    mean, around = corrected(mean, tl.sum(left, 0), tl.sum(around + left * off, 0), n)
    return n, mean, around


@triton.jit
def _before(mean, var, batches, c, live):
    """For _settle: the running statistics, if there are any, and the number of batches."""
    before_mean, before_var, counted = c, c, c
    if mean is not None:
        before_mean, before_var = tl.load(mean + c, live, 0.0), tl.load(var + c, live, 0.0)
        if batches is not None:
            counted = tl.load(batches + c * 0, live & (c == 0), 0)
    return before_mean, before_var, counted


@triton.jit
def _settle(
    center, rstd, around, n, before_mean, before_var, counted, c, c_live, channels, stats, mean, var, batches, factor,
    rest,
):  # fmt: skip
    """stats (2, C); where there are running statistics, these towards those of n elements, and the batch counted."""
    tl.store(stats + c, center, c_live)
    tl.store(stats + channels + c, rstd, c_live)
    if mean is not None:
        by = tl.full((1,), factor, center.dtype) + tl.full((1,), rest, center.dtype)
        tl.store(mean + c, by * center + (1 - by) * before_mean, c_live)
        tl.store(var + c, by * (around / (n - 1)) + (1 - by) * before_var, c_live)
        if batches is not None:
            tl.store(batches + c * 0, counted + 1, c == 0)


@triton.jit
def affine(rstd, weight, bias, c, c_live):
    """Of z = (x - mean) * scale + shift."""
    scale, shift = rstd, tl.zeros_like(rstd)
    if weight is not None:
        scale = rstd * tl.load(weight + c, c_live, 0.0)
    if bias is not None:
        shift = tl.load(bias + c, c_live, 0.0)
    return scale, shift


@triton.jit
def _activated(z, SLOPE: tl.constexpr):
    if SLOPE == 0.0:
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif SLOPE == 1.0:
        return z
    else:
        return tl.where(z <= 0, SLOPE * z, z)


@kernel(pointers=9, aligned=("x", "y"))
def norm_kernel(
    x, y, partial, stats, weight, bias, mean, var, batches, N, P, QA, blocks, splits, piece, factor, rest, row_sizes,
    q_sizes, xs, ys, SOURCE: tl.constexpr, EPS: tl.constexpr, SLOPE: tl.constexpr, SPLITS: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, BLOCKED: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile of y. SOURCE of the statistics: "tile", "partial", "given" (mean, var) or "stats" (mean, rstd)."""
    await_previous(DEPENDENT)
    Q = length_of_rows(QA, ALIGN, WIDE)
    DTYPE: tl.constexpr = x.dtype.element_ty
    channels = Q if CHANNELS_LAST else P
    t, column, c, c_live = place(P, Q, blocks, BLOCKED, B, CHANNELS_LAST, WIDE, True)
    row, rows_live = rows_at(t, c, N, P, R, CHANNELS_LAST, WIDE)
    w = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC, LAST=True)
    v = elements(w, DTYPE, GROUP)
    # all loads come in front of sums, in which threads meet, and of stores: neither is passed by
    factors, shift = affine(tl.full(c.shape, 1.0, ACC), weight, bias, c, c_live)
    first = t + (0 if CHANNELS_LAST else column) == 0  # one program of these channels
    BATCH: tl.constexpr = SOURCE == "tile" or SOURCE == "partial"
    before_mean, before_var, counted = _before(mean if BATCH else None, var, batches, c, c_live & first)
    if SOURCE == "stats":
        center = tl.load(stats + c, c_live, 0.0)
        rstd = tl.load(stats + channels + c, c_live, 0.0)
    else:
        if SOURCE == "given":
            n = None
            around = None
            center = tl.load(mean + c, c_live, 0.0)
            rstd = 1 / tl.sqrt(tl.load(var + c, c_live, 1.0) + EPS)
        else:
            if SOURCE == "tile":
                n = (height(N, P, CHANNELS_LAST, WIDE) * (1 if CHANNELS_LAST else Q)).to(ACC)
                columns_live = column * B + tl.arange(0, B) < Q
                center, around = _moments(v, None, rows_live.to(ACC), columns_live, n, CHANNELS_LAST)
            else:
                n, center, around = _merged(
                    partial, tl.arange(0, SPLITS), c, c_live, N, P, Q, blocks, splits, piece * R, B, BLOCKED,
                    CHANNELS_LAST, WIDE,
                )  # fmt: skip
            rstd = 1 / tl.sqrt(around / n + EPS)
        if first:
            _settle(
                center, rstd, around, n, before_mean, before_var, counted, c, c_live, channels, stats,
                mean if BATCH else None, var, batches, factor, rest,
            )  # fmt: skip
    scale = rstd * factors
    off = v - across(center, CHANNELS_LAST)
    z = tl.fma(off, across(scale, CHANNELS_LAST), across(shift, CHANNELS_LAST))
    out = words(_activated(z, SLOPE), DTYPE, GROUP, PTX)
    store(y, out, row, column, rows_live, QA, row_sizes, q_sizes, ys, Y_UNIT, B, ALIGN, WIDE, GROUP)


@kernel(pointers=5)
def merge_kernel(
    partial, merged, mean, var, batches, N, P, QA, blocks, splits, rows, width, factor, rest, KIND: tl.constexpr,
    EPS: tl.constexpr, UNITS: tl.constexpr, SPLITS: tl.constexpr, BLOCKED: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """merged (2, C). KIND: "sums", "moments" (mean, squared deviations) or "stats" (mean, rstd)."""
    await_previous(DEPENDENT)
    ACC: tl.constexpr = partial.dtype.element_ty
    Q = length_of_rows(QA, ALIGN, WIDE)
    channels = Q if CHANNELS_LAST else P
    c = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    c_live = c < channels
    if KIND == "sums":
        first = tl.zeros((SPLITS, UNITS), ACC)
        second = tl.zeros((SPLITS, UNITS), ACC)
        for start in range(0, splits, SPLITS):
            a, b, _ = partials(partial, start + tl.arange(0, SPLITS), c, c_live, channels, splits, CHANNELS_LAST)
            first += a
            second += b
        tl.store(merged + c, tl.sum(first, 0), c_live)
        tl.store(merged + channels + c, tl.sum(second, 0), c_live)
    else:
        before_mean, before_var, counted = _before(mean, var, batches, c, c_live)
        n = tl.zeros((1,), ACC)
        center = tl.zeros((UNITS,), ACC)
        around = tl.zeros((UNITS,), ACC)
        for start in range(0, splits, SPLITS):
            here, average, within = _merged(
                partial, start + tl.arange(0, SPLITS), c, c_live, N, P, Q, blocks, splits, rows, width, BLOCKED,
                CHANNELS_LAST, WIDE,
            )  # fmt: skip
            apart = average - center
            center += apart * (here / (n + here))
            around += within + apart * (n * here / (n + here)) * apart  # the first mean meets 0, not its square
            n += here
        second = around
        if KIND == "stats":
            second = 1 / tl.sqrt(around / n + EPS)
        _settle(
            center, second, around, n, before_mean, before_var, counted, c, c_live, channels, merged, mean, var,
            batches, factor, rest,
        )  # fmt: skip
