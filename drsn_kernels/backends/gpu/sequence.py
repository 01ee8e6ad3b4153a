"""The shrinkage step with the standard gate: which launches it takes, in order, prepared once and run.

                       forward                       backward
    one pass           forward_kernel                backward_kernel, linear_grad
    several launches   reduce, [hidden, alpha,] map  grad (dtau), [hidden_grad, linear_grad,] grad (dx)

One pass is for gates without batch statistics. In brackets is the gate, which knows nothing of x: forward it takes A
and the parameters to tau and the state, backward dtau to dA and the parameters' gradients. With batch statistics of
many units or samples a launch that merges them, each way, stands between its two. A large batch is shared out in
linear_grad, whose partial sums one more short launch adds up.

Each way is one Pass (launch.py), called with the arguments and up to three allocations besides y and dx:

    kept      bit planes, A and the gate's state: what a backward pass needs, and nothing else
    scratch   what only the launches of this pass hand to one another
    grads     the parameters' gradients, which are views of it
"""

import itertools
from typing import Any, NamedTuple

import torch

from ...reference import SOFT
from .. import cost
from .. import step as steps
from ..step import NOTHING_KEPT, Cost, Kept, Plan, Step
from . import gate, gate_grad, one_pass, plans, stream
from .gate import Sizes
from .launch import Pass, Prepared, Room, multiprocessors, tile_values
from .native import Piece, Source
from .plans import GatePlan, OnePassPlan, Product, cdiv, up_to
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
    fn: Any, step: Step, plan: GatePlan, over: Product, programs: int, cost_of: Cost, precision: str = "ieee",
    **values: int,
) -> Prepared:  # fmt: skip
    values = _gate_values(step) | {
        "N": step.layout.n, "CA": step.layout.c // plan.align, "HA": step.gate.hidden // plan.align,
        "ALIGN": plan.align, "tiles": plan.tiles, "groups": plan.groups, "group": plan.group, "MERGE": plan.merge,
        "BN": plan.samples, "BC": plan.channels, "BH": plan.units, "BK": over.depth, "SLICES": over.slices,
        "GROUPS": plan.at_a_time,
        "PRECISION": "ieee" if step.sums == torch.float64 else precision,
    } | values  # fmt: skip
    return Prepared(
        fn, step.device, programs, values, plan, cost_of, warps=max(plans.GATE_WARPS, over.slices),
        stages=over.stages, registers=plans.GATE_REGISTERS,
    )  # fmt: skip


def _merge(step: Step, plan: GatePlan, statistics: bool) -> Prepared | None:
    """The launch that merges what tiles of the batch have left, where there is one."""
    if not step.gate.batch_stats or (plan.groups if statistics else plan.sums) == plan.tiles:
        return None
    values = {
        "N": step.layout.n, "H": step.gate.hidden, "groups": plan.tiles, "group": plan.samples,
        "STATISTICS": statistics, "BH": plans.MERGED_UNITS, "GROUPS": plans.MERGED // plans.MERGED_UNITS,
    }  # fmt: skip
    programs = cdiv(step.gate.hidden, plans.MERGED_UNITS)
    spent = gate.merge_cost(step, plan.tiles)
    return Prepared(gate.merge_kernel, step.device, programs, values, plan, spent, warps=plans.MERGE_WARPS)


Wired = list[tuple[Prepared, dict[str, Source | None]]]  # launches, each with where its pointers are taken from


def _statistics(room: Room, merge: Prepared | None, step: Step, tiles: int) -> tuple[Piece | None, Piece | None, Wired]:
    """Room for statistics or sums of the tiles (tiles, 2, H), for what is read of them, and the launch between."""
    if not step.gate.batch_stats:
        return None, None, []
    own = room.take(tiles * 2 * step.gate.hidden)
    if merge is None:
        return own, own, []
    merged = room.take(2 * step.gate.hidden)
    return own, merged, [(merge, {"groups_of": own, "merged": merged})]


class Keeping(NamedTuple):
    """What a backward pass needs, in one allocation."""

    room: Room
    planes: Piece
    pooled: Piece
    state: Piece

    @classmethod
    def of(cls, step: Step, room: Room) -> "Keeping":
        """The planes, int32 (3, words), come first; where nothing is kept there are none."""
        layout = step.layout
        planes = room.take_bytes(3 * layout.words * 4 if step.keep else 0)
        pooled = room.take(layout.n * layout.c)
        return cls(room, planes, pooled, room.take(step.state))


