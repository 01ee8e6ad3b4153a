"""Which launches the standard gate takes, forward and backward. It knows nothing of x: sequence.py puts them between
the launches that do.

    forward    whole_gate | hidden, [merge,] [normalise,] alpha        A and the parameters to tau and the state
    backward   [logit_grad,] hidden_grad, [merge,] [norm_grad,] linear_grad [, then dx] [, add_shares]
                                                                       dtau to dA and the gradients

whole_gate of few channels and units without statistics of the batch. In brackets: merge and add_shares of many samples,
normalise and norm_grad of many units, logit_grad of many channels. merge, normalise and norm_grad are there with
statistics of the batch only.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..step import Cost, Step
from . import gate, gate_grad, linear_grad, plans, tuned, whole_gate
from .launch import Prepared, Room, Wired, moving, multiprocessors, same
from .native import Piece, Source
from .plans import GatePlan, Product, cdiv, up_to


def gate_values(step: Step) -> dict[str, Any]:
    hidden, outputs, _, batch_stats, eps, momentum = step.gate
    return {
        "H": hidden, "ONE": outputs == 1, "AVERAGE": step.average, "BATCH_STATS": batch_stats, "EPS": eps,
    } | moving(momentum)  # fmt: skip


def gate_plan(step: Step) -> GatePlan:
    layout, (hidden, outputs, *_) = step.layout, step.gate
    return plans.gate(layout.n, layout.c, hidden, outputs, multiprocessors(step.device), step.sums.itemsize)


def _precision(step: Step, of_float32: str) -> str:
    return "ieee" if step.sums == torch.float64 else of_float32


def _of_gate(
    fn: Any, step: Step, plan: GatePlan, over: Product, programs: int, cost_of: Cost, precision: str = "ieee",
    spread: bool = True, **values: int,
) -> Prepared:  # fmt: skip
    values = gate_values(step) | {
        "N": step.layout.n, "CA": step.layout.c // plan.align, "HA": step.gate.hidden // plan.align,
        "ALIGN": plan.align, "tiles": plan.tiles, "groups": plan.groups, "group": plan.group,
        "BN": plan.samples, "BC": plan.channels, "BH": plan.units, "BK": over.depth, "SLICES": over.slices,
        "EVEN": over.even, "GROUPS": plan.at_a_time,
        "PRECISION": _precision(step, precision), "HELD": tuned.HELD and (2 if over.stages == 1 else 1),
    } | values  # fmt: skip
    return Prepared(
        fn, step.device, programs, values, plan, cost_of, warps=max(tuned.GATE_WARPS, over.slices),
        stages=over.stages, registers=tuned.GATE_REGISTERS, spread=spread and over.slices > 1,
    )  # fmt: skip


def _merge(step: Step, plan: GatePlan, statistics: bool) -> Prepared | None:
    """The launch that merges what tiles of the batch have left, where there is one."""
    if not step.gate.batch_stats or plan.groups == plan.tiles:
        return None
    values = {
        "N": step.layout.n, "H": step.gate.hidden, "groups": plan.tiles, "group": plan.samples,
        "STATISTICS": statistics, "BH": tuned.MERGED_UNITS, "GROUPS": tuned.MERGED // tuned.MERGED_UNITS,
    }  # fmt: skip
    programs = cdiv(step.gate.hidden, tuned.MERGED_UNITS)
    spent = gate.merge_cost(step, plan.tiles)
    return Prepared(gate.merge_tiles_kernel, step.device, programs, values, plan, spent, warps=tuned.MERGE_WARPS)


def _behind_norm(
    fn: Any, step: Step, plan: GatePlan, cost_of: Callable[[Step, int], Cost], **values: int
) -> Prepared | None:
    """The launch that does what follows from the batch's statistics by itself, where there is one."""
    if not (step.gate.batch_stats and plan.apart):
        return None
    programs = plan.tiles * cdiv(step.gate.hidden, plan.units)
    return _of_gate(fn, step, plan, plans.NO_PRODUCT, programs, cost_of(step, plan.groups), **values)


def _statistics(room: Room, merge: Prepared | None, step: Step, tiles: int) -> tuple[Piece | None, Piece | None, Wired]:
    """Room for statistics or sums of the tiles (tiles, 2, H), for what is read of them, and the launch between."""
    if not step.gate.batch_stats:
        return None, None, []
    own = room.take(tiles * 2 * step.gate.hidden)
    if merge is None:
        return own, own, []
    merged = room.take(2 * step.gate.hidden)
    return own, merged, [(merge, {"groups_of": own, "merged": merged})]


# ---- forward ---------------------------------------------------------------------------------------------------------


class WholeGate(NamedTuple):
    """The gate's one launch of a forward pass: A and the parameters to tau and the state."""

    launch: Prepared

    def wired(self, step: Step, room: Room, partial: Source, pooled: Source, state: Source, tau: Source) -> Wired:
        kept = {"pooled": pooled, "state": state} if step.keep else {}
        given = same("w1", "b1", "mean", "var", "gamma", "beta", "w2", "b2")
        return [(self.launch, {"partial": partial, "tau": tau, **kept, **given})]


