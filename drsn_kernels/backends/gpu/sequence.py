"""The shrinkage step with the standard gate: which launches it takes, in order, prepared once and run.

                       forward                       backward
    one pass           forward_kernel                backward_kernel, linear_grad
    several launches   reduce, [hidden, alpha,] map  grad (dtau), [hidden_grad, linear_grad,] grad (dx)

One pass is for gates without batch statistics. In brackets is the gate, which knows nothing of x: forward it takes A
and the parameters to tau and the state, backward dtau to dA and the parameters' gradients. Of many channels, units or
samples it is more launches, forward of few without statistics of the batch one (gate_passes.py).

Each way is one Pass (launch.py), called with the arguments and up to three allocations besides y and dx:

    kept      bit planes, A and the gate's state: what a backward pass needs, and nothing else
    scratch   what only the launches of this pass hand to one another
    grads     the parameters' gradients, which are views of it
"""

from typing import Any, NamedTuple

import torch

from ...reference import SOFT
from .. import cost
from .. import step as steps
from ..step import NOTHING_KEPT, Backend, Cost, Kept, Plan, Step
from . import one_pass, plans, stream, tuned
from .gate import Sizes
from .gate_passes import GateGrad, gate_values, prepare_gate, prepare_gate_grad
from .launch import Pass, Prepared, Room, Wired, multiprocessors, same, tile_values
from .native import Piece
from .plans import OnePassPlan, cdiv
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
    values = tile_values(on, plan, step.dtype, operands) | gate_values(step)
    values |= {"S": plan.samples, "PB": plan.rows, "BH": plan.units, "ALL_UNITS": step.gate.hidden <= plan.units}
    programs = cdiv(on.n, plan.samples)
    return Prepared(fn, step.device, programs, values, plan, cost_of, warps=plan.warps, registers=plan.registers)


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
        planes = room.take_as(torch.int8, 3 * layout.words * 4 if step.keep else 0)
        pooled = room.take(layout.n * layout.c)
        return cls(room, planes, pooled, room.take(step.state))


# ---- forward ---------------------------------------------------------------------------------------------------------

FORWARD = ("x", "y", "residual", "tau", "kept", "scratch", "w1", "b1", "gamma", "beta", "w2", "b2", "mean", "var",
           "batches")  # fmt: skip


class Forward(NamedTuple):
    """All launches as a pass, with what it allocates; of them, the one pass or the last of several."""

    one: Prepared | None
    map: Prepared | None
    keeping: Keeping | None
    scratch: Room
    run: Pass
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return self.run.prepared


@tuned.cached
def prepare_forward(step: Step, y: Strides) -> Forward:
    """y: strides of it."""
    s, scratch = Sizes.of(step), Room("scratch", step.sums)
    keeping = Keeping.of(step, Room("kept", step.sums)) if step.keep else None
    one = _one_forward(step, y)
    if one is not None:
        last = None
        wired = [(one, {
            **same("x", "y", "residual", "w1", "b1", "mean", "var", "gamma", "beta", "w2", "b2"),
            "tau": "tau" if step.want.tau else None,
            **({name: getattr(keeping, name) for name in ("planes", "pooled", "state")} if step.keep else {}),
        })]  # fmt: skip
    else:
        last, wired = _several_forward(step, y, keeping, scratch)
    # mean and variance, where they are not in the state
    saved = keeping.room.bytes + s.norm // 2 - s.statistics if step.keep else 0
    total = sum((launch.cost for launch, _ in wired), Cost(saved=saved, workspace=scratch.bytes))
    return Forward(one, last, keeping, scratch, Pass(FORWARD, wired, step.device), total)


def _one_forward(step: Step, y: Strides) -> Prepared | None:
    one = plan_of(step, (step.strides, y, step.residual or y))
    if isinstance(one, str):
        return None
    return _one_pass(one_pass.forward_kernel, step, *one, "xyr", one_pass.forward_cost(step))


def _several_forward(step: Step, y: Strides, keeping: Keeping | None, scratch: Room) -> tuple[Prepared, Wired]:
    layout = step.layout
    first = stream.prepare_reduce(layout, step.strides, None, step.dtype, step.device, "magnitude", False)
    last = stream.prepare_map(
        layout, step.strides, y, step.residual, (1, 0) if step.one_tau else (layout.c, 1), step.dtype, step.device,
        "threshold", SOFT, False, 3 if step.keep else 0, early=True,
    )  # fmt: skip
    splits, ends = first.plan.splits, prepare_gate(step, first.plan.splits)
    _, planes, pooled, state = keeping or Keeping.of(step, scratch)
    tau = "tau" if step.want.tau else scratch.take(layout.n * (1 if step.one_tau else layout.c))
    partial = pooled if splits == 1 else scratch.take(splits * layout.n * layout.c)
    wired = [
        (first, {"x": "x", "out": partial}),
        *ends.wired(step, scratch, partial, pooled, state, tau),
        (last, {**same("x", "y", "residual"), "t": tau, "planes": planes if step.keep else None}),
    ]
    return last, wired


# ---- backward --------------------------------------------------------------------------------------------------------

BACKWARD = ("g", "dx", "tau_grad", "kept", "scratch", "grads", "w1", "gamma", "beta", "w2", "mean", "var")


