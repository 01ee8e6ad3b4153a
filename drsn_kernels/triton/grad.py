"""grad: dx = kept * g + s * dA / L and dtau = -sum_l s * kept * g, each if wanted, from g and the bit planes.

Reads g once (not at all for abs_mean alone) and 1 to 3 bits an element; writes dx. One launch, and a sum of partials
(splits, N, C) where dtau's rows are split. Without dtau it runs backwards through the tensor, so that after the pass
which summed dtau the part of g read last is still in L2.
"""

import torch
import triton
import triton.language as tl

from ..planes import Geometry
from ..reference import accumulate_dtype
from .gate import pooled_grad_of
from .launch import SIZES, on_device, tiled, units_of
from .tiles import offsets, piece, tile, units, unpack


@triton.jit
def _grad_tile(
    g, kept, sign, nonzero, share, dx, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds,
    G_UNIT: tl.constexpr, D_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, UNIT_BITS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s * kept * g of one tile (0 without a sign plane), its dx stored. share is dA / L of its rows or columns."""
    n, p, q, first, rows_live, columns_live = tile(t, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, REVERSE)
    live = rows_live[:, None] & columns_live[None, :]
    at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
    masked = tl.zeros((R, B), ACC)
    if g is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, gs, G_UNIT, ALIGN)
        value = tl.load(g + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
        masked = tl.where(unpack(tl.load(kept + at, units_live, 0), UNIT_BITS), value, 0.0)
    signed = tl.zeros((R, B), ACC)
    if sign is not None:
        negative = unpack(tl.load(sign + at, units_live, 0), UNIT_BITS)
        signed = tl.where(negative, -masked, masked)
    if dx is not None:
        result = masked
        if share is not None:
            direct = tl.where(negative, -share, share)
            result += tl.where(unpack(tl.load(nonzero + at, units_live, 0), UNIT_BITS), direct, 0.0)
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, ds, D_UNIT, ALIGN)
        tl.store(dx + rows[:, None] + columns[None, :], result.to(dx.dtype.element_ty), live)
    return signed


@triton.jit(
    do_not_specialize=[*SIZES, "gs", "ds", "L", "C", "H"],
    do_not_specialize_on_alignment=["kept", "sign", "nonzero"],
)
def grad_kernel(
    g, kept, sign, nonzero, pooled_grad, dx, dtau, du, w1, around, C, H, L,
    N, P, QA, splits, length, UNITS, p_sizes, q_sizes, gs, ds, BH: tl.constexpr,
    G_UNIT: tl.constexpr, D_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr,
    UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dtau (splits, N, C): this piece's part of it."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    REVERSE: tl.constexpr = dtau is None
    Q = QA * ALIGN
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
                G_UNIT, D_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, REVERSE, ACC,
            )  # fmt: skip
    else:
        total = _grad_tile(
            g, kept, sign, nonzero, share, dx, start, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds,
            G_UNIT, D_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, REVERSE, ACC,
        )  # fmt: skip
    if dtau is not None:
        sums = -tl.sum(total, AXIS)
        dtau += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
        tl.store(dtau + at, sums, sums_live)


_NO_GATE = (None, None, None, 0, 0)


def launch(
    geo: Geometry,
    dtype: torch.dtype,
    g: torch.Tensor | None,
    kept: torch.Tensor | None,
    sign: torch.Tensor | None,
    nonzero: torch.Tensor | None,
    pooled_grad: torch.Tensor | None,
    gate: tuple | None,
    dot: int,
    dx: torch.Tensor | None,
    dtau: bool,
) -> tuple[torch.Tensor | None, int]:
    """Partial sums of dtau (splits, N, C), if wanted, and splits. dA is pooled_grad, or computed from `gate`."""
    shape, dense = geo
    device = (g if g is not None else pooled_grad).device
    plan = tiled(geo, (dense if g is None else g.stride(), dense), dtype, device, dtau)
    splits = plan.plan.splits
    partial = torch.empty((splits, *shape[:2]), dtype=accumulate_dtype(dtype), device=device) if dtau else None
    planes = (None if p is None else units_of(p, plan.walk.unit_bits) for p in (kept, sign, nonzero))
    (gs, g_unit), (ds, d_unit) = plan.walk.operands
    on_device(
        device, grad_kernel[plan.grid],
        g, *planes, pooled_grad, dx, partial, *(_NO_GATE if gate is None else gate), plan.length, *plan.sizes, gs, ds,
        BH=dot, G_UNIT=g_unit, D_UNIT=d_unit, **plan.constants,
    )  # fmt: skip
    return partial, splits


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
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    shape, dense = geo
    if pooled_grad is not None:
        pooled_grad = pooled_grad.contiguous()  # (N, C)-sized
    device = (g if g is not None else pooled_grad).device
    dx = torch.empty_strided(shape, dense, dtype=dtype, device=device) if want_dx else None
    dtau, splits = launch(geo, dtype, g, kept, sign, nonzero, pooled_grad, None, 1, dx, want_dtau)
    if want_dtau:
        dtau = dtau[0] if splits == 1 else dtau.sum(0)
    return dx, dtau
