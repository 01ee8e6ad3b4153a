"""The whole shrinkage step in one launch, where the gate needs no other sample: no BatchNorm, or BatchNorm in eval.

Forward: x is read once and stays on chip (registers) while its mean |x| goes through the gate; y and, for a gradient,
the three bit planes are written from there. Where a sample is too large for that (LOOP), the program walks it
twice, the second time backwards, and finds it in L2. Backward: g and the planes are read once, dtau is summed, taken
back through the gate, and dx written; what is left is the gate's parameters (linear_grad.py).

A program takes S whole samples. Its tile has S * PB rows of B columns; all channels are in it: PB covers C, or B does
in channels_last order. The gate's weights are read from L2 once a program, BH hidden units at a time. Forward, where
these are all of them (ALL_UNITS), what the gate reads is loaded in front of the sums over the sample, in which threads
meet: no load passes by those. Of 64 channels and units it was five waits for the L2.
"""

import triton
import triton.language as tl

from .. import cost
from ..step import Cost, Step
from .bits import elements, exceeds, limits, mask, negative, nonzero, signs, soft, soft_elements, words
from .gate import Sizes, alphas_of, center_and_scale, normalise, relu, scaled, standardised, weight_and_bias
from .gate_grad import logit_grads_of_samples
from .launch import await_previous, kernel
from .tiles import length_of_rows, load, load_plane, store, store_planes


