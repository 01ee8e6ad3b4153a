"""The standard gate, Linear - [BatchNorm1d] - ReLU - Linear - Sigmoid, on the pooled |x|, forward and backward.

    u = A w1' + b1              (N, H)         v = gamma * (u - mean) / sqrt(var + eps) + beta      (no norm: v = u)
    z = relu(v) w2' + b2        (N, O)         alpha = sigmoid(z), O = C or 1
    tau = alpha * M             M = A ("channel"), mean_c A ("sample"), 1 (None)

In training BatchNorm couples the batch, so the first layer has a launch of its own (`hidden_kernel`): a program takes
a few hidden units and the whole batch, so every weight is read by one program only and the batch statistics need no
second launch. The second layer is computed where tau is used (apply.py), or, where rows are too short to carry a dot
product of length H, by `alpha_kernel`. The backward pass mirrors it: `hidden_grad_kernel`, then grad.py or
`pooled_grad_kernel`.

A tile holds all channels of a few samples (CB, the next power of two of C, is a constexpr; N, C, H are not), so sums
over channels stay inside it. Products are multiply-and-add over broadcast tiles: exact float32, as torch's own Linear
without TF32, for any N and H. Rows that were split come as partial sums (parts, N, C) and are added on the way.
"""

import triton
import triton.language as tl

from ..traffic import Budget, StandardCall
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


