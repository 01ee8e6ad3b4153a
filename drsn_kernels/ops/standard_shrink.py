"""shrink with the standard gate (gates.py): gate and step in one autograd node, where the backend can.

    forward    A = mean |x|, u = A w1' + b1, alpha, tau, y = sign(x) * max(|x| - tau, 0) [+ residual]
    backward   dtau = -sum s * kept * g;  dA, dw1, db1, dgamma, dbeta, dw2, db2 through the gate;
               dx = kept * g + s * dA / L

Kept for it: the three bit planes, A, u, alpha, and the statistics that normalised u. A is an output of the node,
although no caller sees it: a second derivative reaches x through A, and an output is a tensor that autograd follows.
"""

from typing import NamedTuple

import torch

from ..backends import eager
from ..gates import Kept, StandardGate
from ..planes import Geometry
from ..reference import threshold
from .dispatch import direct_apply, is_eager_grad


class Call(NamedTuple):
    """What the node is told besides its tensors."""

    backend: object
    geometry: Geometry
    average: str | None
    inplace: bool
    return_tau: bool


class StandardShrink(torch.autograd.Function):
    """(x, residual, w1, b1, gamma, beta, w2, b2) -> (y, A), or (y, A, tau)."""

    @staticmethod
    def forward(ctx, x, residual, w1, b1, gamma, beta, w2, b2, parts, call):
        ctx.set_materialize_grads(False)
        y, tau, kept = call.backend.standard_forward(
            x, call.geometry, parts, call.average, residual, x if call.inplace else None, True, call.return_tau
        )
        if kept.mean is not None and not parts.batch_stats:  # a training step in between would overwrite them
            kept = kept._replace(mean=kept.mean.clone(), var=kept.var.clone())
        ctx.save_for_backward(*kept, w1, b1, gamma, beta, w2, b2)
        # not parts itself: the tensors of a node live in saved_tensors only
        ctx.call, ctx.dtype, ctx.eps, ctx.batch_stats = call, x.dtype, parts.eps, parts.batch_stats
        if call.inplace:
            ctx.mark_dirty(x)
        return (y, kept.pooled, tau) if call.return_tau else (y, kept.pooled)

    @staticmethod
    def backward(ctx, g, pooled_grad=None, tau_grad=None):
        residual_grad = g if ctx.needs_input_grad[1] else None
        want = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:8]
        if not any(want) or (g is None and pooled_grad is None and tau_grad is None):
            return None, residual_grad, *[None] * 8
        *kept, w1, b1, gamma, beta, w2, b2 = ctx.saved_tensors
        kept, call = Kept(*kept), ctx.call
        parts = StandardGate(
            w1, b1, gamma, beta, w2, b2, kept.mean, kept.var, None, ctx.eps, 0.0, ctx.batch_stats
        )  # fmt: skip
        if g is not None and pooled_grad is None and is_eager_grad(g, tau_grad):
            dx, *grads = call.backend.standard_backward(
                call.geometry, ctx.dtype, parts, call.average, kept, g, tau_grad, want
            )
        else:
            dx, *grads = _differentiable(call, ctx.dtype, parts, kept.bits, kept.pooled, g, pooled_grad, tau_grad, want)
        grads = [grad if wanted else None for grad, wanted in zip(grads, want[1:], strict=True)]
        return dx, residual_grad, *grads, None, None


apply_standard = direct_apply(StandardShrink)


def _differentiable(call, dtype, parts, bits, pooled, g, pooled_grad, tau_grad, want):
    """The same gradients as ordinary PyTorch over the planes, A and the parameters: for all higher derivatives."""
    sign, nonzero, kept = bits
    dtau = None
    if g is not None:
        dtau = eager.grad(call.geometry, dtype, g, kept, sign, want_dx=False, want_dtau=True)[1]
    recording = torch.is_grad_enabled()
    # the fused gate computes in float32 under autocast too
    with torch.enable_grad(), torch.autocast(pooled.device.type, enabled=False):
        if not recording or not pooled.requires_grad:
            pooled = pooled.detach().requires_grad_()
        tau = threshold(parts.alpha(pooled), pooled, call.average)
        total = None if dtau is None else dtau.sum_to_size(tau.shape)
        if tau_grad is not None:
            total = tau_grad if total is None else total + tau_grad
        wanted = [pooled, *(p for p, needed in zip(parts[:6], want[1:], strict=True) if needed)]
        if total is None:
            found = [None] * len(wanted)
        else:
            found = torch.autograd.grad(tau, wanted, total, create_graph=recording, allow_unused=True)
    from_gate, *grads = found
    if pooled_grad is not None:
        from_gate = pooled_grad if from_gate is None else from_gate + pooled_grad
    dx = None
    if want[0]:
        dx = eager.grad(call.geometry, dtype, g, kept, sign, nonzero, from_gate)[0]
    grads = iter(grads)
    return dx, *(next(grads) if needed else None for needed in want[1:])