class Gate(NamedTuple):
    """The same by several launches."""

    hidden: Prepared
    merge: Prepared | None
    normalise: Prepared | None
    alpha: Prepared
    ready: bool  # `hidden` makes relu(v): nothing is kept, and statistics are given

    def wired(self, step: Step, room: Room, partial: Source, pooled: Source, state: Source, tau: Source) -> Wired:
        """room: for what they hand to one another."""
        tiles, statistics, between = _statistics(room, self.merge, step, self.hidden.plan.tiles)
        first = {"partial": partial, "pooled": pooled, "state": state, "statistics": tiles, **same("w1", "b1")}
        given = same("mean", "var", "gamma", "beta")
        norm = {"state": state, "statistics": statistics, **given, **same("batches")}
        last = {"pooled": pooled, "state": state, "tau": tau, **same("w2", "b2")}
        if self.ready:
            positive = {"positive": state}  # in the place of u
            return [(self.hidden, first | given | positive), (self.alpha, last | positive)]
        if self.normalise is None:
            return [(self.hidden, first), *between, (self.alpha, norm | last)]
        positive = {"positive": room.take(step.layout.n * step.gate.hidden)}
        return [(self.hidden, first), *between, (self.normalise, norm | positive), (self.alpha, last | positive)]


def prepare_gate(step: Step, parts: int) -> WholeGate | Gate:
    """parts: partial sums that A comes in."""
    whole = _whole_gate(step, parts)
    return _gate(step, parts) if whole is None else WholeGate(whole)


def _whole_gate(step: Step, parts: int) -> Prepared | None:
    n, c, (hidden, _, _, batch_stats, *_) = step.layout.n, step.layout.c, step.gate
    plan = plans.whole_gate(c, hidden, batch_stats)
    if plan is None:
        return None
    values = gate_values(step) | {
        "N": n, "CA": c // plan.align, "HA": hidden // plan.align, "ALIGN": plan.align, "parts": parts,
        "SPLIT": parts > 1, "BN": plan.samples, "BC": plan.channels, "BH": plan.units,
        "PRECISION": _precision(step, tuned.FORWARD_PRECISION), "HELD": tuned.HELD,
    }  # fmt: skip
    return Prepared(
        whole_gate.whole_gate_kernel, step.device, cdiv(n, plan.samples), values, plan,
        whole_gate.whole_gate_cost(step, parts), warps=tuned.WHOLE_WARPS, registers=tuned.GATE_REGISTERS,
    )  # fmt: skip


def _gate(step: Step, parts: int) -> Gate:
    plan, ready = gate_plan(step), not step.keep and not step.gate.batch_stats
    hidden = _of_gate(
        gate.hidden_kernel, step, plan, plan.over_channels, plan.tiles * cdiv(step.gate.hidden, plan.units),
        gate.hidden_cost(step, parts, plan.tiles, ready), tuned.FORWARD_PRECISION, parts=parts, SPLIT=parts > 1,
    )  # fmt: skip
    normalise = _behind_norm(gate.normalise_kernel, step, plan, gate.normalise_cost)
    alpha = _of_gate(
        gate.alpha_kernel, step, plan, plan.over_units, plan.tiles * cdiv(step.gate.outputs, plan.channels),
        gate.alpha_cost(step, plan.groups, ready or normalise is not None), tuned.FORWARD_PRECISION,
    )  # fmt: skip
    return Gate(hidden, _merge(step, plan, statistics=True), normalise, alpha, ready)


# ---- backward --------------------------------------------------------------------------------------------------------


class GateGrad(NamedTuple):
    """The gate's launches of a backward pass: dtau to dA, if wanted, and the parameters' gradients."""

    logits: Prepared | None
    hidden: Prepared | None  # None where one pass has made dz and dv
    merge: Prepared | None
    norm: Prepared | None
    linear: Prepared
    add: Prepared | None  # the shares of a large batch
    pooled: int  # programs of `linear` that make dA
    sizes: tuple[int, ...]  # of the parameters' gradients in their order, each up to 16 bytes

    @property
    def total(self) -> int:
        """Elements of the gradients that `linear` makes, those of a share."""
        return sum(self.sizes[:4] if self.norm else self.sizes)

    def wired(
        self, step: Step, room: Room, dtau: Source | None, dz: Source, dv: Source, pooled: Source, state: Source,
        counted: bool = False,
    ) -> tuple[Wired, dict[str, Piece | None], Wired]:  # fmt: skip
        """The launches up to `linear`; for who makes dx, dA and, where its tiles are counted, their counter; and the
        launches that may come behind that one.

        dz (N, O) and dv (N, H) are filled from dtau, or come filled.
        """
        size, direct, sums, before, positive = step.layout.n * step.layout.c, None, None, [], None
        counter = room.take_as(torch.int32, 1) if counted else None
        given = {"pooled": pooled, "state": state, "dz": dz, "dv": dv, **same("mean", "var", "gamma", "beta")}
        if self.hidden is not None:
            direct = room.take(size) if self.pooled and step.average is not None else None
            tiles, sums, between = _statistics(room, self.merge, step, self.hidden.plan.tiles)
            logits = {"dtau": dtau, "direct": direct, **same("tau_grad")}
            own = {"sums": tiles, "counter": counter, **same("w2")}
            if self.logits is None:
                own |= logits
            else:
                logits |= {"pooled": pooled, "state": state, "dz": dz}
                before = [(self.logits, logits)]
            before += [(self.hidden, given | own), *between]
        if self.norm is not None:
            positive, norms = room.take(step.layout.n * step.gate.hidden), Piece("grads", self.total, step.sums)
            own = {"state": state, "sums": sums, "dv": dv, "positive": positive, "norms": norms}
            before.append((self.norm, own | same("gamma", "beta")))
        dA = room.take(size) if self.pooled else None
        shares = "grads" if self.add is None else room.take(self.linear.plan.shares * self.total)
        own = {"sums": sums, "positive": positive, "direct": direct, "dA": dA, "counter": counter, "grads": shares}
        after = [] if self.add is None else [(self.add, {"shares_of": shares, "added": "grads"})]
        return [*before, (self.linear, given | own | same("w1"))], {"dA": dA, "counter": counter}, after

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