class Backward(NamedTuple):
    """All launches as a pass, with what it allocates. gate: None of one pass whose parameters want no gradients."""

    gate: GateGrad | None
    scratch: Room
    run: Pass
    cost: Cost

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return self.run.prepared


@tuned.cached
def prepare_backward(step: Step, g: Strides, want_dx: bool, want_parameters: bool) -> Backward:
    """g: strides of it."""
    layout, (hidden, outputs, *_) = step.layout, step.gate
    scratch, (_, planes, pooled, state) = Room("scratch", step.sums), Keeping.of(step, Room("kept", step.sums))
    dz, dv = scratch.take(layout.n * outputs), scratch.take(layout.n * hidden)
    one = _one_backward(step, g, want_dx)
    if one is not None:
        ends, gates, after = prepare_gate_grad(step, None, False) if want_parameters else None, [], []
        own = {"planes": planes, "dz": dz, "dv": dv, "pooled": pooled, "state": state,
               **same("g", "dx", "tau_grad", "w1", "mean", "var", "gamma", "beta", "w2")}  # fmt: skip
        if ends is not None:
            gates, _, after = ends.wired(step, scratch, None, dz, dv, pooled, state)
        wired = [(one, own), *gates, *after]
    else:

        def grad(dA: bool, dx: bool, dtau: bool, counted: int = 0) -> Prepared:
            return stream.prepare_grad(layout, g, step.dtype, step.device, _PLANES, dA, dx, dtau, SOFT, counted)

        first = grad(False, False, True)
        ends = prepare_gate_grad(step, first.plan.splits, want_dx, want_parameters)
        dtau = scratch.take(first.plan.splits * layout.n * layout.c)
        last = grad(True, True, False) if want_dx else None
        counted = last is not None and tuned.DEPENDENT and last.plan.warps <= tuned.COUNTED_WARPS
        if counted:
            last = grad(True, True, False, ends.pooled)
        gates, dA, after = ends.wired(step, scratch, dtau, dz, dv, pooled, state, counted)
        wired = [(first, {"g": "g", "planes": planes, "dtau": dtau}), *gates]
        if last is not None:
            wired.append((last, {"g": "g", "planes": planes, "dx": "dx", **dA}))
        wired += after
    total = sum((launch.cost for launch, _ in wired), Cost(workspace=scratch.bytes))
    return Backward(ends, scratch, Pass(BACKWARD, wired, step.device), total)


def _one_backward(step: Step, g: Strides, want_dx: bool) -> Prepared | None:
    """None without dx: then there is nothing to fuse."""
    if not want_dx:
        return None
    one = plan_of(step, (g, step.layout.strides))
    if isinstance(one, str):
        return None
    return _one_pass(one_pass.backward_kernel, step, *one, "gd", one_pass.backward_cost(step))


# ---- both ------------------------------------------------------------------------------------------------------------


class Gated(steps.Gated):
    def __init__(self, backend: Backend, step: Step):
        super().__init__(backend, step)
        # by strides: hashing the whole step at each pass took 0.7 us of a step's host time, twice
        self._ahead: dict[Strides, Forward] = {}
        self._back: dict[tuple, Backward] = {}

    def forward(self, x, parts, residual=None, out=None):
        """Kept: its bits, int32, are all of `kept`, of which pooled is a view."""
        step, layout = self.step, self.step.layout
        y = torch.empty_like(x) if out is None else out  # with the layout's strides
        ahead = self._ahead.get(y.stride())
        if ahead is None:
            ahead = self._ahead[y.stride()] = prepare_forward(step, y.stride())
        tau = self.backend.sums(x, layout, 1 if step.one_tau else layout.c) if step.want.tau else None
        kept = ahead.keeping.room.new(parts.w1) if step.keep else None  # w1 has the dtype of sums
        ahead.run((x, y, residual, tau, kept, ahead.scratch.new(parts.w1), *parts[:9]))
        if kept is None:
            return y, tau, NOTHING_KEPT
        pooled = kept.as_strided((layout.n, layout.c), (layout.c, 1), ahead.keeping.pooled.start)
        mean, var = (None, None) if step.gate.batch_stats else (parts.mean, parts.var)
        return y, tau, Kept(kept.view(torch.int32), pooled, mean, var)

    def backward(self, saved, g, tau_grad, want):
        """All of the parameters' gradients where any is wanted: they are made by one launch."""
        step, layout = self.step, self.step.layout
        bits, _, mean, var, w1, _, gamma, beta, w2, _ = saved
        dx = self.backend.like(g, layout) if want[0] else None
        tau_grad = None if tau_grad is None else tau_grad.contiguous()
        key = g.stride(), want[0], True in want[1:]
        back = self._back.get(key)
        if back is None:
            back = self._back[key] = prepare_backward(step, *key)
        grads = None if back.gate is None else back.gate.new(w1)
        back.run((g, dx, tau_grad, bits, back.scratch.new(w1), grads, w1, gamma, beta, w2, mean, var))
        return dx, *((None,) * 6 if grads is None else back.gate.views(step, grads))

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
        back = prepare_backward(step, dense, step.want.x, True)
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