# ---- forward ---------------------------------------------------------------------------------------------------------

FORWARD = ("x", "y", "residual", "tau", "kept", "scratch", "w1", "b1", "gamma", "beta", "w2", "b2", "mean", "var",
           "batches")  # fmt: skip


class Gate(NamedTuple):
    """The gate's launches of a forward pass: A and the parameters to tau and the state."""

    hidden: Prepared
    merge: Prepared | None
    alpha: Prepared
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return tuple(launch for launch in (self.hidden, self.merge, self.alpha) if launch is not None)

    def wired(self, step: Step, room: Room, partial: Source, pooled: Source, state: Source, tau: Source) -> Wired:
        """room: for what they hand to one another."""
        tiles, statistics, between = _statistics(room, self.merge, step, self.hidden.plan.tiles)
        first = {"partial": partial, "pooled": pooled, "state": state, "statistics": tiles, **_same("w1", "b1")}
        last = {"pooled": pooled, "state": state, "statistics": statistics, "tau": tau,
                **_same("mean", "var", "batches", "gamma", "beta", "w2", "b2")}  # fmt: skip
        return [(self.hidden, first), *between, (self.alpha, last)]


def _same(*names: str) -> dict[str, Source]:
    """Pointers that are arguments of the pass, by the same names."""
    return {name: name for name in names}


class Forward(NamedTuple):
    """Prepared launches: `one`, or the others. And all of them as a pass, with what it allocates."""

    one: Prepared | None
    reduce: Prepared | None
    gate: Gate | None
    map: Prepared | None
    keeping: Keeping | None
    scratch: Room
    run: Pass
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return (self.reduce, *self.gate.launches, self.map) if self.one is None else (self.one,)


@plans.cached
def prepare_forward(step: Step, y: Strides) -> Forward:
    """y: strides of it."""
    s, scratch = Sizes.of(step), Room("scratch", step.sums)
    keeping = Keeping.of(step, Room("kept", step.sums)) if step.keep else None
    one = _one_forward(step, y)
    if one is not None:
        reduce = ends = last = None
        wired = [(one, {
            **_same("x", "y", "residual", "w1", "b1", "mean", "var", "gamma", "beta", "w2", "b2"),
            "tau": "tau" if step.want.tau else None,
            **({name: getattr(keeping, name) for name in ("planes", "pooled", "state")} if step.keep else {}),
        })]  # fmt: skip
    else:
        reduce, ends, last, wired = _several_forward(step, y, keeping, scratch)
    # mean and variance, where they are not in the state
    saved = keeping.room.bytes + s.norm // 2 - s.statistics if step.keep else 0
    total = sum((launch.cost for launch, _ in wired), Cost(saved=saved, workspace=scratch.bytes))
    return Forward(one, reduce, ends, last, keeping, scratch, Pass(FORWARD, wired, step.device), total)


def _one_forward(step: Step, y: Strides) -> Prepared | None:
    one = plan_of(step, (step.strides, y, step.residual or y))
    if isinstance(one, str):
        return None
    return _one_pass(one_pass.forward_kernel, step, *one, "xyr", one_pass.forward_cost(step))


def _several_forward(
    step: Step, y: Strides, keeping: Keeping | None, scratch: Room
) -> tuple[Prepared, Gate, Prepared, Wired]:
    layout = step.layout
    first = stream.prepare_reduce(layout, step.strides, None, step.dtype, step.device, "magnitude", False)
    last = stream.prepare_map(
        layout, step.strides, y, step.residual, (1, 0) if step.one_tau else (layout.c, 1), step.dtype, step.device,
        "threshold", SOFT, False, 3 if step.keep else 0,
    )  # fmt: skip
    splits, ends = first.plan.splits, _prepare_gate(step, first.plan.splits)
    _, planes, pooled, state = keeping or Keeping.of(step, scratch)
    tau = "tau" if step.want.tau else scratch.take(layout.n * (1 if step.one_tau else layout.c))
    partial = pooled if splits == 1 else scratch.take(splits * layout.n * layout.c)
    wired = [
        (first, {"x": "x", "out": partial}),
        *ends.wired(step, scratch, partial, pooled, state, tau),
        (last, {**_same("x", "y", "residual"), "t": tau, "planes": planes if step.keep else None}),
    ]
    return first, ends, last, wired


