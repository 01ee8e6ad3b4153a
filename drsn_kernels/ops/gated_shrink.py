"""shrink with the standard gate (gates.py): gate and step in one autograd node, where the backend can.

    forward    A = mean |x|, u = A w1' + b1, alpha, tau, y = sign(x) * max(|x| - tau, 0) [+ residual]
    backward   dtau = -sum s * kept * g;  dA, dw1, db1, dgamma, dbeta, dw2, db2 through the gate;
               dx = kept * g + s * dA / L

Kept for it: the three bit planes, A, u, alpha, and the statistics that normalised u. A is an output of the node,
although no caller sees it: a second derivative reaches x through A, and an output is a tensor that autograd follows.
"""

import torch

from .. import backends, checked, gates, recording
from ..backends.eager import eager
from ..backends.step import Gated, Kept
from ..gates import StandardGate
from ..layout import thresholded
from ..reference import threshold
from .dispatch import as_saved, direct_apply, is_eager_grad, overwritten, restored


class GatedShrink(torch.autograd.Function):
    """(x, residual, w1, b1, gamma, beta, w2, b2) -> (y, A), or (y, A, tau)."""

    @staticmethod
    def forward(ctx, x, residual, w1, b1, gamma, beta, w2, b2, parts, gated, inplace):
        ctx.set_materialize_grads(False)
        y, tau, kept = gated.forward(x, parts, residual, x if inplace else None)
        if kept.mean is not None:  # running statistics: a training step in between would overwrite them
            kept = kept._replace(mean=kept.mean.clone(), var=kept.var.clone())
        pooled, kept = kept.pooled, (*kept, w1, b1, gamma, beta, w2, b2)
        ctx.as_saved = as_saved(*kept)
        ctx.save_for_backward(*kept)
        ctx.gated = gated  # not parts: the tensors of a node live in saved_tensors only
        if inplace:
            ctx.mark_dirty(x)
        return (y, pooled) if tau is None else (y, pooled, tau)

    @staticmethod
    def backward(ctx, g, pooled_grad=None, tau_grad=None):
        needed = ctx.needs_input_grad
        residual_grad, want = g if needed[1] else None, needed[:1] + needed[2:8]
        if not any(want) or (g is None and pooled_grad is None and tau_grad is None):
            return None, residual_grad, *[None] * 9
        saved, gated = restored(ctx), ctx.gated
        if g is not None and pooled_grad is None and is_eager_grad(g, tau_grad):
            grads = gated.backward(saved, g, tau_grad, want)
        else:
            grads = _differentiable(gated, saved, g, pooled_grad, tau_grad, want)
        if not all(want):
            grads = [grad if wanted else None for grad, wanted in zip(grads, want, strict=True)]
        return grads[0], residual_grad, *grads[1:], None, None, None


_apply = direct_apply(GatedShrink)


def run_gated(
    x: torch.Tensor, residual: torch.Tensor | None, parts: StandardGate, gated: Gated, gate, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, tau or None), gate and step computed together."""
    step, told = gated.step, recording.active
    if told is not None:
        told(step, x, gated.backend, gate=gate)
    if step.keep:
        out = _apply(x, residual, *parts[:6], parts, gated, overwrite)
        y, tau = out[0], out[2] if step.want.tau else None
    else:
        y, tau, _ = gated.forward(x, parts, residual, x if overwrite else None)
        if overwrite:
            overwritten(x)
    if parts.batch_stats:
        overwritten(parts.batches)
    return y, tau


# ---- calls that have been checked ------------------------------------------------------------------------------------


def look_up(
    x: torch.Tensor, residual: torch.Tensor | None, parts: StandardGate, norm: gates.Norm | None, average: str | None,
    return_tau: bool,
) -> tuple[tuple | None, Gated | None]:  # fmt: skip
    """The key of a call with soft thresholds and not in place, and the passes of such calls (checked.py).

    parts, norm: as gates.read has just found them. Of what the guard compares, the key has as much as keeps models that
    take turns from driving each other out.
    """
    try:
        key = (
            x.shape, x.stride(), x.dtype, x.device, x.requires_grad, torch.is_grad_enabled(), average, return_tau,
            parts[0].shape, parts[0].requires_grad, parts[9:], norm, backends.choice.backend,
            None if residual is None else (residual.stride(), residual.requires_grad),
        )  # fmt: skip
        tensors = gates.tensors_of(parts, norm)
        return key, checked.find(key, x, *tensors) if residual is None else checked.find(key, x, residual, *tensors)
    except (AttributeError, RuntimeError, TypeError):  # None, a sparse tensor, a list: the checks say so
        return None, None


def remember(
    key: tuple, gated: Gated, x: torch.Tensor, residual: torch.Tensor | None, parts: StandardGate
) -> None:  # fmt: skip
    """Calls like this one need no checks."""
    checked.keep(key, gated, *(t for t in (x, residual, *parts[:9]) if t is not None))


def _differentiable(gated, saved, g, pooled_grad, tau_grad, want):
    """The same gradients as ordinary PyTorch over the planes, A and the parameters: for all higher derivatives."""
    step, kept = gated.step, Kept(*saved[:4])
    parts = StandardGate(
        *saved[4:], kept.mean, kept.var, None, step.gate.eps, step.gate.momentum, step.gate.batch_stats
    )  # fmt: skip
    planes, pooled, dtau = thresholded(gated.unpacked(kept).bits, nonzero=True), kept.pooled, None
    if g is not None:
        _, dtau = eager.grad(step.layout, step.dtype, planes, g, want_dx=False, want_dtau=True)
    recorded = torch.is_grad_enabled()
    # the fused gate computes in float32 under autocast too
    with torch.enable_grad(), torch.autocast(pooled.device.type, enabled=False):
        if not recorded or not pooled.requires_grad:
            pooled = pooled.detach().requires_grad_()
        tau = threshold(parts.alpha(pooled), pooled, step.average)
        total = None if dtau is None else dtau.sum_to_size(tau.shape)
        if tau_grad is not None:
            total = tau_grad if total is None else total + tau_grad
        wanted = [pooled, *(p for p, needed in zip(parts.parameters, want[1:], strict=True) if needed)]
        if total is None:
            found = [None] * len(wanted)
        else:
            found = torch.autograd.grad(tau, wanted, total, create_graph=recorded, allow_unused=True)
    from_gate, *grads = found
    if pooled_grad is not None:
        from_gate = pooled_grad if from_gate is None else from_gate + pooled_grad
    dx = None
    if want[0]:
        dx, _ = eager.grad(step.layout, step.dtype, planes, g, dA=from_gate)
    grads = iter(grads)
    return dx, *(next(grads) if needed else None for needed in want[1:])
