"""The shrinkage step with the standard gate: one launch each way where the batch is not coupled, else three or four.

                       forward                                      backward
    one pass           forward_kernel                               backward_kernel, hidden_grad
    several launches   reduce, hidden, [alpha,] apply               grad (dtau), hidden_grad, [pooled_grad,] grad (dx)

[alpha] and [pooled_grad] are launches of their own only where a row is too short to carry a dot product over the hidden
units (plans.gate). Between launches nothing comes back to the host.
"""

import functools
from typing import NamedTuple

import torch
import triton.language as tl

from ..gates import StandardGate
from ..planes import Geometry, words
from ..reference import accumulate_dtype
from . import apply, gate, grad, one_pass, plans, reduce
from .launch import multiprocessors, on_device, tiled, units_of
from .plans import GatePlan, OnePassPlan
from .walk import Walk, walk


class Kept(NamedTuple):
    """What a backward pass needs: 3 bits an element, and tensors of the gate's size. None where nothing is kept."""

    bits: torch.Tensor | None  # (3, words): sign, nonzero, kept
    pooled: torch.Tensor | None  # A (N, C)
    hidden: torch.Tensor | None  # u (N, H)
    alpha: torch.Tensor | None  # (N, O)
    mean: torch.Tensor | None  # (H,), of the batch or running
    var: torch.Tensor | None


