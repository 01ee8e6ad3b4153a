"""The `torch` backend: the kernels' contract in pure PyTorch, on every device. Fallback, and oracle for the others.

For its backward passes it keeps x, which costs nothing to make: a training step takes less than half the time of the
fewest operations that autograd records. With `saves` = "memory" (use_backend's `save`) it keeps the bit planes of the
compiled backends, at a tenth of the memory; packing and unpacking them takes most of the time then. In place, where x
is overwritten, it always does. All gradients are written with differentiable operations on g and dA: second and higher
derivatives run through them, those of the other backends too.
"""

import functools

import torch

from .. import reference
from ..layout import Layout, Planes, averaged, lay_out, pack, thresholded, unpack
from ..reference import SOFT, Rule, accumulate_dtype
from . import cost
from .step import Backend, Called, Cost, Plan, Step

_AVERAGES = {"magnitude": reference.abs_mean, "value": reference.mean}


class Eager(Backend):
    name = "torch"
    saves = "time"  # or "memory"

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
            y = _thresholded(x, t, residual, rule)
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

    # ---- x, or the planes, kept: what the operators ask of this backend alone. The gradients take either

    def averaged(self, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """A (N, C), and what its gradient needs."""
        if self.saves == "time":
            return reference.abs_mean(x), x
        pooled, planes = self.reduce(x, layout, keep=True)
        return pooled, planes.bits

    def averaged_grad(self, layout: Layout, dtype: torch.dtype, kept: torch.Tensor, dA: torch.Tensor) -> torch.Tensor:
        """dx."""
        if kept.is_floating_point():
            return _Signs(kept).dx(layout, None, dA, SOFT)
        return self.grad(layout, dtype, averaged(kept), None, dA=dA)[0]

    def thresholded(
        self, x: torch.Tensor, layout: Layout, tau: torch.Tensor, rule: Rule
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:  # fmt: skip
        """y, and what its gradients need."""
        if self.saves == "time":
            return self.map(x, layout, tau, rule=rule)[0], (x, tau)
        y, planes = self.map(x, layout, tau, rule=rule, keep=2)
        return y, (planes.bits,)

    def thresholded_grad(
        self, layout: Layout, dtype: torch.dtype, kept: tuple[torch.Tensor, ...], g: torch.Tensor, want_dx: bool,
        want_dtau: bool, rule: Rule,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        """dx and dtau (N, C), each if wanted."""
        if len(kept) == 1:
            planes = thresholded(kept[0], nonzero=False)
            return self.grad(layout, dtype, planes, g, want_dx=want_dx, want_dtau=want_dtau, rule=rule)
        signs = _Signs(*kept)
        dtau = signs.dtau(g, rule) if want_dtau else None
        return signs.dx(layout, g, None, rule) if want_dx else None, dtau

    def called(self, layout, dtype, rule, average):
        return _Called(self, layout, dtype, rule, average)

    # ---- batch normalisation and an activation; the gradients are differentiable in g, x, weight and bias

    def norm(self, x, layout, norm, weight, bias, given=None, running=None):
        """With given statistics: those of several processes. What one normalises alone, torch's batch_norm does."""
        wide, (mean, var) = x.to(accumulate_dtype(x.dtype)), given
        stats = torch.stack([mean, torch.rsqrt(var + norm.eps)])
        z = _affine(_centred(wide, stats), weight, bias)
        return lay_out(reference.activation(z, norm.slope).to(x.dtype), layout), stats

    def norm_statistics(self, x, layout):
        var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), _but_channels(x), correction=0)
        return torch.stack([mean, var * (layout.n * layout.l)])

    def norm_grad(self, g, x, layout, norm, weight, bias, stats, want_x, want_sums, given=None):
        wide, dims = x.to(accumulate_dtype(x.dtype)), _but_channels(x)
        if norm.batch and given is None and torch.is_grad_enabled():  # mean and rstd depend on x
            var, mean = torch.var_mean(wide, dims, correction=0)
            stats = torch.stack([mean, torch.rsqrt(var + norm.eps)])
        normed = _centred(wide, stats)
        z, g = _affine(normed, weight, bias), g.to(wide.dtype)
        if norm.slope != 1:  # NaN counts as positive, as in the kernels
            g = torch.where(z <= 0, norm.slope * g if norm.slope else 0.0, g)
        sums, count = given or (torch.stack([g.sum(dims), (g * normed).sum(dims)]), layout.n * layout.l)
        dx = None
        if want_x:
            if norm.batch:
                dbias, dweight = (_aligned(s, x) for s in sums)
                g = g - (dbias + normed * dweight) / count
            factor = stats[1] if weight is None else weight * stats[1]
            dx = lay_out((g * _aligned(factor, x)).to(x.dtype), layout)
        return dx, sums if want_sums else None

    def norm_cost(self, step):
        """Of PyTorch's own batch_norm and activation, which this backend's calls are."""
        norm, shape, strides, c = step.norm, step.layout.shape, step.layout.strides, step.layout.c
        x, y = cost.like(shape, step.strides, step.dtype), cost.like(shape, strides, step.dtype)
        by_channel = [torch.empty(c, dtype=step.sums, device="meta") for _ in range(4)]
        mean, var = (None, None) if norm.batch else by_channel[:2]
        forward = cost.traced(
            reference.batch_norm_act, x, mean, var, *by_channel[2:], norm.batch, 0.1, norm.eps, norm.slope
        )  # fmt: skip
        if not step.keep:
            return forward, Cost()

        def backward() -> tuple[torch.Tensor, ...]:
            g = y
            if norm.slope == 0:
                g = torch.ops.aten.threshold_backward(y, y, 0)
            elif norm.slope != 1:
                g = torch.ops.aten.leaky_relu_backward(y, y, norm.slope, False)
            want = [step.want.x, step.want.threshold, step.want.threshold]
            return torch.ops.aten.native_batch_norm_backward(
                g, x, by_channel[2], mean, var, *by_channel[:2], norm.batch, norm.eps, want
            )  # fmt: skip

        saved = cost.map_bytes(step) * (1 if norm.slope == 1 else 2) + 2 * c * step.sums.itemsize
        return forward + Cost(saved=saved), cost.traced(backward)

    # ---- costs

    def plan(self, step: Step) -> Plan:
        """Counted on tensors without memory: the code above changes."""
        why = "the kernels' contract in PyTorch, on every device"
        if step.op == "batch_norm_relu":
            forward, backward = self.norm_cost(step)
            why = "PyTorch's own batch_norm and activation"
            return Plan("PyTorch operations", why, index_bits=None, forward=forward, backward=backward)
        keeps_x = step.keep and step.op != "squeeze_excite" and self.saves == "time"
        forward, backward = _cost_of_keeping_x(step) if keeps_x else cost.of_streams(self, step)
        return Plan("PyTorch operations", why, index_bits=None, forward=forward, backward=backward)

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


def _thresholded(x: torch.Tensor, t: torch.Tensor, residual: torch.Tensor | None, rule: Rule) -> torch.Tensor:
    """reference.soft_threshold, the same numbers, in fewer passes and buffers where no tau is negative.

    That is asked of the CPU only: on another device the answer would be waited for. Tensors without memory have none.
    What autograd records is not written in place.
    """
    recorded = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, t, residual))
    if rule != SOFT or recorded or not (t.is_cpu or t.is_meta):
        return reference.soft_threshold(x, t, residual, rule)
    negative = (t < 0).any()
    if not t.is_meta and negative:
        return reference.soft_threshold(x, t, residual, rule)
    wide, t = x.to(t.dtype), reference.align_tau(t, x)
    y = torch.clamp(wide, -t, t)
    y = torch.sub(wide, y, out=y)
    return (y if residual is None else y.add_(residual)).to(x.dtype)


