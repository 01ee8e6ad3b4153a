"""squeeze_excite: every plane times what a gate makes of the planes' averages.

    A = mean_l x                    Mean
    s = gate(A)                     ordinary autograd: any module, hooks, parameters
    y = x * s [+ residual]          Scale

Two autograd nodes with the gate between them, as in called_shrink.py, and no add of two gradients the size of x:

    Scale.backward     reads g and x: ds = sum_l g * x; hands g and s on
    the gate's own backward: dA
    Mean.backward      reads g again: dx = g * s + dA / L, the only full write

Kept for it: x, because ds takes its values (bits of it are not enough), and s (N, C).
"""

from collections.abc import Callable

import torch

from .. import backends, recording, reference
from ..backends.eager import eager, spread
from ..backends.step import Step, Want
from ..layout import layout_of
from . import checks
from .dispatch import as_saved, current_backward, direct_apply, is_eager_grad, not_eager, restored, will_run
from .gating import call_gate


class Mean(torch.autograd.Function):
    """x -> (A, alias of x). Runs after Scale, which takes the alias and hands g and s over; as called_shrink.Pool."""

    @staticmethod
    def forward(ctx, x, layout, backend):
        ctx.backend, ctx.layout, ctx.dtype, ctx.handed = backend, layout, x.dtype, {}
        ctx.set_materialize_grads(False)
        return backend.reduce(x, layout, kind="value")[0], x

    @staticmethod
    def backward(ctx, mean_grad, alias_grad):
        g, s = ctx.handed.pop(current_backward(), (None, None))
        dx = None
        if g is not None or mean_grad is not None:
            backend = ctx.backend if g is not None and is_eager_grad(g, mean_grad) else eager
            if g is None:  # only A has a loss
                dx = spread(mean_grad, ctx.layout, ctx.dtype)
            else:
                shift = None if mean_grad is None else mean_grad.contiguous()
                dx, _ = backend.map(g, ctx.layout, s, kind="scale", shift=shift)
        if alias_grad is not None:  # after a gate of tensor subclasses, the alias goes through PyTorch's operations
            dx = alias_grad if dx is None else dx + alias_grad
        return dx, None, None


class Scale(torch.autograd.Function):
    """(alias of x, s, residual, x) -> y. `mean` is the Mean node that the alias comes from, if there is one.

    x itself is an input, without a gradient here, to be kept: if someone overwrites it, autograd's error names it.
    """

    @staticmethod
    def forward(ctx, alias, s, residual, x, layout, mean, backend):
        want_x, want_s = ctx.needs_input_grad[:2]
        kept = x if want_s else None, s if want_x else None
        ctx.as_saved = as_saved(*kept)
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.mean, ctx.backend, ctx.columns = layout, mean, backend, s.shape[1]
        ctx.set_materialize_grads(False)
        return backend.map(x, layout, s, kind="scale", residual=residual)[0]

    @staticmethod
    def backward(ctx, g):
        want_x, want_s, want_residual = ctx.needs_input_grad[:3]
        if g is None:
            return None, None, None, None, None, None, None
        x, s = restored(ctx)
        ds = None
        if want_s:
            backend = ctx.backend if is_eager_grad(g) else eager
            ds, _ = backend.reduce(g, ctx.layout, kind="product", times=x)
            if ds.shape[1] != ctx.columns:
                ds = ds.sum(1, keepdim=True)
        if want_x and will_run(ctx.mean):
            ctx.mean.handed[current_backward()] = (g, s)  # instead of returning g * s
        return None, ds, g if want_residual else None, None, None, None, None


_mean, _scale = direct_apply(Mean), direct_apply(Scale)


def squeeze_excite(
    x: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Squeeze-and-excitation: average x over space, let `gate` turn the averages into factors, scale x by them.

    Args:
        x: features (N, C, \*spatial), rank 3 or more, float32, float64, bfloat16 or float16; any strides.
        gate: any callable (N, C) -> (N, C) or (N, 1), a module or a function. It receives the averages in the dtype of
            its first floating-point parameter (float32 without one; float64 for float64 x).
        residual: added to the result in the same pass; x's shape and device, dtype by torch's promotion.

    Returns:
        y with x's shape, dtype and memory format.

    Raises:
        TypeError: x, residual or the gate's output is not a tensor of an accepted dtype, gate is not callable.
        ValueError: a shape or device does not fit.

    The average is of x itself, not of \|x\|, and x is kept for the backward pass where the factors want a gradient.
    Sums and factors are float32 (float64 for float64 x). Source: Hu et al. 2018, equations 2 to 4. Equivalent to::

        A = x.mean(dim=tuple(range(2, x.dim())))
        s = gate(A)
        y = x * s.view(*s.shape, 1, ...) + residual
    """
    checks.features(x, rank=3)
    checks.gate(gate)
    if residual is not None:
        checks.residual(residual, x)
    why = not_eager(x, residual)
    if why is not None or not x.numel():
        recording.elsewhere("squeeze_excite", x, why, gate=gate)
        return _compose(x, call_gate(gate, reference.mean(x), x), residual)

    # A residual of another dtype is added afterwards: the sum's dtype may not be x's.
    fused = residual if residual is None or residual.dtype == x.dtype else None
    backend, layout = backends.select(x), layout_of(x)
    grads = torch.is_grad_enabled()
    mean, handle = None, x
    if grads and x.requires_grad:
        pooled, handle = _mean(x, layout, backend)
        mean = pooled.grad_fn
    else:
        pooled, _ = backend.reduce(x, layout, kind="value")
    s = call_gate(gate, pooled, x)
    why = not_eager(s)
    if why is not None:  # a gate of tensor subclasses
        recording.elsewhere("squeeze_excite", x, f"of what the gate returned, {why}", gate=gate)
        return _compose(handle, s, residual)
    told = recording.active
    if told is not None:
        told(Step(
            "squeeze_excite", layout, x.stride(), x.dtype, x.device, outputs=s.shape[1],
            residual=None if fused is None else fused.stride(), keep=grads and (x.requires_grad or s.requires_grad),
            want=Want(x=x.requires_grad, threshold=s.requires_grad),
        ), x, backend, gate=gate, not_fused="squeeze_excite calls every gate")  # fmt: skip
    if grads and (x.requires_grad or s.requires_grad or (fused is not None and fused.requires_grad)):
        y = _scale(handle, s, fused, x, layout, mean, backend)
    else:
        y, _ = backend.map(x, layout, s, kind="scale", residual=fused)
    return y if residual is fused else y + residual


def _compose(x: torch.Tensor, s: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The rest from ordinary autograd: right under every transform, compiler, subclass."""
    if residual is None or residual.dtype == x.dtype:
        return reference.scale(x, s, residual)  # rounded once, as in the kernels
    return reference.scale(x, s) + residual