@triton.jit
def tau_of(
    n, c, live, pooled, hidden, mean, var, gamma, beta, w2, b2, C, H,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """(tau, alpha) of vectors of samples and channels."""
    alpha = alpha_of(n, c * 0 if ONE else c, live, hidden, mean, var, gamma, beta, w2, b2, H, EPS, BH)
    if AVERAGE == "channel":
        return alpha * tl.load(pooled + n * C + c, live, 0.0), alpha
    elif AVERAGE == "sample":
        return alpha * mean_of(pooled, n, live, C, BH), alpha
    else:
        return alpha, alpha


@kernel(pointers=10)
def hidden_kernel(
    partial, pooled, w1, b1, mean, var, running_mean, running_var, batches, hidden, N, C, H, parts, share, blocks,
    BATCH_STATS: tl.constexpr, MOMENTUM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """u (N, H) and, with BATCH_STATS, the batch's mean and biased variance (H,) and the running ones, updated.

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
        tl.store(hidden + (n * H)[:, None] + h[None, :], u, n_live[:, None] & h_live[None, :])
        if BATCH_STATS:
            here = tl.sum(n_live.to(ACC)[:, None], 0)
            average = tl.sum(tl.where(n_live[:, None], u, 0.0), 0) / here
            off = tl.where(n_live[:, None], u - average[None, :], 0.0)
            apart = average - center
            center += apart * (here / (count + here))
            spread += tl.sum(off * off, 0) + apart * apart * (count * here / (count + here))
            count += here
    if BATCH_STATS:
        tl.store(mean + h, center, h_live)
        tl.store(var + h, spread / count, h_live)
        before = tl.load(running_mean + h, h_live, 0.0)
        tl.store(running_mean + h, before * (1 - MOMENTUM) + center * MOMENTUM, h_live)
        before = tl.load(running_var + h, h_live, 0.0)
        tl.store(running_var + h, before * (1 - MOMENTUM) + spread / (count - 1) * MOMENTUM, h_live)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@kernel(pointers=10)
def alpha_kernel(
    pooled, hidden, mean, var, gamma, beta, w2, b2, alpha, tau, N, C, H,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, V: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """alpha (N, C | 1) and tau (N, C), or (N, 1) where one alpha meets a shared average (or none)."""
    ONE_TAU: tl.constexpr = ONE and AVERAGE != "channel"
    i = tl.program_id(0) * V + tl.arange(0, V)
    columns = 1 if ONE_TAU else C
    n = i // columns
    c = i % columns
    live = n < N
    threshold, value = tau_of(
        n, c, live, pooled, hidden, mean, var, gamma, beta, w2, b2, C, H, AVERAGE, ONE, EPS, BH
    )  # fmt: skip
    tl.store(tau + i, threshold, live)
    if ONE:
        tl.store(alpha + n, value, live & (c == 0))
    else:
        tl.store(alpha + i, value, live)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def logit_grads(
    d, a, value, own, c_live, C, AVERAGE: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """dz (X, C | 1), and the part of dA that goes around the gate (X, C), from dtau d and A a, both (X, C).

    value is alpha (X, C | 1), own the user's gradient of tau where tau is (X, 1), or None. dalpha = M * dtau, summed
    over channels where one alpha serves all; dM = alpha * dtau, summed where the average is shared.
    """
    channels = C.to(a.dtype)
    if AVERAGE == "channel":
        around = d * value
        dalpha = d * a
        if ONE:
            dalpha = tl.sum(dalpha, 1)[:, None]
    elif ONE:
        total = tl.sum(d, 1)[:, None]
        if own is not None:
            total += own
        if AVERAGE == "sample":
            dalpha = total * (tl.sum(a, 1)[:, None] / channels)
            around = tl.where(c_live[None, :], total * value / channels, 0.0)
        else:
            dalpha = total
            around = tl.zeros(d.shape, d.dtype)
    else:
        if AVERAGE == "sample":
            dalpha = d * (tl.sum(a, 1)[:, None] / channels)
            around = tl.where(c_live[None, :], tl.sum(d * value, 1)[:, None] / channels, 0.0)
        else:
            dalpha = d
            around = tl.zeros(d.shape, d.dtype)
    return dalpha * (value * (1 - value)), around


@triton.jit
def load_logit_grads(
    dtau, tau_grad, pooled, alpha, n, c, N, stop, C, parts, AVERAGE: tl.constexpr, ONE: tl.constexpr,
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
        value = tl.load(alpha + n, n < stop, 0.0)[:, None]
    else:
        value = tl.load(alpha + at, live, 0.0)
    dz, around = logit_grads(d, a, value, own, c < C, C, AVERAGE, ONE)
    return dz, around, a


@triton.jit
def hidden_delta(dz, w, hidden, n, h, N, H, mean, var, gamma, beta, EPS: tl.constexpr):
    """dL/dv, relu(v), (u - mean) / std and dv / du for samples n and units h. w is w2 (O, units)."""
    live = (n < N)[:, None] & (h < H)[None, :]
    u = tl.load(hidden + (n * H)[:, None] + h[None, :], live, 0.0)
    v, plain, slope = normalise(u, h, h < H, mean, var, gamma, beta, EPS)
    dv = tl.where(v > 0, tl.sum(dz[:, :, None] * w[None, :, :], 1), 0.0)
    return dv, tl.where(live, relu(v), 0.0), plain, slope


@triton.jit
def _up_to_4(n):
    return (n + 3) // 4 * 4


@kernel(pointers=13)
def hidden_grad_kernel(
    dtau, tau_grad, pooled, alpha, hidden, mean, var, gamma, beta, w2, du, around, grads,
    N, C, H, parts, share, blocks, total,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, BATCH_STATS: tl.constexpr, EPS: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate's parameters, du (N, H) and `around` (N, C).

    A program takes BH units of `share` samples (all, with BATCH_STATS) and writes its row of grads (shares, total):
    w1 (H, C), b1 (H,), w2 (O, H), b2 (O,) and, with a norm, gamma (H,) and beta (H,), each at a multiple of 4 elements.
    du and around are for dA (pooled_grad_of); None where dA is had already (one_pass.py). With BATCH_STATS the second
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
        dz, past, a = load_logit_grads(dtau, tau_grad, pooled, alpha, n, c, N, stop, C, parts, AVERAGE, ONE)
        dv, r, plain, slope = hidden_delta(dz, w, hidden, n, h, stop, H, mean, var, gamma, beta, EPS)
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
        if around is not None:
            first = (n < stop)[:, None] & (c < C)[None, :] & (block == 0)
            tl.store(around + (n * C)[:, None] + c[None, :], past, first)
    if BATCH_STATS:  # BatchNorm's own backward needs both sums before any du
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            dz, past, a = load_logit_grads(dtau, tau_grad, pooled, alpha, n, c, N, N, C, parts, AVERAGE, ONE)
            dv, r, plain, slope = hidden_delta(dz, w, hidden, n, h, N, H, mean, var, gamma, beta, EPS)
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


@triton.jit
def pooled_grad_of(n, c, live, du, w1, around, C, H, BH: tl.constexpr):
    """dA[n, c] for vectors of samples and channels."""
    total = tl.zeros((BH, c.shape[0]), w1.dtype.element_ty)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        both = (h < H)[:, None] & live[None, :]
        total += tl.load(du + (n * H)[None, :] + h[:, None], both, 0.0) * tl.load(
            w1 + (h * C)[:, None] + c[None, :], both, 0.0
        )
    return tl.sum(total, 0) + tl.load(around + n * C + c, live, 0.0)


@kernel(pointers=4)
def pooled_grad_kernel(du, w1, around, out, N, C, H, V: tl.constexpr, BH: tl.constexpr):
    """dA (N, C), where rows are too short to compute it on the way (grad.py)."""
    i = tl.program_id(0) * V + tl.arange(0, V)
    live = i < N * C
    tl.store(out + i, pooled_grad_of(i // C, i % C, live, du, w1, around, C, H, BH), live)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def hidden_budget(call: StandardCall, parts: int) -> Budget:
    statistics = 2 * call.statistics + 8 if call.coupled else 0  # of the batch and running; the number of batches
    return Budget(
        parts * call.sums() + call.first_layer + (call.statistics + 8 if call.coupled else 0),
        call.sums() + call.sums(call.hidden) + statistics,
        ("hidden_kernel",),
    )


def tau_read(call: StandardCall) -> int:
    """What tau is computed from, here or in apply."""
    pooled = call.sums() if call.average is not None else 0
    return pooled + call.sums(call.hidden) + call.norm_read + call.second_layer


def alpha_budget(call: StandardCall) -> Budget:
    return Budget(tau_read(call), call.sums(call.outputs) + call.tau, ("alpha_kernel",))


def hidden_grad_budget(call: StandardCall, parts: int, grads: int, du: bool, around: bool) -> Budget:
    """grads: bytes of the parameters' gradients, of all shares."""
    gate = call.sums() + call.sums(call.hidden) + call.sums(call.outputs)
    return Budget(
        parts * call.sums() + gate + call.norm_read + call.second_layer,
        grads + (call.sums(call.hidden) if du else 0) + (call.sums() if around else 0),
        ("hidden_grad_kernel",),
    )


def pooled_grad_read(call: StandardCall) -> int:
    """What dA is computed from, here or in grad."""
    return call.sums(call.hidden) + call.first_layer + call.sums()


def pooled_grad_budget(call: StandardCall) -> Budget:
    return Budget(pooled_grad_read(call), call.sums(), ("pooled_grad_kernel",))
