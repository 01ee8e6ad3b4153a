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
from . import tuned
from .bits import (
    choose,
    elements,
    exceeds,
    limits,
    mask,
    masks,
    negative,
    nonzero,
    of_bits,
    piecewise,
    signs,
    soft,
    soft_elements,
    to_bits,
    with_sign,
    words,
)
from .launch import Prepared, await_counted, await_previous, end_with_previous, kernel, multiprocessors, tile_values
from .plans import TilePlan, tiles
from .tiles import by_channel, length_of_rows, load, load_plane, over_length, piece, store, store_planes, tile
from .tuned import cached
from .walk import Strides, walk

# ---- reduce ----------------------------------------------------------------------------------------------------------


@triton.jit
def _reduce_tile(
    x, times, planes, plane_bytes, t, N, P, QA, splits, row_bytes, row_sizes, q_sizes, xs, ts,
    KIND: tl.constexpr, X_UNIT: tl.constexpr, T_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    GROUP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What is summed of one tile: |x|, x or x * times; its planes stored."""
    Q = length_of_rows(QA, ALIGN, WIDE)
    n, row, column, q, rows_live, columns_live = tile(t, N, P, Q, splits, R, B, CHANNELS_LAST, SPLIT, WIDE, False)
    w = load(x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC)
    if planes is not None:
        store_planes(
            planes, plane_bytes, negative(w), nonzero(w, GROUP), None, row, column, row_bytes, rows_live,
            B, GROUP, PTX,
        )  # fmt: skip
    value = elements(w, x.dtype.element_ty, GROUP)
    if times is not None:
        w = load(times, row, column, rows_live, QA, row_sizes, q_sizes, ts, T_UNIT, B, ALIGN, WIDE, GROUP, ACC)
        value *= elements(w, times.dtype.element_ty, GROUP)
    if KIND == "magnitude":
        return tl.abs(value)
    else:
        return value


@kernel(pointers=4, aligned=("x", "times"))
def reduce_kernel(
    x, times, out, planes, plane_bytes, L, scale, N, P, QA, splits, length, row_bytes, row_sizes, q_sizes, xs, ts,
    KIND: tl.constexpr, X_UNIT: tl.constexpr, T_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    LOOP: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out (splits, N, C): this piece's part of the mean, or of the sum of products. planes: sign, nonzero."""
    await_previous(DEPENDENT)
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, stop = piece(P if CHANNELS_LAST else Q, splits, length, STEP, SPLIT, False, WIDE)
    if LOOP:
        total = tl.zeros((R, B), ACC)
        for t in range(start, stop):
            total += _reduce_tile(
                x, times, planes, plane_bytes, t, N, P, QA, splits, row_bytes, row_sizes, q_sizes, xs, ts,
                KIND, X_UNIT, T_UNIT, R, B, ALIGN, CHANNELS_LAST, SPLIT, WIDE, ACC, GROUP, PTX,
            )  # fmt: skip
    else:
        total = _reduce_tile(
            x, times, planes, plane_bytes, start, N, P, QA, splits, row_bytes, row_sizes, q_sizes, xs, ts,
            KIND, X_UNIT, T_UNIT, R, B, ALIGN, CHANNELS_LAST, SPLIT, WIDE, ACC, GROUP, PTX,
        )  # fmt: skip
    sums = tl.sum(total, AXIS)
    if KIND != "product":
        sums = over_length(sums, L, scale, ACC)
    n, row, column, q, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, SPLIT, WIDE, False)
    at, live = by_channel(n, row, q, Q, rows_live, columns_live, CHANNELS_LAST)
    if SPLIT:
        out += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
    tl.store(out + at, sums, live)


@cached
def prepare_reduce(
    layout: Layout, x: Strides, times: Strides | None, dtype: torch.dtype, device: torch.device, kind: str, keep: bool
) -> Prepared:
    """The launch for x and times of these strides."""
    plan, values = _tiled(layout, (x, times or x), dtype, device, "xt", split=True)
    cost_of = cost.reduce(layout, dtype, "reduce_kernel", kind, keep, plan.splits)
    return _over_tiles(reduce_kernel, device, values | {"KIND": kind}, plan, cost_of)


def reduce_into(
    out: torch.Tensor, planes: Planes | None, x: torch.Tensor, layout: Layout, kind: str, times: torch.Tensor | None
) -> None:
    keep = planes is not None
    launch = prepare_reduce(
        layout, x.stride(), None if times is None else times.stride(), x.dtype, x.device, kind, keep
    )  # fmt: skip
    sums = partial_sums(out, launch)
    launch(x=x, times=times, out=sums, planes=planes.bits if keep else None)
    if sums is not out:
        torch.sum(sums, 0, out=out)


# ---- map -------------------------------------------------------------------------------------------------------------


