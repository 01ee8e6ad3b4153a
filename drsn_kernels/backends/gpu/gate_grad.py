"""The standard gate's way back: from dtau to dA and the parameters' gradients, as matrix products (gate.py).

    hidden_grad_kernel   dz; dv = (dz w2) [v > 0], and of each tile of samples the sums that BatchNorm's backward needs
    norm_grad_kernel     these merged, du and relu(v); gamma's and beta's gradients
    linear_grad_kernel   dA = du w1, dw1 = du' A, dw2 = dz' relu(v), and the biases'

The first is left out where one_pass.py has made dz and dv. The second is a launch where many units have statistics of
the batch (READY); else programs of the third do its work as they load, each for itself.
"""

import triton
import triton.language as tl

from ..step import Cost, Step
from .gate import (
    Sizes,
    across,
    added_slices,
    added_up,
    alphas_of,
    center_and_scale,
    channel_sums,
    merged_sums,
    normalise,
    nothing,
    ordered,
    product,
    relu,
    rows,
    scaled,
    standardised,
    statistics_of,
    steps_of,
    store_rows,
    transposed,
)
from .launch import kernel


@triton.jit
def summand(d, a, value, AVERAGE: tl.constexpr, ONE: tl.constexpr):
    """What logit_grads wants summed over the channels of a sample, where alpha or the average is shared by them."""
    if AVERAGE == "channel":
        return d * a
    elif ONE:
        return d
    else:
        return d * value


@triton.jit
def logit_grads(d, a, value, total, average, channels, AVERAGE: tl.constexpr, ONE: tl.constexpr):
    """dz (X, C | 1), and A's direct gradient (X, C | 1), by tau = alpha * M, from dtau d and A a, both (X, C).

    value is alpha (X, C | 1), total the sum of summand (X, 1), average mean_c A (X, 1). dalpha = M * dtau, summed over
    channels where one alpha serves all; dM = alpha * dtau, summed where the average is shared.
    """
    if AVERAGE == "channel":
        dalpha = total if ONE else d * a
        direct = d * value
    elif AVERAGE == "sample":
        dalpha = (total if ONE else d) * average
        direct = (total * value if ONE else total) / channels
    else:
        dalpha = total if ONE else d
        direct = tl.zeros((1, 1), d.dtype)
    return dalpha * (value * (1 - value)), direct


@triton.jit
def logit_grads_of_samples(d, a, value, own, C, AVERAGE: tl.constexpr, ONE: tl.constexpr):
    """logit_grads where a tile has all channels. own: the user's gradient of tau where tau is (X, 1), or None."""
    total = tl.sum(summand(d, a, value, AVERAGE, ONE), 1)[:, None]
    if own is not None:
        total += own
    channels = C.to(d.dtype)
    dz, direct = logit_grads(d, a, value, total, tl.sum(a, 1)[:, None] / channels, channels, AVERAGE, ONE)
    return dz, tl.broadcast_to(direct, d.shape)


@triton.jit
def tau_grads(dtau, tau_grad, n, c, N, C, parts, ONE_TAU: tl.constexpr, SPLIT: tl.constexpr):
    """dtau[n, c], with the user's gradient of tau."""
    d = added_up(dtau, n, N, c, C, parts, SPLIT)
    if tau_grad is not None and not ONE_TAU:
        d += rows(tau_grad, n, N, c, C)
    return d


@triton.jit
def alphas_at(alphas, n, o, N, C, ONE: tl.constexpr):
    """alpha of samples n, (X, outputs o) or (X, 1)."""
    if ONE:
        return tl.load(alphas + n, n < N, 0.0)[:, None]
    else:
        return rows(alphas, n, N, o, C)


