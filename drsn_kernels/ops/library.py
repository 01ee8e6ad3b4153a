"""The operators registered with torch.library: opaque to torch.compile, saving bit planes instead of x.

torch.compile uses them where a backend is forced (`dispatch.use_registered_ops`); by default it gets the reference,
which it can fuse. Each op has a fake kernel, a derivative, and a derivative of the derivative.
"""

import torch
from torch.library import Library, register_autograd, register_fake

from .. import backends
from ..backends.eager import eager
from ..layout import Layout, averaged, dense, layout_of, thresholded
from ..reference import accumulate_dtype

_lib = Library("drsn_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_META = "SymInt[] size, SymInt[] stride, ScalarType dtype"

_lib.define("abs_mean(Tensor x) -> (Tensor, Tensor)", tags=_TAGS)
_lib.define(f"abs_mean_grad(Tensor pooled_grad, Tensor planes, {_META}) -> Tensor", tags=_TAGS)
_lib.define("soft_threshold(Tensor x, Tensor tau) -> (Tensor, Tensor)", tags=_TAGS)
_lib.define(f"soft_threshold_grad(Tensor g, Tensor planes, {_META}) -> (Tensor, Tensor)", tags=_TAGS)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _abs_mean(x):
    pooled, planes = backends.select(x).reduce(x, layout_of(x), keep=True)
    return pooled, planes.bits


def _soft_threshold(x, tau):
    y, planes = backends.select(x).map(x, layout_of(x), tau, keep=2)
    return y, planes.bits


def _of_gradient(t, size, stride):
    """The backend and x's layout, for a gradient of x: t may have fewer dimensions than x (size)."""
    return backends.select(t) if len(size) <= 8 else eager, dense(tuple(size), tuple(stride))


def _abs_mean_grad(dA, planes, size, stride, dtype):
    backend, layout = _of_gradient(dA, size, stride)
    return backend.grad(layout, dtype, averaged(planes), None, dA=dA)[0]


def _soft_threshold_grad(g, planes, size, stride, dtype):
    backend, layout = _of_gradient(g, size, stride)
    return backend.grad(layout, dtype, thresholded(planes, nonzero=False), g, want_dtau=True)


for _name, _kernel in (
    ("abs_mean", _abs_mean),
    ("soft_threshold", _soft_threshold),
    ("abs_mean_grad", _abs_mean_grad),
    ("soft_threshold_grad", _soft_threshold_grad),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")

_ops = torch.ops.drsn_kernels


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _symbolic(x) -> Layout:
    """x's layout where sizes may be symbolic."""
    return dense(x.shape, x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride())


def _empty_planes(x):
    return x.new_empty((2, _symbolic(x).words), dtype=torch.int32)


@register_fake("drsn_kernels::abs_mean", lib=_lib)
def _(x):
    return x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype)), _empty_planes(x)


@register_fake("drsn_kernels::soft_threshold", lib=_lib)
def _(x, tau):
    return torch.empty_like(x), _empty_planes(x)


@register_fake("drsn_kernels::abs_mean_grad", lib=_lib)
def _(pooled_grad, planes, size, stride, dtype):
    return pooled_grad.new_empty_strided(size, stride, dtype=dtype)


@register_fake("drsn_kernels::soft_threshold_grad", lib=_lib)
def _(g, planes, size, stride, dtype):
    return g.new_empty_strided(size, stride, dtype=dtype), g.new_empty(size[:2], dtype=accumulate_dtype(dtype))


# ---- derivatives, each in terms of the same four ops -----------------------------------------------------------------


def _length(size):
    length = 1
    for n in size[2:]:
        length = length * n
    return length


def _keep_planes(ctx, inputs, output):
    x = inputs[0]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    layout = _symbolic(x)
    ctx.meta = layout.shape, layout.strides, x.dtype
    if len(inputs) == 2:
        ctx.tau_shape = inputs[1].shape


def _keep_meta(ctx, inputs, output):
    _, planes, *meta = inputs
    ctx.save_for_backward(planes)
    ctx.meta = meta


def _abs_mean_backward(ctx, pooled_grad, _):
    return _ops.abs_mean_grad(pooled_grad, ctx.saved_tensors[0], *ctx.meta)


def _soft_threshold_backward(ctx, g, _):
    dx, dtau = _ops.soft_threshold_grad(g, ctx.saved_tensors[0], *ctx.meta)
    return dx, dtau.sum_to_size(ctx.tau_shape)


def _abs_mean_grad_backward(ctx, v):  # dx = s * dA / L   ->   ddA = sum s * v / L
    planes = ctx.saved_tensors[0].flip(0)  # nonzero takes the place of kept
    dtau = _ops.soft_threshold_grad(v, planes, *ctx.meta)[1]
    return dtau / -_length(ctx.meta[0]), None, None, None, None


def _soft_threshold_grad_backward(ctx, v, w):  # (kept * g, -sum s * kept * g)   ->   kept * v - s * kept * w
    planes = ctx.saved_tensors[0]
    masked = _ops.soft_threshold_grad(v, planes, *ctx.meta)[0]
    spread = _ops.abs_mean_grad(w * -_length(ctx.meta[0]), planes.flip(0), *ctx.meta)
    return masked + spread, None, None, None, None


register_autograd("drsn_kernels::abs_mean", _abs_mean_backward, setup_context=_keep_planes, lib=_lib)
register_autograd("drsn_kernels::soft_threshold", _soft_threshold_backward, setup_context=_keep_planes, lib=_lib)
register_autograd("drsn_kernels::abs_mean_grad", _abs_mean_grad_backward, setup_context=_keep_meta, lib=_lib)
register_autograd(
    "drsn_kernels::soft_threshold_grad", _soft_threshold_grad_backward, setup_context=_keep_meta, lib=_lib
)
