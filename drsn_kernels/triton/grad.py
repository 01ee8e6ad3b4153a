"""grad: dx = kept * g + s * dA / L and dtau = -sum_l s * kept * g, each if wanted, from g and the bit planes.

By another rule (reference.Rule), INSIDE * g is in the place of 0 where it is not kept, and dtau is OFFSET times that.

Reads g once (not at all for abs_mean alone) and 1 to 3 bits an element; writes dx. One launch, and a sum of partials
(splits, N, C) where dtau's rows are split. Without dtau it runs backwards through the tensor, so that after the pass
which summed dtau the part of g read last is still in L2.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import traffic
from ..planes import Geometry
from ..reference import SOFT, Rule, accumulate_dtype
from .gate import pooled_grad_of
from .launch import Prepared, kernel, tiled, units_of
from .plans import ON_THE_WAY_REGISTERS
from .tiles import length_of_rows, offsets, piece, tile, units, unpack


@triton.jit
def _grad_tile(
    g, kept, sign, nonzero, share, dx, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds,
    INSIDE: tl.constexpr, G_UNIT: tl.constexpr, D_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s * kept * g of one tile (0 without a sign plane), its dx stored. share is dA / L of its rows or columns."""
    n, p, q, first, rows_live, columns_live = tile(t, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, REVERSE)
    live = rows_live[:, None] & columns_live[None, :]
    at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
    masked = tl.zeros((R, B), ACC)
    if g is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, gs, G_UNIT, ALIGN)
        value = tl.load(g + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
        outside = unpack(tl.load(kept + at, units_live, 0), UNIT_BITS)
        masked = tl.where(outside, value, 0.0)
    signed = tl.zeros((R, B), ACC)
    if sign is not None:
        negative = unpack(tl.load(sign + at, units_live, 0), UNIT_BITS)
        signed = tl.where(negative, -masked, masked)
    if dx is not None:
        result = masked
        if INSIDE != 0.0:
            if g is not None:
                result = tl.where(outside, value, INSIDE * value)
        if share is not None:
            direct = tl.where(negative, -share, share)
            result += tl.where(unpack(tl.load(nonzero + at, units_live, 0), UNIT_BITS), direct, 0.0)
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, ds, D_UNIT, ALIGN)
        tl.store(dx + rows[:, None] + columns[None, :], result.to(dx.dtype.element_ty), live)
    return signed


@kernel(pointers=10, aligned=("g", "dx"))
def grad_kernel(
    g, kept, sign, nonzero, pooled_grad, dx, dtau, du, w1, around,
    plane_units, L, N, P, QA, splits, length, UNITS, p_sizes, q_sizes, gs, ds, C, H, BH: tl.constexpr,
    INSIDE: tl.constexpr, OFFSET: tl.constexpr, G_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dtau (splits, N, C): this piece's part of it."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    REVERSE: tl.constexpr = dtau is None
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, stop = piece(P if CHANNELS_LAST else Q, splits, length, STEP, REVERSE, WIDE)
    n, p, q, first, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, REVERSE)
    if CHANNELS_LAST:
        sample = n + q * 0
        c = q
        sums_live = columns_live
    else:
        sample = n
        c = p
        sums_live = rows_live
    at = sample * (Q if CHANNELS_LAST else P) + c
    share = None
    if du is not None:
        share = pooled_grad_of(sample, c, sums_live, du, w1, around, C, H, BH) / L.to(ACC)
    elif pooled_grad is not None:
        share = tl.load(pooled_grad + at, sums_live, 0.0) / L.to(ACC)
    if share is not None:
        if CHANNELS_LAST:
            share = share[None, :]
        else:
            share = share[:, None]
    if LOOP:
        total = tl.zeros((R, B), ACC)
        for t in range(start, stop, STEP):
            total += _grad_tile(
                g, kept, sign, nonzero, share, dx, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds,
                INSIDE, G_UNIT, D_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, REVERSE, ACC,
            )  # fmt: skip
    else:
        total = _grad_tile(
            g, kept, sign, nonzero, share, dx, start, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds,
            INSIDE, G_UNIT, D_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, REVERSE, ACC,
        )  # fmt: skip
    if dtau is not None:
        sums = -tl.sum(total, AXIS)
        if OFFSET != 1.0:
            sums *= OFFSET
        dtau += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
        tl.store(dtau + at, sums, sums_live)


class Call(NamedTuple):
    launch: Prepared
    splits: int
    unit_bits: int


def prepare(
    geo: Geometry,
    strides: tuple,
    dtype: torch.dtype,
    device: torch.device,
    want_dtau: bool,
    gate: tuple[int, int, int] = (0, 0, 1),
    rule: Rule = SOFT,
) -> Call:
    """The launch for g and dx of these strides. gate: C, H and the units at a time, where it computes dA."""
    return _prepare(geo, strides, dtype, device, want_dtau, gate, rule)


@functools.lru_cache(maxsize=4096)  # apart from the defaults: arguments left out would be another key
def _prepare(geo, strides, dtype, device, want_dtau, gate, rule) -> Call:
    on = tiled(geo, strides, dtype, device, want_dtau)
    registers = {} if gate[0] == 0 else {"maxnreg": ON_THE_WAY_REGISTERS}
    launch = on.prepare(
        grad_kernel, gate[:2], BH=gate[2], INSIDE=rule.inside, OFFSET=rule.offset, G_UNIT=on.walk.operands[0].unit,
        D_UNIT=on.walk.operands[1].unit, **registers,
    )  # fmt: skip
    return Call(launch, on.plan.splits, on.walk.unit_bits)


def grad(
    geo: Geometry,
    dtype: torch.dtype,
    g: torch.Tensor | None,
    kept: torch.Tensor | None,
    sign: torch.Tensor | None,
    nonzero: torch.Tensor | None = None,
    pooled_grad: torch.Tensor | None = None,
    want_dx: bool = True,
    want_dtau: bool = False,
    rule: Rule = SOFT,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    shape, dense = geo
    if pooled_grad is not None:
        pooled_grad = pooled_grad.contiguous()  # (N, C)-sized
    device = (g if g is not None else pooled_grad).device
    dx = torch.empty_strided(shape, dense, dtype=dtype, device=device) if want_dx else None
    call = prepare(geo, (dense if g is None else g.stride(), dense), dtype, device, want_dtau, rule=rule)
    dtau = None
    if want_dtau:
        dtau = torch.empty((call.splits, *shape[:2]), dtype=accumulate_dtype(dtype), device=device)
    planes = (units_of(plane, call.unit_bits) for plane in (kept, sign, nonzero))
    call.launch(device, g, *planes, pooled_grad, dx, dtau, None, None, None)
    if want_dtau:
        dtau = dtau[0] if call.splits == 1 else dtau.sum(0)
    return dx, dtau


def budget(
    geo: Geometry, strides: tuple, dtype: torch.dtype, device: torch.device,
    masked: bool, pooled: bool, dx: bool, dtau: bool,
) -> traffic.Budget:  # fmt: skip
    """strides: of g."""
    parts = prepare(geo, (strides, geo[1]), dtype, device, dtau).splits if dtau else 1
    return traffic.grad(geo, dtype, masked, pooled, dx, dtau, "grad_kernel", parts) + traffic.added_up(
        traffic.sums_bytes(geo, dtype), parts
    )