def prepare_gate_grad(step: Step, parts: int | None, dA: bool, parameters: bool = True) -> GateGrad:
    """parts: partial sums that dtau comes in; None where dz and dv come instead. parameters: theirs are wanted too."""
    plan, (h, o, norm, *_), c = gate_plan(step), step.gate, step.layout.c
    sizes = tuple(up_to(length, 4) for length in (h * c, h, o * h, o, *((h, h) if norm else ())))
    direct = dA and step.average is not None
    logits = hidden = merge = between = add = None
    if parts is not None:
        # dz by itself where no sum over channels stands in it
        dz_ready = c > tuned.LOGITS_APART and o > 1 and step.average != "sample"
        back, precision = plan.back, tuned.BACKWARD_PRECISION
        if dz_ready:
            back = plan.over_channels
            precision = tuned.FORWARD_PRECISION if back.slices > 1 else precision
            logits = Prepared(
                gate_grad.logit_grad_kernel, step.device, cdiv(step.layout.n * c, tuned.LOGITS),
                {"N": step.layout.n, "CA": c // plan.align, "HA": h // plan.align, "ALIGN": plan.align,
                 "parts": parts, "AVERAGE": step.average, "SPLIT": parts > 1, "BLOCK": tuned.LOGITS},
                plan, gate_grad.logit_grad_cost(step, parts, direct), warps=tuned.GATE_WARPS,
            )  # fmt: skip
        hidden = _of_gate(
            gate_grad.hidden_grad_kernel, step, plan, back, plan.tiles * cdiv(h, plan.units),
            gate_grad.hidden_grad_cost(step, parts, plan.tiles, direct, dz_ready), precision, parts=parts,
            SPLIT=parts > 1, READY=dz_ready,
        )  # fmt: skip
        merge = _merge(step, plan, statistics=False)
        between = _behind_norm(
            gate_grad.normalise_grad_kernel, step, plan, gate_grad.normalise_grad_cost, after_gamma=sum(sizes[4:5])
        )
    du_ready, made = between is not None, sum(sizes[:4] if between else sizes)
    row = made * step.sums.itemsize
    first = plan.shares * cdiv(h, plan.weights) * cdiv(c, plan.weights)
    second = first + plan.shares * cdiv(h, plan.weights) * cdiv(o, plan.weights)
    last = second + du_ready * plan.shares * (cdiv(h, plan.weights) + cdiv(o, plan.weights))
    pooled = dA * plan.tiles * cdiv(c, plan.channels)
    wanted = last if parameters else 0
    tensor_cores = plan.weights == tuned.WEIGHT_TILE or plan.over_units.slices > 1
    linear = _of_gate(
        linear_grad.linear_grad_kernel, step, plan, plan.over_units, pooled + wanted,
        linear_grad.linear_grad_cost(step, 0 if du_ready else plan.groups, parameters * plan.shares * row, dA, direct),
        tuned.WEIGHT_PRECISION if tensor_cores else tuned.BACKWARD_PRECISION,
        spread=False, of_pooled=pooled, first=first, second=second, share=plan.share, total=made, WALK=plan.step,
        BW=plan.weights, READY=du_ready,
    )  # fmt: skip
    if parameters and plan.shares > 1:
        values = {"shares": plan.shares, "total": made, "BLOCK": tuned.ADDED, "AT_ONCE": tuned.ADDED_SHARES}
        spent = linear_grad.add_shares_cost(row, plan.shares)
        programs = cdiv(made, tuned.ADDED)
        add = Prepared(
            linear_grad.add_shares_kernel, step.device, programs, values, plan, spent, warps=tuned.GATE_WARPS
        )  # fmt: skip
    return GateGrad(logits, hidden, merge, between, linear, add, pooled, sizes)
