"""The standard gate, Linear - [BatchNorm1d] - ReLU - Linear - Sigmoid, on the pooled |x|, forward and backward.

    u = A w1' + b1              (N, H)         v = gamma * (u - mean) / sqrt(var + eps) + beta      (no norm: v = u)
    z = relu(v) w2' + b2        (N, O)         alpha = sigmoid(z), O = C or 1
    tau = alpha * M             M = A ("channel"), mean_c A ("sample"), 1 (None)

Forward these are two launches: `hidden_kernel` for the first layer, `alpha_kernel` for the second and tau. With batch
statistics a program of the first takes a few hidden units and the whole batch, so every weight is read by one program
only and the statistics need no launch of their own. The backward pass mirrors it: `hidden_grad_kernel` for the
gradients of the parameters and of u, `pooled_grad_kernel` for dA.

`state` is Backend.gate_state: u (N, H), alpha (N, O) and, of the batch, mean and variance (H,), one after the other.
Other statistics come as `mean` and `var`; without a norm these are None.

A tile holds all channels of a few samples (CB, the next power of two of C, is a constexpr; N, C, H are not), so sums
over channels stay inside it. Products are multiply-and-add over broadcast tiles: exact float32, as torch's own Linear
without TF32, for any N and H. Rows that were split come as partial sums (parts, N, C), added where they are read.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import cost
from ..step import Cost, Step
from .launch import kernel


@triton.jit
def relu(v):
    return tl.where(v <= 0, 0.0, v)  # NaN stays


@triton.jit
def normalise(u, h, live, mean, var, gamma, beta, EPS: tl.constexpr):
    """v, (u - mean) / std, and dv / du for u (X, H block) and its units h. Without a norm v = u."""
    if mean is None:
        return u, u, tl.full(h.shape, 1.0, u.dtype)
    else:
        std = tl.sqrt(tl.load(var + h, live, 1.0) + EPS)
        weight = tl.load(gamma + h, live, 0.0)
        plain = (u - tl.load(mean + h, live, 0.0)[None, :]) / std[None, :]
        return plain * weight[None, :] + tl.load(beta + h, live, 0.0)[None, :], plain, weight / std


@triton.jit
def alphas_of(state, N, H):
    """Where alpha starts."""
    return state + N.to(tl.int64) * H


@triton.jit
def statistics_of(state, N, H, outputs):
    """Where the batch's mean and variance start."""
    mean = state + N.to(tl.int64) * (H + outputs)
    return mean, mean + H


@triton.jit
def sum_parts(partial, at, live, parts, stride):
    total = tl.load(partial + at, live, 0.0)
    for part in range(1, parts):
        total += tl.load(partial + part * stride + at, live, 0.0)
    return total


@triton.jit
def alpha_of(n, o, live, hidden, mean, var, gamma, beta, w2, b2, H, EPS: tl.constexpr, BH: tl.constexpr):
    """alpha[n, o] for vectors of samples and outputs: one dot product of length H each."""
    total = tl.zeros((o.shape[0], BH), hidden.dtype.element_ty)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        both = live[:, None] & (h < H)[None, :]
        u = tl.load(hidden + (n * H)[:, None] + h[None, :], both, 0.0)
        v, _, _ = normalise(u, h, h < H, mean, var, gamma, beta, EPS)
        total += relu(v) * tl.load(w2 + (o * H)[:, None] + h[None, :], both, 0.0)
    return tl.sigmoid(tl.sum(total, 1) + tl.load(b2 + o, live, 0.0))


@triton.jit
def mean_of(pooled, n, live, C, BC: tl.constexpr):
    """mean_c A[n, c] for a vector of samples."""
    total = tl.zeros((n.shape[0], BC), pooled.dtype.element_ty)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        total += tl.load(pooled + (n * C)[:, None] + c[None, :], live[:, None] & (c < C)[None, :], 0.0)
    return tl.sum(total, 1) / C.to(total.dtype)


