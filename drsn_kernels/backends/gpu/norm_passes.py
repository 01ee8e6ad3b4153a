"""Batch normalisation and an activation: which launches a pass takes, in order, prepared once and run.

                          forward                   backward
    a channel on chip     norm                      norm_grad
    several programs      moments, [merge,] norm    sums, [merge,] norm_grad
    statistics given      norm                      norm_grad; where sums are wanted sums[, merge], or on chip norm_grad
    sums given                                      norm_grad

A merge of its own is for channels_last, and for more than tuned.NORM_PARTIALS pieces of a channel.
"""

from typing import Any, NamedTuple

import torch

from ...layout import Layout
from ...reference import accumulate_dtype
from ..step import Backend, Cost, Norm, Running, Step, Strides
from . import plans, tuned
from .launch import Pass, Prepared, Room, Wired, moving, multiprocessors, same, tile_values
from .norm import merge_kernel, moments_kernel, norm_kernel
from .norm_grad import norm_grad_kernel, sums_kernel
from .plans import NormPlan, cdiv
from .walk import Walk, walk


class Launches(NamedTuple):
    """A pass, and what it allocates besides its results."""

    scratch: Room
    run: Pass

    @classmethod
    def of(cls, names: tuple[str, ...], wired: Wired, scratch: Room, device: torch.device) -> "Launches":
        return cls(scratch, Pass(names, wired, device))

    @property
    def launches(self) -> tuple[Prepared, ...]:
        return self.run.prepared

    @property
    def cost(self) -> Cost:
        return sum((launch.cost for launch in self.launches), Cost(workspace=self.scratch.bytes))


class Over(NamedTuple):
    """What the launches of a pass share: tensors of these strides, and the plan for them."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    on: Walk
    plan: NormPlan
    operands: str  # a letter for each of the walk's

    @classmethod
    def of(
        cls, layout: Layout, strides: tuple[Strides, ...], dtype: torch.dtype, device: torch.device, operands: str,
        reads: int, given: bool = False,
    ) -> "Over":  # fmt: skip
        on = walk(layout, *strides)
        plan = plans.norm(on, dtype.itemsize, multiprocessors(device), reads, given)
        return cls(layout, dtype, device, on, plan, operands)

    @property
    def full(self) -> int:
        """Bytes of a tensor of x's size."""
        return self.layout.numel * self.dtype.itemsize

    @property
    def pair(self) -> int:
        """Bytes of two numbers for each channel."""
        return 2 * self.layout.c * accumulate_dtype(self.dtype).itemsize

    def scratch(self) -> Room:
        return Room("scratch", accumulate_dtype(self.dtype))

    def _values(self) -> dict[str, Any]:
        plan = self.plan
        return tile_values(self.on, plan, self.dtype, self.operands) | {
            "R": plan.rows, "blocks": plan.blocks, "BLOCKED": plan.blocks > 1, "splits": plan.splits,
            "piece": plan.piece, "SPLITS": tuned.NORM_PARTIALS,
        }  # fmt: skip

    def prepared(self, fn: Any, programs: int, read: int, written: int, **values: Any) -> Prepared:
        spent = Cost(read, written, (fn.__name__,))
        return Prepared(
            fn, self.device, programs, self._values() | values, self.plan, spent, warps=self.plan.warps,
            registers=self.plan.registers,
        )  # fmt: skip

    def merging(self, kind: str, norm: Norm | None = None, factor: float | None = None) -> Prepared:
        values = self._values() | moving(factor) | {
            "SPLITS": tuned.NORM_MERGED, "UNITS": tuned.MERGED_UNITS, "KIND": kind,
            "EPS": 0.0 if norm is None else norm.eps, "rows": self.plan.rows * self.plan.piece,
            "width": self.plan.columns,
        }  # fmt: skip
        moved = self.running(factor)
        spent = Cost(self.plan.splits * self.pair + moved, self.pair + moved, ("merge_kernel",))
        programs = cdiv(self.layout.c, tuned.MERGED_UNITS)
        return Prepared(
            merge_kernel, self.device, programs, values, self.plan, spent, warps=tuned.NORM_MERGE_WARPS,
            registers=tuned.NORM_WIDE_REGISTERS,
        )  # fmt: skip

    def running(self, factor: float | None) -> int:
        """Bytes of the running statistics and their count."""
        return 0 if factor is None else self.pair + 8


