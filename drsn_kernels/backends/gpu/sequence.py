"""The shrinkage step with the standard gate: one launch each way where the batch is not coupled, else three or four.

                       forward                                      backward
    one pass           forward_kernel                               backward_kernel, hidden_grad
    several launches   reduce, hidden, [alpha,] apply               grad (dtau), hidden_grad, [pooled_grad,] grad (dx)

[alpha] and [pooled_grad] are launches of their own only where a row is too short to carry a dot product over the hidden
units (plans.gate). Where the batch is not coupled, a large one is shared out in hidden_grad, whose partial sums torch
then adds: deterministic, one more short launch. Between launches nothing comes back to the host.
"""

import functools
import itertools
from typing import NamedTuple

import torch

from .. import traffic
from ..gates import Kept, StandardGate
from ..planes import Geometry, words
from ..reference import accumulate_dtype
from ..traffic import Budget, StandardCall
from . import apply, gate, grad, one_pass, plans, reduce
from .launch import Prepared, common, multiprocessors, plane_units, tiled, units_of
from .plans import GatePlan, OnePassPlan
from .walk import Walk, walk

_LAUNCH = {"num_warps": plans.GATE_WARPS, "maxnreg": plans.MOST_REGISTERS}  # of the gate's own kernels


class Call(NamedTuple):
    """What a plan depends on, besides the walk: the key under which prepared launches are kept."""

    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    hidden: int
    outputs: int
    average: str | None
    coupled: bool  # batch statistics
    eps: float
    momentum: float

    @classmethod
    def of(cls, geo, dtype, device, parts: StandardGate, average) -> "Call":
        outputs, hidden = parts.w2.shape
        return cls(geo, dtype, device, hidden, outputs, average, parts.batch_stats, parts.eps, parts.momentum)

    @property
    def channels(self) -> int:
        return self.geometry[0][1]

    @property
    def one_tau(self) -> bool:
        """tau is (N, 1): one alpha, and an average that is shared or none."""
        return self.outputs == 1 and self.average != "channel"


def plan_of(call: Call, strides: tuple) -> tuple[Walk, OnePassPlan] | str:
    """The one-pass plan, or why the step takes several launches."""
    if call.coupled:
        return "BatchNorm in training couples the batch: its statistics are known only when all of x has been read"
    on = walk(call.geometry, *strides)
    plan = plans.one_pass(on, call.hidden, call.outputs, call.dtype.itemsize, multiprocessors(call.device))
    return plan if isinstance(plan, str) else (on, plan)


def unsupported(x: torch.Tensor, parts: StandardGate) -> str | None:
    if x.shape[1] > plans.MOST_CHANNELS:
        return f"{x.shape[1]} channels, the fused gate takes at most {plans.MOST_CHANNELS}"
    if x.shape[0] * max(parts.w1.shape) >= 2**31:
        return "samples x channels, or x hidden units, do not fit the fused gate's 32-bit offsets"
    return None