@kernel(pointers=8)
def hidden_kernel(
    partial, pooled, state, w1, b1, running_mean, running_var, batches, N, C, H, outputs, parts, share, blocks,
    BATCH_STATS: tl.constexpr, MOMENTUM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """A (N, C) and u; with BATCH_STATS the batch's mean and biased variance, and the running ones updated.

    A program takes BH units of `share` samples; with BATCH_STATS that is all of them. Statistics are merged over tiles
    of samples by Chan's rule, which loses nothing to cancellation.
    """
    ACC: tl.constexpr = w1.dtype.element_ty
    block = tl.program_id(0) % blocks
    h = block * BH + tl.arange(0, BH)
    c = tl.arange(0, CB)
    h_live = h < H
    start = tl.program_id(0) // blocks * share
    stop = tl.minimum(start + share, N)
    w = tl.load(w1 + (h * C)[:, None] + c[None, :], h_live[:, None] & (c < C)[None, :], 0.0)
    bias = tl.load(b1 + h, h_live, 0.0)
    count = tl.zeros((1,), ACC)
    center = tl.zeros((BH,), ACC)
    spread = tl.zeros((BH,), ACC)
    for n0 in range(start, stop, BN):
        n = n0 + tl.arange(0, BN)
        n_live = n < stop
        at = (n * C)[:, None] + c[None, :]
        a_live = n_live[:, None] & (c < C)[None, :]
        a = sum_parts(partial, at, a_live, parts, N * C)
        tl.store(pooled + at, a, a_live & (block == 0))
        u = tl.sum(a[:, None, :] * w[None, :, :], 2) + bias[None, :]
        tl.store(state + (n * H)[:, None] + h[None, :], u, n_live[:, None] & h_live[None, :])
        if BATCH_STATS:
            here = tl.sum(n_live.to(ACC)[:, None], 0)
            average = tl.sum(tl.where(n_live[:, None], u, 0.0), 0) / here
            off = tl.where(n_live[:, None], u - average[None, :], 0.0)
            apart = average - center
            center += apart * (here / (count + here))
            spread += tl.sum(off * off, 0) + apart * apart * (count * here / (count + here))
            count += here
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)
        tl.store(mean + h, center, h_live)
        tl.store(var + h, spread / count, h_live)
        before = tl.load(running_mean + h, h_live, 0.0)
        tl.store(running_mean + h, before * (1 - MOMENTUM) + center * MOMENTUM, h_live)
        before = tl.load(running_var + h, h_live, 0.0)
        tl.store(running_var + h, before * (1 - MOMENTUM) + spread / (count - 1) * MOMENTUM, h_live)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@kernel(pointers=9)