FORWARD = ("x", "y", "stats", "scratch", "weight", "bias", "mean", "var", "batches")


@tuned.cached
def prepare_norm(
    layout: Layout, x: Strides, dtype: torch.dtype, device: torch.device, norm: Norm, factor: float | None
) -> Launches:
    """factor: of the running statistics, if there are any. Costs are those with weight and bias."""
    over = Over.of(layout, (x, layout.strides), dtype, device, "xy", 1, given=not norm.batch)
    scratch, plan, wired = over.scratch(), over.plan, []
    own = {**same("x", "y", "stats", "weight", "bias"), **same("mean", "var", "batches")}
    moved, source, read = over.running(factor), "tile", 0
    if not norm.batch:
        source, read = "given", over.pair
    elif not plan.on_chip:
        source, read = "partial", plan.splits * over.pair
        pieces = scratch.take(2 * layout.c * plan.splits)
        wired.append((over.prepared(moments_kernel, plan.walking, over.full, read), {"x": "x", "partial": pieces}))
        if plan.merge:
            merged = {"partial": pieces, "merged": "stats", **same("mean", "var", "batches")}
            wired.append((over.merging("stats", norm, factor), merged))
            own, source, read, moved = same("x", "y", "stats", "weight", "bias"), "stats", over.pair, 0
        else:
            own["partial"] = pieces
    settled = over.pair * (source != "stats") + moved
    wired.append((
        over.prepared(
            norm_kernel, plan.programs, over.full + over.pair + read + moved, over.full + settled, SOURCE=source,
            EPS=norm.eps, SLOPE=norm.slope, **moving(factor),
        ),
        own,
    ))  # fmt: skip
    return Launches.of(FORWARD, wired, scratch, device)


@tuned.cached
def prepare_statistics(layout: Layout, x: Strides, dtype: torch.dtype, device: torch.device) -> Launches:
    over = Over.of(layout, (x, layout.strides), dtype, device, "xy", 1)
    scratch, plan, first = over.scratch(), over.plan, {"x": "x", "partial": "stats"}
    wired = [(over.prepared(moments_kernel, plan.walking, over.full, plan.splits * over.pair), first)]
    if plan.splits > 1:
        first["partial"] = scratch.take(2 * layout.c * plan.splits)
        wired.append((over.merging("moments"), {"partial": first["partial"], "merged": "stats"}))
    return Launches.of(("x", "stats", "scratch"), wired, scratch, device)


