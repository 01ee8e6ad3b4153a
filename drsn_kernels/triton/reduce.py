"""reduce: A = mean |x| over the spatial dimensions, and the bit planes sign and nonzero.

Reads x once; writes A and 2 bits an element. One launch, and a sum of partials (splits, N, C) where rows are split.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import traffic
from ..planes import Geometry, words
from ..reference import accumulate_dtype
from .launch import Prepared, kernel, tiled, units_of
from .tiles import length_of_rows, offsets, pack, piece, sign_bit, tile, units


@triton.jit
def _reduce_tile(
    x, planes, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs,
    X_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """|x| of one tile, its planes stored."""
    n, p, q, first, rows_live, columns_live = tile(t, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, False)
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, xs, X_UNIT, ALIGN)
    live = rows_live[:, None] & columns_live[None, :]
    value = tl.load(x + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
    if planes is not None:
        at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
        tl.store(planes + at, pack(sign_bit(value), UNIT_BITS), units_live)
        tl.store(planes + plane_units + at, pack((value != 0).to(tl.int32), UNIT_BITS), units_live)
    return tl.abs(value)


@kernel(pointers=3, aligned=("x",))
def reduce_kernel(
    x, out, planes, plane_units, L, N, P, QA, splits, length, UNITS, p_sizes, q_sizes, xs,
    X_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr, UNIT_BITS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out (splits, N, C): this piece's part of the mean."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, stop = piece(P if CHANNELS_LAST else Q, splits, length, STEP, False, WIDE)
    if LOOP:
        total = tl.zeros((R, B), ACC)
        for t in range(start, stop, STEP):
            total += _reduce_tile(
                x, planes, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs,
                X_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, ACC,
            )  # fmt: skip
    else:
        total = _reduce_tile(
            x, planes, plane_units, start, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs,
            X_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, ACC,
        )  # fmt: skip
    mean = tl.sum(total, AXIS) / L.to(ACC)
    n, p, q, first, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, False)
    out += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
    if CHANNELS_LAST:
        tl.store(out + n * Q + q, mean, columns_live)
    else:
        tl.store(out + n * P + p, mean, rows_live)


class Call(NamedTuple):
    launch: Prepared
    splits: int
    unit_bits: int


@functools.lru_cache(maxsize=4096)
def prepare(geo: Geometry, x_strides: tuple, dtype: torch.dtype, device: torch.device) -> Call:
    on = tiled(geo, (x_strides,), dtype, device, True)
    return Call(on.prepare(reduce_kernel, X_UNIT=on.walk.operands[0].unit), on.plan.splits, on.walk.unit_bits)


def partial_means(x: torch.Tensor, geo: Geometry, bits: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """(splits, N, C), whose sum over splits is A, and splits; the planes sign and nonzero go to bits[0] and bits[1]."""
    device = x.device
    call = prepare(geo, x.stride(), x.dtype, device)
    out = torch.empty((call.splits, *geo[0][:2]), dtype=accumulate_dtype(x.dtype), device=device)
    call.launch(device, x, out, units_of(bits, call.unit_bits))
    return out, call.splits


def reduce(x: torch.Tensor, geo: Geometry, planes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    bits = torch.empty((2, words(geo)), dtype=torch.int32, device=x.device) if planes else None
    partial, splits = partial_means(x, geo, bits)
    return (partial[0] if splits == 1 else partial.sum(0)), bits


def budget(geo: Geometry, strides: tuple, dtype: torch.dtype, device: torch.device, planes: bool) -> traffic.Budget:
    parts = prepare(geo, strides, dtype, device).splits
    return traffic.reduce(geo, dtype, planes, "reduce_kernel", parts) + traffic.added_up(
        traffic.sums_bytes(geo, dtype), parts
    )
