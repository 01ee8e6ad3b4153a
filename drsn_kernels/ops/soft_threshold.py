"""soft_threshold with a given tau.

    y    = sign(x) * max(|x| - tau, 0)
    kept = not (|x| <= tau) and x != 0
    dx   = kept * g                        dtau = -sum s * kept * g over what tau is broadcast along

Hard and leaky thresholds (reference.Rule) are the same kernels with other constants, and keep the same planes.

Forward reads x and writes y and, for a gradient, the planes kept and sign (2 bits an element). Backward reads g and the
planes once and writes dx, with dtau summed on the way. The torch backend keeps x and tau instead (backends/eager.py).
"""

import numbers

import torch

from .. import backends, recording, reference
from ..backends.eager import eager
from ..backends.step import Step, Want
from ..layout import layout_of, thresholded
from ..reference import SOFT, Rule
from . import checks
from .dispatch import as_saved, direct_apply, is_eager_grad, not_eager, restored, use_registered_ops


class SoftThreshold(torch.autograd.Function):
    """x (N, C, *spatial), tau (N | 1, C | 1) in the accumulate dtype -> y."""

    @staticmethod
    def forward(ctx, x, tau, layout, backend, rule):
        if backend is eager:
            y, kept = eager.thresholded(x, layout, tau, rule)
        else:
            y, planes = backend.map(x, layout, tau, rule=rule, keep=2)
            kept = (planes.bits,)
        ctx.as_saved = as_saved(*kept)
        ctx.save_for_backward(*kept)
        ctx.backend, ctx.layout, ctx.dtype, ctx.tau_shape, ctx.rule = backend, layout, x.dtype, tau.shape, rule
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None, None, None, None
        kept, backend = restored(ctx), ctx.backend if is_eager_grad(g) else eager
        want_dx, want_dtau = ctx.needs_input_grad[:2]
        if backend is eager:
            dx, dtau = eager.thresholded_grad(ctx.layout, ctx.dtype, kept, g, want_dx, want_dtau, ctx.rule)
        else:
            planes = thresholded(kept[0], nonzero=False)
            dx, dtau = backend.grad(
                ctx.layout, ctx.dtype, planes, g, want_dx=want_dx, want_dtau=want_dtau, rule=ctx.rule
            )  # fmt: skip
        return dx, None if dtau is None else dtau.sum_to_size(ctx.tau_shape), None, None, None


_apply = direct_apply(SoftThreshold)


def soft_threshold(
    x: torch.Tensor, tau: float | torch.Tensor, *, threshold: str = "soft", slope: float = 0.0
) -> torch.Tensor:
    r"""Soft thresholding: shrink every element towards zero by tau, and to zero within it.

    Args:
        x: of any shape, floating point.
        tau: a number or 0-dim tensor for any x; (N, 1) or (N, C) for x (N, C, \*spatial); or a tensor of x's rank that
            broadcasts to x: one for each element, for instance.
        threshold: "hard" leaves x as it is outside of \|x\| <= tau.
        slope: y = slope * x within \|x\| <= tau, 0 <= slope < 1. A soft threshold stays continuous:
            y = sign(x) * (\|x\| - (1 - slope) * tau) outside.

    Returns:
        y with x's shape, dtype and memory format.

    Raises:
        TypeError: x or tau is not floating point. ValueError: tau has another shape or device; unknown threshold or
        slope.

    dx is 1 outside and `slope` inside; dtau is -(1 - slope) * sign(x) outside and 0 inside. Where \|x\| == tau, and
    where x is 0, both are those of inside. A hard threshold's dtau is 0 everywhere: tau decides which elements stay,
    and not what becomes of them, so nothing that tau is computed from learns through it. A negative tau expands; NaN
    and Inf go through as in the forms below. Sums and tau are float32 (float64 for float64 x). Source: Zhao et al.
    2020, equations 3 and 4. Equivalent to::

        x.sign() * (x.abs() - tau).relu()          # tau (N, C) seen as (N, C, 1, ...)

        outside = ~(x.abs() <= tau) & (x != 0)     # with another threshold or a slope
        offset = 0 if threshold == "hard" else 1 - slope
        torch.where(outside, x - x.sign() * offset * tau, slope * x)
    """
    rule = checks.rule(threshold, slope)
    checks.features(x, rank=0)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(tau, torch.Tensor):
        checks.tau_tensor(tau, x)
    elif isinstance(tau, numbers.Real) and not isinstance(tau, bool):
        tau = torch.full((), float(tau), dtype=acc, device=x.device)
    else:
        raise TypeError(f"tau must be a number or a tensor, got {type(tau).__name__}")
    if tau.dtype != acc or (tau.dim() == 0 and tau.device != x.device):
        tau = tau.to(dtype=acc, device=x.device)
    rows = _in_rows(x, tau)
    why = not_eager(x, tau)
    if why is not None or not x.numel():
        recording.elsewhere("soft_threshold", x, why, rows=rows)
        return traced_soft_threshold(x, tau, rule)
    if rows:
        return _row_wise(x, tau, rule)
    if x.dim() >= 2:
        return _element_wise(x, tau, rule)
    row = x.reshape(1, 1, -1)
    y = _element_wise(row, tau.reshape(1, 1, -1), rule) if tau.dim() else _row_wise(row, tau, rule, rows=False)
    return y.view(x.shape)


