"""The standard gate's way back: from dtau to dA and the parameters' gradients, as matrix products (gate.py).

    logit_grad_kernel       dz
    hidden_grad_kernel      dv = (dz w2) [not v <= 0], and of each tile of samples the sums for BatchNorm's backward
    normalise_grad_kernel   these merged, du and relu(v); gamma's and beta's gradients
    linear_grad_kernel      dA = du w1, dw1 = du' A, dw2 = dz' relu(v), and the biases' (linear_grad.py)

The first two are left out where one_pass.py has made dz and dv. The first is a launch where there are many channels and
no sum over them in dz, the third where many units have statistics of the batch (READY in the launch behind); else
programs of the product behind do its work as they load, each for itself.
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
    relu,
    scaled,
    standardised,
    statistics_of,
    weight_and_bias,
)
from .launch import await_previous, kernel
from .product import across, added_slices, added_up, held, nothing, ordered, product, rows, steps_of, store_rows


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


@kernel(pointers=6, aligned=("dtau", "tau_grad", "pooled", "state", "dz", "direct"))
def logit_grad_kernel(
    dtau, tau_grad, pooled, state, dz, direct, N, CA, HA, parts, AVERAGE: tl.constexpr, SPLIT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dz (N, C) and A's direct gradient, where nothing is summed over channels: each by itself."""
    await_previous(DEPENDENT)
    size = N * CA * ALIGN
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    d = tl.load(dtau + at, live, 0.0)
    if SPLIT:
        for part in range(1, parts):
            d += tl.load(dtau + part * size + at, live, 0.0)
    if tau_grad is not None:
        d += tl.load(tau_grad + at, live, 0.0)
    a = tl.load(pooled + at, live, 0.0)
    value = tl.load(alphas_of(state, N, HA * ALIGN) + at, live, 0.0)
    logits, past = logit_grads(d, a, value, None, None, None, AVERAGE, False)
    tl.store(dz + at, logits, live)
    if direct is not None:
        tl.store(direct + at, past, live)


