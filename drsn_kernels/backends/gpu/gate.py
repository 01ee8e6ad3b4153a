"""The standard gate, Linear - [BatchNorm1d] - ReLU - Linear - Sigmoid, on the pooled |x|, as matrix products.

    u = A w1' + b1              (N, H)         v = gamma * (u - mean) / sqrt(var + eps) + beta      (no norm: v = u)
    z = relu(v) w2' + b2        (N, O)         alpha = sigmoid(z), O = C or 1
    tau = alpha * M             M = A ("channel"), mean_c A ("sample"), 1 (None)

    hidden_kernel      u = A w1' + b1, and of each tile of samples the mean and the squared deviations of its units
    normalise_kernel   these merged, relu(v); the running statistics
    alpha_kernel       z = relu(v) w2' + b2, alpha, tau

The way back is in gate_grad.py and linear_grad.py; whole_gate.py does the work of hidden and alpha where the gate is
small and its statistics are given. A launch ends where the whole batch must be known, where a product needs all units
of a sample, and where each program of a product would work out the same factor. Every launch shares the batch among
all programs: a program makes one tile of one product. The second launch is there where many units have
statistics of the batch; else programs of the third do its work as they load, each for itself, or, where nothing is kept
and statistics are given, those of the first as they store. What tiles contribute to statistics and sums is merged by
whoever reads it; of many tiles, by a launch of its own (merge_tiles_kernel). No number is summed by atomics: the same
bits from run to run.

`state` is Step.state numbers: u (N, H), alpha (N, O) and, of the batch, mean and variance (H,), one after the other.
Other statistics come as `mean` and `var`; without a norm these are None. Sizes of tiles follow from the larger
of C and H, never from N. C and H come divided by ALIGN, as strides do in tiles.py: 16-byte accesses where rows are
multiples of 16 bytes, without a specialisation for the size. Rows of x that were split come as partial sums (parts, N,
C), which the step of a product that needs them adds up.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import cost
from ..step import Cost, Step
from .launch import await_previous, kernel
from .product import (
    across,
    added_slices,
    added_up,
    held,
    nothing,
    ordered,
    product,
    rows,
    steps_of,
    store_rows,
    transposed,
)


@triton.jit
def alphas_of(state, N, H):
    """Where alpha starts."""
    return state + N.to(tl.int64) * H


@triton.jit
def statistics_of(state, N, H, outputs):
    """Where the batch's mean and variance start."""
    mean = state + N.to(tl.int64) * (H + outputs)
    return mean, mean + H


# ---- the norm --------------------------------------------------------------------------------------------------------


@triton.jit
def relu(v):
    return tl.where(v <= 0, 0.0, v)  # NaN stays


@triton.jit
def standardised(u, center, scale):
    return (u - across(center)) * across(scale)


@triton.jit
def weight_and_bias(gamma, beta, h, live):
    return tl.load(gamma + h, live, 0.0), tl.load(beta + h, live, 0.0)


@triton.jit
def scaled(xhat, scale, weight, bias):
    """v of (u - mean) / std, and dv / du."""
    return xhat * across(weight) + across(bias), weight * scale


@triton.jit
def center_and_scale(mean, var, h, live, EPS: tl.constexpr):
    """mean and 1 / std of units h, for u (X, units)."""
    return tl.load(mean + h, live, 0.0), 1 / tl.sqrt(tl.load(var + h, live, 1.0) + EPS)


@triton.jit
def normalise(u, h, live, mean, var, gamma, beta, EPS: tl.constexpr):
    """v, (u - mean) / std, and dv / du for u (X, H block) and its units h. Without a norm v = u."""
    if mean is None:
        return u, u, tl.full(h.shape, 1.0, u.dtype)
    else:
        center, scale = center_and_scale(mean, var, h, live, EPS)
        weight, bias = weight_and_bias(gamma, beta, h, live)
        xhat = standardised(u, center, scale)
        v, slope = scaled(xhat, scale, weight, bias)
        return v, xhat, slope


@triton.jit
def merged_statistics(statistics, h, live, N, H, groups, group, GROUPS: tl.constexpr):
    """Mean of units h, and sum of squared deviations from it, of the whole batch, (units,) each.

    statistics (groups, 2, H) holds both for every `group` samples. GROUPS of them at a time are merged as single
    numbers would be, and blocks of these by Chan's rule, so nothing is lost to cancellation. What is loaded comes
    before the first sum, in which threads meet: no load passes by that.
    """
    ACC: tl.constexpr = statistics.dtype.element_ty
    count = tl.zeros((1,), ACC)
    mean = tl.zeros(h.shape, ACC)
    spread = tl.zeros(h.shape, ACC)
    for p0 in range(0, groups, GROUPS):
        p = p0 + tl.arange(0, GROUPS)
        size = tl.where(p < groups, tl.minimum(N - p * group, group), 0).to(ACC)
        at = (p * 2 * H)[:, None] + h[None, :]
        alive = (p < groups)[:, None] & live[None, :]
        means, spreads = tl.load(statistics + at, alive, 0.0), tl.load(statistics + H + at, alive, 0.0)
        here = tl.sum(size[:, None], 0)
        average = tl.sum(means * size[:, None], 0) / here
        off = tl.where(alive, means - average[None, :], 0.0)
        within = tl.sum(spreads + off * off * size[:, None], 0)
        apart = average - mean
        mean += apart * (here / (count + here))
        spread += within + apart * (count * here / (count + here)) * apart  # a first mean meets 0, not its square
        count += here
    return mean, spread


