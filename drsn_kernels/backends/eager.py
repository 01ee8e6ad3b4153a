"""The `torch` backend: the kernels' contract in pure PyTorch, on every device. Fallback, and oracle for the others.

It keeps the same bit planes as the compiled backends, so it saves the same memory; only the speed differs. `grad` is
written with differentiable operations on g and dA: second and higher derivatives run through it.
"""

import torch

from .. import reference
from ..layout import Layout, Planes, averaged, lay_out, pack, thresholded, unpack
from ..reference import SOFT, accumulate_dtype
from . import cost
from .step import Backend, Cost, Plan, Step

_AVERAGES = {"magnitude": reference.abs_mean, "value": reference.mean}


class Eager(Backend):
    name = "torch"

    def unsupported(self, x: torch.Tensor) -> str | None:
        return None

    def describe(self) -> str:
        return "available: pure PyTorch, every device"

    def reduce(self, x, layout, *, kind="magnitude", times=None, keep=False):
        if kind == "product":
            acc = accumulate_dtype(x.dtype)
            return (x.to(acc) * times.to(acc)).sum(list(range(2, x.dim()))), None
        planes = averaged(_stacked(layout, torch.signbit(x), x != 0)) if keep else None
        return _AVERAGES[kind](x), planes

    def map(
        self, x, layout, t, *, kind="threshold", rule=SOFT, residual=None, shift=None, out=None, keep=0,
    ):  # fmt: skip
        planes = None
        if kind == "scale":
            y = reference.scale(x, t, residual) if shift is None else _scale_grad(x, layout, t, shift)
        else:
            if keep:
                kept = ~(x.abs().to(t.dtype) <= reference.align_tau(t, x)) & (x != 0)
                masks = (kept, torch.signbit(x), x != 0)
                planes = thresholded(_stacked(layout, *masks[:keep]), keep == 3)
            y = reference.soft_threshold(x, t, residual, rule)
        return (lay_out(y, layout) if out is None else out.copy_(y)), planes

    def grad(
        self, layout, dtype, planes, g, *, dA=None, want_dx=True, want_dtau=False, rule=SOFT,
    ):  # fmt: skip
        acc, spatial = accumulate_dtype(dtype), list(range(2, len(layout.shape)))
        signs = None
        if want_dtau or dA is not None:
            signs = torch.where(unpack(planes.plane("sign"), layout), -1.0, 1.0).to(acc)
        kept = None if g is None else unpack(planes.plane("kept"), layout)
        masked = None if g is None else torch.where(kept, g.to(acc), 0.0)
        dx = dtau = None
        if want_dtau:
            product = masked * signs
            dtau = -(product.sum(spatial) if spatial else product)
            dtau = dtau if rule.offset == 1 else rule.offset * dtau
        if want_dx:
            dx = masked
            if g is not None and rule.inside:
                dx = torch.where(kept, masked, rule.inside * g.to(acc))
            if dA is not None:
                share = (dA / layout.l).reshape(*dA.shape, *[1] * len(spatial))
                direct = torch.where(unpack(planes.plane("nonzero"), layout), signs * share, 0.0)
                dx = direct if dx is None else dx + direct
            dx = lay_out(dx.to(dtype), layout)
        return dx, dtau

    def plan(self, step: Step) -> Plan:
        """Counted on tensors without memory: the code above changes."""
        forward, backward = cost.of_streams(self, step)
        why = "the kernels' contract in PyTorch, on every device"
        return Plan("PyTorch operations", why, forward=forward, backward=backward)

    def reduce_cost(self, step: Step, strides, *, kind="magnitude", keep=False) -> Cost:
        x = cost.like(step.layout.shape, strides, step.dtype)
        times = cost.like(step.layout.shape, step.layout.strides, step.dtype) if kind == "product" else None
        return cost.traced(lambda: self.reduce(x, step.layout, kind=kind, times=times, keep=keep))

    def map_cost(self, step: Step, strides, *, columns, kind="threshold", residual=False, shift=False, keep=0) -> Cost:
        x, added = cost.like(step.layout.shape, strides, step.dtype), None
        if residual:
            added = cost.like(step.layout.shape, step.layout.strides, step.dtype)
        t, small = cost.small(step, columns), cost.small(step, step.layout.c) if shift else None
        return cost.traced(lambda: self.map(
            x, step.layout, t, kind=kind, rule=step.rule, residual=added, shift=small, keep=keep
        ))  # fmt: skip

    def grad_cost(self, step: Step, *, g=True, dA=False, dx=True, dtau=False) -> Cost:
        full = cost.like(step.layout.shape, step.layout.strides, step.dtype) if g else None
        planes = Planes(torch.empty((3, step.layout.words), dtype=torch.int32, device="meta"), 0, 1, 2)
        small = cost.small(step, step.layout.c) if dA else None
        return cost.traced(lambda: self.grad(
            step.layout, step.dtype, planes, full, dA=small, want_dx=dx, want_dtau=dtau, rule=step.rule
        ))  # fmt: skip


def _stacked(layout: Layout, *masks: torch.Tensor) -> torch.Tensor:
    return torch.stack([pack(mask, layout) for mask in masks])


def spread(dA: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """dA / L at every element: the gradient of a mean."""
    share = (dA / layout.l).reshape(*dA.shape, *[1] * (len(layout.shape) - 2))
    return lay_out(share.to(dtype).expand(layout.shape), layout)


def _scale_grad(g: torch.Tensor, layout: Layout, s: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """g * s + dA / L in g's dtype, rounded once; differentiable."""
    acc = accumulate_dtype(g.dtype)
    return (g.to(acc) * reference.align_tau(s, g) + spread(shift, layout, acc)).to(g.dtype)


eager = Eager()
