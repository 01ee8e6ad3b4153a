"""The operators registered with torch.library: what torch.compile is given where `dispatch.IN_GRAPHS` says so.

    abs_mean         A = mean |x|; keep: the planes sign, nonzero
    soft_threshold   y by a threshold rule [+ residual]; keep planes: kept, sign[, nonzero]
    abs_mean_grad, soft_threshold_grad, tau_grad, shrink_grad    dx, dtau or both, from planes

A compiled shrink is these calls, each one pass over x or g, with the gate left to the compiler between them:

    forward    A = abs_mean(x, keep=0);  tau = gate(A) * A;  y, planes = soft_threshold(x, tau, residual, A, keep=3)
    backward   dtau = tau_grad(g, planes);  dA = the gate's backward;  dx = shrink_grad(g, planes, dA)

abs_mean is given A's gradient last, so its derivative writes all of dx: soft_threshold, which takes A for this reason
only, leaves it the planes in the forward pass and g in the backward pass, and returns no gradient of x. That happens in
Python while a compiler traces the derivatives; in the graph it is data flow, planes are kept, and x is not. Where the
two are not in one graph (a gate that breaks it), each writes its own part of dx, from planes of its own.

Opaque rather than triton_op: a plan needs sizes that are numbers, so a kernel that the compiler sees into would be
compiled anew for every batch size, and `wrap_triton` takes no tuples, which is how kernels take strides. A CUDA graph
records the launches of an opaque call like any other's: nothing here waits for the device or reads its memory.
"""

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler with it
from torch.library import Library, register_autograd, register_fake

from .. import backends
from ..backends.eager import eager
from ..layout import Layout, Planes, averaged, dense, layout_of, thresholded
from ..reference import Rule, accumulate_dtype
from .dispatch import current_backward, keeps_graph, will_run

_lib = Library("drsn_kernels", "DEF")
# x arrives with the strides that were traced, which y's and the planes' order follow; before torch 2.7, in their order
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_META = "Tensor planes, SymInt[] size, SymInt[] stride, ScalarType dtype"
_THRESHOLD = "Tensor? residual=None, Tensor? pooled=None, float inside=0.0, float offset=1.0, int keep=2"

for _schema in (
    "abs_mean(Tensor x, int keep=2) -> (Tensor, Tensor)",
    f"soft_threshold(Tensor x, Tensor tau, {_THRESHOLD}) -> (Tensor, Tensor)",
    f"abs_mean_grad(Tensor pooled_grad, {_META}) -> Tensor",
    f"soft_threshold_grad(Tensor g, {_META}, float inside=0.0, float offset=1.0) -> (Tensor, Tensor)",
    f"tau_grad(Tensor g, {_META}, float offset=1.0) -> Tensor",
    f"shrink_grad(Tensor g, {_META}, float inside=0.0, Tensor? dA=None) -> Tensor",
):
    _lib.define(_schema, tags=_TAGS)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _backend(t, size):
    """Kernels are given no empty tensors, here as in the operators."""
    return eager if 0 in size or len(size) > 8 else backends.select(t)


def _abs_mean(x, keep=2):
    layout = layout_of(x)
    pooled, planes = _backend(x, x.shape).reduce(x, layout, keep=keep > 0)
    return pooled, _bits(planes, x, layout)


def _soft_threshold(x, tau, residual=None, pooled=None, inside=0.0, offset=1.0, keep=2):
    layout = layout_of(x)
    y, planes = _backend(x, x.shape).map(x, layout, tau, rule=Rule(inside, offset), residual=residual, keep=keep)
    return y, _bits(planes, x, layout)


