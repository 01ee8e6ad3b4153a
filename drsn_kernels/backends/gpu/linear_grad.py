"""The end of the gate's way back (gate_grad.py): the gradients of its two Linears, and dA, from du and dz.

    linear_grad_kernel   dA = du w1, dw1 = du' A, dw2 = dz' relu(v), and the biases'
    add_shares_kernel    of a large batch, which programs share, the shares added up
"""

import triton
import triton.language as tl

from ..step import Cost, Step
from .gate import Sizes, center_and_scale, relu, scaled, standardised, statistics_of, weight_and_bias
from .gate_grad import batch_averages, norm_grads
from .launch import await_previous, count_in, kernel
from .product import added_slices, held, nothing, ordered, product, rows, steps_of, store_rows, transposed


@triton.jit
def pooled_grad_tile(
    pid, state, mean, var, gamma, w1, dv, sums, direct, dA, N, C, H, tiles, groups,
    BATCH_STATS: tl.constexpr, EPS: tl.constexpr, READY: tl.constexpr, GROUPS: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """dA = du w1 + the direct gradient, BN samples of BC channels."""
    n = pid % tiles * BN + tl.arange(0, BN)
    c = pid // tiles * BC + tl.arange(0, BC)
    if direct is not None:
        past = rows(direct, n, N, c, C)
    total = nothing(SLICES, BN, BC, w1.dtype.element_ty)
    for h0 in range(0, H, SLICES * BK):
        k = steps_of(h0, SLICES, BK)
        h = ordered(k)
        du, w = rows(dv, n, N, k, H, EVEN), rows(w1, h, H, c, C, EVEN)
        if mean is not None and not READY:
            center, scale = center_and_scale(mean, var, h, h < H, EPS)
            slope = tl.load(gamma + h, h < H, 0.0) * scale
            xhat, average, average_xhat = du, du, du
            if BATCH_STATS:
                xhat = standardised(rows(state, n, N, k, H), center, scale)
                average, average_xhat = batch_averages(sums, h, h < H, N, H, groups, GROUPS)
            du = norm_grads(du, xhat, average, average_xhat, slope, BATCH_STATS)
        total = product(held(du, HELD > 1), held(w, HELD > 1), total, PRECISION)
    total = added_slices(total)
    if direct is not None:
        total += held(past, HELD)
    store_rows(dA, total, n, N, c, C)


@triton.jit
def weight_grad_tile(
    of_second, i, rows_end, j, columns, pooled, dz, dv, positive, start, stop, BW: tl.constexpr, WALK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """du' A or, of_second, dz' relu(v): rows i by columns j of the weight, from samples start to stop.

    Nothing else is made of what is loaded: then it stands in shared memory as tensor cores read it.
    """
    left = tl.where(of_second, dz, dv)
    right = tl.where(of_second, positive, pooled)
    total = tl.zeros((BW, BW), dv.dtype.element_ty)
    for n0 in range(start, stop, WALK):
        n = n0 + tl.arange(0, WALK)
        total = product(transposed(left, n, stop, i, rows_end), rows(right, n, stop, j, columns), total, PRECISION)
    return total


@triton.jit
def summed_rows(matrix, start, stop, c, columns, ROWS: tl.constexpr):
    """Of columns c, over rows start to stop."""
    total = tl.zeros((ROWS, c.shape[0]), matrix.dtype.element_ty)
    for n0 in range(start, stop, ROWS):
        total += rows(matrix, n0 + tl.arange(0, ROWS), stop, c, columns)
    return tl.sum(total, 0)


@triton.jit
def weight_grad_tile_of_dv(
    of_second, h, c, columns, of_first_column, pooled, state, mean, var, gamma, beta, dz, dv, sums, db1, db2, dgamma,
    dbeta, N, H, groups, start, stop,
    BATCH_STATS: tl.constexpr, EPS: tl.constexpr, GROUPS: tl.constexpr, BW: tl.constexpr, WALK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """du' A or, of_second, relu(v)' dz, without READY, and the vectors by the first of a row of tiles.

    What the other gradient needs is not loaded, its mask ends at sample 0. Sums over samples are taken at the end: in
    the loop they are one addition an element.
    """
    ACC: tl.constexpr = dv.dtype.element_ty
    live = h < H
    vectors = live & of_first_column & (of_second == 0)
    if mean is not None:
        center, scale = center_and_scale(mean, var, h, live, EPS)
        weight, bias = weight_and_bias(gamma, beta, h, live)
        average, average_xhat = scale, scale
        if BATCH_STATS:
            average, average_xhat = batch_averages(sums, h, live, N, H, groups, GROUPS)
    total = tl.zeros((BW, BW), ACC)
    sum_left = tl.zeros((WALK, BW), ACC)
    sum_dv = tl.zeros((WALK, BW), ACC)
    sum_dv_xhat = tl.zeros((WALK, BW), ACC)
    sum_right = tl.zeros((WALK, BW), ACC)
    right_of = tl.where(of_second, dz, pooled)
    for n0 in range(start, stop, WALK):
        n = n0 + tl.arange(0, WALK)
        du = rows(dv, n, tl.where(of_second, 0, stop), h, H)
        xhat = rows(state, n, stop, h, H)
        right = rows(right_of, n, stop, c, columns)
        v = xhat
        if mean is not None:
            xhat = standardised(xhat, center, scale)
            v, slope = scaled(xhat, scale, weight, bias)
            sum_dv += du
            sum_dv_xhat += du * xhat
            du = norm_grads(du, xhat, average, average_xhat, slope, BATCH_STATS)
        left = tl.where((n < stop)[:, None], tl.where(of_second, relu(v), du), 0.0)
        sum_left += left
        sum_right += right
        total = product(tl.trans(left), right, total, PRECISION)
    tl.store(db1 + h, tl.sum(sum_left, 0), vectors)
    tl.store(db2 + c, tl.sum(sum_right, 0), (c < columns) & (tl.min(h, 0) == 0) & of_second)
    if mean is not None:
        tl.store(dgamma + h, tl.sum(sum_dv_xhat, 0), vectors)
        tl.store(dbeta + h, tl.sum(sum_dv, 0), vectors)
    return total


@triton.jit
def _up_to_4(n):  # as plans.up_to does where gate_passes.py lays out the gradients
    return (n + 3) // 4 * 4


@kernel(pointers=15, aligned=("pooled", "state", "w1", "dz", "dv", "positive", "sums", "direct", "dA", "grads"))
def linear_grad_kernel(
    pooled, state, mean, var, gamma, beta, w1, dz, dv, positive, sums, direct, dA, counter, grads,
    N, CA, HA, tiles, groups, of_pooled, first, second, share, total,
    ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr, READY: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, EVEN: tl.constexpr,
    WALK: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters and, where wanted, dA (N, C).

    The first `of_pooled` programs make tiles of dA and count themselves in: dx is made beside the others. The others,
    numbered from 0, make tiles of dw1, from `first` on of dw2 (the same code: two matrices multiplied over the batch),
    of `share` samples each, and from `second` on, with READY, the biases' gradients. A share's gradients are its row of
    grads (shares, total): w1 (H, C), b1 (H,), w2 (O, H), b2 (O,) and, with a norm and without READY, gamma (H,) and
    beta (H,), each at a multiple of 4 elements.
    """
    await_previous(DEPENDENT)
    C = CA * ALIGN
    H = HA * ALIGN
    outputs = 1 if ONE else C
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)
    pid = tl.program_id(0)
    if dA is not None and pid < of_pooled:
        pooled_grad_tile(
            pid, state, mean, var, gamma, w1, dv, sums, direct, dA, N, C, H, tiles, groups,
            BATCH_STATS, EPS, READY, GROUPS, BN, BC, BK, SLICES, EVEN, PRECISION, HELD,
        )  # fmt: skip
        count_in(counter, DEPENDENT)
    else:
        pid -= of_pooled
        of_second = (pid >= first) & (pid < second)
        # a tile's rows and columns: of the weight itself or, without READY, units and columns of either
        height, columns = H, tl.where(of_second, outputs, C)
        if READY:
            height, columns = tl.where(of_second, outputs, H), tl.where(of_second, H, C)
        blocks = tl.cdiv(columns, BW)
        kind = tl.cdiv(height, BW) * blocks
        if READY:  # blocks of units, then of outputs
            vectors = tl.cdiv(H, BW) + tl.cdiv(outputs, BW)
            kind = tl.where(pid >= second, vectors, kind)
        place = pid - tl.where(pid >= second, second, tl.where(of_second, first, 0))
        part = place // kind
        block = place % kind
        start = part * share
        stop = tl.minimum(start + share, N)
        dw1 = grads + part.to(tl.int64) * total
        db1 = dw1 + _up_to_4(H * C)
        dw2 = db1 + _up_to_4(H)
        db2 = dw2 + _up_to_4(outputs * H)
        dgamma = db2 + _up_to_4(outputs)
        i = block // blocks * BW + tl.arange(0, BW)
        j = block % blocks * BW + tl.arange(0, BW)
        if READY and pid >= second:
            of_units = block < tl.cdiv(H, BW)
            length = tl.where(of_units, H, outputs)
            k = (block - tl.where(of_units, 0, tl.cdiv(H, BW))) * BW + tl.arange(0, BW)
            summed = summed_rows(tl.where(of_units, dv, dz), start, stop, k, length, WALK)
            tl.store(tl.where(of_units, db1, db2) + k, summed, k < length)
        elif READY:
            made = weight_grad_tile(
                of_second, i, height, j, columns, pooled, dz, dv, positive, start, stop, BW, WALK, PRECISION
            )  # fmt: skip
            store_rows(tl.where(of_second, dw2, dw1), made, i, height, j, columns)
        else:
            made = weight_grad_tile_of_dv(
                of_second, i, j, columns, block % blocks == 0, pooled, state, mean, var, gamma, beta, dz, dv, sums,
                db1, db2, dgamma, dgamma + _up_to_4(H), N, H, groups, start, stop,
                BATCH_STATS, EPS, GROUPS, BW, WALK, PRECISION,
            )  # fmt: skip
            # element (i, j) of dw1 (H, C), or of dw2 (outputs, H) transposed
            at = (i * tl.where(of_second, 1, C))[:, None] + (j * tl.where(of_second, H, 1))[None, :]
            tl.store(tl.where(of_second, dw2, dw1) + at, made, (i < H)[:, None] & (j < columns)[None, :])


@kernel(pointers=2, aligned=("shares_of", "added"))
def add_shares_kernel(
    shares_of, added, shares, total, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, DEPENDENT: tl.constexpr
):
    """(shares, total) -> (total,): the gradients of all shares of the batch added up, always in the same order."""
    await_previous(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), added.dtype.element_ty)
    for first in range(0, shares, AT_ONCE):
        share = first + tl.arange(0, AT_ONCE)
        live = (share < shares)[:, None] & (at < total)[None, :]
        found += tl.sum(tl.load(shares_of + share[:, None].to(tl.int64) * total + at[None, :], live, 0.0), 0)
    tl.store(added + at, found, at < total)


# ---- costs -----------------------------------------------------------------------------------------------------------


def add_shares_cost(size: int, shares: int) -> Cost:
    """size: bytes of a share's gradients."""
    return Cost(shares * size, size, ("add_shares_kernel",))


def linear_grad_cost(step: Step, groups: int, grads: int, dA: bool, direct: bool) -> Cost:
    """grads: bytes of the parameters' gradients, of all shares; 0 where they are not wanted."""
    s = Sizes.of(step)
    read = 2 * s.hidden + s.norm + groups * s.statistics + dA * s.w1 + direct * s.pooled
    read += s.pooled + s.alpha if grads else 0
    return Cost(read, grads + dA * s.pooled, ("linear_grad_kernel",))
