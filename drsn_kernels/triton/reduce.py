"""reduce: A = mean |x| over the spatial dimensions, and the bit planes sign and nonzero.

Reads x once; writes A and 2 bits an element. One launch, and a sum of partials (splits, N, C) where rows are split.
For squeeze_excite the same kernel makes the mean of x, and, reading two tensors, the sum of g * x; SUM says which.
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
    x, times, planes, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs, ts,
    SUM: tl.constexpr, X_UNIT: tl.constexpr, T_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
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
        tl.store(planes + plane_units + at, pack((value != 0).to(tl.int32), UNIT_BITS), units_live)
    if times is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, ts, T_UNIT, ALIGN)
        value *= tl.load(times + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
    if SUM == "magnitudes":
        return tl.abs(value)
    else:
        return value


@kernel(pointers=4, aligned=("x", "times"))
def reduce_kernel(
    x, times, out, planes, plane_units, L, N, P, QA, splits, length, UNITS, p_sizes, q_sizes, xs, ts,
    SUM: tl.constexpr, X_UNIT: tl.constexpr, T_UNIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    LOOP: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out (splits, N, C): this piece's part of the mean, or of the sum of products."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
    start, stop = piece(P if CHANNELS_LAST else Q, splits, length, STEP, False, WIDE)
    if LOOP:
        total = tl.zeros((R, B), ACC)
        for t in range(start, stop, STEP):
            total += _reduce_tile(
                x, times, planes, plane_units, t, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs, ts,
                SUM, X_UNIT, T_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, ACC,
            )  # fmt: skip
    else:
        total = _reduce_tile(
            x, times, planes, plane_units, start, N, P, Q, splits, UNITS, p_sizes, q_sizes, xs, ts,
            SUM, X_UNIT, T_UNIT, R, B, UNIT_BITS, ALIGN, CHANNELS_LAST, WIDE, ACC,
        )  # fmt: skip
    sums = tl.sum(total, AXIS)
    if SUM != "products":
        sums /= L.to(ACC)
    n, p, q, first, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, False)
    out += (tl.program_id(0) % splits).to(tl.int64) * N * (Q if CHANNELS_LAST else P)
    if CHANNELS_LAST:
        tl.store(out + n * Q + q, sums, columns_live)
    else:
        tl.store(out + n * P + p, sums, rows_live)


class Call(NamedTuple):
    launch: Prepared
    splits: int
    unit_bits: int


def prepare(
    geo: Geometry,
    x_strides: tuple,
    dtype: torch.dtype,
    device: torch.device,
    what: str = "magnitudes",
    times_strides: tuple | None = None,
) -> Call:
    """The launch for x, and what it is multiplied by, of these strides."""
    return _prepare(geo, x_strides, dtype, device, what, times_strides)


@functools.lru_cache(maxsize=4096)  # apart from the defaults: arguments left out would be another key
def _prepare(geo, x_strides, dtype, device, what, times_strides) -> Call:
    on = tiled(geo, (x_strides, times_strides or x_strides), dtype, device, True)
    units = dict(zip(("X_UNIT", "T_UNIT"), (unit for _, unit in on.walk.operands), strict=True))
    return Call(on.prepare(reduce_kernel, SUM=what, **units), on.plan.splits, on.walk.unit_bits)


def partial_sums(
    x: torch.Tensor,
    geo: Geometry,
    bits: torch.Tensor | None,
    what: str = "magnitudes",
    times: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """(splits, N, C), whose sum over splits is A, and splits; the planes sign and nonzero go to bits[0] and bits[1]."""
    device = x.device
    call = prepare(geo, x.stride(), x.dtype, device, what, None if times is None else times.stride())
    out = torch.empty((call.splits, *geo[0][:2]), dtype=accumulate_dtype(x.dtype), device=device)
    call.launch(device, x, times, out, units_of(bits, call.unit_bits))
    return out, call.splits


def reduce(x: torch.Tensor, geo: Geometry, planes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    bits = torch.empty((2, words(geo)), dtype=torch.int32, device=x.device) if planes else None
    return _added_up(*partial_sums(x, geo, bits)), bits


def _added_up(partial: torch.Tensor, splits: int) -> torch.Tensor:
    return partial[0] if splits == 1 else partial.sum(0)


def mean(x: torch.Tensor, geo: Geometry) -> torch.Tensor:
    return _added_up(*partial_sums(x, geo, None, "values"))


def scale_sums(geo: Geometry, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _added_up(*partial_sums(g, geo, None, "products", x))


def budget(geo: Geometry, strides: tuple, dtype: torch.dtype, device: torch.device, planes: bool) -> traffic.Budget:
    parts = prepare(geo, strides, dtype, device).splits  # the same for the mean of x
    return traffic.reduce(geo, dtype, planes, "reduce_kernel", parts) + traffic.added_up(
        traffic.sums_bytes(geo, dtype), parts
    )


def products_budget(geo: Geometry, strides: tuple, dtype: torch.dtype, device: torch.device) -> traffic.Budget:
    """strides: of g and x."""
    parts = prepare(geo, strides[0], dtype, device, "products", strides[1]).splits
    return traffic.products(geo, dtype, "reduce_kernel", parts) + traffic.added_up(
        traffic.sums_bytes(geo, dtype), parts
    )