class _Signs:
    """For one backward pass, what it needs of x (and, for g, of tau): made once, where it is first asked for."""

    def __init__(self, x: torch.Tensor, tau: torch.Tensor | None = None):
        self.x, self.tau, self.masked = x.detach(), None if tau is None else tau.detach(), None
        self.spatial = list(range(2, x.dim()))

    @functools.cached_property
    def signs(self) -> torch.Tensor:
        return torch.sign(self.x).to(accumulate_dtype(self.x.dtype))

    @functools.cached_property
    def inside(self) -> torch.Tensor:
        """Not kept: |x| <= tau or x == 0, which is inside even of a tau that is negative or NaN."""
        return self.x.abs() <= reference.align_tau(torch.where(self.tau > 0, self.tau, 0.0), self.x)

    def dtau(self, g: torch.Tensor, rule: Rule) -> torch.Tensor:
        """(N, C)."""
        self.masked = torch.where(self.inside, 0.0, g.to(self.tau.dtype))
        product = self.masked * self.signs
        dtau = -(product.sum(self.spatial) if self.spatial else product)
        return dtau if rule.offset == 1 else rule.offset * dtau

    def dx(self, layout: Layout, g: torch.Tensor | None, dA: torch.Tensor | None, rule: Rule) -> torch.Tensor:
        dx = None
        if g is not None:
            dx, self.masked = self.masked, None  # dtau's, for the same g
            if dx is None or rule.inside:
                wide = g.to(self.tau.dtype)
                dx = torch.where(self.inside, rule.inside * wide if rule.inside else 0.0, wide)
        if dA is not None:
            share = (dA / layout.l).reshape(*dA.shape, *[1] * len(self.spatial))
            dx = self.signs * share if dx is None else torch.addcmul(dx, self.signs, share)
        return lay_out(dx.to(self.x.dtype), layout)


