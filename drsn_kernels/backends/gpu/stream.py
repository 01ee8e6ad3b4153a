"""The kernels that stream over x or g: reduce, map and grad. They take tau and dA as (N, C) and know no gate.

    reduce   reads x once;        A = mean |x| (mean x; sum x * times), and for abs_mean alone the planes sign, nonzero
    map      reads x once;        y = x by a threshold rule, or x * t + shift / L; + residual; kept, sign[, nonzero]
    grad     reads g and planes;  dx = kept * g + s * dA / L and dtau = -sum_l s * kept * g, each if wanted

Each is one launch, and a sum of partials (splits, N, C) where rows that are summed over are split. map runs backwards
through the tensor: after reduce, which reads x forwards, the part of x read last is still in L2. So does grad without
dtau, after the pass that summed dtau.
"""

import torch
import triton
import triton.language as tl

from ...layout import Layout, Planes
from ...reference import SOFT, Rule
from .. import cost
from ..step import Step
from .launch import Prepared, kernel, multiprocessors, tile_values, units_of
from .plans import TilePlan, cached, tiles
from .tiles import (
    by_channel,
    length_of_rows,
    offsets,
    pack,
    piece,
    piecewise,
    plane,
    sign_bit,
    soft_threshold,
    tile,
    units,
    unpack,
)
from .walk import Strides, walk

# ---- reduce ----------------------------------------------------------------------------------------------------------