@triton.jit
def merged_sums(sums, h, live, H, groups, GROUPS: tl.constexpr):
    """Two sums of units h over the batch, (units,) each, of those of its groups, (groups, 2, H)."""
    first = tl.zeros((GROUPS, h.shape[0]), sums.dtype.element_ty)
    second = tl.zeros((GROUPS, h.shape[0]), sums.dtype.element_ty)
    for p0 in range(0, groups, GROUPS):
        p = p0 + tl.arange(0, GROUPS)
        at = (p * 2 * H)[:, None] + h[None, :]
        alive = (p < groups)[:, None] & live[None, :]
        first += tl.load(sums + at, alive, 0.0)
        second += tl.load(sums + H + at, alive, 0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@kernel(pointers=2)
def merge_tiles_kernel(
    groups_of, merged, N, H, groups, group, STATISTICS: tl.constexpr, BH: tl.constexpr, GROUPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """(groups, 2, H) -> (1, 2, H): statistics of the batch, or sums over it, where programs would merge too many."""
    await_previous(DEPENDENT)
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    if STATISTICS:
        first, second = merged_statistics(groups_of, h, h < H, N, H, groups, group, GROUPS)
    else:
        first, second = merged_sums(groups_of, h, h < H, H, groups, GROUPS)
    tl.store(merged + h, first, h < H)
    tl.store(merged + H + h, second, h < H)


# ---- forward ---------------------------------------------------------------------------------------------------------


@kernel(pointers=11, aligned=("partial", "w1", "state", "positive"))
def hidden_kernel(
    partial, pooled, w1, b1, state, positive, statistics, mean, var, gamma, beta, N, CA, HA, parts, tiles,
    BATCH_STATS: tl.constexpr, EPS: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    HELD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """u; A (N, C), where it comes in parts (SPLIT); with BATCH_STATS each tile's statistics, (tiles, 2, H).

    Where nothing is kept and statistics are given, positive = relu(v) (N, H) in the place of u. A program makes BN
    samples of BH units.
    """
    await_previous(DEPENDENT)
    C = CA * ALIGN
    H = HA * ALIGN
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    n = tile * BN + tl.arange(0, BN)
    h = block * BH + tl.arange(0, BH)
    bias = tl.load(b1 + h, h < H, 0.0)  # here, so that it is waited for together with the first step's loads
    if positive is not None and mean is not None:
        center, scale = center_and_scale(mean, var, h, h < H, EPS)
        weight, shift = weight_and_bias(gamma, beta, h, h < H)
    u = nothing(SLICES, BN, BH, w1.dtype.element_ty)
    for c0 in range(0, C, SLICES * BK):
        c = steps_of(c0, SLICES, BK)
        a = added_up(partial, n, N, c, C, parts, SPLIT, EVEN)
        w = transposed(w1, h, H, c, C, EVEN)
        u = product(held(a, HELD > 1), held(w, HELD > 1), u, PRECISION)
        if SPLIT:  # the programs of a tile share its channels
            here = tl.where(c0 // (SLICES * BK) % tl.cdiv(H, BH) == block, N, 0)
            store_rows(pooled, a, n, here, ordered(c), C)
    u = added_slices(u) + bias[None, :]
    if positive is not None:
        if mean is not None:
            u, _ = scaled(standardised(u, center, scale), scale, weight, shift)
        store_rows(positive, relu(u), n, N, h, H)
    else:
        store_rows(state, u, n, N, h, H)
    if BATCH_STATS:
        count = tl.minimum(N - tile * BN, BN).to(u.dtype)
        average = tl.sum(tl.where((n < N)[:, None], u, 0.0), 0) / count
        off = tl.where((n < N)[:, None], u - average[None, :], 0.0)
        tl.store(statistics + tile * 2 * H + h, average, h < H)
        tl.store(statistics + (tile * 2 + 1) * H + h, tl.sum(off * off, 0), h < H)


@triton.jit
def settle(
    center, spread, before_mean, before_var, h, live, state, mean, var, N, H, outputs, factor, rest
):  # fmt: skip
    """The batch's statistics (variance: biased) to the state, and the running ones (variance: unbiased) updated.

    before: these as they were, which come loaded together with everything else. One after the other, each load behind
    a store, they were the longest way through the launch. factor + rest: the batch's part in them.
    """
    count = N.to(center.dtype)
    by = tl.full((1,), factor, center.dtype) + tl.full((1,), rest, center.dtype)
    batch_mean, batch_var = statistics_of(state, N, H, outputs)
    tl.store(batch_mean + h, center, live)
    tl.store(batch_var + h, spread / count, live)
    tl.store(mean + h, before_mean * (1 - by) + center * by, live)
    tl.store(var + h, before_var * (1 - by) + spread / (count - 1) * by, live)


@triton.jit
def of_batch(statistics, h, live, N, H, groups, group, EPS: tl.constexpr, GROUPS: tl.constexpr):
    """Mean of units h, sum of squared deviations from it, and 1 / std."""
    center, spread = merged_statistics(statistics, h, live, N, H, groups, group, GROUPS)
    return center, spread, 1 / tl.sqrt(spread / N.to(spread.dtype) + EPS)


@kernel(pointers=8, aligned=("state", "statistics", "positive"))
def normalise_kernel(
    state, statistics, mean, var, batches, gamma, beta, positive, N, CA, HA, tiles, groups, group, factor, rest,
    ONE: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    GROUPS: tl.constexpr, HELD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """positive = relu(v) (N, H), behind a norm by statistics of the batch. They go to the state; running ones follow.

    A program makes BN samples of BH units.
    """
    await_previous(DEPENDENT)
    H = HA * ALIGN
    tile = tl.program_id(0) % tiles
    n = tile * BN + tl.arange(0, BN)
    h = tl.program_id(0) // tiles * BH + tl.arange(0, BH)
    live = h < H
    u = rows(state, n, N, h, H)  # loaded together with the statistics
    weight, bias = weight_and_bias(gamma, beta, h, live)
    own = live & (tile == 0)
    before_mean, before_var = tl.load(mean + h, own, 0.0), tl.load(var + h, own, 0.0)
    counted = tl.load(batches, tl.program_id(0) == 0, 0)
    center, spread, scale = of_batch(statistics, h, live, N, H, groups, group, EPS, GROUPS)
    v, _ = scaled(standardised(held(u, HELD), center, scale), scale, weight, bias)
    store_rows(positive, relu(v), n, N, h, H)
    outputs = 1 if ONE else CA * ALIGN
    settle(center, spread, before_mean, before_var, h, own, state, mean, var, N, H, outputs, factor, rest)
    tl.store(batches, counted + 1, tl.program_id(0) == 0)


@kernel(pointers=12, aligned=("pooled", "state", "positive", "statistics", "w2", "tau"))
def alpha_kernel(
    pooled, state, positive, statistics, tau, mean, var, batches, gamma, beta, w2, b2, N, CA, HA, tiles, groups, group,
    factor, rest, AVERAGE: tl.constexpr, ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr,
    ALIGN: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
    EVEN: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """alpha (N, C | 1) and tau (N, C), or (N, 1) where one alpha meets a shared average (or none).

    positive is relu(v), where a launch before has made it. Else mean and var are the running statistics: used, or with
    BATCH_STATS updated, by the first program, from those of the batch (groups, 2, H). A program makes BN samples of BC
    outputs.
    """
    await_previous(DEPENDENT)
    C = CA * ALIGN
    H = HA * ALIGN
    outputs = 1 if ONE else C
    tile = tl.program_id(0) % tiles
    n = tile * BN + tl.arange(0, BN)
    block = tl.program_id(0) // tiles
    o = block * BC + tl.arange(0, BC)
    if not ONE:  # loaded before the products, which it would otherwise wait for
        bias = tl.load(b2 + o, o < C, 0.0)
        if AVERAGE == "channel":
            a = rows(pooled, n, N, o, C)
    if BATCH_STATS and positive is None:
        counted = tl.load(batches, tl.program_id(0) == 0, 0)
    z = nothing(SLICES, BN, BK if ONE else BC, w2.dtype.element_ty)
    for h0 in range(0, H, SLICES * BK):
        k = steps_of(h0, SLICES, BK)
        h = ordered(k)
        live = h < H
        if ONE:
            w = tl.load(w2 + h, live, 0.0)
        else:
            w = transposed(w2, o, outputs, k, H, EVEN)
        if positive is not None:
            v = rows(positive, n, N, k, H, EVEN)
        else:
            v = rows(state, n, N, k, H, EVEN)
            if BATCH_STATS:
                weight, shift = weight_and_bias(gamma, beta, h, live)
                own = live & (tl.program_id(0) == 0)
                before_mean, before_var = tl.load(mean + h, own, 0.0), tl.load(var + h, own, 0.0)
                center, spread, scale = of_batch(statistics, h, live, N, H, groups, group, EPS, GROUPS)
                v, _ = scaled(standardised(v, center, scale), scale, weight, shift)
            else:
                v, _, _ = normalise(v, h, live, mean, var, gamma, beta, EPS)
            v = relu(v)
        if ONE:
            z += v * across(w)
        else:
            z = product(held(v, HELD > 1), held(w, HELD > 1), z, PRECISION)
        if BATCH_STATS and positive is None:
            settle(center, spread, before_mean, before_var, h, own, state, mean, var, N, H, outputs, factor, rest)
    z = added_slices(z)
    if BATCH_STATS and positive is None:
        tl.store(batches, counted + 1, tl.program_id(0) == 0)
    alphas = alphas_of(state, N, H)
    if AVERAGE == "sample":
        average = channel_sums(pooled, n, N, C, BC) / C.to(z.dtype)
    if ONE:
        alpha = tl.sigmoid(tl.sum(z, 1) + tl.load(b2))
        tl.store(alphas + n, alpha, n < N)
        if AVERAGE == "channel":
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                store_rows(tau, alpha[:, None] * rows(pooled, n, N, c, C), n, N, c, C)
        elif AVERAGE == "sample":
            tl.store(tau + n, alpha * average, n < N)
        else:
            tl.store(tau + n, alpha, n < N)
    else:
        alpha = tl.sigmoid(z + bias[None, :])
        store_rows(alphas, alpha, n, N, o, C)
        if AVERAGE == "channel":
            alpha *= a
        elif AVERAGE == "sample":
            alpha *= average[:, None]
        store_rows(tau, alpha, n, N, o, C)


@triton.jit
def channel_sums(matrix, n, N, C, BC: tl.constexpr):
    """Sums over the rows n."""
    total = tl.zeros((n.shape[0], BC), matrix.dtype.element_ty)
    for c0 in range(0, C, BC):
        total += rows(matrix, n, N, c0 + tl.arange(0, BC), C)
    return tl.sum(total, 1)


# ---- costs -----------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Bytes of a gate's tensors."""

    pooled: int  # A, dtau, dA, and A's direct gradient
    hidden: int  # u, dv
    alpha: int  # alpha, dz
    tau: int
    w1: int
    b1: int
    w2: int
    b2: int
    norm: int  # gamma, beta, mean and variance; 0 without a norm
    statistics: int  # mean and variance of the batch, or two sums over it; 0 where they are not of the batch

    @classmethod
    def of(cls, step: Step) -> "Sizes":
        c, (h, o, norm, batch_stats, *_), size = step.layout.c, step.gate, step.sums.itemsize
        sums = cost.sums_bytes
        return cls(
            sums(step), sums(step, h), sums(step, o), sums(step, 1 if step.one_tau else c), size * h * c, size * h,
            size * o * h, size * o, 4 * size * h if norm else 0, 2 * size * h if batch_stats else 0,
        )  # fmt: skip

    @property
    def state(self) -> int:
        return self.hidden + self.alpha + self.statistics


_BATCHES = 8  # bytes of the number of batches


def hidden_cost(step: Step, parts: int, tiles: int, ready: bool) -> Cost:
    """ready: it makes relu(v), as the others below are behind a launch that has."""
    s = Sizes.of(step)
    read = parts * s.pooled + s.w1 + s.b1 + ready * s.norm
    written = s.hidden + tiles * s.statistics + (s.pooled if parts > 1 else 0)
    return Cost(read, written, ("hidden_kernel",))


def merge_cost(step: Step, tiles: int) -> Cost:
    s = Sizes.of(step)
    return Cost(tiles * s.statistics, s.statistics, ("merge_tiles_kernel",))


def _updated(s: Sizes) -> int:
    """Bytes of the running statistics and the number of batches; read as the norm's, and written."""
    return s.statistics + _BATCHES if s.statistics else 0


def normalise_cost(step: Step, groups: int) -> Cost:
    s = Sizes.of(step)
    read = s.hidden + groups * s.statistics + s.norm + _BATCHES
    return Cost(read, s.hidden + s.statistics + _updated(s), ("normalise_kernel",))


def alpha_cost(step: Step, groups: int, ready: bool) -> Cost:
    s = Sizes.of(step)
    read, written = s.hidden + s.w2 + s.b2 + (0 if step.average is None else s.pooled), s.alpha + s.tau
    if not ready:
        read += groups * s.statistics + s.norm + (_BATCHES if s.statistics else 0)
        written += s.statistics + _updated(s)
    return Cost(read, written, ("alpha_kernel",))
