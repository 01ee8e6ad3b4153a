"""abs_mean: the pooling half of the shrinkage operator.

    A[n, c] = mean_l |x[n, c, l]|        dx = s * dA / L,   s = sign(x)

Forward reads x once. Backward reads the planes sign and nonzero (2 bits an element) and writes dx.
"""

import torch

from .. import backends, reference
from ..backends import eager
from ..planes import geometry
from . import checks
from .dispatch import direct_apply, is_eager, is_eager_grad, use_registered_ops


class AbsMean(torch.autograd.Function):
    """x -> A; with `alias` also x itself, for an operator that goes on with x after a gate has seen A (shrink.py).

    The alias lets two gradients of x meet here before either is written: backward receives g, the alias's gradient,
    and dA, the pooled one, and writes dx = kept * g + s * dA / L in one pass. `handed` is how the second operator
    passes on the planes that it has already unpacked: saved tensors may be asked for only once under checkpointing.
    """

    @staticmethod
    def forward(ctx, x, geo, backend, alias, inplace):
        pooled, bits = backend.reduce(x, geo, planes=True)
        ctx.save_for_backward(bits)
        ctx.backend, ctx.geometry, ctx.dtype, ctx.handed = backend, geo, x.dtype, None
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        return (pooled, x) if alias else pooled

    @staticmethod
    def backward(ctx, pooled_grad, g=None):
        handed, ctx.handed = ctx.handed, None
        if pooled_grad is None and g is None:
            return None, None, None, None, None
        kept, bits = handed if handed is not None else (None, ctx.saved_tensors[0])
        sign, nonzero = bits
        backend = ctx.backend if is_eager_grad(g, pooled_grad) else eager
        masked = g if kept is not None else None
        dx = None
        if masked is not None or pooled_grad is not None:
            sign = sign if pooled_grad is not None else None
            dx, _ = backend.grad(ctx.geometry, ctx.dtype, masked, kept, sign, nonzero, pooled_grad)
        if g is not None and kept is None:  # the alias went through ordinary autograd: g is whole already
            dx = g if dx is None else g + dx
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
    if is_eager(x) and x.numel():
        backend = backends.select(x)
        if x.requires_grad and torch.is_grad_enabled():
            return apply_abs_mean(x, geometry(x), backend, False, False)
        return backend.reduce(x, geometry(x), planes=False)[0]
    if use_registered_ops(x):
        return torch.ops.drsn_kernels.abs_mean(x)[0]
    return reference.abs_mean(x)
