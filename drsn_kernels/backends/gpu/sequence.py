"""The shrinkage step with the standard gate: which launches it takes, in order, prepared once and run.

                       forward                       backward
    one pass           forward_kernel                backward_kernel, linear_grad
    several launches   reduce, [hidden, alpha,] map  grad (dtau), [hidden_grad, linear_grad,] grad (dx)

One pass is for gates without batch statistics. In brackets is the gate, which knows nothing of x: forward it takes A
and the parameters to tau and the state, backward dtau to dA and the parameters' gradients. With batch statistics of
many units or samples a launch that merges them, each way, stands between its two. A large batch is shared out in
linear_grad, whose partial sums one more short launch adds up.
Between launches nothing comes back to the host.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...gates import StandardGate
from ...reference import SOFT
from .. import cost
from ..step import Backend, Cost, Kept, Plan, Step
from . import gate, gate_grad, one_pass, one_pass_cu, plans, stream
from .gate import Sizes
from .launch import Prepared, bytes_of, multiprocessors, tile_values
from .plans import GatePlan, OnePassPlan, cdiv, up_to
from .walk import Strides, Walk, walk

_PLANES = (0, 1, 2)  # rows of kept, sign and nonzero, as layout.thresholded has them


def plan_of(step: Step, strides: tuple[Strides, ...]) -> tuple[Walk, OnePassPlan] | str:
    """The one-pass plan over operands of these strides, or why the step takes several launches."""
    if step.gate.batch_stats:
        return "BatchNorm in training couples the batch: its statistics are known only when all of x has been read"
    on, (hidden, outputs, *_) = walk(step.layout, *strides), step.gate
    plan = plans.one_pass(on, hidden, outputs, step.dtype.itemsize, multiprocessors(step.device), step.keep)
    return plan if isinstance(plan, str) else (on, plan)


def _one_pass(fn: Any, step: Step, on: Walk, plan: OnePassPlan, operands: str, cost_of: Cost) -> Prepared:
    values = tile_values(on, plan, step.dtype, operands) | _gate_values(step)
    values |= {"S": plan.samples, "PB": plan.rows, "BH": plan.units}
    programs = cdiv(on.n, plan.samples)
    return Prepared(fn, step.device, programs, values, plan, cost_of, warps=plan.warps, registers=plan.registers)


def _for_cu(*tensors: torch.Tensor | None) -> bool:
    """Whether one_pass_cu is asked for and can copy these: from and to multiples of 16 bytes."""
    return plans.ONE_PASS_CU and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def _gate_values(step: Step) -> dict[str, Any]:
    hidden, outputs, _, batch_stats, eps, momentum = step.gate
    return {
        "C": step.layout.c, "H": hidden, "outputs": outputs, "ONE": outputs == 1, "AVERAGE": step.average,
        "BATCH_STATS": batch_stats, "EPS": eps, "MOMENTUM": momentum,
    }  # fmt: skip


def _gate_plan(step: Step) -> GatePlan:
    layout, (hidden, outputs, *_) = step.layout, step.gate
    return plans.gate(layout.n, layout.c, hidden, outputs, multiprocessors(step.device), step.sums.itemsize)


def _of_gate(
    fn: Any, step: Step, plan: GatePlan, programs: int, cost_of: Cost, precision: str, registers: int | None = None,
    **values: int,
) -> Prepared:  # fmt: skip
    values |= _gate_values(step) | {
        "N": step.layout.n, "CA": step.layout.c // plan.align, "HA": step.gate.hidden // plan.align,
        "ALIGN": plan.align, "tiles": plan.tiles, "groups": plan.groups, "group": plan.group, "MERGE": plan.merge,
        "BN": plan.samples, "BC": plan.channels, "BH": plan.units, "BK": plan.depth, "GROUPS": plan.at_a_time,
        "PRECISION": "ieee" if step.sums == torch.float64 else precision,
    }  # fmt: skip
    return Prepared(
        fn, step.device, programs, values, plan, cost_of, warps=plans.GATE_WARPS, stages=plan.stages,
        registers=registers or plans.GATE_REGISTERS,
    )  # fmt: skip


def _merge(step: Step, plan: GatePlan, statistics: bool) -> Prepared | None:
    """The launch between the gate's two, where there is one."""
    if not step.gate.batch_stats or plan.groups == plan.tiles:
        return None
    values = {
        "N": step.layout.n, "H": step.gate.hidden, "groups": plan.tiles, "group": plan.samples,
        "STATISTICS": statistics, "BH": plans.MERGED_UNITS, "GROUPS": plans.MERGED // plans.MERGED_UNITS,
    }  # fmt: skip
    programs = cdiv(step.gate.hidden, plans.MERGED_UNITS)
    spent = gate.merge_cost(step, plan.tiles)
    return Prepared(gate.merge_kernel, step.device, programs, values, plan, spent, warps=plans.GATE_WARPS)