def norm(
    backend: Backend, x: torch.Tensor, layout: Layout, norm: Norm, weight: torch.Tensor | None,
    bias: torch.Tensor | None, given: tuple[torch.Tensor, torch.Tensor] | None, running: Running | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    y, stats = backend.like(x, layout), backend.pair(x, layout)
    if not x.numel():  # one of several processes has no samples
        return y, stats.zero_()
    mean, var, factor, batches = running or (*(given or (None, None)), None, None)
    ahead = prepare_norm(layout, x.stride(), x.dtype, x.device, norm, factor)
    ahead.run((x, y, stats, ahead.scratch.new(stats), weight, bias, mean, var, batches))
    return y, stats


def statistics(backend: Backend, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    stats = backend.pair(x, layout)
    ahead = prepare_statistics(layout, x.stride(), x.dtype, x.device)
    ahead.run((x, stats, ahead.scratch.new(stats)))
    return stats


BACKWARD = ("g", "x", "dx", "sums", "scratch", "stats", "weight", "bias")


@tuned.cached
def prepare_grad(
    layout: Layout, g: Strides, x: Strides, dtype: torch.dtype, device: torch.device, norm: Norm, want_x: bool,
    want_sums: bool, count: int | None,
) -> Launches:  # fmt: skip
    """count: the M of sums that are given. Costs are those with weight and bias."""
    coupled = norm.batch and want_x  # dx has the sums in it
    given = count is not None or not (coupled or want_sums)
    over = Over.of(layout, (g, x, layout.strides), dtype, device, "gxd", 2, given)
    scratch, plan, wired = over.scratch(), over.plan, []
    own = same("g", "x", "stats", "weight", "bias") | ({"dx": "dx"} if want_x else {})
    read, dx, sums = 2 * over.full + 2 * over.pair, over.full * want_x, over.pair * want_sums
    source, more = "tile", 0
    if given:
        source, more, sums = ("sums", over.pair, 0) if coupled else (None, 0, 0)
        own |= {"sums": "sums"} if coupled else {}
    elif plan.on_chip:
        own |= {"sums": "sums"} if want_sums else {}
    else:
        direct = not coupled and plan.splits == 1
        pieces = "sums" if direct else scratch.take(2 * layout.c * plan.splits)
        first = own | {"partial": pieces} if not coupled else own | {"partial": pieces, "dx": None}
        written = plan.splits * over.pair + (0 if coupled else dx)
        wired.append((over.prepared(sums_kernel, plan.walking, read, written, SLOPE=norm.slope), first))
        if not coupled:
            if not direct:
                wired.append((over.merging("sums"), {"partial": pieces, "merged": "sums"}))
            return Launches.of(BACKWARD, wired, scratch, device)
        if plan.merge:
            merged = "sums" if want_sums else scratch.take(2 * layout.c)
            wired.append((over.merging("sums"), {"partial": pieces, "merged": merged}))
            source, more, sums = "sums", over.pair, 0
            own["sums"] = merged
        else:
            source, more = "partial", plan.splits * over.pair
            own |= {"partial": pieces} | ({"sums": "sums"} if want_sums else {})
    last = over.prepared(
        norm_grad_kernel, plan.programs, read + more, dx + sums, SOURCE=source, BATCH=coupled, SLOPE=norm.slope,
        M=layout.n * layout.l if count is None else count,
    )  # fmt: skip
    return Launches.of(BACKWARD, [*wired, (last, own)], scratch, device)


def norm_grad(
    backend: Backend, g: torch.Tensor, x: torch.Tensor, layout: Layout, norm: Norm, weight: torch.Tensor | None,
    bias: torch.Tensor | None, stats: torch.Tensor, want_x: bool, want_sums: bool,
    given: tuple[torch.Tensor, int] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    sums, count = given or (backend.pair(x, layout) if want_sums else None, None)
    want_sums = want_sums and given is None
    dx = backend.like(g, layout) if want_x else None
    if not x.numel():
        return dx, sums.zero_() if want_sums else None
    back = prepare_grad(layout, g.stride(), x.stride(), x.dtype, x.device, norm, want_x, want_sums, count)
    back.run((g, x, dx, sums, back.scratch.new(stats), stats, weight, bias))
    return dx, sums if want_sums else None


# ---- plan ------------------------------------------------------------------------------------------------------------


def of_step(step: Step) -> tuple[Launches, Launches | None]:
    """Forward and, where something is kept, backward of a dense g; with running statistics."""
    factor = 0.1 if step.norm.batch else None
    ahead = prepare_norm(step.layout, step.strides, step.dtype, step.device, step.norm, factor)
    if not step.keep:
        return ahead, None
    return ahead, prepare_grad(
        step.layout, step.layout.strides, step.strides, step.dtype, step.device, step.norm, step.want.x,
        step.want.threshold, None,
    )  # fmt: skip


def costs(step: Step) -> tuple[Cost, Cost]:
    ahead, back = of_step(step)
    if back is None:
        return ahead.cost, Cost()
    saved = step.layout.numel * step.dtype.itemsize + 2 * step.layout.c * step.sums.itemsize  # x; mean and rstd
    return ahead.cost + Cost(saved=saved), back.cost
