"""abs_mean: the pooling half of the shrinkage operator.

    A[n, c] = mean_l |x[n, c, l]|        dx = s * dA / L,   s = sign(x)

Forward reads x once. Backward reads the planes sign and nonzero (2 bits an element) and writes dx.
"""

import torch

from .. import backends, recording, reference
from ..backends import eager
from ..planes import geometry
from ..reference import SOFT
from . import checks
from .dispatch import current_backward, direct_apply, is_eager_grad, not_eager, use_registered_ops


class AbsMean(torch.autograd.Function):
    """x -> A; with `alias` also x itself, for an operator that goes on with x after a gate has seen A (shrink.py).

    The alias makes this node run after the second operator's (Apply), which hands over its gradient g, the plane kept,
    and the planes of this node that it has unpacked already (saved tensors may be asked for only once under
    checkpointing). So dx = kept * g + s * dA / L is written in one pass, and no gradient add is left to autograd.
    `handed` is keyed by the backward pass: threads and hooks may run several through one node at a time. A gradient
    that reaches the alias itself comes from elsewhere (an in-place x that the gate or a residual uses too): it is whole
    already, and added.
    """

    @staticmethod
    def forward(ctx, x, geo, backend, alias, inplace):
        pooled, bits = backend.reduce(x, geo, planes=True)
        ctx.save_for_backward(bits)
        ctx.backend, ctx.geometry, ctx.dtype, ctx.handed = backend, geo, x.dtype, {}
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        return (pooled, x) if alias else pooled

    @staticmethod
    def backward(ctx, pooled_grad, alias_grad=None):
        handed = ctx.handed.pop(current_backward(), None)
        g = kept = dx = None
        rule = SOFT
        if handed is not None:
            g, kept, (sign, nonzero), rule = handed
        elif pooled_grad is not None:
            sign, nonzero = ctx.saved_tensors[0]
        if g is not None or pooled_grad is not None:
            backend = ctx.backend if is_eager_grad(g, pooled_grad) else eager
            dx, _ = backend.grad(
                ctx.geometry, ctx.dtype, g, kept, sign if pooled_grad is not None else None, nonzero, pooled_grad,
                rule=rule,
            )  # fmt: skip
        if alias_grad is not None:
            dx = alias_grad if dx is None else dx + alias_grad
        return dx, None, None, None, None


apply_abs_mean = direct_apply(AbsMean)


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
    if why is None and x.numel():
        backend = backends.select(x)
        keep = x.requires_grad and torch.is_grad_enabled()
        if recording.active is not None:
            recording.active("abs_mean", x, backend, keep=keep)
        if keep:
            return apply_abs_mean(x, geometry(x), backend, False, False)
        return backend.reduce(x, geometry(x), planes=False)[0]
    if recording.active is not None:
        recording.elsewhere("abs_mean", x, why)
    return traced_abs_mean(x)


def traced_abs_mean(x: torch.Tensor) -> torch.Tensor:
    """abs_mean where raw pointers are of no use: the registered op, or the reference."""
    if use_registered_ops(x):
        return torch.ops.drsn_kernels.abs_mean(x)[0]
    return reference.abs_mean(x)