@triton.jit
def _place(t, N, P, S: tl.constexpr, PB: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Rows (S * PB,), the tile's number along q and the mask of rows, of tile t along the spatial dimensions."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    own = tl.arange(0, S * PB)
    column = t + pid * 0  # as wide as pid
    n = pid * S + own // PB
    p = own % PB + pid * 0
    if CHANNELS_LAST:
        p += column * PB
        column = pid * 0
    return n * P + p, column, (n < N) & (p < P)


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
def _finish(
    w, tau, row, column, rows_live, y, residual, planes, plane_bytes, QA, row_bytes, row_sizes, q_sizes, ys, rs,
    Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y and the planes kept, sign, nonzero of a tile whose threshold is known."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    limit, finite = limits(tau, DTYPE, GROUP)
    if planes is not None:
        store_planes(
            planes, plane_bytes, exceeds(w, limit, GROUP), negative(w), nonzero(w, GROUP), row, column, row_bytes,
            rows_live, B, GROUP, PTX,
        )  # fmt: skip
    if residual is None:
        out = soft(w, tau, finite, DTYPE, GROUP, PTX)
    else:
        added = load(residual, row, column, rows_live, QA, row_sizes, q_sizes, rs, R_UNIT, B, ALIGN, WIDE, GROUP, ACC)
        result = soft_elements(w, tau, finite, DTYPE, GROUP, PTX) + elements(added, DTYPE, GROUP)
        out = words(result, DTYPE, GROUP, PTX)
    store(y, out, row, column, rows_live, QA, row_sizes, q_sizes, ys, Y_UNIT, B, ALIGN, WIDE, GROUP)


@triton.jit
def _weights(w1, w2, mean, var, gamma, beta, h, c, o, H, C, outputs, EPS: tl.constexpr):
    """Of units h: weights (units, C) and (outputs, units); mean, 1 / std, weight and bias where there is a norm."""
    live = h < H
    first = tl.load(w1 + (h * C)[:, None] + c[None, :], live[:, None] & (c < C)[None, :], 0.0)
    second = tl.load(w2 + (o * H)[:, None] + h[None, :], (o < outputs)[:, None] & live[None, :], 0.0)
    if mean is None:
        return first, second, h, h, h, h
    else:
        center, scale = center_and_scale(mean, var, h, live, EPS)
        weight, bias = weight_and_bias(gamma, beta, h, live)
        return first, second, center, scale, weight, bias


@kernel(pointers=15, aligned=("x", "y", "residual"))
def forward_kernel(
    x, y, residual, planes, pooled, state, tau, w1, b1, mean, var, gamma, beta, w2, b2,
    plane_bytes, L, H, N, P, QA, row_bytes, row_sizes, q_sizes, xs, ys, rs,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, LOOP: tl.constexpr, S: tl.constexpr,
    PB: tl.constexpr, B: tl.constexpr, BH: tl.constexpr, ALL_UNITS: tl.constexpr, X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    await_previous(DEPENDENT)
    CB: tl.constexpr = B if CHANNELS_LAST else PB
    OB: tl.constexpr = 1 if ONE else CB
    STEP: tl.constexpr = PB if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    C = Q if CHANNELS_LAST else P
    DTYPE: tl.constexpr = x.dtype.element_ty
    tiles = tl.cdiv(P if CHANNELS_LAST else Q, STEP)
    row, column, rows_live = _place(0, N, P, S, PB, CHANNELS_LAST, WIDE)
    tile = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC)
    total = tl.abs(elements(tile, DTYPE, GROUP))
    if LOOP:
        for t in range(1, tiles):
            row, column, rows_live = _place(t, N, P, S, PB, CHANNELS_LAST, WIDE)
            more = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC)
            total += tl.abs(elements(more, DTYPE, GROUP))

    sample = tl.program_id(0) * S + tl.arange(0, S)
    c = tl.arange(0, CB)
    o = tl.arange(0, OB)
    columns = 1 if ONE else C
    o_live = o < columns
    if ALL_UNITS:
        h = tl.arange(0, BH)
        first, second, center, scale, weight, shift = _weights(
            w1, w2, mean, var, gamma, beta, h, c, o, H, C, columns, EPS
        )  # fmt: skip
        first_bias = tl.load(b1 + h, h < H, 0.0)
    bias = tl.load(b2 + o, o_live, 0.0)
    a = _by_channel(total, S, PB, B, CHANNELS_LAST) / L.to(ACC)

    # the gate, BH hidden units at a time
    z = tl.zeros((S, OB), ACC)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        if not ALL_UNITS:
            first, second, center, scale, weight, shift = _weights(
                w1, w2, mean, var, gamma, beta, h, c, o, H, C, columns, EPS
            )  # fmt: skip
            first_bias = tl.load(b1 + h, h < H, 0.0)
        v = tl.sum(a[:, None, :] * first[None, :, :], 2) + first_bias[None, :]
        if state is not None:
            at = (sample * H)[:, None] + h[None, :]
            tl.store(state + at, v, (sample < N)[:, None] & (h < H)[None, :])
        if mean is not None:
            v, _ = scaled(standardised(v, center, scale), scale, weight, shift)
        z += tl.sum(relu(v)[:, None, :] * second[None, :, :], 2)
    value = tl.sigmoid(z + bias[None, :])
    if AVERAGE == "channel":
        threshold = value * a
    elif AVERAGE == "sample":
        threshold = value * (tl.sum(a, 1)[:, None] / C.to(ACC))
    else:
        threshold = value
    live = (sample < N)[:, None] & (c < C)[None, :]
    out_live = (sample < N)[:, None] & o_live[None, :]
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
            tile, threshold, row, column, rows_live, y, residual, planes, plane_bytes, QA, row_bytes,
            row_sizes, q_sizes, ys, rs, Y_UNIT, R_UNIT, B, ALIGN, WIDE, ACC, GROUP, PTX,
        )  # fmt: skip
    else:
        for back in range(0, tiles):
            row, column, rows_live = _place(tiles - 1 - back, N, P, S, PB, CHANNELS_LAST, WIDE)
            again = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC)
            _finish(
                again, threshold, row, column, rows_live, y, residual, planes, plane_bytes, QA, row_bytes,
                row_sizes, q_sizes, ys, rs, Y_UNIT, R_UNIT, B, ALIGN, WIDE, ACC, GROUP, PTX,
            )  # fmt: skip


