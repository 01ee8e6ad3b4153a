"""The plan of a call in words, from the objects that its launches are made of."""

from dataclasses import fields
from typing import Any, NamedTuple

import torch

from ..planes import Geometry
from ..traffic import Plan, StandardCall
from . import apply, grad, reduce, standard
from .launch import Prepared


class Planned(NamedTuple):
    """A launch as it would be made."""

    kernel: str
    programs: int
    warps: int
    plan: Any  # of plans.py

    @classmethod
    def of(cls, prepared: Prepared) -> "Planned":
        return cls(prepared.fn.__name__, prepared.grid[0], prepared.constants["num_warps"], prepared.plan)

    def __str__(self) -> str:
        told = {f.name: getattr(self.plan, f.name) for f in fields(self.plan) if f.name not in _TOLD}
        sizes = ", ".join(f"{name} {value}" for name, value in told.items())
        return f"{self.kernel}: {self.programs} programs of {self.warps} warps; {sizes}"


_TOLD = ("programs", "warps", "why")


def plan(
    op: str, geo: Geometry, strides: tuple, dtype: torch.dtype, device: torch.device,
    gate: StandardCall | str | None, planes: int,
) -> Plan:  # fmt: skip
    """strides: of x, y and the residual. gate: shrink's, or why it is not fused. planes: 0 where nothing is kept."""
    if isinstance(gate, StandardCall):
        return _standard(gate)
    if op == "squeeze_excite":
        return _squeeze_excite(geo, strides, dtype, device, gate, planes)
    n, c = geo[0][:2]
    launches = []
    if op != "soft_threshold":
        launches.append(reduce.prepare(geo, strides[0], dtype, device).launch)
    if op != "abs_mean":
        launches.append(apply.prepare(geo, strides, (c, 1), dtype, device, planes == 2)[0])
    if planes and op != "abs_mean":
        launches.append(grad.prepare(geo, (geo[1], geo[1]), dtype, device, True).launch)
    if planes and op != "soft_threshold":
        launches.append(grad.prepare(geo, (geo[1], geo[1]), dtype, device, False).launch)
    why = "; ".join(dict.fromkeys(launch.plan.why for launch in launches))
    if op != "shrink":
        return _of(launches, "one launch each way", why, ())
    return _of(launches, "two launches each way", f"{_BETWEEN}; {why}", [("gate fused", gate)])


_BETWEEN = "a gate of torch's stands between them"


def _squeeze_excite(geo, strides, dtype, device, gate, planes) -> Plan:
    factors, dense = (geo[0][1], 1), geo[1]
    launches = [
        reduce.prepare(geo, strides[0], dtype, device, "values").launch,
        apply.prepare(geo, strides, factors, dtype, device, False, what="scale")[0],
    ]
    if planes:
        launches.append(reduce.prepare(geo, dense, dtype, device, "products", strides[0]).launch)
        launches.append(apply.prepare(geo, (dense,) * 3, factors, dtype, device, False, what="scale")[0])
    why = "; ".join(dict.fromkeys(launch.plan.why for launch in launches))
    return _of(launches, "two launches each way", f"{_BETWEEN}; {why}", [("gate fused", gate)])


def _standard(call: StandardCall) -> Plan:
    ahead, back = standard.prepared(call)
    launches = [ahead.one, ahead.hidden, ahead.alpha, ahead.apply]
    if ahead.one is None:
        launches.insert(0, reduce.prepare(call.geometry, call.strides[0], call.dtype, call.device).launch)
    if call.keep:
        launches += [back.one, back.dtau, back.hidden, back.pooled, back.dx]
    launches = [launch for launch in launches if launch is not None]
    if ahead.one is not None:
        where = "walked twice, the second time from L2" if ahead.one.plan.loop else "kept in registers"
        return _of(launches, "one pass", f"a program takes whole samples, {where}", ())
    key = standard.Call(call.geometry, call.dtype, call.device, *call[4:7], call.coupled, call.eps, call.momentum)
    not_taken = [("one pass", standard.plan_of(key, call.strides))]
    gate = ahead.hidden.plan
    if not gate.on_the_way:
        not_taken.append(("the gate's end on the way", gate.why))
        return _of(launches, "several launches, gate apart", gate.why, not_taken)
    return _of(launches, "several launches", gate.why, not_taken)


def _of(launches: list[Prepared], name: str, why: str, not_taken) -> Plan:
    wide = any(launch.constants.get("WIDE", False) for launch in launches)
    return Plan(name, why, tuple(not_taken), 64 if wide else 32, tuple(map(Planned.of, launches)))
