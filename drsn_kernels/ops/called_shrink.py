"""shrink with a gate that is called: two autograd nodes around it, and no add of two gradients the size of x.

    Pool               A = mean |x|
    the gate           any module, hooks, parameters: ordinary autograd
    Apply              tau, and y
    Apply.backward     reads g: dtau = -sum s * kept * g, dalpha, the direct part of dA; hands g on untouched
    the gate's own backward: dA
    Pool.backward      reads g again: dx = kept * g + s * dA / L, the only full write

Apply takes A from Pool, so Pool runs after Apply and after the gate, with g and dA at hand. x itself is no input of
Apply's: it is found at Pool. In place it is one, as an alias that Pool returns: a node may overwrite its inputs only.
Kept for it by Apply, which knows tau: three planes, alpha and A, 3 bits an element and two (N, C) tensors. The torch
backend keeps x in place of the planes (backends/eager.py).
"""

import weakref

import torch

from .. import reference
from ..backends.eager import eager
from ..backends.step import Called
from .dispatch import (
    as_saved,
    current_backward,
    direct_apply,
    is_eager_grad,
    is_plain_grad,
    keeps_graph,
    restored,
    will_run,
)  # fmt: skip


class Pool(torch.autograd.Function):
    """x -> A, and in place an alias of x.

    `handed` is what Apply.backward leaves instead of a gradient of x: g, the planes that it has unpacked (saved tensors
    may be asked for only once under checkpointing) and the backend of this pass. It is keyed by the backward pass:
    threads and hooks may run several through one node at a time. A gradient that reaches the alias itself comes from
    elsewhere (an in-place x that the gate or a residual uses too): it is whole already, and added.

    Where only A has a loss, Apply does not run, and may be gone: the planes are then those that it left here, or are
    made from x while there is no Apply yet.
    """

    @staticmethod
    def forward(ctx, x, call, inplace):
        pooled = call.pool(x)
        ctx.call, ctx.handed = call, {}
        ctx.source = ctx.planes = ctx.apply_node = None
        ctx.set_materialize_grads(False)
        if not inplace:
            return pooled
        ctx.mark_dirty(x)
        return pooled, x

    @staticmethod
    def backward(ctx, dA, alias_grad=None):
        call, dx = ctx.call, None
        handed = ctx.handed.pop(current_backward(), None)
        if handed is not None:
            g, bits, here = handed
            if here is call and dA is not None and not is_plain_grad(dA):
                here = _differentiable(call)
            if g is not None or dA is not None:
                dx = here.dx(bits, g, dA)
        elif dA is not None:
            dx = _grad_of_the_average(ctx, call if is_eager_grad(dA) else _differentiable(call), dA)
        if alias_grad is not None:
            dx = alias_grad if dx is None else dx + alias_grad
        if not keeps_graph():
            ctx.planes = ctx.source = None
        return dx, None, None


def _grad_of_the_average(pool: Pool, here: Called, dA: torch.Tensor) -> torch.Tensor:
    """dx of a loss on A alone."""
    call = pool.call
    if pool.planes is not None:
        return here.dx(pool.planes, None, dA)
    if pool.source is not None:
        x, version = pool.source
        if x._version != version:
            raise RuntimeError("x was modified by an inplace operation, and the gradient of the gate's input needs it")
        if call.backend is eager:
            return eager.averaged_grad(call.layout, call.dtype, eager.averaged(x, call.layout)[1], dA)
        _, planes = call.backend.reduce(x, call.layout, keep=True)
        return here.backend.grad(call.layout, call.dtype, planes, None, dA=dA)[0]
    apply = None if pool.apply_node is None else pool.apply_node()
    if apply is not None:
        bits, alpha, pooled = restored(apply)
        if bits.dtype is not torch.int32:
            bits = call.unpacked(bits, alpha, pooled)
        return here.dx(bits, None, dA)
    if pool.apply_node is not None:
        raise RuntimeError("a loss on the gate's input alone needs y's graph where saved tensors are hooked; keep y")
    raise RuntimeError("trying to backward through the graph a second time: pass retain_graph=True to the first")


class Apply(torch.autograd.Function):
    """(x, alpha, A, residual) -> y, or (y, tau). `pool` is the node that A comes from, if there is one.

    x is None unless it is overwritten or nothing pools: it is then the tensor that Pool has seen.
    """

    @staticmethod
    def forward(ctx, x, alpha, pooled, residual, call, pool, return_tau, inplace):
        ctx.set_materialize_grads(False)
        if x is None:
            x = pool.source[0]
        tau = reference.threshold(alpha, pooled, call.average)
        if return_tau and call.average is None:
            tau = tau.clone()  # an output that is an input would be a view of the gate's tensor
        keep = 3 if pool is not None else 2 if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else 0
        y, bits = call.shrink(x, tau, residual, x if inplace else None, keep)
        ctx.as_saved = as_saved(bits, alpha, pooled)
        if keep:
            ctx.save_for_backward(bits, alpha, pooled)
        if pool is not None:
            if ctx.as_saved is not None:  # hooks decide where planes live: nothing is held beside them
                pool.source, pool.apply_node = None, weakref.ref(ctx)
            elif bits is not x:
                pool.source, pool.planes = None, bits
        ctx.call, ctx.pool = call, pool
        if inplace:
            ctx.mark_dirty(x)
        return (y, tau) if return_tau else y

    @staticmethod
    def backward(ctx, g, tau_grad=None):
        want_x, want_alpha, want_pooled, want_residual = ctx.needs_input_grad[:4]
        call, pool, residual_grad = ctx.call, ctx.pool, g if want_residual else None
        if not (want_x or want_alpha or want_pooled) or (g is None and tau_grad is None):
            return None, None, None, residual_grad, None, None, None, None
        bits, alpha, pooled = restored(ctx)
        here = call if is_eager_grad(g) else _differentiable(call)
        if bits.dtype is not torch.int32:  # no planes: x, kept by the torch backend
            bits = call.unpacked(bits, alpha, pooled)
        x_grad = dtau = None
        if g is not None:
            if want_alpha or want_pooled:
                dtau = here.dtau(bits, g)
            if want_x and pool is None:  # nothing pools: the masked gradient is written here
                x_grad = here.dx(bits, g, None)
        if pool is not None:
            if will_run(pool):
                pool.handed[current_backward()] = g, bits, here
            elif not keeps_graph():
                pool.planes = pool.source = None
        alpha_grad, pooled_grad = reference.threshold_grad(
            dtau, tau_grad, alpha, pooled, call.average, want_alpha, want_pooled
        )
        return x_grad, alpha_grad, pooled_grad, residual_grad, None, None, None, None


def _differentiable(call: Called) -> Called:
    """The same in ordinary PyTorch, for higher derivatives."""
    return eager.called(call.layout, call.dtype, call.rule, call.average)


run_pool, run_apply = direct_apply(Pool), direct_apply(Apply)