def _one_pass(fn, call: Call, on: Walk, plan: OnePassPlan, **constants) -> Prepared:
    geo = call.geometry
    integers = (
        plane_units(geo, on), geo[0][2:].numel(), call.hidden, on.n, on.p, on.q // on.align, on.units,
        on.p_sizes, on.q_sizes, *(strides for strides, _ in on.operands),
    )  # fmt: skip
    constants |= {
        "AVERAGE": call.average, "ONE": call.outputs == 1, "EPS": call.eps, "LOOP": plan.loop, "S": plan.samples,
        "PB": plan.rows, "B": plan.columns, "BH": plan.units, "num_warps": plan.warps, "maxnreg": plan.registers,
        **common(on, call.dtype),
    }  # fmt: skip
    return Prepared(fn, -(-on.n // plan.samples), integers, constants, plan)


def _gate_plan(call: Call, strides: tuple) -> GatePlan:
    on = tiled(call.geometry, strides, call.dtype, call.device, False)
    sms = multiprocessors(call.device)
    return plans.gate(on.walk, on.plan, call.hidden, call.coupled, call.dtype.itemsize, sms)


# ---- forward ---------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    """Prepared launches: `one`, or the others (`alpha` only where the gate ends apart)."""

    unit_bits: int
    one: Prepared | None
    splits: int = 1
    hidden: Prepared | None = None
    alpha: Prepared | None = None
    apply: Prepared | None = None


@functools.lru_cache(maxsize=4096)
def _prepare_forward(call: Call, strides: tuple) -> Forward:
    """strides: of x, y and the residual."""
    one = plan_of(call, strides)
    if not isinstance(one, str):
        on, plan = one
        units = dict(zip(("X_UNIT", "Y_UNIT", "R_UNIT"), (unit for _, unit in on.operands), strict=True))
        return Forward(on.unit_bits, _one_pass(one_pass.forward_kernel, call, on, plan, **units))
    (n, c, *_), geo, dtype, device = call.geometry[0], call.geometry, call.dtype, call.device
    first, plan = reduce.prepare(geo, strides[0], dtype, device), _gate_plan(call, strides)
    hidden = Prepared(
        gate.hidden_kernel, plan.blocks * plan.shares, (n, c, call.hidden, first.splits, plan.share, plan.blocks),
        {"BATCH_STATS": call.coupled, "MOMENTUM": call.momentum, "BN": plan.samples, "BH": plan.units,
         "CB": plan.channels, **_LAUNCH}, plan,
    )  # fmt: skip
    if plan.on_the_way:
        ends = apply.Gate(c, call.hidden, call.average, call.outputs == 1, call.eps, plan.dot)
        last, unit_bits = apply.prepare(geo, strides, (0, 0), dtype, device, False, ends)
        return Forward(unit_bits, None, first.splits, hidden, None, last)
    columns = 1 if call.one_tau else c
    alpha = Prepared(
        gate.alpha_kernel, -(-n * columns // plan.vector), (n, c, call.hidden),
        {"AVERAGE": call.average, "ONE": call.outputs == 1, "EPS": call.eps, "V": plan.vector, "BH": plan.vector_dot,
         **_LAUNCH}, plan,
    )  # fmt: skip
    last, unit_bits = apply.prepare(geo, strides, (1, 0) if columns == 1 else (c, 1), dtype, device, False)
    return Forward(unit_bits, None, first.splits, hidden, alpha, last)


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
    n, c = shape[0], shape[1]
    device, dtype = x.device, x.dtype
    call = Call.of(geo, dtype, device, parts, average)
    y = torch.empty_strided(shape, dense, dtype=dtype, device=device) if out is None else out
    step = _prepare_forward(call, (x.stride(), y.stride(), (y if residual is None else residual).stride()))

    def new(rows: int, columns: int) -> torch.Tensor:  # parses its arguments faster than torch.empty
        return torch.empty_strided((rows, columns), (columns, 1), dtype=accumulate_dtype(dtype), device=device)

    bits = torch.empty((3, words(geo)), dtype=torch.int32, device=device) if keep else None
    units = units_of(bits, step.unit_bits)
    tau = new(n, 1 if call.one_tau else c) if want_tau else None
    mean, var, norm = parts.mean, parts.var, (parts.gamma, parts.beta)
    if step.one is not None:
        kept = Kept(None, None, None, None, None, None)
        if keep:
            kept = Kept(bits, new(n, c), new(n, call.hidden), new(n, call.outputs), mean, var)
        step.one(
            device, x, y, residual, units, kept.pooled, kept.hidden, kept.alpha, tau,
            parts.w1, parts.b1, mean, var, *norm, parts.w2, parts.b2,
        )  # fmt: skip
        return y, tau, kept

    partial, _ = reduce.partial_sums(x, geo, bits)
    pooled, hidden = new(n, c), new(n, call.hidden)
    if parts.batch_stats:
        mean, var = new(2, call.hidden)
    step.hidden(
        device, partial, pooled, parts.w1, parts.b1, mean, var,
        parts.mean, parts.var, parts.batches, hidden,
    )  # fmt: skip
    kept_plane = None if units is None else units[2]
    if step.alpha is None:
        alpha = new(n, call.outputs) if keep else None
        step.apply(
            device, x, y, residual, None, kept_plane, None, pooled, hidden, mean, var, *norm, parts.w2, parts.b2,
            alpha, tau,
        )  # fmt: skip
    else:
        alpha = new(n, call.outputs)
        used = new(n, 1 if call.one_tau else c) if tau is None else tau
        step.alpha(device, pooled, hidden, mean, var, *norm, parts.w2, parts.b2, alpha, used)
        step.apply(device, x, y, residual, used, kept_plane, *apply.NO_GATE)
    return y, tau, Kept(bits, pooled, hidden, alpha, mean, var)


# ---- backward --------------------------------------------------------------------------------------------------------


class Backward(NamedTuple):
    """Prepared launches: `one` and hidden, or all the others (`pooled` only where dA is computed apart)."""

    unit_bits: int
    one: Prepared | None
    hidden: Prepared
    shares: int
    sizes: tuple[int, ...]  # of the parameters' gradients in their order, each up to 16 bytes
    splits: int = 1
    dtau: Prepared | None = None
    pooled: Prepared | None = None
    dx: Prepared | None = None


@functools.lru_cache(maxsize=4096)
def _prepare_backward(call: Call, strides: tuple, normed: bool, want_dx: bool) -> Backward:
    """strides: of g and dx."""
    (n, c, *_), geo, dtype, device = call.geometry[0], call.geometry, call.dtype, call.device
    one = plan_of(call, strides) if want_dx else "without dx there is nothing to fuse"
    first = None if not isinstance(one, str) else grad.prepare(geo, strides, dtype, device, True)
    plan = _gate_plan(call, strides)
    h, o = call.hidden, call.outputs
    sizes = tuple(-(-size // 4) * 4 for size in (h * c, h, o * h, o, *((h, h) if normed else ())))
    hidden = Prepared(
        gate.hidden_grad_kernel, plan.blocks * plan.shares,
        (n, c, h, 1 if first is None else first.splits, plan.share, plan.blocks, sum(sizes)),
        {"AVERAGE": call.average, "ONE": o == 1, "BATCH_STATS": call.coupled, "EPS": call.eps,
         "BN": max(plan.samples // 2, 1), "BH": plan.units, "CB": plan.channels, **_LAUNCH}, plan,
    )  # fmt: skip
    if first is None:
        on, tile = one
        units = dict(zip(("G_UNIT", "D_UNIT"), (unit for _, unit in on.operands), strict=True))
        launch = _one_pass(one_pass.backward_kernel, call, on, tile, **units)
        return Backward(on.unit_bits, launch, hidden, plan.shares, sizes)
    pooled = None
    if not plan.on_the_way:
        constants = {"V": plan.vector, "BH": plan.vector_dot, **_LAUNCH}
        pooled = Prepared(gate.pooled_grad_kernel, -(-n * c // plan.vector), (n, c, h), constants, plan)
    ends = (c, h, plan.dot) if plan.on_the_way else (0, 0, 1)
    last = grad.prepare(geo, strides, dtype, device, False, ends).launch
    return Backward(first.unit_bits, None, hidden, plan.shares, sizes, first.splits, first.launch, pooled, last)


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
    """dx, and the gradients of w1, b1, gamma, beta, w2, b2 (views of one tensor)."""
    shape, dense = geo
    n, c = shape[0], shape[1]
    device, acc = g.device, accumulate_dtype(dtype)
    call = Call.of(geo, dtype, device, parts, average)
    bits, pooled, hidden, alpha, mean, var = kept
    step = _prepare_backward(call, (g.stride(), dense), mean is not None, want_dx)
    units, norm = units_of(bits, step.unit_bits), (parts.gamma, parts.beta)

    def new(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=acc, device=device)

    if tau_grad is not None:
        tau_grad = tau_grad.contiguous()
    dx = torch.empty_strided(shape, dense, dtype=dtype, device=device) if want_dx else None
    du = around = None
    dtau = new(step.splits, n, c)
    if step.one is not None:
        step.one(
            device, g, dx, units, dtau, tau_grad, pooled, hidden, alpha, parts.w1, mean, var, *norm, parts.w2
        )  # fmt: skip
    else:
        sign, nonzero, plane = units
        step.dtau(device, g, plane, sign, None, None, None, dtau, None, None, None)
        if want_dx or parts.batch_stats:
            du = new(n, call.hidden)
        if want_dx:
            around = new(n, c)
    grads = new(step.shares, sum(step.sizes))
    step.hidden(device, dtau, tau_grad, pooled, alpha, hidden, mean, var, *norm, parts.w2, du, around, grads)
    if around is not None and step.pooled is None:
        step.dx(device, g, plane, sign, nonzero, None, dx, None, du, parts.w1, around)
    elif around is not None:
        pooled_grad = new(n, c)
        step.pooled(device, du, parts.w1, around, pooled_grad)
        step.dx(device, g, plane, sign, nonzero, pooled_grad, dx, None, None, None, None)
    grads = grads[0] if step.shares == 1 else grads.sum(0)
    # a section may be up to 3 elements longer than its parameter
    h, o = call.hidden, call.outputs
    starts = [0, *itertools.accumulate(step.sizes)]
    shapes = ((h, c), (h,), (o, h), (o,), (h,), (h,))
    strides = ((c, 1), (1,), (h, 1), (1,), (1,), (1,))
    dw1, db1, dw2, db2, *norm = map(grads.as_strided, shapes, strides, starts[:-1])
    dgamma, dbeta = norm or (None, None)
    return dx, dw1, db1, dgamma, dbeta, dw2, db2


# ---- budgets ---------------------------------------------------------------------------------------------------------


def prepared(call: StandardCall) -> tuple[Forward, Backward]:
    """The launches that forward() and, for a dense g, backward() would make."""
    geo, dense = call.geometry, call.geometry[1]
    key = Call(geo, call.dtype, call.device, *call[4:7], call.coupled, call.eps, call.momentum)
    return _prepare_forward(key, call.strides), _prepare_backward(key, (dense, dense), call.norm, call.want_dx)


def budgets(call: StandardCall) -> tuple[Budget, Budget]:
    """Forward and backward."""
    ahead, back = prepared(call)
    return _forward_budget(call, ahead), _backward_budget(call, back) if call.keep else Budget()


def _forward_budget(call: StandardCall, step: Forward) -> Budget:
    if step.one is not None:
        return one_pass.forward_budget(call)
    geo, dtype, parts = call.geometry, call.dtype, step.splits
    total = traffic.reduce(geo, dtype, call.keep, "reduce_kernel", parts) + gate.hidden_budget(call, parts)
    used = parts * call.sums()
    if not call.keep:
        used += call.sums() + call.sums(call.hidden) + (call.statistics if call.coupled else 0)
    if step.alpha is None:
        made = (call.sums(call.outputs) if call.keep else 0) + (call.tau if call.want_tau else 0)
        tau = gate.tau_read(call)
    else:
        made, tau = 0, call.tau
        total += gate.alpha_budget(call)
        used += (0 if call.keep else call.sums(call.outputs)) + (0 if call.want_tau else call.tau)
    total += apply.budget(geo, dtype, tau, call.residual, int(call.keep))
    return total + Budget(written=made, workspace=used, saved=call.saved)


def _backward_budget(call: StandardCall, step: Backward) -> Budget:
    geo, dtype, parts = call.geometry, call.dtype, step.splits
    row = sum(step.sizes) * accumulate_dtype(dtype).itemsize
    grads = step.shares * row
    if step.one is not None:
        first = one_pass.backward_budget(call)
        return first + gate.hidden_grad_budget(call, 1, grads, False, False) + traffic.added_up(row, step.shares)
    du = call.want_dx or call.coupled
    total = traffic.grad(geo, dtype, True, False, False, True, "grad_kernel", parts)
    total += gate.hidden_grad_budget(call, parts, grads, du, call.want_dx)
    used = parts * call.sums() + (call.sums(call.hidden) if du else 0)
    if call.want_dx:
        used += call.sums()
        last = traffic.grad(geo, dtype, True, True, True, False, "grad_kernel")
        if step.pooled is None:
            total += last + Budget(read=gate.pooled_grad_read(call) - call.sums())
        else:
            total += gate.pooled_grad_budget(call) + last
            used += call.sums()
    return total + traffic.added_up(row, step.shares) + Budget(workspace=used)