def _row_wise(x: torch.Tensor, tau: torch.Tensor, rule: Rule, rows: bool = True) -> torch.Tensor:
    """tau for each plane of x. rows: whether the operator was called so."""
    t, backend, layout = _per_plane(tau), backends.select(x), layout_of(x)
    keep = torch.is_grad_enabled() and (x.requires_grad or tau.requires_grad)
    told = recording.active
    if told is not None:
        want = Want(x=x.requires_grad, threshold=tau.requires_grad)
        told(Step(
            "soft_threshold", layout, x.stride(), x.dtype, x.device, rule=rule, outputs=t.shape[1], keep=keep,
            want=want,
        ), x, backend, rows=rows)  # fmt: skip
    return _apply(x, t, layout, backend, rule) if keep else backend.map(x, layout, t, rule=rule)[0]


def _element_wise(x: torch.Tensor, tau: torch.Tensor, rule: Rule) -> torch.Tensor:
    """A tau that varies along the spatial dimensions: every element, in x's memory order, as a channel of its own."""
    as_it_lies, back = layout_of(x).memory_order
    flat, each = (t.permute(as_it_lies).reshape(1, -1) for t in (x, tau.expand(x.shape)))
    y = _row_wise(flat, each, rule, rows=False)
    y = y.view([x.shape[d] for d in as_it_lies]).permute(back)
    return y if y.requires_grad else y.data  # a view made under no_grad could not be changed in place later


def traced_soft_threshold(
    x: torch.Tensor, tau: torch.Tensor, rule: Rule = SOFT, *, residual: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The same for tensors that raw pointers are of no use for; tau in the dtype of sums. residual: of x's dtype.

    pooled: traced_abs_mean(x, keep=False), whose gradient the planes kept here are for too.
    """
    if not use_registered_ops(x, _in_rows(x, tau)):
        return reference.soft_threshold(x, tau, residual, rule)
    keep = 0
    if torch.is_grad_enabled() and (x.requires_grad or tau.requires_grad):
        keep = 3 if pooled is not None and x.requires_grad else 2
    return torch.ops.drsn_kernels.soft_threshold(x, _per_plane(tau), residual, pooled, *rule, keep)[0]


def _in_rows(x: torch.Tensor, tau: torch.Tensor) -> bool:
    """Whether tau does not vary within the planes of x (N, C, *spatial)."""
    return x.dim() >= 2 and (tau.dim() <= 2 or all(n == 1 for n in tau.shape[2:]))


def _per_plane(tau: torch.Tensor) -> torch.Tensor:
    """tau, which does not vary within planes, as (N | 1, C | 1)."""
    return tau if tau.dim() == 2 else tau.view(tau.shape[:2] if tau.dim() else (1, 1))