@triton.jit
def _masked(
    g, planes, plane_bytes, row, column, rows_live, QA, row_bytes, row_sizes, q_sizes, gs, G_UNIT: tl.constexpr,
    B: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """s * kept * g of a tile, and the sign bits, in words."""
    w = load(g, row, column, rows_live, QA, row_sizes, q_sizes, gs, G_UNIT, B, ALIGN, WIDE, GROUP, ACC)
    kept = load_plane(planes, plane_bytes, row, column, row_bytes, rows_live, 0, B, GROUP, PTX)
    sign = load_plane(planes, plane_bytes, row, column, row_bytes, rows_live, 1, B, GROUP, PTX)
    negated = signs(sign, ACC, GROUP)
    return (w & mask(kept, ACC, GROUP, PTX)) ^ negated, negated


@triton.jit
def _store_dx(
    signed, negated, share, row, column, rows_live, dx, planes, plane_bytes, QA, row_bytes, row_sizes, q_sizes, ds,
    D_UNIT: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    GROUP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """As in stream._grad_tile."""
    DTYPE: tl.constexpr = dx.dtype.element_ty
    other = load_plane(planes, plane_bytes, row, column, row_bytes, rows_live, 2, B, GROUP, PTX)
    moved = words(elements(signed, DTYPE, GROUP) + share, DTYPE, GROUP, PTX)
    out = (moved & mask(other, ACC, GROUP, PTX)) ^ negated
    store(dx, out, row, column, rows_live, QA, row_sizes, q_sizes, ds, D_UNIT, B, ALIGN, WIDE, GROUP)


@kernel(pointers=14, aligned=("g", "dx"))
def backward_kernel(
    g, dx, planes, dz, dv, tau_grad, pooled, state, w1, mean, var, gamma, beta, w2,
    plane_bytes, L, H, N, P, QA, row_bytes, row_sizes, q_sizes, gs, ds,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, LOOP: tl.constexpr, S: tl.constexpr,
    PB: tl.constexpr, B: tl.constexpr, BH: tl.constexpr, G_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dx, and for the second launch dz (N, C | 1) and dv (N, H)."""
    await_previous(DEPENDENT)
    CB: tl.constexpr = B if CHANNELS_LAST else PB
    OB: tl.constexpr = 1 if ONE else CB
    STEP: tl.constexpr = PB if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    C = Q if CHANNELS_LAST else P
    DTYPE: tl.constexpr = g.dtype.element_ty
    tiles = tl.cdiv(P if CHANNELS_LAST else Q, STEP)
    row, column, rows_live = _place(0, N, P, S, PB, CHANNELS_LAST, WIDE)
    signed, negated = _masked(
        g, planes, plane_bytes, row, column, rows_live, QA, row_bytes, row_sizes, q_sizes, gs,
        G_UNIT, B, ALIGN, WIDE, ACC, GROUP, PTX,
    )  # fmt: skip
    total = elements(signed, DTYPE, GROUP)
    if LOOP:
        for t in range(1, tiles):
            row, column, rows_live = _place(t, N, P, S, PB, CHANNELS_LAST, WIDE)
            signed, negated = _masked(
                g, planes, plane_bytes, row, column, rows_live, QA, row_bytes, row_sizes, q_sizes, gs,
                G_UNIT, B, ALIGN, WIDE, ACC, GROUP, PTX,
            )  # fmt: skip
            total += elements(signed, DTYPE, GROUP)
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
        delta = tl.where(v <= 0, 0.0, tl.sum(logits[:, :, None] * w[None, :, :], 1))  # a NaN lets it pass, as in torch
        tl.store(dv + hidden_at, delta, hidden_live)
        w = tl.load(w1 + (h * C)[:, None] + c[None, :], (h < H)[:, None] & (c < C)[None, :], 0.0)
        da += tl.sum((delta * slope[None, :])[:, :, None] * w[None, :, :], 1)
    share = _to_tile(da / L.to(ACC), S, PB, B, CHANNELS_LAST)

    if not LOOP:
        _store_dx(
            signed, negated, share, row, column, rows_live, dx, planes, plane_bytes, QA, row_bytes,
            row_sizes, q_sizes, ds, D_UNIT, B, ALIGN, WIDE, ACC, GROUP, PTX,
        )  # fmt: skip
    else:
        for back in range(0, tiles):
            row, column, rows_live = _place(tiles - 1 - back, N, P, S, PB, CHANNELS_LAST, WIDE)
            signed, negated = _masked(
                g, planes, plane_bytes, row, column, rows_live, QA, row_bytes, row_sizes, q_sizes, gs,
                G_UNIT, B, ALIGN, WIDE, ACC, GROUP, PTX,
            )  # fmt: skip
            _store_dx(
                signed, negated, share, row, column, rows_live, dx, planes, plane_bytes, QA, row_bytes,
                row_sizes, q_sizes, ds, D_UNIT, B, ALIGN, WIDE, ACC, GROUP, PTX,
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