@kernel(pointers=13, aligned=("dtau", "pooled", "state", "w2", "dz", "dv", "direct"))
def hidden_grad_kernel(
    dtau, tau_grad, pooled, state, mean, var, gamma, beta, w2, dz, dv, sums, direct, N, CA, HA, parts, tiles,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr, SPLIT: tl.constexpr,
    ALIGN: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz (N, C | 1), dv (N, H) and, with BATCH_STATS, sum dv and sum dv * (u - mean) / std of each tile (tiles, 2, H).

    direct (N, C) is A's direct gradient, where it is wanted and there is one. A program makes BN samples of BH units.
    """
    ONE_TAU: tl.constexpr = ONE and AVERAGE != "channel"
    C = CA * ALIGN
    H = HA * ALIGN
    outputs = 1 if ONE else C
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    blocks = tl.cdiv(H, BH)
    n = tile * BN + tl.arange(0, BN)
    h = block * BH + tl.arange(0, BH)
    live = h < H
    channels = C.to(w2.dtype.element_ty)
    alphas = alphas_of(state, N, H)
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)
    # loaded before the products, which it would otherwise wait for
    v, xhat, _ = normalise(rows(state, n, N, h, H), h, live, mean, var, gamma, beta, EPS)

    total = tl.zeros((BN, 1), w2.dtype.element_ty)
    average = total
    if AVERAGE == "sample":
        average = channel_sums(pooled, n, N, C, BK)[:, None] / channels
    if ONE or AVERAGE == "sample":
        terms = nothing(SLICES, BN, BK, w2.dtype.element_ty)
        for c0 in range(0, C, SLICES * BK):
            c = steps_of(c0, SLICES, BK)
            d = tau_grads(dtau, tau_grad, n, c, N, C, parts, ONE_TAU, SPLIT)
            terms += summand(d, rows(pooled, n, N, c, C), alphas_at(alphas, n, c, N, C, ONE), AVERAGE, ONE)
        total = tl.sum(added_slices(terms), 1)[:, None]
        if tau_grad is not None and ONE_TAU:
            total += tl.load(tau_grad + n, n < N, 0.0)[:, None]

    delta = nothing(SLICES, BN, BH, w2.dtype.element_ty)
    if not ONE or direct is not None:
        for c0 in range(0, C, SLICES * BK):
            c = steps_of(c0, SLICES, BK)
            d = tau_grads(dtau, tau_grad, n, c, N, C, parts, ONE_TAU, SPLIT)
            value = alphas_at(alphas, n, c, N, C, ONE)
            logits, past = logit_grads(d, rows(pooled, n, N, c, C), value, total, average, channels, AVERAGE, ONE)
            here = tl.where(c0 // (SLICES * BK) % blocks == block, N, 0)  # the programs of a tile share its channels
            if not ONE:
                delta = product(logits, rows(w2, ordered(c), C, h, H), delta, PRECISION)
                store_rows(dz, logits, n, here, ordered(c), C)
            if direct is not None:
                store_rows(direct, past + tl.zeros_like(d), n, here, ordered(c), C)
    delta = added_slices(delta)
    if ONE:
        value = alphas_at(alphas, n, n, N, C, ONE)
        one, _ = logit_grads(total, total, value, total, average, channels, AVERAGE, ONE)
        delta += one * tl.load(w2 + h, live, 0.0)[None, :]
        tl.store(dz + n[:, None], one, (n < N)[:, None] & (block == 0))
    delta = tl.where(v > 0, delta, 0.0)
    store_rows(dv, delta, n, N, h, H)
    if BATCH_STATS:
        tl.store(sums + tile * 2 * H + h, tl.sum(delta, 0), live)
        tl.store(sums + (tile * 2 + 1) * H + h, tl.sum(delta * xhat, 0), live)


@triton.jit
def norm_grads(change, xhat, average, average_xhat, slope, BATCH_STATS: tl.constexpr):
    """du of dv (X, units) behind a norm; with BATCH_STATS by the averages of dv and dv * xhat over the batch."""
    if BATCH_STATS:
        change -= across(average) + xhat * across(average_xhat)
    return change * across(slope)


@triton.jit
def batch_averages(sums, h, live, N, H, groups, GROUPS: tl.constexpr):
    """Averages over the batch of dv and dv * xhat, from their sums (groups, 2, H)."""
    first, second = merged_sums(sums, h, live, H, groups, GROUPS)
    count = N.to(first.dtype)
    return first / count, second / count


@kernel(pointers=7, aligned=("state", "dv", "positive"))
def norm_grad_kernel(
    state, gamma, beta, sums, dv, positive, norms, N, CA, HA, pieces, share, groups, after_gamma,
    ONE: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """dv (N, H) becomes du, positive relu(v) (N, H), behind a norm by statistics of the batch.

    Gamma's gradient (H,) goes to norms, beta's to norms + after_gamma. A program takes `share` samples of BH units.
    """
    H = HA * ALIGN
    part = tl.program_id(0) % pieces
    h = tl.program_id(0) // pieces * BH + tl.arange(0, BH)
    live = h < H
    of_beta, of_gamma = merged_sums(sums, h, live, H, groups, GROUPS)
    tl.store(norms + h, of_gamma, live & (part == 0))
    tl.store(norms + after_gamma + h, of_beta, live & (part == 0))
    count = N.to(of_beta.dtype)
    mean, var = statistics_of(state, N, H, 1 if ONE else CA * ALIGN)
    center, scale = center_and_scale(mean, var, h, live, EPS)
    stop = tl.minimum(part * share + share, N)
    for n0 in range(part * share, stop, BN):
        n = n0 + tl.arange(0, BN)
        xhat = standardised(rows(state, n, stop, h, H), center, scale)
        v, slope = scaled(xhat, h, live, scale, gamma, beta)
        du = norm_grads(rows(dv, n, stop, h, H), xhat, of_beta / count, of_gamma / count, slope, True)
        store_rows(dv, du, n, stop, h, H)
        store_rows(positive, relu(v), n, stop, h, H)


@triton.jit
def pooled_grad_tile(
    pid, state, mean, var, gamma, beta, w1, dv, sums, direct, dA, N, C, H, tiles, groups,
    BATCH_STATS: tl.constexpr, EPS: tl.constexpr, READY: tl.constexpr, GROUPS: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA = du w1 + the direct gradient, BN samples of BC channels."""
    n = pid % tiles * BN + tl.arange(0, BN)
    c = pid // tiles * BC + tl.arange(0, BC)
    total = nothing(SLICES, BN, BC, w1.dtype.element_ty)
    for h0 in range(0, H, SLICES * BK):
        k = steps_of(h0, SLICES, BK)
        h = ordered(k)
        du = rows(dv, n, N, k, H)
        if mean is not None and not READY:
            xhat, average, average_xhat = du, du, du
            center, scale = center_and_scale(mean, var, h, h < H, EPS)
            if BATCH_STATS:
                xhat = standardised(rows(state, n, N, k, H), center, scale)
                average, average_xhat = batch_averages(sums, h, h < H, N, H, groups, GROUPS)
            slope = tl.load(gamma + h, h < H, 0.0) * scale
            du = norm_grads(du, xhat, average, average_xhat, slope, BATCH_STATS)
        total = product(du, rows(w1, h, H, c, C), total, PRECISION)
    total = added_slices(total)
    if direct is not None:
        total += rows(direct, n, N, c, C)
    store_rows(dA, total, n, N, c, C)


@triton.jit
def weight_grad_tile(
    of_second, h, c, columns, pooled, dz, dv, positive, H, start, stop, BW: tl.constexpr, WALK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """du' A or, of_second, relu(v)' dz, units h by columns c, from samples start to stop.

    Nothing else is made of what is loaded: then it stands in shared memory as tensor cores read it.
    """
    left = tl.where(of_second, positive, dv)
    right = tl.where(of_second, dz, pooled)
    total = tl.zeros((BW, BW), dv.dtype.element_ty)
    for n0 in range(start, stop, WALK):
        n = n0 + tl.arange(0, WALK)
        total = product(transposed(left, n, stop, h, H), rows(right, n, stop, c, columns), total, PRECISION)
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
    """The same without READY, and the vectors by the first of a row of tiles.

    What the other gradient needs is not loaded, its mask ends at sample 0. Sums over samples are taken at the end: in
    the loop they are one addition an element.
    """
    ACC: tl.constexpr = dv.dtype.element_ty
    live = h < H
    vectors = live & of_first_column & (of_second == 0)
    if mean is not None:
        center, scale = center_and_scale(mean, var, h, live, EPS)
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
        v = xhat
        if mean is not None:
            xhat = standardised(xhat, center, scale)
            v, slope = scaled(xhat, h, live, scale, gamma, beta)
            sum_dv += du
            sum_dv_xhat += du * xhat
            du = norm_grads(du, xhat, average, average_xhat, slope, BATCH_STATS)
        left = tl.where((n < stop)[:, None], tl.where(of_second, relu(v), du), 0.0)
        right = rows(right_of, n, stop, c, columns)
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
def _up_to_4(n):  # as plans.up_to does where sequence.py lays out the gradients
    return (n + 3) // 4 * 4


@kernel(pointers=14, aligned=("pooled", "state", "w1", "dz", "dv", "positive", "direct", "dA", "grads"))
def linear_grad_kernel(
    pooled, state, mean, var, gamma, beta, w1, dz, dv, positive, sums, direct, dA, grads,
    N, CA, HA, tiles, groups, pooled_programs, first, second, share, total,
    ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr, READY: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, WALK: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters and, where wanted, dA (N, C).

    The first pooled_programs make tiles of dA: they take longest. Of the others those from 0 on make tiles of dw1, from
    `first` on of dw2 (the same code: both are units by columns, summed over the batch), of `share` samples each, and
    from `second` on, with READY, the biases'. A share's gradients are its row of grads (shares, total): w1 (H, C), b1
    (H,), w2 (O, H), b2 (O,) and, with a norm and without READY, gamma (H,) and beta (H,), each at a multiple of 4
    elements.
    """
    C = CA * ALIGN
    H = HA * ALIGN
    outputs = 1 if ONE else C
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)
    pid = tl.program_id(0) - pooled_programs
    if pid >= 0:
        of_second = (pid >= first) & (pid < second)
        columns = tl.where(of_second, outputs, C)
        blocks = tl.cdiv(columns, BW)
        kind = tl.cdiv(H, BW) * blocks
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
        h = block // blocks * BW + tl.arange(0, BW)
        c = block % blocks * BW + tl.arange(0, BW)
        if READY and pid >= second:
            of_units = block < tl.cdiv(H, BW)
            length = tl.where(of_units, H, outputs)
            k = (block - tl.where(of_units, 0, tl.cdiv(H, BW))) * BW + tl.arange(0, BW)
            summed = summed_rows(tl.where(of_units, dv, dz), start, stop, k, length, WALK)
            tl.store(tl.where(of_units, db1, db2) + k, summed, k < length)
        else:
            if READY:
                made = weight_grad_tile(
                    of_second, h, c, columns, pooled, dz, dv, positive, H, start, stop, BW, WALK, PRECISION
                )  # fmt: skip
            else:
                made = weight_grad_tile_of_dv(
                    of_second, h, c, columns, block % blocks == 0, pooled, state, mean, var, gamma, beta, dz, dv, sums,
                    db1, db2, dgamma, dgamma + _up_to_4(H), N, H, groups, start, stop,
                    BATCH_STATS, EPS, GROUPS, BW, WALK, PRECISION,
                )  # fmt: skip
            # element (h, c) of dw1 (H, C), or of dw2 (outputs, H) transposed
            at = (h * tl.where(of_second, 1, C))[:, None] + (c * tl.where(of_second, H, 1))[None, :]
            tl.store(tl.where(of_second, dw2, dw1) + at, made, (h < H)[:, None] & (c < columns)[None, :])
    elif dA is not None:
        pooled_grad_tile(
            pid + pooled_programs, state, mean, var, gamma, beta, w1, dv, sums, direct, dA, N, C, H, tiles, groups,
            BATCH_STATS, EPS, READY, GROUPS, BN, BC, BK, SLICES, PRECISION,
        )  # fmt: skip


@kernel(pointers=2, aligned=("shares_of", "added"))
def add_shares_kernel(shares_of, added, shares, total, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """(shares, total) -> (total,): the gradients of all shares of the batch added up, always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), added.dtype.element_ty)
    for first in range(0, shares, AT_ONCE):
        share = first + tl.arange(0, AT_ONCE)
        live = (share < shares)[:, None] & (at < total)[None, :]
        found += tl.sum(tl.load(shares_of + share[:, None].to(tl.int64) * total + at[None, :], live, 0.0), 0)
    tl.store(added + at, found, at < total)


# ---- costs -----------------------------------------------------------------------------------------------------------


def hidden_grad_cost(step: Step, parts: int, tiles: int, direct: bool) -> Cost:
    s = Sizes.of(step)
    read = parts * s.pooled + s.pooled + s.hidden + s.alpha + s.norm + s.w2
    written = s.alpha + s.hidden + tiles * s.statistics + direct * s.pooled
    return Cost(read, written, ("hidden_grad_kernel",))


def norm_grad_cost(step: Step, sums: int) -> Cost:
    s = Sizes.of(step)
    return Cost(sums * s.statistics + 2 * s.hidden + s.norm, 2 * s.hidden + s.norm // 2, ("norm_grad_kernel",))


def add_shares_cost(size: int, shares: int) -> Cost:
    """size: bytes of a share's gradients."""
    return Cost(shares * size, size, ("add_shares_kernel",))


def linear_grad_cost(step: Step, groups: int, grads: int, dA: bool, direct: bool) -> Cost:
    """grads: bytes of the parameters' gradients, of all shares."""
    s = Sizes.of(step)
    read = s.pooled + s.hidden + s.norm + s.alpha + s.hidden + groups * s.statistics + dA * s.w1 + direct * s.pooled
    return Cost(read, grads + dA * s.pooled, ("linear_grad_kernel",))