def _merged(merge: Prepared | None, tiles: torch.Tensor | None) -> torch.Tensor | None:
    """Statistics or sums of the tiles, (tiles, 2, H); merged, (1, 2, H), by the launch for it."""
    if merge is None:
        return tiles
    merged = tiles.new_empty((1, *tiles.shape[1:]))
    merge(groups_of=tiles, merged=merged)
    return merged


# ---- forward ---------------------------------------------------------------------------------------------------------


class Gate(NamedTuple):
    """The gate's launches of a forward pass: A and the parameters to tau and the state."""

    hidden: Prepared
    merge: Prepared | None
    alpha: Prepared
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return tuple(launch for launch in (self.hidden, self.merge, self.alpha) if launch is not None)

    def __call__(self, new: Callable, partial, pooled, state, tau, parts: StandardGate) -> None:
        tiles = new((self.hidden.plan.tiles, 2, len(parts.w1))) if parts.batch_stats else None
        self.hidden(partial=partial, pooled=pooled, w1=parts.w1, b1=parts.b1, state=state, statistics=tiles)
        self.alpha(
            pooled=pooled, state=state, statistics=_merged(self.merge, tiles), tau=tau, mean=parts.mean, var=parts.var,
            batches=parts.batches, gamma=parts.gamma, beta=parts.beta, w2=parts.w2, b2=parts.b2,
        )  # fmt: skip


class Forward(NamedTuple):
    """Prepared launches: `one`, or the others."""

    one: Prepared | one_pass_cu.Launch | None
    reduce: Prepared | None
    gate: Gate | None
    map: Prepared | None
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return (self.reduce, *self.gate.launches, self.map) if self.one is None else (self.one,)


@plans.cached
def prepare_forward(step: Step, y: Strides, cu: bool = False) -> Forward:
    """y: strides of it. cu: by one_pass_cu, if it takes the step."""
    layout, s = step.layout, Sizes.of(step)
    kept = 3 * cost.plane_bytes(layout) + s.pooled + s.state
    running = s.norm // 2 - s.statistics  # mean and variance, where they are not in the state
    saved = Cost(saved=kept + running if step.keep else 0)
    if cu and not isinstance(compiled := one_pass_cu.prepare_forward(step, y), str):
        return Forward(compiled, None, None, None, compiled.cost + saved)
    one = plan_of(step, (step.strides, y, step.residual or y))
    if not isinstance(one, str):
        launch = _one_pass(one_pass.forward_kernel, step, *one, "xyr", one_pass.forward_cost(step))
        return Forward(launch, None, None, None, launch.cost + saved)
    first = stream.prepare_reduce(layout, step.strides, None, step.dtype, step.device, "magnitude", False)
    last = stream.prepare_map(
        layout, step.strides, y, step.residual, (1, 0) if step.one_tau else (layout.c, 1), step.dtype, step.device,
        "threshold", SOFT, False, 3 if step.keep else 0,
    )  # fmt: skip
    ends, splits = _prepare_gate(step, first.plan.splits), first.plan.splits
    used = (0 if step.want.tau else s.tau) + (0 if step.keep else s.pooled + s.state)
    used += splits * s.pooled if splits > 1 else 0
    total = first.cost + ends.cost + last.cost + saved + Cost(workspace=used)
    return Forward(None, first, ends, last, total)


