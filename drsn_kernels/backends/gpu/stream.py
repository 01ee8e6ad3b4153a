"""apply: y = sign(x) * relu(|x| - tau) [+ residual], and the bit planes kept [and sign].

tau is given, or computed on the way from the standard gate's hidden units (gate.tau_of). For squeeze_excite the same
kernel makes y = x * s [+ residual] and dx = g * s + dA / L; MAP says which.
Reads x (and the residual) once; writes y and 1 or 2 bits an element. One launch, backwards through the tensor: after
`reduce`, which reads x forwards, the part of x read last is still in L2.
"""

import functools
from typing import NamedTuple

import torch
import triton.language as tl

from .. import traffic
from ..planes import Geometry, words
from ..reference import SOFT, Rule
from .gate import tau_of
from .launch import Prepared, kernel, tiled, units_of
from .plans import ON_THE_WAY_REGISTERS
from .tiles import length_of_rows, offsets, pack, piece, piecewise, sign_bit, soft_threshold, tile, units


@kernel(pointers=16, aligned=("x", "y", "residual"))
def apply_kernel(
    x, y, residual, tau, planes, shift, pooled, hidden, mean, var, gamma, beta, w2, b2, alpha_out, tau_out,
    plane_units, L, N, P, QA, splits, length, UNITS, p_sizes, q_sizes, xs, ys, rs, tau_n, tau_c, C, H,
    MAP: tl.constexpr, INSIDE: tl.constexpr, OFFSET: tl.constexpr,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, BH: tl.constexpr,
    TWO_PLANES: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, LOOP: tl.constexpr, UNIT_BITS: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = R if CHANNELS_LAST else B
    Q = length_of_rows(QA, ALIGN, WIDE)
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
    if MAP == "scale":
        result = value * threshold
    elif MAP == "soft":
        result = soft_threshold(value, threshold)
    else:
        result = piecewise(value, threshold, INSIDE, OFFSET)
    if shift is not None:
        share = tl.load(shift + sample * (Q if CHANNELS_LAST else P) + c, threshold_live, 0.0) / L.to(ACC)
        if CHANNELS_LAST:
            result += share[None, :]
        else:
            result += share[:, None]
    if residual is not None:
        rows, columns = offsets(n, p, q, p_sizes, q_sizes, rs, R_UNIT, ALIGN)
        result += tl.load(residual + rows[:, None] + columns[None, :], live, 0.0).to(ACC)
    rows, columns = offsets(n, p, q, p_sizes, q_sizes, ys, Y_UNIT, ALIGN)
    tl.store(y + rows[:, None] + columns[None, :], result.to(y.dtype.element_ty), live)


class Gate(NamedTuple):
    """What the kernel has to know of a standard gate that it ends; none where it is given tau."""

    channels: int = 0
    hidden: int = 0
    average: str | None = None
    one: bool = False
    eps: float = 0.0
    dot: int = 1


def prepare(
    geo: Geometry,
    strides: tuple,
    tau_strides: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    two_planes: bool,
    gate: Gate = Gate(),  # noqa: B008  immutable
    what: str = "soft",
    rule: Rule = SOFT,
) -> tuple[Prepared, int]:
    """The launch for x, y and the residual of these strides, and the bits of a plane's unit."""
    return _prepare(geo, strides, tau_strides, dtype, device, two_planes, gate, what, rule)


@functools.lru_cache(maxsize=4096)  # apart from the defaults: arguments left out would be another key
def _prepare(geo, strides, tau_strides, dtype, device, two_planes, gate, what, rule) -> tuple[Prepared, int]:
    on = tiled(geo, strides, dtype, device, False)
    registers = {} if gate.channels == 0 else {"maxnreg": ON_THE_WAY_REGISTERS}
    launch = on.prepare(
        apply_kernel, (*tau_strides, gate.channels, gate.hidden), TWO_PLANES=two_planes,
        MAP=what if rule == SOFT else "pieces", INSIDE=rule.inside, OFFSET=rule.offset,
        AVERAGE=gate.average, ONE=gate.one, EPS=gate.eps, BH=gate.dot, X_UNIT=on.walk.operands[0].unit,
        Y_UNIT=on.walk.operands[1].unit, R_UNIT=on.walk.operands[2].unit, **registers,
    )  # fmt: skip
    return launch, on.walk.unit_bits


NO_GATE = (None,) * 11  # nor a shift


def apply(
    x: torch.Tensor,
    geo: Geometry,
    tau: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    planes: int,
    rule: Rule = SOFT,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    device = x.device
    y = torch.empty_strided(*geo, dtype=x.dtype, device=device) if out is None else out
    bits = torch.empty((planes, words(geo)), dtype=torch.int32, device=device) if planes else None
    strides = (x.stride(), y.stride(), (y if residual is None else residual).stride())
    launch, unit_bits = prepare(geo, strides, _broadcast(tau), x.dtype, device, planes == 2, rule=rule)
    launch(device, x, y, residual, tau, units_of(bits, unit_bits), *NO_GATE)
    return y, bits


def _broadcast(tau: torch.Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(tau.shape, tau.stride(), strict=True))


def scale(x: torch.Tensor, geo: Geometry, s: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return _scaled(x, geo, x.dtype, s, residual, None)


def scale_grad(
    geo: Geometry, dtype: torch.dtype, g: torch.Tensor, s: torch.Tensor, mean_grad: torch.Tensor | None
) -> torch.Tensor:
    return _scaled(g, geo, dtype, s, None, None if mean_grad is None else mean_grad.contiguous())


def _scaled(x, geo, dtype, s, residual, shift) -> torch.Tensor:
    """x * s + residual, or x * s + shift / L."""
    device = x.device
    y = torch.empty_strided(*geo, dtype=dtype, device=device)
    strides = (x.stride(), geo[1], (y if residual is None else residual).stride())
    launch, _ = prepare(geo, strides, _broadcast(s), dtype, device, False, what="scale")
    launch(device, x, y, residual, s, None, shift, *NO_GATE[1:])
    return y


def budget(geo: Geometry, dtype: torch.dtype, tau: int, residual: bool, planes: int) -> traffic.Budget:
    """tau: bytes of it, or of what it is computed from on the way."""
    return traffic.apply(geo, dtype, tau, residual, planes, "apply_kernel")
