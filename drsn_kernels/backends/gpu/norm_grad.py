"""The way back of batch normalisation and activation (norm.py): sums over a channel, and dx.

    sums_kernel        reads g, x;  dbias and dweight of a piece of a channel; and dx, where no sum is in it
    norm_grad_kernel   reads g, x;  dx, from sums that it merges, is given, or takes of a channel that it has on chip

                          statistics of the batch         given statistics
    a channel on chip     norm_grad                       norm_grad
    several programs      sums, [merge,] norm_grad        sums[, merge]
    no sums wanted        as above                        norm_grad
    sums given            norm_grad
"""

import triton
import triton.language as tl

from .bits import elements, words
from .launch import await_previous, kernel
from .norm import across, affine, height, offset_of, partials, place, rows_at, summed
from .tiles import length_of_rows, load, store


@triton.jit
def _gradient(
    g, x, row, column, rows_live, center, scale, shift, QA, row_sizes, q_sizes, gs, xs, SLOPE: tl.constexpr,
    G_UNIT: tl.constexpr, X_UNIT: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """g' and x - mean of a tile."""
    w = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC, LAST)
    off = elements(w, x.dtype.element_ty, GROUP) - across(center, CHANNELS_LAST)
    w = load(g, row, column, rows_live, QA, row_sizes, q_sizes, gs, G_UNIT, B, ALIGN, WIDE, GROUP, ACC, LAST)
    passed = elements(w, g.dtype.element_ty, GROUP)
    if SLOPE != 1.0:
        z = tl.fma(off, across(scale, CHANNELS_LAST), across(shift, CHANNELS_LAST))
        passed = tl.where(z <= 0, SLOPE * passed if SLOPE != 0.0 else 0.0, passed)  # of NaN as of what is above 0
    return passed, off


@kernel(pointers=7, aligned=("g", "x", "dx"))
def sums_kernel(
    g, x, dx, partial, stats, weight, bias, N, P, QA, blocks, splits, piece, row_sizes, q_sizes, gs, xs, ds,
    SLOPE: tl.constexpr, G_UNIT: tl.constexpr, X_UNIT: tl.constexpr, D_UNIT: tl.constexpr, BLOCKED: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dbias and dweight of a piece of a channel; dx of given statistics."""
    await_previous(DEPENDENT)
    Q = length_of_rows(QA, ALIGN, WIDE)
    channels = Q if CHANNELS_LAST else P
    number, column, c, c_live = place(P, Q, blocks, BLOCKED, B, CHANNELS_LAST, WIDE, False)
    center = tl.load(stats + c, c_live, 0.0)
    rstd = tl.load(stats + channels + c, c_live, 0.0)
    scale, shift = affine(rstd, weight, bias, c, c_live)
    first = number * piece
    total = tl.zeros((R, B), ACC)
    product = tl.zeros((R, B), ACC)
    turns = 1
    if LOOP:
        turns = tl.cdiv(tl.minimum(piece * R, height(N, P, CHANNELS_LAST, WIDE) - first * R), R)
    for t in range(0, turns):
        row, rows_live = rows_at(first + t, c, N, P, R, CHANNELS_LAST, WIDE)
        passed, off = _gradient(
            g, x, row, column, rows_live, center, scale, shift, QA, row_sizes, q_sizes, gs, xs, SLOPE, G_UNIT, X_UNIT,
            B, ALIGN, CHANNELS_LAST, WIDE, ACC, GROUP, False,
        )  # fmt: skip
        total += passed
        product = tl.fma(passed, off, product)
        if dx is not None:
            out = words(passed * across(scale, CHANNELS_LAST), dx.dtype.element_ty, GROUP, PTX)
            store(dx, out, row, column, rows_live, QA, row_sizes, q_sizes, ds, D_UNIT, B, ALIGN, WIDE, GROUP)
    split = number if CHANNELS_LAST else number * blocks + column
    at = partial + offset_of(c, split, channels, splits, CHANNELS_LAST)
    tl.store(at, summed(total, CHANNELS_LAST), c_live)
    tl.store(at + channels * splits, summed(product, CHANNELS_LAST) * rstd, c_live)


@kernel(pointers=8, aligned=("g", "x", "dx"))
def norm_grad_kernel(
    g, x, dx, partial, sums, stats, weight, bias, N, P, QA, blocks, splits, M, row_sizes, q_sizes, gs, xs, ds,
    SOURCE: tl.constexpr, BATCH: tl.constexpr, SLOPE: tl.constexpr, SPLITS: tl.constexpr, G_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr, D_UNIT: tl.constexpr, BLOCKED: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile of dx. SOURCE of the sums: "tile", "partial", "sums", or None where nothing needs them."""
    await_previous(DEPENDENT)
    Q = length_of_rows(QA, ALIGN, WIDE)
    channels = Q if CHANNELS_LAST else P
    t, column, c, c_live = place(P, Q, blocks, BLOCKED, B, CHANNELS_LAST, WIDE, True)
    row, rows_live = rows_at(t, c, N, P, R, CHANNELS_LAST, WIDE)
    center = tl.load(stats + c, c_live, 0.0)
    rstd = tl.load(stats + channels + c, c_live, 0.0)
    scale, shift = affine(rstd, weight, bias, c, c_live)
    passed, off = _gradient(
        g, x, row, column, rows_live, center, scale, shift, QA, row_sizes, q_sizes, gs, xs, SLOPE, G_UNIT, X_UNIT, B,
        ALIGN, CHANNELS_LAST, WIDE, ACC, GROUP, True,
    )  # fmt: skip
    if SOURCE is not None:
        if SOURCE == "tile":
            dbias = summed(passed, CHANNELS_LAST)
            dweight = summed(passed * off, CHANNELS_LAST) * rstd
        elif SOURCE == "partial":
            a, b, _ = partials(partial, tl.arange(0, SPLITS), c, c_live, channels, splits, CHANNELS_LAST)
            dbias = tl.sum(a, 0)
            dweight = tl.sum(b, 0)
        else:
            dbias = tl.load(sums + c, c_live, 0.0)
            dweight = tl.load(sums + channels + c, c_live, 0.0)
        if SOURCE != "sums" and sums is not None:
            if t + (0 if CHANNELS_LAST else column) == 0:  # one program of these channels
                tl.store(sums + c, dbias, c_live)
                tl.store(sums + channels + c, dweight, c_live)
        if BATCH:
            count = M.to(ACC)
            passed -= across(dbias / count, CHANNELS_LAST)
            passed = tl.fma(off, across(-rstd * dweight / count, CHANNELS_LAST), passed)
    if dx is not None:
        out = words(passed * across(scale, CHANNELS_LAST), dx.dtype.element_ty, GROUP, PTX)
        store(dx, out, row, column, rows_live, QA, row_sizes, q_sizes, ds, D_UNIT, B, ALIGN, WIDE, GROUP)