def _bits(planes: Planes | None, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    return x.new_empty((0, layout.words), dtype=torch.int32) if planes is None else planes.bits


def _grad(planes: Planes, size, stride, dtype, g=None, **wanted):
    """backend.grad by the layout of x (size, stride): g may have fewer dimensions than x, or be absent."""
    backend = _backend(wanted["dA"] if g is None else g, size)
    return backend.grad(dense(tuple(size), tuple(stride)), dtype, planes, g, **wanted)


def _abs_mean_grad(dA, planes, size, stride, dtype):
    return _grad(averaged(planes.contiguous()), size, stride, dtype, dA=dA)[0]


def _of_threshold(planes: torch.Tensor) -> Planes:
    return thresholded(planes.contiguous(), nonzero=len(planes) == 3)  # hooks on saved tensors may have copied them


def _soft_threshold_grad(g, planes, size, stride, dtype, inside=0.0, offset=1.0):
    return _grad(_of_threshold(planes), size, stride, dtype, g, want_dtau=True, rule=Rule(inside, offset))


def _tau_grad(g, planes, size, stride, dtype, offset=1.0):
    rule = Rule(0.0, offset)
    return _grad(_of_threshold(planes), size, stride, dtype, g, want_dx=False, want_dtau=True, rule=rule)[1]


def _shrink_grad(g, planes, size, stride, dtype, inside=0.0, dA=None):
    return _grad(_of_threshold(planes), size, stride, dtype, g, dA=dA, rule=Rule(inside, 1.0))[0]


for _name, _kernel in (
    ("abs_mean", _abs_mean),
    ("soft_threshold", _soft_threshold),
    ("abs_mean_grad", _abs_mean_grad),
    ("soft_threshold_grad", _soft_threshold_grad),
    ("tau_grad", _tau_grad),
    ("shrink_grad", _shrink_grad),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")

_ops = torch.ops.drsn_kernels


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _symbolic(x) -> Layout:
    """x's layout where sizes may be symbolic."""
    return dense(x.shape, x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride())


def _empty_planes(x, count):
    return x.new_empty((count, _symbolic(x).words), dtype=torch.int32)


def _empty_sums(t, size, dtype):
    return t.new_empty(size[:2], dtype=accumulate_dtype(dtype))


@register_fake("drsn_kernels::abs_mean", lib=_lib)
def _(x, keep=2):
    return _empty_sums(x, x.shape, x.dtype), _empty_planes(x, keep)


@register_fake("drsn_kernels::soft_threshold", lib=_lib)
def _(x, tau, residual=None, pooled=None, inside=0.0, offset=1.0, keep=2):
    return torch.empty_like(x), _empty_planes(x, keep)


@register_fake("drsn_kernels::abs_mean_grad", lib=_lib)
def _(pooled_grad, planes, size, stride, dtype):
    return pooled_grad.new_empty_strided(size, stride, dtype=dtype)


@register_fake("drsn_kernels::soft_threshold_grad", lib=_lib)
def _(g, planes, size, stride, dtype, inside=0.0, offset=1.0):
    return g.new_empty_strided(size, stride, dtype=dtype), _empty_sums(g, size, dtype)


@register_fake("drsn_kernels::tau_grad", lib=_lib)
def _(g, planes, size, stride, dtype, offset=1.0):
    return _empty_sums(g, size, dtype)


@register_fake("drsn_kernels::shrink_grad", lib=_lib)
def _(g, planes, size, stride, dtype, inside=0.0, dA=None):
    return g.new_empty_strided(size, stride, dtype=dtype)


# ---- derivatives, each in terms of these ops -------------------------------------------------------------------------


def _keep_planes(ctx, x, planes):
    ctx.mark_non_differentiable(planes)
    ctx.set_materialize_grads(False)
    layout = _symbolic(x)
    ctx.meta = layout.shape, layout.strides, x.dtype


def _abs_mean_context(ctx, inputs, output):
    x, keep = inputs
    _keep_planes(ctx, x, output[1])
    ctx.save_for_backward(output[1] if keep else x)
    ctx.keep, ctx.planes, ctx.handed = keep, None, {}  # from soft_threshold: its planes; by backward pass, g


def _abs_mean_backward(ctx, dA, _):
    handed = ctx.handed.pop(current_backward(), None) if ctx.handed else None
    left = ctx.planes
    if not keeps_graph():
        ctx.planes = None
    if handed is not None:
        g, planes, inside = handed
        return _ops.shrink_grad(g, planes, *ctx.meta, inside, dA), None
    if dA is None:
        return None, None
    if left is not None:
        planes = left[1:]
    else:
        (saved,) = ctx.saved_tensors
        planes = saved if ctx.keep else _ops.abs_mean(saved.detach())[1]
    return _ops.abs_mean_grad(dA, planes, *ctx.meta), None


def _soft_threshold_context(ctx, inputs, output):
    x, tau, _, pooled, inside, offset, keep = inputs
    _keep_planes(ctx, x, output[1])
    ctx.save_for_backward(output[1])
    ctx.tau_shape, ctx.inside, ctx.offset, ctx.keep = tau.shape, inside, offset, keep
    node = None if pooled is None or current_backward is None else pooled.grad_fn
    ctx.pool = node if keep == 3 and hasattr(node, "handed") else None
    if ctx.pool is not None:
        ctx.pool.planes = output[1]


def _soft_threshold_backward(ctx, g, _):
    want_x, want_tau, *others = ctx.needs_input_grad
    residual_grad = g if others and others[0] else None
    dx = dtau = None
    if g is not None and (want_x or want_tau):
        if not ctx.keep:
            raise RuntimeError("soft_threshold was called with keep=0, which keeps no planes for a gradient")
        (planes,) = ctx.saved_tensors
        if want_x and ctx.pool is not None and will_run(ctx.pool):
            ctx.pool.handed[current_backward()] = g, planes, ctx.inside
            want_x = False
        if want_x and want_tau:
            dx, dtau = _ops.soft_threshold_grad(g, planes, *ctx.meta, ctx.inside, ctx.offset)
        elif want_x:
            dx = _ops.shrink_grad(g, planes, *ctx.meta, ctx.inside)
        elif want_tau:
            dtau = _ops.tau_grad(g, planes, *ctx.meta, ctx.offset)
    return dx, None if dtau is None else dtau.sum_to_size(ctx.tau_shape), residual_grad, None, None, None, None


# ---- derivatives of the derivatives ----------------------------------------------------------------------------------


def _keep_meta(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.meta, ctx.rule = inputs[2:5], [value for value in inputs[5:] if isinstance(value, float)]


def _length(size):
    length = 1
    for n in size[2:]:
        length = length * n
    return length


def _masked(ctx, v, inside):
    """kept * v, with inside * v elsewhere."""
    return _ops.shrink_grad(v, ctx.saved_tensors[0], *ctx.meta, inside)


def _spread(ctx, w, offset):
    """-offset * s * kept * w: what abs_mean_grad computes, with kept in the place of nonzero."""
    signs = ctx.saved_tensors[0][:2].flip(0)  # from (kept, sign, ...)
    return _ops.abs_mean_grad(w * (-offset * _length(ctx.meta[0])), signs, *ctx.meta)


def _averaged(ctx, v, planes):
    """sum s * nonzero * v / L: what tau_grad computes, with nonzero in the place of kept. planes: nonzero, sign."""
    return _ops.tau_grad(v, planes, *ctx.meta) / -_length(ctx.meta[0])


def _abs_mean_grad_backward(ctx, v):  # s * nonzero * dA / L
    return _averaged(ctx, v, ctx.saved_tensors[0].flip(0)), None, None, None, None


def _soft_threshold_grad_backward(ctx, v, w):  # (kept * g, -offset * sum s * kept * g)
    inside, offset = ctx.rule
    return _masked(ctx, v, inside) + _spread(ctx, w, offset), *[None] * 6


def _tau_grad_backward(ctx, w):  # -offset * sum s * kept * g
    return _spread(ctx, w, *ctx.rule), *[None] * 5


def _shrink_grad_backward(ctx, v):  # kept * g + s * nonzero * dA / L
    dA = None
    if ctx.needs_input_grad[6:]:  # not one of the trailing arguments that were left out
        dA = _averaged(ctx, v, ctx.saved_tensors[0][1:].flip(0))
    return _masked(ctx, v, *ctx.rule), *[None] * 5, dA


for _name, _backward, _context in (
    ("abs_mean", _abs_mean_backward, _abs_mean_context),
    ("soft_threshold", _soft_threshold_backward, _soft_threshold_context),
    ("abs_mean_grad", _abs_mean_grad_backward, _keep_meta),
    ("soft_threshold_grad", _soft_threshold_grad_backward, _keep_meta),
    ("tau_grad", _tau_grad_backward, _keep_meta),
    ("shrink_grad", _shrink_grad_backward, _keep_meta),
):
    # A backward pass within a compiled function's call is run by torch, and Dynamo would trace what torch calls.
    _backward, _context = _disable_dynamo(_backward), _disable_dynamo(_context)
    register_autograd(f"drsn_kernels::{_name}", _backward, setup_context=_context, lib=_lib)