class _Called(Called):
    """Keeps x, or planes where it is told to. It is told what Called itself has kept, too, and goes on with that."""

    def shrink(self, x, tau, residual=None, out=None, keep=0):
        if not keep or self.backend.saves == "memory":
            return super().shrink(x, tau, residual, out, keep)
        return self.backend.map(x, self.layout, tau, rule=self.rule, residual=residual)[0], x

    def unpacked(self, x: torch.Tensor, alpha: torch.Tensor, pooled: torch.Tensor) -> _Signs:
        """What the methods below are given in the place of planes, in one backward pass."""
        return _Signs(x, reference.threshold(alpha, pooled, self.average))

    def dtau(self, bits, g):
        return bits.dtau(g, self.rule) if isinstance(bits, _Signs) else super().dtau(bits, g)

    def dx(self, bits, g, dA):
        if isinstance(bits, _Signs):
            return bits.dx(self.layout, g, dA, self.rule)
        return super().dx(bits, g, dA)


def _cost_of_keeping_x(step: Step) -> tuple[Cost, Cost]:
    """Forward and backward."""
    full, c, want = cost.map_bytes(step), step.layout.c, step.want
    x = cost.like(step.layout.shape, step.strides, step.dtype)
    g, pooled = cost.like(step.layout.shape, step.layout.strides, step.dtype), cost.small(step, c)
    if step.op == "abs_mean":
        forward = cost.traced(reference.abs_mean, x) + Cost(saved=full)
        return forward, cost.traced(lambda: _Signs(x).dx(step.layout, None, pooled, SOFT))
    if step.op == "soft_threshold":
        tau = cost.small(step, step.outputs)
        forward = cost.traced(_thresholded, x, tau, None, step.rule)
        forward += Cost(saved=full + cost.sums_bytes(step, step.outputs))

        def backward() -> tuple[torch.Tensor | None, ...]:
            dx, dtau = eager.thresholded_grad(
                step.layout, step.dtype, (x, tau), g, want.x, want.threshold, step.rule
            )  # fmt: skip
            return dx, None if dtau is None else dtau.sum_to_size(tau.shape)

        return forward, cost.traced(backward)
    alpha = cost.small(step, step.outputs)
    call = eager.called(step.layout, step.dtype, step.rule, step.average)

    def ahead() -> tuple[torch.Tensor, torch.Tensor | None]:
        tau = reference.threshold(alpha, pooled, step.average)
        tau = tau.clone() if want.tau and step.average is None else tau
        residual = None if step.residual is None else g
        return _thresholded(x, tau, residual, step.rule), tau if want.tau else None

    def back() -> torch.Tensor | None:
        signs = call.unpacked(x, alpha, pooled)
        dtau = signs.dtau(g, step.rule)
        _, dA = reference.threshold_grad(dtau, None, alpha, pooled, step.average, True, want.x)
        if want.x:
            return signs.dx(step.layout, g, pooled if dA is None else dA, step.rule)

    saved = Cost(saved=full + cost.sums_bytes(step) + cost.sums_bytes(step, step.outputs))
    return cost.traced(reference.abs_mean, x) + cost.traced(ahead) + saved, cost.traced(back)


def _but_channels(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _aligned(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) along x's channels."""
    return t.reshape(1, -1, *[1] * (x.dim() - 2))


def _centred(wide: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """(x - mean) * rstd"""
    return (wide - _aligned(stats[0], wide)) * _aligned(stats[1], wide)


def _affine(normed: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    z = normed if weight is None else normed * _aligned(weight, normed)
    return z if bias is None else z + _aligned(bias, normed)


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
