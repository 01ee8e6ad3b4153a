"""The standard gate's way back: from dtau to dA and the parameters' gradients, as matrix products (gate.py).

    hidden_grad_kernel   dz; dv = (dz w2) [v > 0], and of each tile of samples the sums that BatchNorm's backward needs
    linear_grad_kernel   these merged, du; dA = du w1, dw1 = du' A, dw2 = dz' relu(v), and the biases', gamma and beta's

The first is left out where one_pass.py has made dz and dv.
"""

import triton
import triton.language as tl

from ..step import Cost, Step
from .gate import (
    Sizes,
    alphas_of,
    center_and_scale,
    channel_sums,
    merged_sums,
    normalise,
    product,
    relu,
    rows,
    scaled,
    standardised,
    statistics_of,
    store_rows,
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
def tau_grads(dtau, tau_grad, n, c, N, C, part, ONE_TAU: tl.constexpr):
    """A part of dtau[n, c]. The user's gradient of tau comes with the first."""
    d = rows(dtau + part * (N * C), n, N, c, C)
    if tau_grad is not None and not ONE_TAU:
        d += rows(tau_grad, n, tl.where(part == 0, N, 0), c, C)
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
    AVERAGE: tl.constexpr, ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
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
    steps = tl.cdiv(C, BK)
    channels = C.to(w2.dtype.element_ty)
    alphas = alphas_of(state, N, H)
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)

    total = tl.zeros((BN, 1), w2.dtype.element_ty)
    average = total
    if AVERAGE == "sample":
        average = channel_sums(pooled, n, N, C, BK)[:, None] / channels
    if ONE or AVERAGE == "sample":
        terms = tl.zeros((BN, BK), w2.dtype.element_ty)
        for step in range(0, parts * steps):
            c = step % steps * BK + tl.arange(0, BK)
            d = tau_grads(dtau, tau_grad, n, c, N, C, step // steps, ONE_TAU)
            terms += summand(d, rows(pooled, n, N, c, C), alphas_at(alphas, n, c, N, C, ONE), AVERAGE, ONE)
        total = tl.sum(terms, 1)[:, None]
        if tau_grad is not None and ONE_TAU:
            total += tl.load(tau_grad + n, n < N, 0.0)[:, None]

    delta = tl.zeros((BN, BH), w2.dtype.element_ty)
    if ONE:
        value = alphas_at(alphas, n, n, N, C, ONE)
        one, _ = logit_grads(total, total, value, total, average, channels, AVERAGE, ONE)
        delta += one * tl.load(w2 + h, live, 0.0)[None, :]
        tl.store(dz + n[:, None], one, (n < N)[:, None] & (block == 0))
    else:  # dz is linear in dtau: parts are steps as well
        for step in range(0, parts * steps):
            c = step % steps * BK + tl.arange(0, BK)
            d = tau_grads(dtau, tau_grad, n, c, N, C, step // steps, ONE_TAU)
            a = rows(pooled, n, N, c, C)
            part, _ = logit_grads(d, a, rows(alphas, n, N, c, C), total, average, channels, AVERAGE, ONE)
            delta = product(part, rows(w2, c, C, h, H), delta, PRECISION)
    v, xhat, _ = normalise(rows(state, n, N, h, H), h, live, mean, var, gamma, beta, EPS)
    delta = tl.where(v > 0, delta, 0.0)
    store_rows(dv, delta, n, N, h, H)
    if BATCH_STATS:
        tl.store(sums + tile * 2 * H + h, tl.sum(delta, 0), live)
        tl.store(sums + (tile * 2 + 1) * H + h, tl.sum(delta * xhat, 0), live)

    if not ONE or direct is not None:
        for c0 in range(block * BK, C, blocks * BK):  # the programs of a tile share its channels
            c = c0 + tl.arange(0, BK)
            d = tau_grads(dtau, tau_grad, n, c, N, C, 0, ONE_TAU)
            for part in range(1, parts):
                d += tau_grads(dtau, tau_grad, n, c, N, C, part, ONE_TAU)
            a = rows(pooled, n, N, c, C)
            value = alphas_at(alphas, n, c, N, C, ONE)
            logits, past = logit_grads(d, a, value, total, average, channels, AVERAGE, ONE)
            if not ONE:
                store_rows(dz, logits, n, N, c, C)
            if direct is not None:
                store_rows(direct, tl.broadcast_to(past, (BN, BK)), n, N, c, C)


@triton.jit
def norm_grads(change, xhat, average, average_xhat, slope, BATCH_STATS: tl.constexpr):
    """du of dv (X, units) behind a norm; with BATCH_STATS by the averages of dv and dv * xhat over the batch."""
    if BATCH_STATS:
        change -= average[None, :] + xhat * average_xhat[None, :]
    return change * slope[None, :]


@triton.jit
def batch_averages(sums, h, live, N, H, groups, MERGE: tl.constexpr, GROUPS: tl.constexpr):
    """Averages over the batch of dv and dv * xhat, from their sums (groups, 2, H), or (1, 2, H) without MERGE."""
    if MERGE:
        first, second = merged_sums(sums, h, live, H, groups, GROUPS)
    else:
        first = tl.load(sums + h, live, 0.0)
        second = tl.load(sums + H + h, live, 0.0)
    count = N.to(first.dtype)
    return first / count, second / count


@triton.jit
def pooled_grad_tile(
    pid, state, mean, var, gamma, beta, w1, dv, sums, direct, dA, N, C, H, tiles, groups,
    BATCH_STATS: tl.constexpr, EPS: tl.constexpr, MERGE: tl.constexpr, GROUPS: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA = du w1 + the direct gradient, BN samples of BC channels."""
    n = pid % tiles * BN + tl.arange(0, BN)
    c = pid // tiles * BC + tl.arange(0, BC)
    total = tl.zeros((BN, BC), w1.dtype.element_ty)
    for h0 in range(0, H, BK):
        h = h0 + tl.arange(0, BK)
        du = rows(dv, n, N, h, H)
        if mean is not None:
            xhat, average, average_xhat = du, du, du
            center, scale = center_and_scale(mean, var, h, h < H, EPS)
            if BATCH_STATS:
                xhat = standardised(rows(state, n, N, h, H), center, scale)
                average, average_xhat = batch_averages(sums, h, h < H, N, H, groups, MERGE, GROUPS)
            slope = tl.load(gamma + h, h < H, 0.0) * scale
            du = norm_grads(du, xhat, average, average_xhat, slope, BATCH_STATS)
        total = product(du, rows(w1, h, H, c, C), total, PRECISION)
    if direct is not None:
        total += rows(direct, n, N, c, C)
    store_rows(dA, total, n, N, c, C)


@triton.jit
def weight_grad_tile(
    of_second, block, blocks, columns, pooled, state, mean, var, gamma, beta, dz, dv, sums, dw, along_h, along_c,
    db1, db2, dgamma, dbeta, N, C, H, outputs, groups, start, stop,
    BATCH_STATS: tl.constexpr, EPS: tl.constexpr, MERGE: tl.constexpr, GROUPS: tl.constexpr,
    BC: tl.constexpr, BH: tl.constexpr, WALK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BH units of BC columns of dw1 = du' A or, of_second, of dw2' = relu(v)' dz, from samples start to stop.

    Element (h, c) of the gradient lies at dw + h * along_h + c * along_c. What the other gradient needs is not loaded,
    its mask ends at sample 0. The first of a row of tiles also makes the vectors. Their sums over samples are taken at
    the end: in the loop they are one addition an element.
    """
    ACC: tl.constexpr = dv.dtype.element_ty
    h = block // blocks * BH + tl.arange(0, BH)
    c = block % blocks * BC + tl.arange(0, BC)
    live = h < H
    vectors = live & (block % blocks == 0)
    if mean is not None:
        center, scale = center_and_scale(mean, var, h, live, EPS)
        average, average_xhat = scale, scale
        if BATCH_STATS:
            average, average_xhat = batch_averages(sums, h, live, N, H, groups, MERGE, GROUPS)
    total = tl.zeros((BH, BC), ACC)
    sum_left = tl.zeros((WALK, BH), ACC)
    sum_dv = tl.zeros((WALK, BH), ACC)
    sum_dv_xhat = tl.zeros((WALK, BH), ACC)
    sum_right = tl.zeros((WALK, BC), ACC)
    end_of_first = tl.where(of_second, 0, stop)
    end_of_second = tl.where(of_second, stop, 0)
    for n0 in range(start, stop, WALK):
        n = n0 + tl.arange(0, WALK)
        du = rows(dv, n, end_of_first, h, H)
        xhat = rows(state, n, stop, h, H)
        v = xhat
        if mean is not None:
            xhat = standardised(xhat, center, scale)
            v, slope = scaled(xhat, h, live, scale, gamma, beta)
            sum_dv += du
            sum_dv_xhat += du * xhat
            du = norm_grads(du, xhat, average, average_xhat, slope, BATCH_STATS)
        left = tl.where((n < stop)[:, None], tl.where(of_second, relu(v), du), 0.0)
        right = rows(pooled, n, end_of_first, c, C) + rows(dz, n, end_of_second, c, outputs)
        sum_left += left
        sum_right += right
        total = product(tl.trans(left), right, total, PRECISION)
    at = (h * along_h)[:, None] + (c * along_c)[None, :]
    tl.store(dw + at, total, live[:, None] & (c < columns)[None, :])
    tl.store(db1 + h, tl.sum(sum_left, 0), vectors & (of_second == 0))
    tl.store(db2 + c, tl.sum(sum_right, 0), (c < columns) & (block // blocks == 0) & of_second)
    if mean is not None:
        tl.store(dgamma + h, tl.sum(sum_dv_xhat, 0), vectors & (of_second == 0))
        tl.store(dbeta + h, tl.sum(sum_dv, 0), vectors & (of_second == 0))


@triton.jit
def _up_to_4(n):  # as plans.up_to does where sequence.py lays out the gradients
    return (n + 3) // 4 * 4


@kernel(pointers=13, aligned=("pooled", "state", "w1", "dz", "dv", "direct", "dA", "grads"))
def linear_grad_kernel(
    pooled, state, mean, var, gamma, beta, w1, dz, dv, sums, direct, dA, grads,
    N, CA, HA, tiles, groups, first, second, share, total,
    ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr, MERGE: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, WALK: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters and, where wanted, dA (N, C).

    Programs from 0 on make tiles of dw1, from `first` on of dw2 (the same code: both are units by columns, summed over
    the batch), of `share` samples each, and from `second` on of dA. A share's gradients are its row of grads (shares,
    total): w1 (H, C), b1 (H,), w2 (O, H), b2 (O,) and, with a norm, gamma (H,) and beta (H,), each at a multiple of 4
    elements.
    """
    C = CA * ALIGN
    H = HA * ALIGN
    outputs = 1 if ONE else C
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)
    pid = tl.program_id(0)
    if pid < second:
        of_second = pid >= first
        columns = tl.where(of_second, outputs, C)
        blocks = tl.cdiv(columns, BC)
        block = pid - tl.where(of_second, first, 0)
        kind = tl.cdiv(H, BH) * blocks
        part = block // kind
        start = part * share
        dw1 = grads + part.to(tl.int64) * total
        db1 = dw1 + _up_to_4(H * C)
        dw2 = db1 + _up_to_4(H)
        db2 = dw2 + _up_to_4(outputs * H)
        dgamma = db2 + _up_to_4(outputs)
        weight_grad_tile(
            of_second, block % kind, blocks, columns, pooled, state, mean, var, gamma, beta, dz, dv, sums,
            tl.where(of_second, dw2, dw1), tl.where(of_second, 1, C), tl.where(of_second, H, 1),
            db1, db2, dgamma, dgamma + _up_to_4(H), N, C, H, outputs, groups, start, tl.minimum(start + share, N),
            BATCH_STATS, EPS, MERGE, GROUPS, BC, BH, WALK, PRECISION,
        )  # fmt: skip
    elif dA is not None:
        pooled_grad_tile(
            pid - second, state, mean, var, gamma, beta, w1, dv, sums, direct, dA, N, C, H, tiles, groups,
            BATCH_STATS, EPS, MERGE, GROUPS, BN, BC, BK, PRECISION,
        )  # fmt: skip


# ---- costs -----------------------------------------------------------------------------------------------------------


def hidden_grad_cost(step: Step, parts: int, tiles: int, direct: bool) -> Cost:
    s = Sizes.of(step)
    read = parts * s.pooled + s.pooled + s.hidden + s.alpha + s.norm + s.w2
    written = s.alpha + s.hidden + tiles * s.statistics + direct * s.pooled
    return Cost(read, written, ("hidden_grad_kernel",))


def linear_grad_cost(step: Step, groups: int, grads: int, dA: bool, direct: bool) -> Cost:
    """grads: bytes of the parameters' gradients, of all shares."""
    s = Sizes.of(step)
    read = s.pooled + s.hidden + s.norm + s.alpha + s.hidden + groups * s.statistics + dA * s.w1 + direct * s.pooled
    return Cost(read, grads + dA * s.pooled, ("linear_grad_kernel",))