@triton.jit
def _reduce_tile(
    x, times, planes, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs, ts,
    KIND: tl.constexpr, X_UNIT: tl.constexpr, T_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What is summed of one tile: |x|, x or x * times; its planes stored."""
    n, p, q, first, rows_live, columns_live = tile(t, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, False)
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, xs, X_UNIT, ALIGN)
    live = rows_live[:, None] & columns_live[None, :]
    value = tl.load(x + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
    if planes is not None:
        at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
        tl.store(planes + at, pack(sign_bit(value), UNIT_BITS), units_live)
        tl.store(plane(planes, plane_units, 1) + at, pack((value != 0).to(tl.int32), UNIT_BITS), units_live)
    if times is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, ts, T_UNIT, ALIGN)
        value *= tl.load(times + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
    if KIND == "magnitude":
        return tl.abs(value)
    else:
        return value


@kernel(pointers=4, aligned=("x", "times"))
def reduce_kernel(
    x, times, out, planes, plane_units, L, N, P, QA, splits, length, UNITS, p_sizes, q_sizes, xs, ts,
    KIND: tl.constexpr, X_UNIT: tl.constexpr, T_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    LOOP: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out (splits, N, C): this piece's part of the mean, or of the sum of products. planes: sign, nonzero."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, stop = piece(P if CHANNELS_LAST else Q, splits, length, STEP, False, WIDE)
    if LOOP:
        total = tl.zeros((R, B), ACC)
        for t in range(start, stop, STEP):
            total += _reduce_tile(
                x, times, planes, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs, ts,
                KIND, X_UNIT, T_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, ACC,
            )  # fmt: skip
    else:
        total = _reduce_tile(
            x, times, planes, plane_units, start, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs, ts,
            KIND, X_UNIT, T_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, ACC,
        )  # fmt: skip
    sums = tl.sum(total, AXIS)
    if KIND != "product":
        sums /= L.to(ACC)
    n, p, q, first, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, False)
    at, live = by_channel(n, p, q, P, Q, rows_live, columns_live, CHANNELS_LAST)
    out += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
    tl.store(out + at, sums, live)


@cached
def prepare_reduce(
    layout: Layout, x: Strides, times: Strides | None, dtype: torch.dtype, device: torch.device, kind: str, keep: bool
) -> Prepared:
    """The launch for x and times of these strides."""
    plan, values = _tiled(layout, (x, times or x), dtype, device, "xt", split=True)
    step = Step("abs_mean", layout, x, dtype, device)
    cost_of = cost.reduce(step, "reduce_kernel", kind, keep, plan.splits)
    return _over_tiles(reduce_kernel, device, values | {"KIND": kind}, plan, cost_of)


def reduce_into(
    out: torch.Tensor, planes: Planes | None, x: torch.Tensor, layout: Layout, kind: str, times: torch.Tensor | None
) -> None:
    keep = planes is not None
    launch = prepare_reduce(
        layout, x.stride(), None if times is None else times.stride(), x.dtype, x.device, kind, keep
    )  # fmt: skip
    sums = partial_sums(out, launch)
    launch(x=x, times=times, out=sums, planes=units_of(planes.bits, layout) if keep else None)
    if sums is not out:
        torch.sum(sums, 0, out=out)


# ---- map -------------------------------------------------------------------------------------------------------------


@kernel(pointers=6, aligned=("x", "y", "residual"))
def map_kernel(
    x, y, residual, t, shift, planes, plane_units, L, N, P, QA, splits, length, UNITS, p_sizes, q_sizes, xs, ys, rs,
    t_n, t_c, KIND: tl.constexpr, INSIDE: tl.constexpr, OFFSET: tl.constexpr, PLANES: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """KIND: "soft", "piecewise" (another rule, INSIDE and OFFSET) or "scale". planes: kept, sign[, nonzero]."""
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, _ = piece(P if CHANNELS_LAST else Q, splits, length, STEP, True, WIDE)
    n, p, q, first, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, True)
    live = rows_live[:, None] & columns_live[None, :]
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, xs, X_UNIT, ALIGN)
    value = tl.load(x + rows[:, None] + columns[None, :], live, 0.0, eviction_policy="evict_first").to(ACC)
    if CHANNELS_LAST:
        threshold = tl.load(t + n * t_n + q * t_c, columns_live, 0.0)[None, :]
    else:
        threshold = tl.load(t + n * t_n + p * t_c, rows_live, 0.0)[:, None]
    if PLANES != 0:
        at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
        kept = (value != 0) & ((tl.abs(value) <= threshold) == 0)
        tl.store(planes + at, pack(kept.to(tl.int32), UNIT_BITS), units_live)
        tl.store(plane(planes, plane_units, 1) + at, pack(sign_bit(value), UNIT_BITS), units_live)
        if PLANES == 3:
            tl.store(plane(planes, plane_units, 2) + at, pack((value != 0).to(tl.int32), UNIT_BITS), units_live)
    if KIND == "scale":
        result = value * threshold
    elif KIND == "soft":
        result = soft_threshold(value, threshold)
    else:
        result = piecewise(value, threshold, INSIDE, OFFSET)
    if shift is not None:
        at, sums_live = by_channel(n, p, q, P, Q, rows_live, columns_live, CHANNELS_LAST)
        share = tl.load(shift + at, sums_live, 0.0) / L.to(ACC)
        result += share[None, :] if CHANNELS_LAST else share[:, None]
    if residual is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, rs, R_UNIT, ALIGN)
        result += tl.load(residual + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, ys, Y_UNIT, ALIGN)
    tl.store(y + rows[:, None] + columns[None, :], result.to(y.dtype.element_ty), live)


@cached
def prepare_map(
    layout: Layout, x: Strides, y: Strides, residual: Strides | None, t: tuple[int, int], dtype: torch.dtype,
    device: torch.device, kind: str, rule: Rule, shift: bool, keep: int,
) -> Prepared:  # fmt: skip
    """The launch for tensors of these strides; t's are 0 where it is broadcast. keep: planes."""
    plan, values = _tiled(layout, (x, y, residual or y), dtype, device, "xyr", split=False)
    values |= {
        "KIND": kind if kind == "scale" else "soft" if rule == SOFT else "piecewise", "INSIDE": rule.inside,
        "OFFSET": rule.offset, "PLANES": keep, "t_n": t[0], "t_c": t[1],
    }  # fmt: skip
    step = Step("soft_threshold", layout, x, dtype, device)
    columns = layout.c if t[1] else 1
    cost_of = cost.map(step, "map_kernel", columns, residual is not None, shift, keep)
    return _over_tiles(map_kernel, device, values, plan, cost_of)


def map_into(
    y: torch.Tensor, planes: Planes | None, x: torch.Tensor, layout: Layout, t: torch.Tensor, kind: str, rule: Rule,
    residual: torch.Tensor | None, shift: torch.Tensor | None,
) -> None:  # fmt: skip
    (rows, columns), (t_n, t_c) = t.shape, t.stride()
    bits = None if planes is None else planes.bits
    launch = prepare_map(
        layout, x.stride(), y.stride(), None if residual is None else residual.stride(),
        (0 if rows == 1 else t_n, 0 if columns == 1 else t_c), x.dtype, x.device, kind, rule, shift is not None,
        0 if bits is None else len(bits),
    )  # fmt: skip
    shift = None if shift is None else shift.contiguous()  # (N, C)
    launch(x=x, y=y, residual=residual, t=t, shift=shift, planes=units_of(bits, layout))


# ---- grad ------------------------------------------------------------------------------------------------------------


@triton.jit
def _grad_tile(
    g, planes, share, dx, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds,
    INSIDE: tl.constexpr, KEPT: tl.constexpr, SIGN: tl.constexpr, NONZERO: tl.constexpr, G_UNIT: tl.constexpr,
    D_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s * kept * g of one tile (0 without a sign plane), its dx stored. share is dA / L of its rows or columns."""
    n, p, q, first, rows_live, columns_live = tile(t, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, REVERSE)
    live = rows_live[:, None] & columns_live[None, :]
    at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
    masked = tl.zeros((R, B), ACC)
    if g is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, gs, G_UNIT, ALIGN)
        value = tl.load(g + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
        outside = unpack(tl.load(plane(planes, plane_units, KEPT) + at, units_live, 0), UNIT_BITS)
        masked = tl.where(outside, value, 0.0)
    signed = tl.zeros((R, B), ACC)
    if SIGN is not None:
        negative = unpack(tl.load(plane(planes, plane_units, SIGN) + at, units_live, 0), UNIT_BITS)
        signed = tl.where(negative, -masked, masked)
    if dx is not None:
        result = masked
        if INSIDE != 0.0:
            if g is not None:
                result = tl.where(outside, value, INSIDE * value)
        if share is not None:
            nonzero = unpack(tl.load(plane(planes, plane_units, NONZERO) + at, units_live, 0), UNIT_BITS)
            result += tl.where(nonzero, tl.where(negative, -share, share), 0.0)
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, ds, D_UNIT, ALIGN)
        tl.store(dx + rows[:, None] + columns[None, :], result.to(dx.dtype.element_ty), live)
    return signed


@kernel(pointers=5, aligned=("g", "dx"))
def grad_kernel(
    g, planes, dA, dx, dtau, plane_units, L, N, P, QA, splits, length, UNITS, p_sizes, q_sizes, gs, ds,
    INSIDE: tl.constexpr, OFFSET: tl.constexpr, KEPT: tl.constexpr, SIGN: tl.constexpr, NONZERO: tl.constexpr,
    G_UNIT: tl.constexpr, D_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr,
    UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dtau (splits, N, C): this piece's part of it. KEPT, SIGN, NONZERO: which plane; None where it is not read.

    By a rule with INSIDE, INSIDE * g is in the place of 0 where it is not kept, and dtau is OFFSET times the sum.
    """
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    REVERSE: tl.constexpr = dtau is None
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, stop = piece(P if CHANNELS_LAST else Q, splits, length, STEP, REVERSE, WIDE)
    n, p, q, first, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, REVERSE)
    at, sums_live = by_channel(n, p, q, P, Q, rows_live, columns_live, CHANNELS_LAST)
    share = None
    if dA is not None:
        share = tl.load(dA + at, sums_live, 0.0) / L.to(ACC)
        share = share[None, :] if CHANNELS_LAST else share[:, None]
    if LOOP:
        total = tl.zeros((R, B), ACC)
        for t in range(start, stop, STEP):
            total += _grad_tile(
                g, planes, share, dx, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds, INSIDE, KEPT,
                SIGN, NONZERO, G_UNIT, D_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, REVERSE, ACC,
            )  # fmt: skip
    else:
        total = _grad_tile(
            g, planes, share, dx, plane_units, start, N, P, Q, splits, UNITS, p_sizes, q_sizes, gs, ds, INSIDE, KEPT,
            SIGN, NONZERO, G_UNIT, D_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, REVERSE, ACC,
        )  # fmt: skip
    if dtau is not None:
        sums = -tl.sum(total, AXIS)
        if OFFSET != 1.0:
            sums *= OFFSET
        dtau += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
        tl.store(dtau + at, sums, sums_live)


@cached
def prepare_grad(
    layout: Layout, g: Strides | None, dtype: torch.dtype, device: torch.device,
    planes: tuple[int | None, int, int | None], dA: bool, dx: bool, dtau: bool, rule: Rule,
) -> Prepared:  # fmt: skip
    """The launch for a g of these strides; dx lies as the layout says. planes: the rows of kept, sign and nonzero."""
    plan, values = _tiled(layout, (g or layout.strides, layout.strides), dtype, device, "gd", split=dtau)
    kept, sign, nonzero = planes
    values |= {
        "INSIDE": rule.inside, "OFFSET": rule.offset, "KEPT": None if g is None else kept,
        "SIGN": sign if dtau or dA else None, "NONZERO": nonzero if dA else None,
    }  # fmt: skip
    step = Step("shrink", layout, layout.strides, dtype, device)
    cost_of = cost.grad(step, "grad_kernel", g is not None, dA, dx, dtau, plan.splits if dtau else 1)
    return _over_tiles(grad_kernel, device, values, plan, cost_of)


def grad_into(
    dx: torch.Tensor | None, dtau: torch.Tensor | None, layout: Layout, dtype: torch.dtype, planes: Planes,
    g: torch.Tensor | None, dA: torch.Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    launch = prepare_grad(
        layout, None if g is None else g.stride(), dtype, planes.bits.device, planes[1:],
        dA is not None and dx is not None, dx is not None, dtau is not None, rule,
    )  # fmt: skip
    sums = None if dtau is None else partial_sums(dtau, launch)
    launch(g=g, planes=units_of(planes.bits, layout), dA=None if dx is None else dA, dx=dx, dtau=sums)
    if sums is not dtau:
        torch.sum(sums, 0, out=dtau)


# ---- what the three share --------------------------------------------------------------------------------------------


def _tiled(
    layout: Layout, strides: tuple[Strides, ...], dtype: torch.dtype, device: torch.device, operands: str, split: bool
) -> tuple[TilePlan, dict]:
    """Plan and values of a launch over tiles. split: rows may be cut, because sums over them may be partial."""
    on = walk(layout, *strides)
    plan = tiles(on, dtype.itemsize, multiprocessors(device), split)
    values = tile_values(on, plan, dtype, operands)
    return plan, values | {"R": plan.rows, "splits": plan.splits, "length": plan.piece}


def _over_tiles(fn, device: torch.device, values: dict, plan: TilePlan, cost_of: cost.Cost) -> Prepared:
    return Prepared(fn, device, plan.programs, values, plan, cost_of, warps=plan.warps)


def partial_sums(out: torch.Tensor, launch: Prepared) -> torch.Tensor:
    """What the launch sums into: out (N, C), or (splits, N, C) to be added up."""
    return out if launch.plan.splits == 1 else out.new_empty((launch.plan.splits, *out.shape))
