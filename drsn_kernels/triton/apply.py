"""apply: y = sign(x) * relu(|x| - tau) [+ residual], and the bit planes kept [and sign].

tau is given, or computed on the way from the standard gate's hidden units (gate.tau_of).
Reads x (and the residual) once; writes y and 1 or 2 bits an element. One launch, backwards through the tensor: after
`reduce`, which reads x forwards, the part of x read last is still in L2.
"""

import torch
import triton
import triton.language as tl

from ..planes import Geometry, words
from .gate import tau_of
from .launch import SIZES, on_device, tiled, units_of
from .tiles import offsets, pack, piece, sign_bit, soft_threshold, tile, units


@triton.jit(
    do_not_specialize=[*SIZES, "plane_units", "tau_n", "tau_c", "xs", "ys", "rs", "C", "H"],
    do_not_specialize_on_alignment=["planes"],
)
def apply_kernel(
    x, y, residual, tau, planes, plane_units, tau_n, tau_c,
    pooled, hidden, mean, var, gamma, beta, w2, b2, alpha_out, tau_out, C, H,
    N, P, QA, splits, length, UNITS, p_sizes, q_sizes, xs, ys, rs,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, BH: tl.constexpr,
    TWO_PLANES: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = QA * ALIGN
    start, _ = piece(P if CHANNELS_LAST else Q, splits, length, STEP, True, WIDE)
    n, p, q, first, rows_live, columns_live = tile(start, N, P, Q, splits, R, B, CHANNELS_LAST, WIDE, True)
    live = rows_live[:, None] & columns_live[None, :]
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, xs, X_UNIT, ALIGN)
    value = tl.load(x + rows[:, None] + columns[None, :], live, 0.0, eviction_policy="evict_first").to(ACC)
    if CHANNELS_LAST:
        sample = n + q * 0
        c = q
        threshold_live = columns_live
    else:
        sample = n
        c = p
        threshold_live = rows_live
    if tau is not None:
        threshold = tl.load(tau + sample * tau_n + c * tau_c, threshold_live, 0.0)
    else:
        threshold, alpha = tau_of(
            sample, c, threshold_live, pooled, hidden, mean, var, gamma, beta, w2, b2, C, H, AVERAGE, ONE, EPS, BH
        )  # fmt: skip
        first_piece = threshold_live & (start == 0)  # one writer for each
        if alpha_out is not None:
            if ONE:
                tl.store(alpha_out + sample, alpha, first_piece & (c == 0))
            else:
                tl.store(alpha_out + sample * C + c, alpha, first_piece)
        if tau_out is not None:
            if ONE and AVERAGE != "channel":
                tl.store(tau_out + sample, threshold, first_piece & (c == 0))
            else:
                tl.store(tau_out + sample * C + c, threshold, first_piece)
    if CHANNELS_LAST:
        threshold = threshold[None, :]
    else:
        threshold = threshold[:, None]
    if planes is not None:
        at, units_live = units(n, p, first, P, UNITS, rows_live, B, UNIT_BITS)
        kept = (value != 0) & ((tl.abs(value) <= threshold) == 0)
        tl.store(planes + at, pack(kept.to(tl.int32), UNIT_BITS), units_live)
        if TWO_PLANES:
            tl.store(planes + plane_units + at, pack(sign_bit(value), UNIT_BITS), units_live)
    result = soft_threshold(value, threshold)
    if residual is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, rs, R_UNIT, ALIGN)
        result += tl.load(residual + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, ys, Y_UNIT, ALIGN)
    tl.store(y + rows[:, None] + columns[None, :], result.to(y.dtype.element_ty), live)


# What a kernel with tau as an argument is given in place of the gate.
_NO_GATE = (None,) * 10 + (0, 0)
_NO_CONSTANTS = {"AVERAGE": None, "ONE": False, "EPS": 0.0, "BH": 1}


def launch(
    x: torch.Tensor,
    y: torch.Tensor,
    residual: torch.Tensor | None,
    geo: Geometry,
    tau: torch.Tensor | None,
    bits: torch.Tensor | None,
    planes: int,
    gate: tuple = _NO_GATE,
    constants: dict = _NO_CONSTANTS,
) -> None:
    """Without tau the kernel computes it from `gate`: pooled, hidden, mean, ..., in the order of its arguments."""
    strides = (x.stride(), y.stride(), (y if residual is None else residual).stride())
    plan = tiled(geo, strides, x.dtype, x.device, False)
    units = None if bits is None else units_of(bits, plan.walk.unit_bits)
    (xs, x_unit), (ys, y_unit), (rs, r_unit) = plan.walk.operands
    tau_n, tau_c = 0, 0
    if tau is not None:
        tau_n, tau_c = (0 if size == 1 else stride for size, stride in zip(tau.shape, tau.stride(), strict=True))
    on_device(
        x.device, apply_kernel[plan.grid],
        x, y, residual, tau, units, 0 if planes < 2 else units.shape[1], tau_n, tau_c, *gate, *plan.sizes, xs, ys, rs,
        TWO_PLANES=planes == 2, X_UNIT=x_unit, Y_UNIT=y_unit, R_UNIT=r_unit, **constants, **plan.constants,
    )  # fmt: skip


def apply(
    x: torch.Tensor,
    geo: Geometry,
    tau: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    planes: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, dense = geo
    y = torch.empty_strided(shape, dense, dtype=x.dtype, device=x.device) if out is None else out
    bits = torch.empty((planes, words(geo)), dtype=torch.int32, device=x.device) if planes else None
    launch(x, y, residual, geo, tau, bits, planes)
    return y, bits