@triton.jit
def _of_row(row, P, t_n, t_c, row_sizes):
    """Where a row's threshold is. Rows that are not told apart by sample have theirs t_c apart."""
    if len(row_sizes) == 0:
        return row * t_c
    else:
        return (row // P) * t_n + (row % P) * t_c


@kernel(pointers=6, aligned=("x", "y", "residual"))
def map_kernel(
    x, y, residual, t, shift, planes, plane_bytes, L, scale, N, P, QA, splits, length, row_bytes, row_sizes, q_sizes,
    xs, ys, rs, t_n, t_c, KIND: tl.constexpr, INSIDE: tl.constexpr, OFFSET: tl.constexpr, PLANES: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    GROUP: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """KIND: "soft", "piecewise" (another rule, INSIDE and OFFSET) or "scale". planes: kept, sign[, nonzero]."""
    await_previous(0 if EARLY else DEPENDENT)
    DTYPE: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, _ = piece(P if CHANNELS_LAST else Q, splits, length, STEP, SPLIT, True, WIDE)
    n, row, column, q, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, SPLIT, WIDE, True)
    w = load(
        x, row, column, rows_live, QA, row_sizes, q_sizes, xs, X_UNIT, B, ALIGN, WIDE, GROUP, ACC, LAST=True,
        PAST_L1=EARLY and DEPENDENT > 0,
    )  # fmt: skip
    await_previous(DEPENDENT if EARLY else 0)
    if CHANNELS_LAST:
        threshold = tl.load(t + n * t_n + q * t_c, columns_live, 0.0)[None, :]
    else:
        threshold = tl.load(t + _of_row(row, P, t_n, t_c, row_sizes), rows_live, 0.0)[:, None]
    limit, finite = limits(threshold, DTYPE, GROUP)
    kept = exceeds(w, limit, GROUP)
    if PLANES != 0:
        other = nonzero(w, GROUP) if PLANES == 3 else None
        store_planes(
            planes, plane_bytes, kept, negative(w), other, row, column, row_bytes, rows_live, B, GROUP, PTX
        )  # fmt: skip
    if KIND == "soft" and shift is None and residual is None:
        out = soft(w, threshold, finite, DTYPE, GROUP, PTX)
    else:
        if KIND == "scale":
            result = elements(w, DTYPE, GROUP) * threshold
        elif KIND == "soft":
            result = soft_elements(w, threshold, finite, DTYPE, GROUP, PTX)
        else:
            result = piecewise(w, threshold, kept, INSIDE, OFFSET, DTYPE, GROUP, PTX)
        if shift is not None:
            at, sums_live = by_channel(n, row, q, Q, rows_live, columns_live, CHANNELS_LAST)
            share = over_length(tl.load(shift + at, sums_live, 0.0), L, scale, ACC)
            result += share[None, :] if CHANNELS_LAST else share[:, None]
        if residual is not None:
            w = load(residual, row, column, rows_live, QA, row_sizes, q_sizes, rs, R_UNIT, B, ALIGN, WIDE, GROUP, ACC)
            result += elements(w, residual.dtype.element_ty, GROUP)
        out = words(result, DTYPE, GROUP, PTX)
    store(y, out, row, column, rows_live, QA, row_sizes, q_sizes, ys, Y_UNIT, B, ALIGN, WIDE, GROUP)


@cached
def prepare_map(
    layout: Layout, x: Strides, y: Strides, residual: Strides | None, t: tuple[int, int], dtype: torch.dtype,
    device: torch.device, kind: str, rule: Rule, shift: bool, keep: int, early: bool = False,
) -> Prepared:  # fmt: skip
    """The launch for tensors of these strides; t's are 0 where it is broadcast. keep: planes; early: x was there before
    the launch in front of this one (await_previous)."""
    t_n, t_c = t
    if layout.c == 1:
        t_c = t_n
    # A batch of one takes the code of any other batch with a t for each sample; one t for all then looks the same.
    apart = t_n != layout.c * t_c if layout.n > 1 else t_c == 0 and layout.c > 1
    apart = apart and not layout.channels_last
    plan, values = _tiled(layout, (x, y, residual or y), dtype, device, "xyr", split=False, apart=apart)
    values |= {
        "KIND": kind if kind == "scale" else "soft" if rule == SOFT else "piecewise", "INSIDE": rule.inside,
        "OFFSET": rule.offset, "PLANES": keep, "t_n": t_n, "t_c": t_c, "EARLY": early and tuned.DEPENDENT,
    }  # fmt: skip
    columns = layout.c if t[1] else 1
    cost_of = cost.map(layout, dtype, "map_kernel", columns, residual is not None, shift, keep)
    return _over_tiles(map_kernel, device, values, plan, cost_of)


def map_into(
    y: torch.Tensor, planes: Planes | None, x: torch.Tensor, layout: Layout, t: torch.Tensor, kind: str, rule: Rule,
    residual: torch.Tensor | None, shift: torch.Tensor | None,
) -> None:  # fmt: skip
    (rows, columns), (t_n, t_c) = t.shape, t.stride()
    if (rows - 1) * t_n + (columns - 1) * t_c >= 2**31:  # the kernel's offsets into t are of 32 bits
        t = t.contiguous()
        t_n, t_c = t.stride()
    bits = None if planes is None else planes.bits
    launch = prepare_map(
        layout, x.stride(), y.stride(), None if residual is None else residual.stride(),
        (0 if rows == 1 else t_n, 0 if columns == 1 else t_c), x.dtype, x.device, kind, rule, shift is not None,
        0 if bits is None else len(bits),
    )  # fmt: skip
    shift = None if shift is None else shift.contiguous()  # (N, C)
    launch(x=x, y=y, residual=residual, t=t, shift=shift, planes=bits)


# ---- grad ------------------------------------------------------------------------------------------------------------


@triton.jit
def _grad_tile(
    g, planes, dA, dx, counter, counted, plane_bytes, L, scale, t, N, P, QA, splits, row_bytes, row_sizes, q_sizes, gs,
    ds, INSIDE: tl.constexpr, KEPT: tl.constexpr, SIGN: tl.constexpr, NONZERO: tl.constexpr, G_UNIT: tl.constexpr,
    D_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """s * kept * g of one tile (kept * g without a sign plane), its dx stored. counter: await_counted.

    dx = s * (s * kept * g + dA / L): rounding is symmetric, so the sign can be put back after it.
    """
    PAST_L1: tl.constexpr = counter is not None and DEPENDENT > 0
    DTYPE: tl.constexpr = dx.dtype.element_ty if g is None else g.dtype.element_ty
    W: tl.constexpr = B // 2 if GROUP == 8 else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    n, row, column, q, rows_live, columns_live = tile(t, N, P, Q, splits, R, B, CHANNELS_LAST, SPLIT, WIDE, REVERSE)
    signed = tl.zeros((R, W), tl.int64 if ACC == tl.float64 else tl.int32)
    if g is not None:
        w = load(
            g, row, column, rows_live, QA, row_sizes, q_sizes, gs, G_UNIT, B, ALIGN, WIDE, GROUP, ACC, PAST_L1=PAST_L1
        )  # fmt: skip
        kept = load_plane(planes, plane_bytes, row, column, row_bytes, rows_live, KEPT, B, GROUP, PTX, PAST_L1)
        signed = w & mask(kept, ACC, GROUP, PTX)
    if SIGN is not None:
        sign = load_plane(planes, plane_bytes, row, column, row_bytes, rows_live, SIGN, B, GROUP, PTX, PAST_L1)
        negated = signs(sign, ACC, GROUP)
        signed ^= negated
    value = elements(signed, DTYPE, GROUP)
    if dx is not None:
        share = None
        if dA is not None:
            other = load_plane(planes, plane_bytes, row, column, row_bytes, rows_live, NONZERO, B, GROUP, PTX, PAST_L1)
            await_counted(counter, counted, DEPENDENT)
            at, sums_live = by_channel(n, row, q, Q, rows_live, columns_live, CHANNELS_LAST)
            share = over_length(tl.load(dA + at, sums_live, 0.0), L, scale, ACC)
            share = share[None, :] if CHANNELS_LAST else share[:, None]
        if INSIDE != 0.0 and g is not None:
            result = elements(w, DTYPE, GROUP)
            result = of_bits(choose(masks(kept, ACC, GROUP, PTX), to_bits(result), to_bits(INSIDE * result)))
            if share is not None:
                own = with_sign(share, of_bits(masks(sign, ACC, GROUP, PTX)))
                result += of_bits(to_bits(own) & masks(other, ACC, GROUP, PTX))
            out = words(result, DTYPE, GROUP, PTX)
        elif share is not None:
            out = (words(value + share, DTYPE, GROUP, PTX) & mask(other, ACC, GROUP, PTX)) ^ negated
        elif SIGN is not None:
            out = signed ^ negated
        else:
            out = signed
        store(dx, out, row, column, rows_live, QA, row_sizes, q_sizes, ds, D_UNIT, B, ALIGN, WIDE, GROUP)
    return value


@kernel(pointers=6, aligned=("g", "dx"))
def grad_kernel(
    g, planes, dA, dx, dtau, counter, counted, plane_bytes, L, scale, N, P, QA, splits, length, row_bytes, row_sizes,
    q_sizes, gs, ds,
    INSIDE: tl.constexpr, OFFSET: tl.constexpr, KEPT: tl.constexpr, SIGN: tl.constexpr, NONZERO: tl.constexpr,
    G_UNIT: tl.constexpr, D_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    GROUP: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dtau (splits, N, C): this piece's part of it. KEPT, SIGN, NONZERO: which plane; None where it is not read.

    By a rule with INSIDE, INSIDE * g is in the place of 0 where it is not kept, and dtau is OFFSET times the sum.
    counter (1,), counted: how many programs of the launch before make dA, and all that this one needs of it.
    """
    await_previous(DEPENDENT if counter is None else 0)
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    REVERSE: tl.constexpr = dtau is None
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, stop = piece(P if CHANNELS_LAST else Q, splits, length, STEP, SPLIT, REVERSE, WIDE)
    if LOOP:
        total = tl.zeros((R, B), ACC)
        for t in range(start, stop):
            total += _grad_tile(
                g, planes, dA, dx, None, 0, plane_bytes, L, scale, t, N, P, QA, splits, row_bytes, row_sizes, q_sizes,
                gs, ds, INSIDE, KEPT, SIGN, NONZERO, G_UNIT, D_UNIT, R, B, ALIGN, CHANNELS_LAST, SPLIT, WIDE, REVERSE,
                ACC, GROUP, PTX, DEPENDENT,
            )  # fmt: skip
    else:
        total = _grad_tile(
            g, planes, dA, dx, counter, counted, plane_bytes, L, scale, start, N, P, QA, splits, row_bytes, row_sizes,
            q_sizes, gs, ds, INSIDE, KEPT, SIGN, NONZERO, G_UNIT, D_UNIT, R, B, ALIGN, CHANNELS_LAST, SPLIT, WIDE,
            REVERSE, ACC, GROUP, PTX, DEPENDENT,
        )  # fmt: skip
    if dtau is not None:
        n, row, column, q, rows_live, columns_live = tile(
            start, N, P, Q, splits, R, B, CHANNELS_LAST, SPLIT, WIDE, REVERSE
        )
        at, sums_live = by_channel(n, row, q, Q, rows_live, columns_live, CHANNELS_LAST)
        sums = -tl.sum(total, AXIS)
        if OFFSET != 1.0:
            sums *= OFFSET
        if SPLIT:
            dtau += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
        tl.store(dtau + at, sums, sums_live)
    end_with_previous(counter, DEPENDENT)


@cached
def prepare_grad(
    layout: Layout, g: Strides | None, dtype: torch.dtype, device: torch.device,
    planes: tuple[int | None, int, int | None], dA: bool, dx: bool, dtau: bool, rule: Rule, counted: int = 0,
) -> Prepared:  # fmt: skip
    """The launch for a g of these strides; dx lies as the layout says. planes: the rows of kept, sign and nonzero;
    counted: programs of the launch before that make dA, where it is called with their counter."""
    plan, values = _tiled(layout, (g or layout.strides, layout.strides), dtype, device, "gd", split=dtau)
    kept, sign, nonzero = planes
    values |= {
        "INSIDE": rule.inside, "OFFSET": rule.offset, "KEPT": None if g is None else kept,
        "SIGN": sign if dtau or dA else None, "NONZERO": nonzero if dA else None,
        "counted": counted,
    }  # fmt: skip
    parts = plan.splits if dtau else 1
    cost_of = cost.grad(layout, dtype, "grad_kernel", g is not None, dA, dx, dtau, parts)
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
    launch(g=g, planes=planes.bits, dA=None if dx is None else dA, dx=dx, dtau=sums)
    if sums is not dtau:
        torch.sum(sums, 0, out=dtau)


# ---- what the three share --------------------------------------------------------------------------------------------


def _tiled(
    layout: Layout, strides: tuple[Strides, ...], dtype: torch.dtype, device: torch.device, operands: str, split: bool,
    apart: bool = False,
) -> tuple[TilePlan, dict]:  # fmt: skip
    """Plan and values of a launch over tiles. split: rows may be cut, because sums over them may be partial."""
    on = walk(layout, *strides, apart=apart)
    plan = tiles(on, dtype.itemsize, multiprocessors(device), split)
    values = tile_values(on, plan, dtype, operands)
    several = plan.loop or plan.splits > 1
    return plan, values | {"R": plan.rows, "splits": plan.splits, "length": plan.piece, "SPLIT": several}


def _over_tiles(fn, device: torch.device, values: dict, plan: TilePlan, cost_of: cost.Cost) -> Prepared:
    return Prepared(fn, device, plan.programs, values, plan, cost_of, warps=plan.warps)


def partial_sums(out: torch.Tensor, launch: Prepared) -> torch.Tensor:
    """What the launch sums into: out (N, C), or (splits, N, C) to be added up."""
    return out if launch.plan.splits == 1 else out.new_empty((launch.plan.splits, *out.shape))