@functools.lru_cache(maxsize=4096)
def _one_pass(
    geo: Geometry, strides: tuple, hidden: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[Walk, OnePassPlan | str]:
    on = walk(geo, *strides)
    return on, plans.one_pass(on, hidden, outputs, dtype.itemsize, multiprocessors(device))


def plan_of(
    geo: Geometry, strides: tuple, parts: StandardGate, dtype: torch.dtype, device: torch.device
) -> tuple[Walk, OnePassPlan] | str:
    """The one-pass plan, or why the step takes several launches."""
    if parts.batch_stats:
        return "BatchNorm in training couples the batch: its statistics are known only when all of x has been read"
    on, plan = _one_pass(geo, strides, parts.w1.shape[0], parts.w2.shape[0], dtype, device)
    return plan if isinstance(plan, str) else (on, plan)


def unsupported(x: torch.Tensor, parts: StandardGate) -> str | None:
    if x.shape[1] > plans.MOST_CHANNELS:
        return f"{x.shape[1]} channels, the fused gate takes at most {plans.MOST_CHANNELS}"
    return None


def _constants(on: Walk, plan: OnePassPlan, parts: StandardGate, average: str | None, dtype: torch.dtype) -> dict:
    return {
        "AVERAGE": average, "ONE": parts.w2.shape[0] == 1, "EPS": parts.eps, "LOOP": plan.loop, "S": plan.samples,
        "PB": plan.rows, "B": plan.columns, "BH": plan.units, "UNIT_BITS": on.unit_bits, "ALIGN": on.align,
        "CHANNELS_LAST": on.channels_last, "WIDE": on.wide,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32, "num_warps": plan.warps,
    }  # fmt: skip


def _length(geo: Geometry) -> int:
    return geo[0][2:].numel()


def _gate_plan(
    geo: Geometry, strides: tuple, parts: StandardGate, dtype: torch.dtype, device: torch.device
) -> GatePlan:
    tiles = tiled(geo, strides, dtype, device, False)
    return plans.gate(tiles.walk, tiles.plan, parts.w1.shape[0])


def forward(
    x: torch.Tensor,
    geo: Geometry,
    parts: StandardGate,
    average: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    keep: bool,
    want_tau: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Kept]:
    """y, tau if wanted, and what a backward pass needs if `keep`."""
    shape, dense = geo
    (n, c), device, acc = shape[:2], x.device, accumulate_dtype(x.dtype)
    hidden_size, outputs = parts.w1.shape[0], parts.w2.shape[0]
    y = torch.empty_strided(shape, dense, dtype=x.dtype, device=device) if out is None else out
    strides = (x.stride(), y.stride(), (y if residual is None else residual).stride())
    one = plan_of(geo, strides, parts, x.dtype, device)
    bits = torch.empty((3, words(geo)), dtype=torch.int32, device=device) if keep else None
    new = functools.partial(torch.empty, dtype=acc, device=device)
    tau = new((n, 1 if outputs == 1 and average != "channel" else c)) if want_tau else None
    mean, var = parts.mean, parts.var
    if not isinstance(one, str):
        on, plan = one
        pooled, hidden, alpha = (new((n, c)), new((n, hidden_size)), new((n, outputs))) if keep else (None, None, None)
        units = None if bits is None else units_of(bits, on.unit_bits)
        (xs, x_unit), (ys, y_unit), (rs, r_unit) = on.operands
        on_device(
            device, one_pass.forward_kernel[(-(-n // plan.samples), 1, 1)],
            x, y, residual, units, 0 if units is None else units.shape[1], pooled, hidden, alpha, tau,
            parts.w1, parts.b1, mean, var, parts.gamma, parts.beta, parts.w2, parts.b2,
            on.n, on.p, on.q // on.align, on.units, on.p_sizes, on.q_sizes, hidden_size, _length(geo), xs, ys, rs,
            X_UNIT=x_unit, Y_UNIT=y_unit, R_UNIT=r_unit, **_constants(on, plan, parts, average, x.dtype),
        )  # fmt: skip
        return y, tau, Kept(bits, pooled, hidden, alpha, mean, var)

    partial, splits = reduce.partial_means(x, geo, bits)
    pooled = partial[0] if splits == 1 else new((n, c))
    hidden, alpha = new((n, hidden_size)), new((n, outputs)) if keep else None
    if parts.batch_stats:
        mean, var = new(hidden_size), new(hidden_size)
    plan = _gate_plan(geo, strides, parts, x.dtype, device)
    on_device(
        device, gate.hidden_kernel[(-(-hidden_size // plan.units), 1, 1)],
        partial, None if splits == 1 else pooled, parts.w1, parts.b1, mean, var, parts.mean, parts.var, parts.batches,
        hidden, n, c, hidden_size, splits,
        BATCH_STATS=parts.batch_stats, MOMENTUM=parts.momentum, BN=plan.samples, BH=plan.units, CB=plan.channels,
        num_warps=plan.warps,
    )  # fmt: skip
    second = (pooled, hidden, mean, var, parts.gamma, parts.beta, parts.w2, parts.b2)
    constants = {"AVERAGE": average, "ONE": outputs == 1, "EPS": parts.eps, "BH": plan.dot}
    if plan.on_the_way:
        kept = None if bits is None else bits[2]
        apply.launch(x, y, residual, geo, None, kept, 1, (*second, alpha, tau, c, hidden_size), constants)
    else:
        alpha = new((n, outputs)) if alpha is None else alpha
        used = new((n, 1 if outputs == 1 and average != "channel" else c)) if tau is None else tau
        on_device(
            device, gate.alpha_kernel[(-(-used.numel() // plan.vector), 1, 1)],
            *second, alpha, used, n, c, hidden_size, **(constants | {"BH": 16}), V=plan.vector, num_warps=plan.warps,
        )  # fmt: skip
        apply.launch(x, y, residual, geo, used, None if bits is None else bits[2], 1)
    return y, tau, Kept(bits, pooled, hidden, alpha, mean, var)


def backward(
    geo: Geometry,
    dtype: torch.dtype,
    parts: StandardGate,
    average: str | None,
    kept: Kept,
    g: torch.Tensor,
    tau_grad: torch.Tensor | None,
    want_dx: bool,
) -> tuple[torch.Tensor | None, ...]:
    """dx, and the gradients of w1, b1, gamma, beta, w2, b2."""
    shape, dense = geo
    (n, c), device, acc = shape[:2], g.device, accumulate_dtype(dtype)
    hidden_size, outputs = parts.w1.shape[0], parts.w2.shape[0]
    bits, pooled, hidden, alpha, mean, var = kept
    new = functools.partial(torch.empty, dtype=acc, device=device)
    if tau_grad is not None:
        tau_grad = tau_grad.contiguous()
    one = plan_of(geo, (g.stride(), dense), parts, dtype, device)
    dx = du = around = None
    if want_dx and not isinstance(one, str):
        on, plan = one
        dx = torch.empty_strided(shape, dense, dtype=dtype, device=device)
        dtau, splits = new((n, c)), 1
        units = units_of(bits, on.unit_bits)
        (gs, g_unit), (ds, d_unit) = on.operands
        on_device(
            device, one_pass.backward_kernel[(-(-n // plan.samples), 1, 1)],
            g, dx, units, units.shape[1], dtau, tau_grad, pooled, hidden, alpha, parts.w1, mean, var, parts.gamma,
            parts.beta, parts.w2, on.n, on.p, on.q // on.align, on.units, on.p_sizes, on.q_sizes, hidden_size,
            _length(geo), gs, ds,
            G_UNIT=g_unit, D_UNIT=d_unit, **_constants(on, plan, parts, average, dtype),
        )  # fmt: skip
    else:
        dtau, splits = grad.launch(geo, dtype, g, bits[2], bits[0], None, None, None, 1, None, True)
        if want_dx or parts.batch_stats:
            du = new((n, hidden_size))
        if want_dx:
            around = new((n, c))
    plan = _gate_plan(geo, (dense, dense), parts, dtype, device)
    grads = [None if p is None else torch.empty_like(p) for p in parts[:6]]
    dw1, db1, dgamma, dbeta, dw2, db2 = grads
    on_device(
        device, gate.hidden_grad_kernel[(-(-hidden_size // plan.units), 1, 1)],
        dtau, tau_grad, pooled, alpha, hidden, mean, var, parts.gamma, parts.beta, parts.w2, du, around,
        dw1, db1, dgamma, dbeta, dw2, db2, n, c, hidden_size, splits,
        AVERAGE=average, ONE=outputs == 1, BATCH_STATS=parts.batch_stats, EPS=parts.eps,
        BN=plan.samples, BH=plan.units, CB=plan.channels, num_warps=plan.warps,
    )  # fmt: skip
    if around is not None:
        if plan.on_the_way:
            pooled_grad, gated = None, (du, parts.w1, around, c, hidden_size)
        else:
            pooled_grad, gated = new((n, c)), None
            on_device(
                device, gate.pooled_grad_kernel[(-(-n * c // plan.vector), 1, 1)],
                du, parts.w1, around, pooled_grad, n, c, hidden_size,
                V=plan.vector, BH=16, num_warps=plan.warps,
            )  # fmt: skip
        dx = torch.empty_strided(shape, dense, dtype=dtype, device=device)
        grad.launch(geo, dtype, g, bits[2], bits[0], bits[1], pooled_grad, gated, plan.dot, dx, False)
    return (dx, *grads)
