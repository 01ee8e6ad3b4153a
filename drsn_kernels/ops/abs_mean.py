"""abs_mean: the pooling half of the shrinkage operator.

    A[n, c] = mean_l |x[n, c, l]|        dx = s * dA / L,   s = sign(x)

Forward reads x once. Backward reads the planes sign and nonzero (2 bits an element) and writes dx. The torch backend
keeps x instead (backends/eager.py).
"""

import torch

from .. import backends, recording, reference
from ..backends.eager import eager
from ..backends.step import Step
from ..layout import averaged, layout_of
from . import checks
from .dispatch import as_saved, direct_apply, is_eager_grad, not_eager, restored, use_registered_ops


class AbsMean(torch.autograd.Function):
    """x -> A."""

    @staticmethod
    def forward(ctx, x, layout, backend):
        if backend is eager:
            pooled, kept = eager.averaged(x, layout)
        else:
            pooled, planes = backend.reduce(x, layout, keep=True)
            kept = planes.bits
        ctx.as_saved = as_saved(kept)
        ctx.save_for_backward(kept)
        ctx.backend, ctx.layout, ctx.dtype = backend, layout, x.dtype
        ctx.set_materialize_grads(False)
        return pooled

    @staticmethod
    def backward(ctx, dA):
        if dA is None:
            return None, None, None
        (kept,) = restored(ctx)
        backend = ctx.backend if is_eager_grad(dA) else eager
        if backend is eager:
            return eager.averaged_grad(ctx.layout, ctx.dtype, kept, dA), None, None
        dx, _ = backend.grad(ctx.layout, ctx.dtype, averaged(kept), None, dA=dA)
        return dx, None, None


_apply = direct_apply(AbsMean)


def abs_mean(x: torch.Tensor) -> torch.Tensor:
    r"""Mean of \|x\| over the spatial dimensions: the global average pooling of the absolute value.

    Shapes:
        x (N, C, \*spatial), rank 3 or more -> (N, C), float32 (float64 for float64).

    Raises:
        TypeError: x is not a floating-point tensor. ValueError: x has fewer than three dimensions.

    Source: Zhao et al. 2020, figures 4 and 5 (absolute + GAP). Equivalent to::

        x.abs().mean(dim=tuple(range(2, x.dim())), dtype=torch.float32)
    """
    checks.features(x, rank=3)
    why = not_eager(x)
    if why is not None or not x.numel():
        recording.elsewhere("abs_mean", x, why)
        return traced_abs_mean(x)
    backend, layout = backends.select(x), layout_of(x)
    keep = x.requires_grad and torch.is_grad_enabled()
    told = recording.active
    if told is not None:
        told(Step("abs_mean", layout, x.stride(), x.dtype, x.device, keep=keep), x, backend)
    return _apply(x, layout, backend) if keep else backend.reduce(x, layout)[0]


def traced_abs_mean(x: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """abs_mean where raw pointers are of no use: the registered op, or the reference.

    keep: planes for its own gradient. shrink needs none, because its threshold keeps them.
    """
    if use_registered_ops(x):
        keep = keep and x.requires_grad and torch.is_grad_enabled()
        return torch.ops.drsn_kernels.abs_mean(x, 2 if keep else 0)[0]
    return reference.abs_mean(x)