def _prepare_gate(step: Step, parts: int) -> Gate:
    """parts: partial sums that A comes in."""
    plan = _gate_plan(step)
    hidden = _of_gate(
        gate.hidden_kernel, step, plan, plan.tiles * cdiv(step.gate.hidden, plan.units),
        gate.hidden_cost(step, parts, plan.tiles), plans.FORWARD_PRECISION, parts=parts, SPLIT=parts > 1,
    )  # fmt: skip
    merge = _merge(step, plan, statistics=True)
    alpha = _of_gate(
        gate.alpha_kernel, step, plan, plan.tiles * cdiv(step.gate.outputs, plan.channels),
        gate.alpha_cost(step, plan.groups), plans.FORWARD_PRECISION,
    )  # fmt: skip
    total = hidden.cost + alpha.cost if merge is None else hidden.cost + merge.cost + alpha.cost
    return Gate(hidden, merge, alpha, total + Cost(workspace=plan.tiles * Sizes.of(step).statistics))


def forward(
    backend: Backend, y: torch.Tensor, tau: torch.Tensor | None, kept: Kept, step: Step, x: torch.Tensor,
    parts: StandardGate, residual: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills y, tau and kept, as far as they are given."""
    launches, layout = prepare_forward(step, y.stride(), _for_cu(x, y, residual)), step.layout
    planes = bytes_of(kept.bits)
    if launches.one is not None:
        launches.one(
            x=x, y=y, residual=residual, planes=planes, pooled=kept.pooled, state=kept.state, tau=tau, w1=parts.w1,
            b1=parts.b1, mean=parts.mean, var=parts.var, gamma=parts.gamma, beta=parts.beta, w2=parts.w2, b2=parts.b2,
        )  # fmt: skip
        return
    new, n, c = parts.w1.new_empty, layout.n, layout.c  # w1 has the dtype of sums
    splits = launches.reduce.plan.splits
    tau = new((n, 1 if step.one_tau else c)) if tau is None else tau
    pooled, state = (kept.pooled, kept.state) if step.keep else (new((n, c)), backend.gate_state(step))
    partial = pooled if splits == 1 else new((splits, n, c))
    launches.reduce(x=x, out=partial)
    launches.gate(new, partial, pooled, state, tau, parts)
    launches.map(x=x, y=y, residual=residual, t=tau, planes=planes)


# ---- backward --------------------------------------------------------------------------------------------------------


class GateGrad(NamedTuple):
    """The gate's launches of a backward pass: dtau to dA, if wanted, and the parameters' gradients."""

    hidden: Prepared | None  # None where one pass has made dz and dv
    merge: Prepared | None
    linear: Prepared
    add: Prepared | None  # the shares of a large batch
    dA: bool
    sizes: tuple[int, ...]  # of the parameters' gradients in their order, each up to 16 bytes
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return tuple(launch for launch in (self.hidden, self.merge, self.linear, self.add) if launch is not None)

    def __call__(self, new: Callable, step: Step, dtau, tau_grad, dz, dv, kept: Kept, parts: StandardGate):
        """dA or None, and the gradients of w1, b1, gamma, beta, w2, b2: views of one tensor.

        dz (N, O) and dv (N, H) are filled from dtau, or come filled.
        """
        n, c, (h, o, _, batch_stats, *_) = step.layout.n, step.layout.c, step.gate
        plan, direct, sums = self.linear.plan, None, None
        if self.hidden is not None:
            direct = new((n, c)) if self.dA and step.average is not None else None
            sums = new((plan.tiles, 2, h)) if batch_stats else None
            self.hidden(
                dtau=dtau, tau_grad=tau_grad, pooled=kept.pooled, state=kept.state, mean=kept.mean, var=kept.var,
                gamma=parts.gamma, beta=parts.beta, w2=parts.w2, dz=dz, dv=dv, sums=sums, direct=direct,
            )  # fmt: skip
        dA = new((n, c)) if self.dA else None
        grads = new((plan.shares, sum(self.sizes)))
        self.linear(
            pooled=kept.pooled, state=kept.state, mean=kept.mean, var=kept.var, gamma=parts.gamma, beta=parts.beta,
            w1=parts.w1, dz=dz, dv=dv, sums=_merged(self.merge, sums), direct=direct, dA=dA, grads=grads,
        )  # fmt: skip
        if self.add is not None:
            shares, grads = grads, new((1, sum(self.sizes)))
            self.add(shares_of=shares, added=grads)
        grads = grads[0]
        # a section may be up to 3 elements longer than its parameter
        starts = (0, *itertools.accumulate(self.sizes[:-1]))
        shapes = ((h, c), (h,), (o, h), (o,), (h,), (h,))
        strides = ((c, 1), (1,), (h, 1), (1,), (1,), (1,))
        dw1, db1, dw2, db2, *norm = map(grads.as_strided, shapes, strides, starts)
        dgamma, dbeta = norm or (None, None)
        return dA, (dw1, db1, dgamma, dbeta, dw2, db2)


class Backward(NamedTuple):
    """Prepared launches: `one` and the gate, or all the others (dx: where it is wanted)."""

    one: Prepared | one_pass_cu.Launch | None
    dtau: Prepared | None
    gate: GateGrad
    dx: Prepared | None
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        every = (self.one, self.dtau, *self.gate.launches, self.dx)
        return tuple(launch for launch in every if launch is not None)


@plans.cached
def prepare_backward(step: Step, g: Strides, want_dx: bool, cu: bool = False) -> Backward:
    """g: strides of it. cu: by one_pass_cu, if it takes the step."""
    layout, s = step.layout, Sizes.of(step)
    if cu and want_dx and not isinstance(compiled := one_pass_cu.prepare_backward(step, g), str):
        ends = _prepare_gate_grad(step, None, False)
        return Backward(compiled, None, ends, None, compiled.cost + ends.cost)
    one = plan_of(step, (g, layout.strides)) if want_dx else "without dx there is nothing to fuse"
    if not isinstance(one, str):
        launch = _one_pass(one_pass.backward_kernel, step, *one, "gd", one_pass.backward_cost(step))
        ends = _prepare_gate_grad(step, None, False)
        return Backward(launch, None, ends, None, launch.cost + ends.cost)

    def grad(dA: bool, dx: bool, dtau: bool) -> Prepared:
        return stream.prepare_grad(layout, g, step.dtype, step.device, _PLANES, dA, dx, dtau, SOFT)

    first = grad(False, False, True)
    ends = _prepare_gate_grad(step, first.plan.splits, want_dx)
    last = grad(True, True, False) if want_dx else None
    total = first.cost + ends.cost + Cost(workspace=first.plan.splits * s.pooled)
    return Backward(None, first, ends, last, total if last is None else total + last.cost)


def _prepare_gate_grad(step: Step, parts: int | None, dA: bool) -> GateGrad:
    """parts: partial sums that dtau comes in; None where dz and dv come instead."""
    plan, s, (h, o, norm, *_), c = _gate_plan(step), Sizes.of(step), step.gate, step.layout.c
    sizes = tuple(up_to(length, 4) for length in (h * c, h, o * h, o, *((h, h) if norm else ())))
    row = sum(sizes) * step.sums.itemsize
    direct = dA and step.average is not None
    total, hidden, merge = Cost(workspace=s.alpha + s.hidden), None, None  # dz, dv
    if parts is not None:
        hidden = _of_gate(
            gate_grad.hidden_grad_kernel, step, plan, plan.tiles * cdiv(h, plan.units),
            gate_grad.hidden_grad_cost(step, parts, plan.tiles, direct), plan.precision, parts=parts, SPLIT=parts > 1,
        )  # fmt: skip
        merge = _merge(step, plan, statistics=False)
        total += hidden.cost + Cost(workspace=direct * s.pooled + plan.tiles * s.statistics)
        total += Cost() if merge is None else merge.cost
    first = plan.shares * cdiv(h, plan.weights) * cdiv(c, plan.weights)
    second = first + plan.shares * cdiv(h, plan.weights) * cdiv(o, plan.weights)
    programs = second + dA * plan.tiles * cdiv(c, plan.channels)
    linear = _of_gate(
        gate_grad.linear_grad_kernel, step, plan, programs,
        gate_grad.linear_grad_cost(step, plan.groups, plan.shares * row, dA, direct), plan.precision,
        plans.WEIGHT_REGISTERS,
        first=first, second=second, share=plan.share, total=sum(sizes), WALK=plan.step, BW=plan.weights,
    )  # fmt: skip
    total, add = total + linear.cost + Cost(workspace=dA * s.pooled), None
    if plan.shares > 1:
        add = Prepared(
            gate_grad.add_shares_kernel, step.device, cdiv(sum(sizes), plans.ADDED), {
                "shares": plan.shares, "total": sum(sizes), "BLOCK": plans.ADDED, "AT_ONCE": plans.ADDED_SHARES,
            }, plan, gate_grad.add_shares_cost(row, plan.shares), warps=plans.GATE_WARPS,
        )  # fmt: skip
        total += add.cost
    return GateGrad(hidden, merge, linear, add, dA, sizes, total)


def backward(
    dx: torch.Tensor | None, step: Step, parts: StandardGate, kept: Kept, g: torch.Tensor,
    tau_grad: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Fills dx, if given; the gradients of w1, b1, gamma, beta, w2, b2."""
    cu = _for_cu(g, dx, tau_grad, *kept[:3])
    launches, layout = prepare_backward(step, g.stride(), dx is not None, cu), step.layout
    planes, new = bytes_of(kept.bits), parts.w1.new_empty
    dz, dv, dtau = new((layout.n, step.gate.outputs)), new((layout.n, step.gate.hidden)), None
    if launches.one is not None:
        launches.one(
            g=g, dx=dx, planes=planes, dz=dz, dv=dv, tau_grad=tau_grad, pooled=kept.pooled, state=kept.state,
            w1=parts.w1, mean=kept.mean, var=kept.var, gamma=parts.gamma, beta=parts.beta, w2=parts.w2,
        )  # fmt: skip
    else:
        dtau = new((launches.dtau.plan.splits, layout.n, layout.c))
        launches.dtau(g=g, planes=planes, dtau=dtau)
    dA, grads = launches.gate(new, step, dtau, tau_grad, dz, dv, kept, parts)
    if launches.dx is not None:
        launches.dx(g=g, planes=planes, dA=dA, dx=dx)
    return grads


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan(step: Step) -> Plan:
    """Of forward() into a dense y and, where something is kept, of backward() from a dense g."""
    dense = step.layout.strides
    ahead = prepare_forward(step, dense, plans.ONE_PASS_CU)
    launches, spent = ahead.launches, Cost()
    if step.keep:
        back = prepare_backward(step, dense, step.want.x, plans.ONE_PASS_CU)
        launches, spent = launches + back.launches, back.cost
    if isinstance(ahead.one, one_pass_cu.Launch):
        name, why, not_taken = "one_pass_cu", "plans.ONE_PASS_CU; persistent blocks, samples copied ahead", ()
    elif ahead.one is not None:
        where = "walked twice, the second time from L2" if ahead.one.plan.loop else "kept in registers"
        name, why, not_taken = "one pass", f"a program takes whole samples, {where}", ()
    else:
        name, why = "several launches", f"the gate stands between reduce and map; {ahead.map.plan.why}"
        not_taken = (("one pass", plan_of(step, (step.strides, dense, step.residual or dense))),)
    if plans.ONE_PASS_CU and name != "one_pass_cu":
        not_taken += (("one_pass_cu", one_pass_cu.prepare_forward(step, dense)),)
    return described(name, why, not_taken, ahead.cost + cost.kept_statistics(step), spent, launches)


def described(name: str, why: str, not_taken, forward: Cost, backward: Cost, launches: tuple[Prepared, ...]) -> Plan:
    wide = any(launch.values.get("WIDE", False) for launch in launches)
    shown = tuple(launch.describe() for launch in launches)
    return Plan(name, why, not_taken, 64 if wide else 32, forward, backward, shown)