def _prepare_gate(step: Step, parts: int) -> Gate:
    """parts: partial sums that A comes in."""
    plan = _gate_plan(step)
    hidden = _of_gate(
        gate.hidden_kernel, step, plan, plan.over_channels, plan.tiles * cdiv(step.gate.hidden, plan.units),
        gate.hidden_cost(step, parts, plan.tiles), plans.FORWARD_PRECISION, parts=parts, SPLIT=parts > 1,
    )  # fmt: skip
    merge = _merge(step, plan, statistics=True)
    alpha = _of_gate(
        gate.alpha_kernel, step, plan, plan.over_units, plan.tiles * cdiv(step.gate.outputs, plan.channels),
        gate.alpha_cost(step, plan.groups), plans.FORWARD_PRECISION,
    )  # fmt: skip
    return Gate(hidden, merge, alpha, hidden.cost + (Cost() if merge is None else merge.cost) + alpha.cost)


# ---- backward --------------------------------------------------------------------------------------------------------

BACKWARD = ("g", "dx", "tau_grad", "kept", "scratch", "grads", "w1", "gamma", "beta", "w2", "mean", "var")


class GateGrad(NamedTuple):
    """The gate's launches of a backward pass: dtau to dA, if wanted, and the parameters' gradients."""

    hidden: Prepared | None  # None where one pass has made dz and dv
    merge: Prepared | None
    norm: Prepared | None
    linear: Prepared
    add: Prepared | None  # the shares of a large batch
    dA: bool
    sizes: tuple[int, ...]  # of the parameters' gradients in their order, each up to 16 bytes
    cost: Cost

    @property
    def total(self) -> int:
        """Elements of the gradients that `linear` makes, those of a share."""
        return sum(self.sizes[:4] if self.norm else self.sizes)

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return tuple(launch for launch in (self.hidden, self.merge, self.norm, self.linear, self.add) if launch)

    def wired(
        self, step: Step, room: Room, dtau: Source | None, dz: Source, dv: Source, pooled: Source, state: Source
    ) -> tuple[Wired, Piece | None]:
        """And dA, where it is wanted. dz (N, O) and dv (N, H) are filled from dtau, or come filled."""
        size, direct, sums, before, positive = step.layout.n * step.layout.c, None, None, [], None
        given = {"pooled": pooled, "state": state, "dz": dz, "dv": dv, **_same("mean", "var", "gamma", "beta")}
        if self.hidden is not None:
            direct = room.take(size) if self.dA and step.average is not None else None
            tiles, sums, between = _statistics(room, self.merge, step, self.hidden.plan.tiles)
            own = {"dtau": dtau, "sums": tiles, "direct": direct, **_same("tau_grad", "w2")}
            before = [(self.hidden, given | own), *between]
        if self.norm is not None:
            positive, norms = room.take(step.layout.n * step.gate.hidden), Piece("grads", self.total, step.sums)
            own = {"state": state, "sums": sums, "dv": dv, "positive": positive, "norms": norms}
            before.append((self.norm, own | _same("gamma", "beta")))
        dA = room.take(size) if self.dA else None
        shares = "grads" if self.add is None else room.take(self.linear.plan.shares * self.total)
        own = {"sums": sums, "positive": positive, "direct": direct, "dA": dA, "grads": shares, **_same("w1")}
        after = [] if self.add is None else [(self.add, {"shares_of": shares, "added": "grads"})]
        return [*before, (self.linear, given | own), *after], dA

    def new(self, like: torch.Tensor) -> torch.Tensor:
        """For `grads`."""
        return like.new_empty(sum(self.sizes))

    def views(self, step: Step, grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of w1, b1, gamma, beta, w2, b2."""
        c, (h, o, *_) = step.layout.c, step.gate
        if h % 4 == o % 4 == 0:  # half the host time of six views
            dw1, db1, dw2, db2, *norm = grads.split_with_sizes(self.sizes)
            dw1, dw2 = dw1.view(h, c), dw2.view(o, h)
        else:  # a section may be up to 3 elements longer than its parameter
            starts = (0, *itertools.accumulate(self.sizes[:-1]))
            shapes = ((h, c), (h,), (o, h), (o,), (h,), (h,))
            strides = ((c, 1), (1,), (h, 1), (1,), (1,), (1,))
            dw1, db1, dw2, db2, *norm = map(grads.as_strided, shapes, strides, starts)
        dgamma, dbeta = norm or (None, None)
        return dw1, db1, dgamma, dbeta, dw2, db2


class Backward(NamedTuple):
    """Prepared launches: `one` and the gate, or all the others (dx: where it is wanted). And all of them as a pass."""

    one: Prepared | None
    dtau: Prepared | None
    gate: GateGrad
    dx: Prepared | None
    scratch: Room
    run: Pass
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        every = (self.one, self.dtau, *self.gate.launches, self.dx)
        return tuple(launch for launch in every if launch is not None)


@plans.cached
def prepare_backward(step: Step, g: Strides, want_dx: bool) -> Backward:
    """g: strides of it."""
    layout, (hidden, outputs, *_) = step.layout, step.gate
    scratch, (_, planes, pooled, state) = Room("scratch", step.sums), Keeping.of(step, Room("kept", step.sums))
    dz, dv = scratch.take(layout.n * outputs), scratch.take(layout.n * hidden)
    one, first, last = _one_backward(step, g, want_dx), None, None
    if one is not None:
        ends = _prepare_gate_grad(step, None, False)
        own = {"planes": planes, "dz": dz, "dv": dv, "pooled": pooled, "state": state,
               **_same("g", "dx", "tau_grad", "w1", "mean", "var", "gamma", "beta", "w2")}  # fmt: skip
        wired = [(one, own), *ends.wired(step, scratch, None, dz, dv, pooled, state)[0]]
    else:

        def grad(dA: bool, dx: bool, dtau: bool) -> Prepared:
            return stream.prepare_grad(layout, g, step.dtype, step.device, _PLANES, dA, dx, dtau, SOFT)

        first = grad(False, False, True)
        ends = _prepare_gate_grad(step, first.plan.splits, want_dx)
        dtau = scratch.take(first.plan.splits * layout.n * layout.c)
        gates, dA = ends.wired(step, scratch, dtau, dz, dv, pooled, state)
        wired = [(first, {"g": "g", "planes": planes, "dtau": dtau}), *gates]
        if want_dx:
            last = grad(True, True, False)
            wired.append((last, {"g": "g", "planes": planes, "dA": dA, "dx": "dx"}))
    total = sum((launch.cost for launch, _ in wired), Cost(workspace=scratch.bytes))
    return Backward(one, first, ends, last, scratch, Pass(BACKWARD, wired, step.device), total)


def _one_backward(step: Step, g: Strides, want_dx: bool) -> Prepared | None:
    """None without dx: then there is nothing to fuse."""
    if not want_dx:
        return None
    one = plan_of(step, (g, step.layout.strides))
    if isinstance(one, str):
        return None
    return _one_pass(one_pass.backward_kernel, step, *one, "gd", one_pass.backward_cost(step))


def _prepare_gate_grad(step: Step, parts: int | None, dA: bool) -> GateGrad:
    """parts: partial sums that dtau comes in; None where dz and dv come instead."""
    plan, (h, o, norm, batch_stats, *_), c = _gate_plan(step), step.gate, step.layout.c
    sizes = tuple(up_to(length, 4) for length in (h * c, h, o * h, o, *((h, h) if norm else ())))
    direct = dA and step.average is not None
    hidden = merge = between = add = None
    if parts is not None:
        hidden = _of_gate(
            gate_grad.hidden_grad_kernel, step, plan, plan.back, plan.tiles * cdiv(h, plan.units),
            gate_grad.hidden_grad_cost(step, parts, plan.tiles, direct), plans.BACKWARD_PRECISION,
            parts=parts, SPLIT=parts > 1,
        )  # fmt: skip
        merge = _merge(step, plan, statistics=False)
        if batch_stats and not plan.merge:
            pieces = cdiv(step.layout.n, plan.normed)
            between = _of_gate(
                gate_grad.norm_grad_kernel, step, plan, plans.NO_PRODUCT, pieces * cdiv(h, plan.units),
                gate_grad.norm_grad_cost(step, plan.sums), groups=plan.sums, pieces=pieces, share=plan.normed,
                after_gamma=sizes[4],
            )  # fmt: skip
    ready, made = between is not None, sum(sizes[:4] if between else sizes)
    row = made * step.sums.itemsize
    first = plan.shares * cdiv(h, plan.weights) * cdiv(c, plan.weights)
    second = first + plan.shares * cdiv(h, plan.weights) * cdiv(o, plan.weights)
    last = second + ready * plan.shares * (cdiv(h, plan.weights) + cdiv(o, plan.weights))
    pooled = dA * plan.tiles * cdiv(c, plan.channels)
    tensor_cores = plan.weights == plans.WEIGHT_TILE or plan.over_units.slices > 1
    linear = _of_gate(
        gate_grad.linear_grad_kernel, step, plan, plan.over_units, pooled + last,
        gate_grad.linear_grad_cost(step, 0 if ready else plan.sums, plan.shares * row, dA, direct),
        plans.WEIGHT_PRECISION if tensor_cores else plans.BACKWARD_PRECISION,
        groups=plan.sums, pooled_programs=pooled, first=first, second=second, share=plan.share, total=made,
        WALK=plan.step, BW=plan.weights, READY=ready,
    )  # fmt: skip
    if plan.shares > 1:
        values = {"shares": plan.shares, "total": made, "BLOCK": plans.ADDED, "AT_ONCE": plans.ADDED_SHARES}
        spent = gate_grad.add_shares_cost(row, plan.shares)
        programs = cdiv(made, plans.ADDED)
        add = Prepared(
            gate_grad.add_shares_kernel, step.device, programs, values, plan, spent, warps=plans.GATE_WARPS
        )  # fmt: skip
    total = sum((launch.cost for launch in (hidden, merge, between, linear, add) if launch), Cost())
    return GateGrad(hidden, merge, between, linear, add, dA, sizes, total)


# ---- both ------------------------------------------------------------------------------------------------------------


class Gated(steps.Gated):
    def forward(self, x, parts, residual=None, out=None):
        """Kept: its bits, int32, are all of `kept`, of which pooled is a view."""
        step, layout = self.step, self.step.layout
        y = torch.empty_like(x) if out is None else out  # with the layout's strides
        ahead = prepare_forward(step, y.stride())
        tau = self.backend.sums(x, layout, 1 if step.one_tau else layout.c) if step.want.tau else None
        kept = ahead.keeping.room.new(parts.w1) if step.keep else None  # w1 has the dtype of sums
        ahead.run((x, y, residual, tau, kept, ahead.scratch.new(parts.w1), *parts[:9]))
        if kept is None:
            return y, tau, NOTHING_KEPT
        pooled = kept.as_strided((layout.n, layout.c), (layout.c, 1), ahead.keeping.pooled.start)
        mean, var = (None, None) if step.gate.batch_stats else (parts.mean, parts.var)
        return y, tau, Kept(kept.view(torch.int32), pooled, mean, var)

    def backward(self, saved, g, tau_grad, want):
        """All of the parameters' gradients, whichever are wanted: they are made by one launch."""
        step, layout = self.step, self.step.layout
        bits, _, mean, var, w1, _, gamma, beta, w2, _ = saved
        dx = self.backend.empty(layout.shape, layout.strides, step.dtype, step.device) if want[0] else None
        tau_grad = None if tau_grad is None else tau_grad.contiguous()
        back = prepare_backward(step, g.stride(), want[0])
        grads = back.gate.new(w1)
        back.run((g, dx, tau_grad, bits, back.scratch.new(w1), grads, w1, gamma, beta, w2, mean, var))
        return dx, *back.gate.views(step, grads)

    def unpacked(self, kept):
        words = self.step.layout.words
        return kept._replace(bits=kept.bits[: 3 * words].view(3, words))


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan(step: Step) -> Plan:
    """Of forward() into a dense y and, where something is kept, of backward() from a dense g."""
    dense = step.layout.strides
    ahead = prepare_forward(step, dense)
    launches, spent = ahead.launches, Cost()
    if step.keep:
        back = prepare_backward(step, dense, step.want.x)
        launches, spent = launches + back.launches, back.cost
    if ahead.one is not None:
        where = "walked twice, the second time from L2" if ahead.one.plan.loop else "kept in registers"
        name, why, not_taken = "one pass", f"a program takes whole samples, {where}", ()
    else:
        name, why = "several launches", f"the gate stands between reduce and map; {ahead.map.plan.why}"
        not_taken = (("one pass", plan_of(step, (step.strides, dense, step.residual or dense))),)
    return described(name, why, not_taken, ahead.cost + cost.kept_statistics(step), spent, launches)


def described(name: str, why: str, not_taken, forward: Cost, backward: Cost, launches: tuple[Prepared, ...]) -> Plan:
    wide = any(launch.values.get("WIDE", False) for launch in launches)
    shown = tuple(launch.describe() for launch in launches)
    return Plan(name, why, not_taken, 64 if wide else 32, forward, backward, shown)
