"""shrink: the whole shrinkage step with any gate.

    A     = mean_l |x|                                          AbsMean (abs_mean.py)
    alpha = gate(A)                                             ordinary autograd: any module, hooks, parameters
    tau   = alpha * A | alpha * mean_c A | alpha                Apply
    y     = sign(x) * max(|x| - tau, 0) [+ residual]            Apply

Two autograd nodes with the gate between them, and no add of two gradients the size of x:

    Apply.backward     reads g: dtau = -sum s * kept * g, dalpha, the direct part of dA; hands g on untouched
    the gate's own backward: dA
    AbsMean.backward   reads g again: dx = kept * g + s * dA / L, the only full write

x -> AbsMean -> alias of x -> Apply is why it works: AbsMean runs after Apply and after the gate, with g and dA at hand.
Kept for it: the planes sign and nonzero (AbsMean), kept (Apply), alpha and A: 3 bits an element and two (N, C) tensors.
"""

from collections.abc import Callable

import torch

from .. import backends, recording, reference
from ..backends import eager
from ..gates import StandardGate, standard_gate
from ..planes import geometry
from ..reference import SOFT
from . import checks
from .abs_mean import apply_abs_mean, traced_abs_mean
from .dispatch import current_backward, direct_apply, is_eager_grad, not_eager, use_registered_ops, will_run
from .gating import call_gate
from .soft_threshold import traced_soft_threshold
from .standard_shrink import Call, apply_standard

AVERAGES = ("channel", "sample", None)


class Apply(torch.autograd.Function):
    """(x, alpha, A, residual) -> y, or (y, tau). `pool` is the AbsMean node whose alias x is, if there is one."""

    @staticmethod
    def forward(ctx, x, alpha, pooled, residual, geo, average, pool, backend, inplace, return_tau, rule):
        ctx.set_materialize_grads(False)
        tau = reference.threshold(alpha, pooled, average)
        if return_tau and average is None:
            tau = tau.clone()  # an output that is an input would be a view of the gate's tensor
        planes = 1 if pool is not None else 2 if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else 0
        y, bits = backend.apply(x, geo, tau, residual, x if inplace else None, planes, rule)
        if planes:
            ctx.save_for_backward(bits, alpha, pooled)
            ctx.geometry = geo
        ctx.average, ctx.pool, ctx.backend, ctx.dtype, ctx.rule = average, pool, backend, x.dtype, rule
        if inplace:
            ctx.mark_dirty(x)
        return (y, tau) if return_tau else y

    @staticmethod
    def backward(ctx, g, tau_grad=None):
        want_x, want_alpha, want_pooled, want_residual = ctx.needs_input_grad[:4]
        residual_grad = g if want_residual else None
        if not (want_x or want_alpha or want_pooled) or (g is None and tau_grad is None):
            return None, None, None, residual_grad, None, None, None, None, None, None, None
        bits, alpha, pooled = ctx.saved_tensors
        planes = ctx.pool.saved_tensors[0] if ctx.pool is not None else None
        kept, sign = bits[0], bits[1] if planes is None else planes[0]
        x_grad = dtau = None
        if g is not None:
            backend = ctx.backend if is_eager_grad(g) else eager
            here = want_x and planes is None  # no AbsMean node on x's way: the masked gradient is written here
            want_dtau = want_alpha or want_pooled
            if here or want_dtau:
                x_grad, dtau = backend.grad(
                    ctx.geometry, ctx.dtype, g, kept, sign, want_dx=here, want_dtau=want_dtau, rule=ctx.rule
                )
        if planes is not None and want_x and will_run(ctx.pool):
            ctx.pool.handed[current_backward()] = (g, kept, planes, ctx.rule)  # instead of returning g: see AbsMean
        alpha_grad, pooled_grad = reference.threshold_grad(
            dtau, tau_grad, alpha, pooled, ctx.average, want_alpha, want_pooled
        )
        return x_grad, alpha_grad, pooled_grad, residual_grad, None, None, None, None, None, None, None


