"""The whole shrinkage step in one launch, where the gate needs no other sample: no BatchNorm, or BatchNorm in eval.

Forward: x is read once and stays on chip (registers) while its mean |x| goes through the gate; y and, for a gradient,
the three bit planes are written from there. Where a sample is too large for that (LOOP), the program walks it
twice, the second time backwards, and finds it in L2. Backward: g and the planes are read once, dtau is summed, taken
back through the gate, and dx written; what is left is the gate's parameters (gate_grad.py, second launch).

A program takes S whole samples. Its tile has S * PB rows of B columns; all channels are in it: PB covers C, or B does
in channels_last order. The gate's weights are read from L2 once a program, BH hidden units at a time, and the hidden
layer never exists as a whole.
"""

import triton
import triton.language as tl

from .. import cost
from ..step import Cost, Step
from .gate import Sizes, alphas_of, normalise, relu
from .gate_grad import logit_grads_of_samples
from .launch import kernel
from .tiles import length_of_rows, offsets, pack, plane, sign_bit, soft_threshold, units, unpack


@triton.jit
def _place(
    t, N, P, Q, S: tl.constexpr, PB: tl.constexpr, B: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr
):
    """n, p (S * PB,), q (B,), the first q and the masks, of step t along the spatial dimensions."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    row = tl.arange(0, S * PB)
    first = t + pid * 0  # as wide as pid
    n = pid * S + row // PB
    p = row % PB + pid * 0
    if CHANNELS_LAST:
        p += t
        first = pid * 0
    q = first + tl.arange(0, B)
    return n, p, q, first, (n < N) & (p < P), q < Q


@triton.jit
def _by_channel(tile, S: tl.constexpr, PB: tl.constexpr, B: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Sums over the spatial dimensions of a tile: (S * PB, B) -> (S, channels)."""
    if CHANNELS_LAST:
        return tl.sum(tile.reshape(S, PB, B), 1)
    else:
        return tl.sum(tile, 1).reshape(S, PB)