def alpha_kernel(
    pooled, state, tau, mean, var, gamma, beta, w2, b2, N, C, H,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr, V: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """alpha (N, C | 1) and tau (N, C), or (N, 1) where one alpha meets a shared average (or none)."""
    ONE_TAU: tl.constexpr = ONE and AVERAGE != "channel"
    outputs = 1 if ONE else C
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)
    i = tl.program_id(0) * V + tl.arange(0, V)
    columns = 1 if ONE_TAU else C
    n = i // columns
    c = i % columns
    live = n < N
    alpha = alpha_of(n, c * 0 if ONE else c, live, state, mean, var, gamma, beta, w2, b2, H, EPS, BH)
    if AVERAGE == "channel":
        threshold = alpha * tl.load(pooled + n * C + c, live, 0.0)
    elif AVERAGE == "sample":
        threshold = alpha * mean_of(pooled, n, live, C, BH)
    else:
        threshold = alpha
    tl.store(tau + i, threshold, live)
    alphas = alphas_of(state, N, H)
    if ONE:
        tl.store(alphas + n, alpha, live & (c == 0))
    else:
        tl.store(alphas + i, alpha, live)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def logit_grads(
    d, a, value, own, c_live, C, AVERAGE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """dz (X, C | 1), and A's direct gradient (X, C), by tau = alpha * M, from dtau d and A a, both (X, C).

    value is alpha (X, C | 1), own the user's gradient of tau where tau is (X, 1), or None. dalpha = M * dtau, summed
    over channels where one alpha serves all; dM = alpha * dtau, summed where the average is shared.
    """
    channels = C.to(a.dtype)
    if AVERAGE == "channel":
        direct = d * value
        dalpha = d * a
        if ONE:
            dalpha = tl.sum(dalpha, 1)[:, None]
    elif ONE:
        total = tl.sum(d, 1)[:, None]
        if own is not None:
            total += own
        if AVERAGE == "sample":
            dalpha = total * (tl.sum(a, 1)[:, None] / channels)
            direct = tl.where(c_live[None, :], total * value / channels, 0.0)
        else:
            dalpha = total
            direct = tl.zeros(d.shape, d.dtype)
    else:
        if AVERAGE == "sample":
            dalpha = d * (tl.sum(a, 1)[:, None] / channels)
            direct = tl.where(c_live[None, :], tl.sum(d * value, 1)[:, None] / channels, 0.0)
        else:
            dalpha = d
            direct = tl.zeros(d.shape, d.dtype)
    return dalpha * (value * (1 - value)), direct


@triton.jit
def load_logit_grads(
    dtau, tau_grad, pooled, alphas, n, c, N, stop, C, parts, AVERAGE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """logit_grads of samples n (up to stop) and all channels c, and A, from memory."""
    ONE_TAU: tl.constexpr = ONE and AVERAGE != "channel"
    live = (n < stop)[:, None] & (c < C)[None, :]
    at = (n * C)[:, None] + c[None, :]
    d = sum_parts(dtau, at, live, parts, N * C)
    own = None
    if tau_grad is not None:
        if ONE_TAU:
            own = tl.load(tau_grad + n, n < stop, 0.0)[:, None]
        else:
            d += tl.load(tau_grad + at, live, 0.0)
    a = tl.load(pooled + at, live, 0.0)
    if ONE:
        value = tl.load(alphas + n, n < stop, 0.0)[:, None]
    else:
        value = tl.load(alphas + at, live, 0.0)
    dz, direct = logit_grads(d, a, value, own, c < C, C, AVERAGE, ONE)
    return dz, direct, a


@triton.jit
def hidden_delta(dz, w, state, n, h, N, H, mean, var, gamma, beta, EPS: tl.constexpr):
    """dL/dv, relu(v), (u - mean) / std and dv / du for samples n and units h. w is w2 (O, units)."""
    live = (n < N)[:, None] & (h < H)[None, :]
    u = tl.load(state + (n * H)[:, None] + h[None, :], live, 0.0)
    v, plain, slope = normalise(u, h, h < H, mean, var, gamma, beta, EPS)
    dv = tl.where(v > 0, tl.sum(dz[:, :, None] * w[None, :, :], 1), 0.0)
    return dv, tl.where(live, relu(v), 0.0), plain, slope


@triton.jit
def _up_to_4(n):
    return (n + 3) // 4 * 4


@kernel(pointers=12)
def hidden_grad_kernel(
    dtau, tau_grad, pooled, state, mean, var, gamma, beta, w2, du, direct, grads, N, C, H, parts, share, blocks, total,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate's parameters, du (N, H) and A's direct gradient (N, C).

    A program takes BH units of `share` samples (all, with BATCH_STATS) and writes its row of grads (shares, total):
    w1 (H, C), b1 (H,), w2 (O, H), b2 (O,) and, with a norm, gamma (H,) and beta (H,), each at a multiple of 4 elements.
    du and direct are for dA (pooled_grad_kernel); None where one_pass.py has dA already. With BATCH_STATS the second
    loop recomputes dz rather than keep it: three loads against a store and a load of each.
    """
    ACC: tl.constexpr = w2.dtype.element_ty
    OB: tl.constexpr = 1 if ONE else CB
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    start = part * share
    stop = tl.minimum(start + share, N)
    h = block * BH + tl.arange(0, BH)
    c = tl.arange(0, CB)
    o = tl.arange(0, OB)
    h_live = h < H
    outputs = 1 if ONE else C
    o_live = o < outputs
    alphas = alphas_of(state, N, H)
    if BATCH_STATS:
        mean, var = statistics_of(state, N, H, outputs)
    w2_at = (o * H)[:, None] + h[None, :]
    w2_live = o_live[:, None] & h_live[None, :]
    w = tl.load(w2 + w2_at, w2_live, 0.0)
    sum_dv = tl.zeros((BH,), ACC)
    sum_dv_plain = tl.zeros((BH,), ACC)
    grad_w2 = tl.zeros((OB, BH), ACC)
    grad_b2 = tl.zeros((OB,), ACC)
    grad_w1 = tl.zeros((BH, CB), ACC)
    grad_b1 = tl.zeros((BH,), ACC)
    for n0 in range(start, stop, BN):
        n = n0 + tl.arange(0, BN)
        dz, past, a = load_logit_grads(dtau, tau_grad, pooled, alphas, n, c, N, stop, C, parts, AVERAGE, ONE)
        dv, r, plain, slope = hidden_delta(dz, w, state, n, h, stop, H, mean, var, gamma, beta, EPS)
        sum_dv += tl.sum(dv, 0)
        sum_dv_plain += tl.sum(dv * plain, 0)
        grad_w2 += tl.sum(dz[:, :, None] * r[:, None, :], 0)
        grad_b2 += tl.sum(dz, 0)
        if not BATCH_STATS:
            change = dv * slope[None, :]
            grad_b1 += tl.sum(change, 0)
            grad_w1 += tl.sum(change[:, :, None] * a[:, None, :], 0)
            if du is not None:
                tl.store(du + (n * H)[:, None] + h[None, :], change, (n < stop)[:, None] & h_live[None, :])
        if direct is not None:
            first = (n < stop)[:, None] & (c < C)[None, :] & (block == 0)
            tl.store(direct + (n * C)[:, None] + c[None, :], past, first)
    if BATCH_STATS:  # BatchNorm's own backward needs both sums before any du
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            dz, past, a = load_logit_grads(dtau, tau_grad, pooled, alphas, n, c, N, N, C, parts, AVERAGE, ONE)
            dv, r, plain, slope = hidden_delta(dz, w, state, n, h, N, H, mean, var, gamma, beta, EPS)
            change = slope[None, :] * (dv - (sum_dv[None, :] + plain * sum_dv_plain[None, :]) / N.to(ACC))
            change = tl.where((n < N)[:, None], change, 0.0)
            grad_b1 += tl.sum(change, 0)
            grad_w1 += tl.sum(change[:, :, None] * a[:, None, :], 0)
            tl.store(du + (n * H)[:, None] + h[None, :], change, (n < N)[:, None] & h_live[None, :])
    grads += part.to(tl.int64) * total
    tl.store(grads + (h * C)[:, None] + c[None, :], grad_w1, h_live[:, None] & (c < C)[None, :])
    grads += _up_to_4(H * C)
    tl.store(grads + h, grad_b1, h_live)
    grads += _up_to_4(H)
    tl.store(grads + w2_at, grad_w2, w2_live)
    grads += _up_to_4(outputs * H)
    tl.store(grads + o, grad_b2, o_live & (block == 0))
    if mean is not None:
        grads += _up_to_4(outputs)
        tl.store(grads + h, sum_dv_plain, h_live)
        tl.store(grads + _up_to_4(H) + h, sum_dv, h_live)


@kernel(pointers=4)
def pooled_grad_kernel(du, w1, direct, dA, N, C, H, V: tl.constexpr, BH: tl.constexpr):
    """dA (N, C) = du w1 + the direct gradient."""
    i = tl.program_id(0) * V + tl.arange(0, V)
    live = i < N * C
    n = i // C
    c = i % C
    total = tl.zeros((BH, V), w1.dtype.element_ty)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        both = (h < H)[:, None] & live[None, :]
        w = tl.load(w1 + (h * C)[:, None] + c[None, :], both, 0.0)
        total += tl.load(du + (n * H)[None, :] + h[:, None], both, 0.0) * w
    tl.store(dA + i, tl.sum(total, 0) + tl.load(direct + i, live, 0.0), live)


# ---- costs -----------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Bytes of a gate's tensors."""

    pooled: int  # A, dtau, dA, and A's direct gradient
    hidden: int  # u, du
    alpha: int
    tau: int
    w1: int
    b1: int
    w2: int
    b2: int
    norm: int  # gamma, beta, mean and variance; 0 without a norm
    statistics: int  # mean and variance of the batch; 0 where they are not of the batch

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


def hidden_cost(step: Step, parts: int) -> Cost:
    s = Sizes.of(step)
    running = s.statistics + _BATCHES if s.statistics else 0
    read = parts * s.pooled + s.w1 + s.b1 + running
    return Cost(read, s.pooled + s.hidden + s.statistics + running, ("hidden_kernel",))


def alpha_cost(step: Step) -> Cost:
    s = Sizes.of(step)
    average = 0 if step.average is None else s.pooled
    return Cost(average + s.hidden + s.norm + s.w2 + s.b2, s.alpha + s.tau, ("alpha_kernel",))


def hidden_grad_cost(step: Step, parts: int, grads: int, du: bool, direct: bool) -> Cost:
    """grads: bytes of the parameters' gradients, of all shares."""
    s = Sizes.of(step)
    read = parts * s.pooled + s.pooled + s.hidden + s.alpha + s.norm + s.w2
    return Cost(read, grads + du * s.hidden + direct * s.pooled, ("hidden_grad_kernel",))


def pooled_grad_cost(step: Step) -> Cost:
    s = Sizes.of(step)
    return Cost(s.hidden + s.w1 + s.pooled, s.pooled, ("pooled_grad_kernel",))