@kernel(pointers=14, aligned=("dtau", "pooled", "state", "w2", "dz", "dv", "direct"))
def hidden_grad_kernel(
    dtau, tau_grad, pooled, state, mean, var, gamma, beta, w2, dz, dv, sums, direct, counter, N, CA, HA, parts,
    tiles,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr, SPLIT: tl.constexpr,
    READY: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dz (N, C | 1), dv (N, H) and, with BATCH_STATS, sum dv and sum dv * (u - mean) / std of each tile (tiles, 2, H).

    READY: logit_grad_kernel has made dz and direct. direct (N, C) is A's direct gradient, where it is wanted and there
    is one. A program makes BN samples of BH units. counter (1,) becomes 0, for linear_grad_kernel.
    """
    await_previous(DEPENDENT)
    if counter is not None:
        tl.store(counter, 0, tl.program_id(0) == 0)
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
    u = rows(state, n, N, h, H)
    if mean is not None:
        center, scale = center_and_scale(mean, var, h, live, EPS)
        weight, bias = weight_and_bias(gamma, beta, h, live)

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
    if READY:
        for c0 in range(0, C, SLICES * BK):
            c = steps_of(c0, SLICES, BK)
            logits = rows(dz, n, N, c, C, EVEN)
            delta = product(logits, rows(w2, ordered(c), C, h, H, EVEN), delta, PRECISION)
    elif not ONE or direct is not None:
        for c0 in range(0, C, SLICES * BK):
            c = steps_of(c0, SLICES, BK)
            d = tau_grads(dtau, tau_grad, n, c, N, C, parts, ONE_TAU, SPLIT)
            value = alphas_at(alphas, n, c, N, C, ONE)
            if not ONE:
                w = rows(w2, ordered(c), C, h, H)
            logits, past = logit_grads(d, rows(pooled, n, N, c, C), value, total, average, channels, AVERAGE, ONE)
            here = tl.where(c0 // (SLICES * BK) % blocks == block, N, 0)  # the programs of a tile share its channels
            if not ONE:
                delta = product(held(logits, HELD > 1), held(w, HELD > 1), delta, PRECISION)
                store_rows(dz, logits, n, here, ordered(c), C)
            if direct is not None:
                store_rows(direct, past + tl.zeros_like(d), n, here, ordered(c), C)
    delta = added_slices(delta)
    if ONE:
        value = alphas_at(alphas, n, n, N, C, ONE)
        one, _ = logit_grads(total, total, value, total, average, channels, AVERAGE, ONE)
        delta += one * tl.load(w2 + h, live, 0.0)[None, :]
        tl.store(dz + n[:, None], one, (n < N)[:, None] & (block == 0))
    v = held(u, HELD)
    if mean is not None:
        xhat = standardised(v, center, scale)
        v, _ = scaled(xhat, scale, weight, bias)
    delta = tl.where(v <= 0, 0.0, delta)  # a NaN lets it pass, as in torch
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


@kernel(pointers=7, aligned=("state", "sums", "dv", "positive"))
def normalise_grad_kernel(
    state, gamma, beta, sums, dv, positive, norms, N, CA, HA, tiles, groups, after_gamma,
    ONE: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, GROUPS: tl.constexpr,
    HELD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dv (N, H) becomes du, positive relu(v) (N, H), behind a norm by statistics of the batch.

    Gamma's gradient (H,) goes to norms, beta's to norms + after_gamma. A program makes BN samples of BH units.
    """
    await_previous(DEPENDENT)
    H = HA * ALIGN
    tile = tl.program_id(0) % tiles
    n = tile * BN + tl.arange(0, BN)
    h = tl.program_id(0) // tiles * BH + tl.arange(0, BH)
    live = h < H
    u, change = rows(state, n, N, h, H), rows(dv, n, N, h, H)  # loaded together with the sums
    weight, bias = weight_and_bias(gamma, beta, h, live)
    mean, var = statistics_of(state, N, H, 1 if ONE else CA * ALIGN)
    center, scale = center_and_scale(mean, var, h, live, EPS)
    of_beta, of_gamma = merged_sums(sums, h, live, H, groups, GROUPS)
    xhat = standardised(held(u, HELD), center, scale)
    v, slope = scaled(xhat, scale, weight, bias)
    count = N.to(of_beta.dtype)
    store_rows(dv, norm_grads(held(change, HELD), xhat, of_beta / count, of_gamma / count, slope, True), n, N, h, H)
    store_rows(positive, relu(v), n, N, h, H)
    tl.store(norms + h, of_gamma, live & (tile == 0))
    tl.store(norms + after_gamma + h, of_beta, live & (tile == 0))


# ---- costs -----------------------------------------------------------------------------------------------------------


def logit_grad_cost(step: Step, parts: int, direct: bool) -> Cost:
    s = Sizes.of(step)
    average = 0 if step.average is None else s.pooled
    return Cost(parts * s.pooled + average + s.alpha, s.alpha + direct * s.pooled, ("logit_grad_kernel",))


def hidden_grad_cost(step: Step, parts: int, tiles: int, direct: bool, ready: bool) -> Cost:
    """ready: behind logit_grad_kernel."""
    s = Sizes.of(step)
    logits = Cost(s.alpha, 0) if ready else logit_grad_cost(step, parts, direct)
    read = logits.read + s.hidden + s.norm + s.w2
    return Cost(read, logits.written + s.hidden + tiles * s.statistics, ("hidden_grad_kernel",))


def normalise_grad_cost(step: Step, sums: int) -> Cost:
    s = Sizes.of(step)
    return Cost(sums * s.statistics + 2 * s.hidden + s.norm, 2 * s.hidden + s.norm // 2, ("normalise_grad_kernel",))