@triton.jit
def _to_tile(values, S: tl.constexpr, PB: tl.constexpr, B: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(S, channels) -> what broadcasts with a tile."""
    if CHANNELS_LAST:
        return tl.broadcast_to(values[:, None, :], (S, PB, B)).reshape(S * PB, B)
    else:
        return values.reshape(S * PB)[:, None]


@triton.jit
def _load(x, n, p, q, rows_live, columns_live, p_sizes, q_sizes, xs, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, xs, UNIT, ALIGN)
    return tl.load(x + rows[:, None] + columns[None, :], rows_live[:, None] & columns_live[None, :], 0.0)


@triton.jit
def _finish(
    value, tau, n, p, q, first, rows_live, columns_live, y, residual, planes, plane_units, P, UNITS,
    p_sizes, q_sizes, ys, rs, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr, B: tl.constexpr,
    UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """y and the planes kept, sign, nonzero of a tile whose threshold is known."""
    if planes is not None:
        at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
        kept = (value != 0) & ((tl.abs(value) <= tau) == 0)
        tl.store(planes + at, pack(kept.to(tl.int32), UNIT_BITS), units_live)
        tl.store(plane(planes, plane_units, 1) + at, pack(sign_bit(value), UNIT_BITS), units_live)
        tl.store(plane(planes, plane_units, 2) + at, pack((value != 0).to(tl.int32), UNIT_BITS), units_live)
    result = soft_threshold(value, tau)
    if residual is not None:
        result += _load(residual, n, p, q, rows_live, columns_live, p_sizes, q_sizes, rs, R_UNIT, ALIGN).to(value.dtype)
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, ys, Y_UNIT, ALIGN)
    live = rows_live[:, None] & columns_live[None, :]
    tl.store(y + rows[:, None] + columns[None, :], result.to(y.dtype.element_ty), live)


@kernel(pointers=15, aligned=("x", "y", "residual"))
def forward_kernel(
    x, y, residual, planes, pooled, state, tau, w1, b1, mean, var, gamma, beta, w2, b2,
    plane_units, L, H, N, P, QA, UNITS, p_sizes, q_sizes, xs, ys, rs,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, LOOP: tl.constexpr, S: tl.constexpr,
    PB: tl.constexpr, B: tl.constexpr, BH: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    CB: tl.constexpr = B if CHANNELS_LAST else PB
    OB: tl.constexpr = 1 if ONE else CB
    STEP: tl.constexpr = PB if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    C = Q if CHANNELS_LAST else P
    extent = P if CHANNELS_LAST else Q
    n, p, q, first, rows_live, columns_live = _place(0, N, P, Q, S, PB, B, CHANNELS_LAST, WIDE)
    tile = _load(x, n, p, q, rows_live, columns_live, p_sizes, q_sizes, xs, X_UNIT, ALIGN)
    total = tl.abs(tile.to(ACC))
    if LOOP:
        for t in range(STEP, extent, STEP):
            n, p, q, first, rows_live, columns_live = _place(t, N, P, Q, S, PB, B, CHANNELS_LAST, WIDE)
            total += tl.abs(_load(x, n, p, q, rows_live, columns_live, p_sizes, q_sizes, xs, X_UNIT, ALIGN).to(ACC))
    a = _by_channel(total, S, PB, B, CHANNELS_LAST) / L.to(ACC)

    # the gate, BH hidden units at a time
    sample = tl.program_id(0) * S + tl.arange(0, S)
    c = tl.arange(0, CB)
    o = tl.arange(0, OB)
    if ONE:
        o_live = o < 1
    else:
        o_live = o < C
    z = tl.zeros((S, OB), ACC)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        w = tl.load(w1 + (h * C)[:, None] + c[None, :], (h < H)[:, None] & (c < C)[None, :], 0.0)
        u = tl.sum(a[:, None, :] * w[None, :, :], 2) + tl.load(b1 + h, h < H, 0.0)[None, :]
        if state is not None:
            at = (sample * H)[:, None] + h[None, :]
            tl.store(state + at, u, (sample < N)[:, None] & (h < H)[None, :])
        v, _, _ = normalise(u, h, h < H, mean, var, gamma, beta, EPS)
        w = tl.load(w2 + (o * H)[:, None] + h[None, :], o_live[:, None] & (h < H)[None, :], 0.0)
        z += tl.sum(relu(v)[:, None, :] * w[None, :, :], 2)
    value = tl.sigmoid(z + tl.load(b2 + o, o_live, 0.0)[None, :])
    if AVERAGE == "channel":
        threshold = value * a
    elif AVERAGE == "sample":
        threshold = value * (tl.sum(a, 1)[:, None] / C.to(ACC))
    else:
        threshold = value
    live = (sample < N)[:, None] & (c < C)[None, :]
    out_live = (sample < N)[:, None] & o_live[None, :]
    columns = 1 if ONE else C
    if pooled is not None:
        tl.store(pooled + (sample * C)[:, None] + c[None, :], a, live)
        tl.store(alphas_of(state, N, H) + (sample * columns)[:, None] + o[None, :], value, out_live)
    if tau is not None:
        if ONE and AVERAGE != "channel":
            tl.store(tau + sample[:, None] + o[None, :], threshold, out_live)
        else:
            tl.store(tau + (sample * C)[:, None] + c[None, :], threshold, live)
    threshold = _to_tile(tl.broadcast_to(threshold, (S, CB)), S, PB, B, CHANNELS_LAST)

    if not LOOP:
        _finish(
            tile.to(ACC), threshold, n, p, q, first, rows_live, columns_live, y, residual, planes, plane_units,
            P, UNITS, p_sizes, q_sizes, ys, rs, Y_UNIT, R_UNIT, B, UNIT_BITS, ALIGN,
        )  # fmt: skip
    else:
        last = (tl.cdiv(extent, STEP) - 1) * STEP
        for back in range(0, extent, STEP):
            n, p, q, first, rows_live, columns_live = _place(last - back, N, P, Q, S, PB, B, CHANNELS_LAST, WIDE)
            again = _load(x, n, p, q, rows_live, columns_live, p_sizes, q_sizes, xs, X_UNIT, ALIGN)
            _finish(
                again.to(ACC), threshold, n, p, q, first, rows_live, columns_live, y, residual, planes, plane_units,
                P, UNITS, p_sizes, q_sizes, ys, rs, Y_UNIT, R_UNIT, B, UNIT_BITS, ALIGN,
            )  # fmt: skip


@triton.jit
def _masked(
    g, planes, plane_units, n, p, q, first, rows_live, columns_live, P, UNITS, p_sizes, q_sizes, gs,
    G_UNIT: tl.constexpr, B: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """kept * g of a tile, and its sign plane as bools."""
    at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
    value = _load(g, n, p, q, rows_live, columns_live, p_sizes, q_sizes, gs, G_UNIT, ALIGN).to(ACC)
    masked = tl.where(unpack(tl.load(planes + at, units_live, 0), UNIT_BITS), value, 0.0)
    return masked, unpack(tl.load(plane(planes, plane_units, 1) + at, units_live, 0), UNIT_BITS)


@triton.jit
def _store_dx(
    masked, negative, share, n, p, q, first, rows_live, columns_live, dx, planes, plane_units, P, UNITS,
    p_sizes, q_sizes, ds, D_UNIT: tl.constexpr, B: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
    nonzero = unpack(tl.load(plane(planes, plane_units, 2) + at, units_live, 0), UNIT_BITS)
    result = masked + tl.where(nonzero, tl.where(negative, -share, share), 0.0)
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, ds, D_UNIT, ALIGN)
    live = rows_live[:, None] & columns_live[None, :]
    tl.store(dx + rows[:, None] + columns[None, :], result.to(dx.dtype.element_ty), live)


@kernel(pointers=14, aligned=("g", "dx"))
def backward_kernel(
    g, dx, planes, dz, dv, tau_grad, pooled, state, w1, mean, var, gamma, beta, w2,
    plane_units, L, H, N, P, QA, UNITS, p_sizes, q_sizes, gs, ds,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, LOOP: tl.constexpr, S: tl.constexpr,
    PB: tl.constexpr, B: tl.constexpr, BH: tl.constexpr, G_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, and for the second launch dz (N, C | 1) and dv (N, H)."""
    CB: tl.constexpr = B if CHANNELS_LAST else PB
    OB: tl.constexpr = 1 if ONE else CB
    STEP: tl.constexpr = PB if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    C = Q if CHANNELS_LAST else P
    extent = P if CHANNELS_LAST else Q
    n, p, q, first, rows_live, columns_live = _place(0, N, P, Q, S, PB, B, CHANNELS_LAST, WIDE)
    masked, negative = _masked(
        g, planes, plane_units, n, p, q, first, rows_live, columns_live, P, UNITS, p_sizes, q_sizes, gs,
        G_UNIT, B, UNIT_BITS, ALIGN, ACC,
    )  # fmt: skip
    total = tl.where(negative, -masked, masked)
    if LOOP:
        for t in range(STEP, extent, STEP):
            n, p, q, first, rows_live, columns_live = _place(t, N, P, Q, S, PB, B, CHANNELS_LAST, WIDE)
            masked, negative = _masked(
                g, planes, plane_units, n, p, q, first, rows_live, columns_live, P, UNITS, p_sizes, q_sizes, gs,
                G_UNIT, B, UNIT_BITS, ALIGN, ACC,
            )  # fmt: skip
            total += tl.where(negative, -masked, masked)
    d = -_by_channel(total, S, PB, B, CHANNELS_LAST)

    # back through the gate, BH hidden units at a time
    sample = tl.program_id(0) * S + tl.arange(0, S)
    c = tl.arange(0, CB)
    o = tl.arange(0, OB)
    if ONE:
        o_live = o < 1
    else:
        o_live = o < C
    live = (sample < N)[:, None] & (c < C)[None, :]
    at = (sample * C)[:, None] + c[None, :]
    columns = 1 if ONE else C
    a = tl.load(pooled + at, live, 0.0)
    out_at = (sample * columns)[:, None] + o[None, :]
    out_live = (sample < N)[:, None] & o_live[None, :]
    value = tl.load(alphas_of(state, N, H) + out_at, out_live, 0.0)
    own = None
    if tau_grad is not None:
        if ONE and AVERAGE != "channel":
            own = tl.load(tau_grad + sample, sample < N, 0.0)[:, None]
        else:
            d += tl.load(tau_grad + at, live, 0.0)
    logits, da = logit_grads_of_samples(d, a, value, own, C, AVERAGE, ONE)
    tl.store(dz + out_at, logits, out_live)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        hidden_at = (sample * H)[:, None] + h[None, :]
        hidden_live = (sample < N)[:, None] & (h < H)[None, :]
        u = tl.load(state + hidden_at, hidden_live, 0.0)
        v, _, slope = normalise(u, h, h < H, mean, var, gamma, beta, EPS)
        w = tl.load(w2 + (o * H)[:, None] + h[None, :], o_live[:, None] & (h < H)[None, :], 0.0)
        delta = tl.where(v > 0, tl.sum(logits[:, :, None] * w[None, :, :], 1), 0.0)
        tl.store(dv + hidden_at, delta, hidden_live)
        w = tl.load(w1 + (h * C)[:, None] + c[None, :], (h < H)[:, None] & (c < C)[None, :], 0.0)
        da += tl.sum((delta * slope[None, :])[:, :, None] * w[None, :, :], 1)
    share = _to_tile(da / L.to(ACC), S, PB, B, CHANNELS_LAST)

    if not LOOP:
        _store_dx(
            masked, negative, share, n, p, q, first, rows_live, columns_live, dx, planes, plane_units, P, UNITS,
            p_sizes, q_sizes, ds, D_UNIT, B, UNIT_BITS, ALIGN,
        )  # fmt: skip
    else:
        last = (tl.cdiv(extent, STEP) - 1) * STEP
        for back in range(0, extent, STEP):
            n, p, q, first, rows_live, columns_live = _place(last - back, N, P, Q, S, PB, B, CHANNELS_LAST, WIDE)
            masked, negative = _masked(
                g, planes, plane_units, n, p, q, first, rows_live, columns_live, P, UNITS, p_sizes, q_sizes, gs,
                G_UNIT, B, UNIT_BITS, ALIGN, ACC,
            )  # fmt: skip
            _store_dx(
                masked, negative, share, n, p, q, first, rows_live, columns_live, dx, planes, plane_units, P, UNITS,
                p_sizes, q_sizes, ds, D_UNIT, B, UNIT_BITS, ALIGN,
            )  # fmt: skip


def forward_cost(step: Step) -> Cost:
    """x counts once: where the sample is walked twice, the second time it comes from L2."""
    full, s = cost.map_bytes(step), Sizes.of(step)
    read = (1 + (step.residual is not None)) * full + s.w1 + s.b1 + s.norm + s.w2 + s.b2
    kept = 3 * cost.plane_bytes(step.layout) + s.pooled + s.state if step.keep else 0
    return Cost(read, full + kept + (s.tau if step.want.tau else 0), ("forward_kernel",))


def backward_cost(step: Step) -> Cost:
    full, s = cost.map_bytes(step), Sizes.of(step)
    kept = 3 * cost.plane_bytes(step.layout) + s.pooled + s.state
    return Cost(full + kept + s.w1 + s.norm + s.w2, full + s.alpha + s.hidden, ("backward_kernel",))