_apply = direct_apply(Apply)


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without memory, or a traced one
        return False


def shrink(
    x: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
    *,
    average: str | None = "channel",
    residual: torch.Tensor | None = None,
    inplace: bool = False,
    return_tau: bool = False,
    threshold: str = "soft",
    slope: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Adaptive soft thresholding: pool \|x\|, let `gate` turn it into thresholds, shrink x by them.

    Args:
        x: features (N, C, \*spatial), rank 3 or more, float32, float64, bfloat16 or float16; any strides.
        gate: any callable (N, C) -> (N, C) or (N, 1), a module or a function. It receives A in the dtype of its first
            floating-point parameter (float32 without one; float64 for float64 x).
        average: "channel": tau = gate(A) * A (DRSN-CW). "sample": tau = gate(A) * mean_c A (DRSN-CS when the gate ends
            in one neuron). None: tau = gate(A).
        residual: added to the result in the same pass; x's shape and device, dtype by torch's promotion.
        inplace: overwrite x and return it, in training too.
        return_tau: return (y, tau); tau is (N, C) or (N, 1), float32 (float64 for float64 x), and differentiable.
        threshold, slope: as in :func:`drsn_kernels.soft_threshold`: "hard", or leaky. A gate is then called, never
            fused. Through a hard threshold it does not learn: the derivative of y in tau is 0, and so are the gradients
            that y sends to the gate's parameters.

    Returns:
        y with x's shape, dtype and memory format, or (y, tau).

    Raises:
        TypeError: x, residual or the gate's output is not a tensor of an accepted dtype, gate is not callable.
        ValueError: a shape or device does not fit, unknown average, threshold or slope, inplace on a leaf that requires
        grad or on an expanded tensor. Nothing is changed then.

    Source: Zhao et al. 2020, equations 3 to 11. Equivalent to::

        A = x.abs().mean(dim=tuple(range(2, x.dim())))
        alpha = gate(A)
        tau = alpha * {"channel": A, "sample": A.mean(1, keepdim=True), None: 1}[average]
        y = x.sign() * (x.abs() - tau.view(*tau.shape, 1, ...)).relu() + residual
    """
    checks.features(x, rank=3)
    if average not in AVERAGES:
        raise ValueError(f"average must be 'channel', 'sample' or None, got {average!r}")
    rule = checks.rule(threshold, slope)
    if not callable(gate):
        raise TypeError(f"gate must be a callable (N, C) -> (N, C) or (N, 1), got {type(gate).__name__}")
    if residual is not None:
        checks.residual(residual, x)
    if inplace:
        checks.inplace(x, residual)
        if residual is not None and residual is not x and _share_memory(x, residual):
            residual = residual.clone()  # x would be overwritten before it is added

    why = not_eager(x, residual)
    if why is not None or not x.numel():
        if recording.active is not None:
            recording.elsewhere("shrink", x, why, gate=gate)
        pooled = traced_abs_mean(x)
        return _compose(x, pooled, call_gate(gate, pooled, x), average, residual, inplace, return_tau, rule)

    # A residual of another dtype is added afterwards: the sum's dtype may not be x's.
    fused = residual if residual is None or residual.dtype == x.dtype else None
    backend, geo = backends.select(x), geometry(x)
    grads = torch.is_grad_enabled()
    # autograd allows a node that overwrites a view one output and no siblings: a view is computed aside and copied
    by_copy = inplace and grads and x._is_view()
    overwrite = inplace and not by_copy
    parts = _fusable(gate, x, backend) if rule == SOFT else "the fused gate has soft thresholds only"
    if not isinstance(parts, str):
        if grads and fused is not None and fused.requires_grad and not _any_requires_grad(x, *parts[:6]):
            fused = None  # added afterwards: its gradient is g, for which nothing need be kept
        y, tau = _standard(x, geo, parts, backend, gate, average, fused, grads, overwrite, return_tau)
        return _finish(x, y, tau, residual if residual is not fused else None, overwrite, by_copy, return_tau)
    pool, handle = None, x
    if grads and x.requires_grad:
        pooled, handle = apply_abs_mean(x, geo, backend, True, overwrite)
        pool = pooled.grad_fn
    else:
        pooled = backend.reduce(x, geo, planes=False)[0]
    alpha = call_gate(gate, pooled, x)
    why = not_eager(alpha)
    if why is not None:  # a gate of tensor subclasses
        if recording.active is not None:
            recording.elsewhere("shrink", x, f"of what the gate returned, {why}", gate=gate)
        return _compose(handle, pooled, alpha, average, residual, inplace, return_tau, rule)
    keep = grads and (x.requires_grad or alpha.requires_grad or (fused is not None and fused.requires_grad))
    if recording.active is not None:
        recording.active(
            "shrink", x, backend, keep=grads and (x.requires_grad or alpha.requires_grad), gate=gate, parts=parts,
            average=average, outputs=alpha.shape[1], residual=fused, return_tau=return_tau, rule=rule,
        )  # fmt: skip
    if keep:
        out = _apply(handle, alpha, pooled, fused, geo, average, pool, backend, overwrite, return_tau, rule)
        y, tau = out if return_tau else (out, None)
    else:
        tau = reference.threshold(alpha, pooled, average)
        y = backend.apply(x, geo, tau, fused, x if overwrite else None, 0, rule)[0]
        _overwritten(x if overwrite else None)
        if return_tau and average is None:
            tau = tau.clone()  # the gate's own tensor otherwise
    return _finish(x, y, tau, residual if residual is not fused else None, overwrite, by_copy, return_tau)


def _finish(x, y, tau, residual, overwrite, by_copy, return_tau):
    if residual is not None:
        y = y.add_(residual) if overwrite else y + residual
    if by_copy:
        y = x.copy_(y)
    return (y, tau) if return_tau else y


def _overwritten(*tensors: torch.Tensor | None) -> None:
    """Whoever saved one of these for a backward pass is told, as by any in-place operation."""
    for t in tensors:
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)


def _fusable(gate, x: torch.Tensor, backend) -> StandardGate | str:
    """The parts of a standard gate that this backend computes itself, or why the gate is called."""
    if not hasattr(backend, "standard_forward"):
        return f"the {backend.name} backend calls every gate"
    parts = standard_gate(gate, x)
    return parts if isinstance(parts, str) else backend.standard_unsupported(x, parts) or parts


def _standard(x, geo, parts, backend, gate, average, residual, grads, overwrite, return_tau):
    """(y, tau or None), gate and step computed together."""
    parameters = parts[:6]
    keep = grads and _any_requires_grad(x, *parameters)
    if recording.active is not None:
        recording.active(
            "shrink", x, backend, keep=keep, gate=gate, parts=parts, average=average, outputs=parts.w2.shape[0],
            residual=residual, return_tau=return_tau,
        )  # fmt: skip
    if keep:
        call = Call(backend, geo, average, overwrite, return_tau)
        y, _, *tau = apply_standard(x, residual, *parameters, parts, call)
        tau = tau[0] if tau else None
    else:
        y, tau, _ = backend.standard_forward(
            x, geo, parts, average, residual, x if overwrite else None, False, return_tau
        )
        _overwritten(x if overwrite else None)
    if parts.batch_stats:
        _overwritten(parts.mean, parts.var, parts.batches)
    return y, tau


def _compose(x, pooled, alpha, average, residual, inplace, return_tau, rule):
    """The rest of shrink from soft_threshold and ordinary autograd: right under every transform, compiler, subclass."""
    tau = reference.threshold(alpha, pooled, average)
    if residual is not None and residual.dtype == x.dtype and not (rule == SOFT and use_registered_ops(x)):
        y = reference.soft_threshold(x, tau, residual, rule)  # rounded once, as in the kernels
    else:
        y = traced_soft_threshold(x, tau, rule)
        y = y if residual is None else y + residual
    if inplace:
        y = x.copy_(y)
    return (y, tau) if return_tau else y
