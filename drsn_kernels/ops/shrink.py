"""shrink: the whole shrinkage step with any gate.

    A     = mean_l |x|                                          Pool
    alpha = gate(A)                                             ordinary autograd: any module, hooks, parameters
    tau   = alpha * A | alpha * mean_c A | alpha                Apply
    y     = sign(x) * max(|x| - tau, 0) [+ residual]            Apply

Two autograd nodes with the gate between them, and no add of two gradients the size of x:

    Apply.backward     reads g: dtau = -sum s * kept * g, dalpha, the direct part of dA; hands g on untouched
    the gate's own backward: dA
    Pool.backward      reads g again: dx = kept * g + s * dA / L, the only full write

x -> Pool -> alias of x -> Apply is why it works: Pool runs after Apply and after the gate, with g and dA at hand.
Kept for it by Apply, which knows tau: three planes, alpha and A, 3 bits an element and two (N, C) tensors.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import backends, gates, recording, reference
from ..backends.eager import eager
from ..backends.step import Backend, GateShape, Step, Want
from ..gates import StandardGate
from ..layout import Planes, layout_of, thresholded
from ..reference import SOFT, Rule
from . import checks
from .abs_mean import traced_abs_mean
from .dispatch import (
    current_backward,
    direct_apply,
    hooks_on_saved_tensors,
    is_eager_grad,
    keeps_graph,
    not_eager,
    will_run,
)  # fmt: skip
from .gated_shrink import look_up, overwritten, remember, run_gated
from .gating import call_gate
from .soft_threshold import traced_soft_threshold


class Handed(NamedTuple):
    """From Apply.backward to Pool.backward, in place of a gradient of the alias."""

    g: torch.Tensor | None
    planes: Planes
    rule: Rule


class Pool(torch.autograd.Function):
    """x -> (A, alias of x).

    The alias makes this node run after Apply, which hands over g and the planes that it has unpacked (saved tensors may
    be asked for only once under checkpointing). `handed` is keyed by the backward pass: threads and hooks may run
    several through one node at a time. A gradient that reaches the alias itself comes from elsewhere (an in-place x
    that the gate or a residual uses too): it is whole already, and added.

    Where only A has a loss, Apply does not run, and may be gone: the planes are then those that it left here, or are
    made from x while there is no Apply yet.
    """

    @staticmethod
    def forward(ctx, x, layout, backend, inplace):
        pooled, _ = backend.reduce(x, layout)
        ctx.backend, ctx.layout, ctx.dtype, ctx.handed = backend, layout, x.dtype, {}
        ctx.source, ctx.planes, ctx.apply_node = None, None, None
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        return pooled, x

    @staticmethod
    def backward(ctx, dA, alias_grad):
        handed = ctx.handed.pop(current_backward(), None)
        g, planes, rule = handed or (None, None, SOFT)
        dx = None
        if g is not None or dA is not None:
            planes = _planes(ctx) if planes is None else planes
            backend = ctx.backend if is_eager_grad(g, dA) else eager
            dx, _ = backend.grad(ctx.layout, ctx.dtype, planes, g, dA=dA, rule=rule)
        if alias_grad is not None:
            dx = alias_grad if dx is None else dx + alias_grad
        if not keeps_graph():
            ctx.planes = ctx.source = None
        return dx, None, None, None


def _planes(pool: Pool) -> Planes:
    """For a loss on A alone."""
    if pool.planes is not None:
        return pool.planes
    if pool.source is not None:
        x, version = pool.source
        if x._version != version:
            raise RuntimeError("x was modified by an inplace operation, and the gradient of the gate's input needs it")
        return pool.backend.reduce(x, pool.layout, keep=True)[1]
    apply = None if pool.apply_node is None else pool.apply_node()
    if apply is not None:
        return thresholded(apply.saved_tensors[0], nonzero=True)
    if pool.apply_node is not None:
        raise RuntimeError("a loss on the gate's input alone needs y's graph where saved tensors are hooked; keep y")
    raise RuntimeError("trying to backward through the graph a second time: pass retain_graph=True to the first")


class Apply(torch.autograd.Function):
    """(x, alpha, A, residual) -> y, or (y, tau). `pool` is the node whose alias x is, if there is one."""

    @staticmethod
    def forward(ctx, x, alpha, pooled, residual, step, backend, pool, inplace):
        ctx.set_materialize_grads(False)
        tau = reference.threshold(alpha, pooled, step.average)
        if step.want.tau and step.average is None:
            tau = tau.clone()  # an output that is an input would be a view of the gate's tensor
        keep = 3 if pool is not None else 2 if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else 0
        y, planes = backend.map(
            x, step.layout, tau, rule=step.rule, residual=residual, out=x if inplace else None, keep=keep
        )
        if keep:
            ctx.save_for_backward(planes.bits, alpha, pooled)
        if pool is not None:
            pool.source = None
            if hooks_on_saved_tensors():  # they decide where planes live: nothing is held beside them
                pool.apply_node = weakref.ref(ctx)
            else:
                pool.planes = planes
        ctx.step, ctx.backend, ctx.pool = step, backend, pool
        if inplace:
            ctx.mark_dirty(x)
        return (y, tau) if step.want.tau else y

    @staticmethod
    def backward(ctx, g, tau_grad=None):
        want_x, want_alpha, want_pooled, want_residual = ctx.needs_input_grad[:4]
        residual_grad = g if want_residual else None
        if not (want_x or want_alpha or want_pooled) or (g is None and tau_grad is None):
            return None, None, None, residual_grad, None, None, None, None
        step = ctx.step
        bits, alpha, pooled = ctx.saved_tensors
        planes = thresholded(bits, nonzero=ctx.pool is not None)
        x_grad = dtau = None
        here = want_x and ctx.pool is None  # nothing pools: the masked gradient is written here
        want_dtau = want_alpha or want_pooled
        if g is not None and (here or want_dtau):
            backend = ctx.backend if is_eager_grad(g) else eager
            x_grad, dtau = backend.grad(
                step.layout, step.dtype, planes, g, want_dx=here, want_dtau=want_dtau, rule=step.rule
            )
        if ctx.pool is not None:
            if want_x and will_run(ctx.pool):
                ctx.pool.handed[current_backward()] = Handed(g, planes, step.rule)  # and no gradient of the alias
            elif not keeps_graph():
                ctx.pool.planes = None
        alpha_grad, pooled_grad = reference.threshold_grad(
            dtau, tau_grad, alpha, pooled, step.average, want_alpha, want_pooled
        )
        return x_grad, alpha_grad, pooled_grad, residual_grad, None, None, None, None


_pool, _apply = direct_apply(Pool), direct_apply(Apply)


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


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
    why, read, key = not_eager(x, residual), None, None
    if why is None and not inplace and threshold == "soft" and type(slope) is float and slope == 0:
        read = gates.read(gate)
        if read.__class__ is tuple:
            key, known = look_up(x, residual, *read, average, return_tau)
            if known is not None:
                y, tau = run_gated(x, residual, read[0], known.gated, gate, False)
                return (y, tau) if return_tau else y
    checks.features(x, rank=3)
    checks.average(average)
    rule = checks.rule(threshold, slope)
    checks.gate(gate)
    if residual is not None:
        checks.residual(residual, x)
    if inplace:
        checks.inplace(x, residual)
        if residual is not None and residual is not x and _share_memory(x, residual):
            residual = residual.clone()  # x would be overwritten before it is added

    if why is not None or not x.numel():
        recording.elsewhere("shrink", x, why, gate=gate)
        pooled = traced_abs_mean(x, keep=False)
        return _compose(x, pooled, call_gate(gate, pooled, x), average, residual, inplace, return_tau, rule)

    # A residual of another dtype is added afterwards: the sum's dtype may not be x's.
    fused = residual if residual is None or residual.dtype == x.dtype else None
    backend = backends.select(x)
    grads = torch.is_grad_enabled()
    # autograd allows a node that overwrites a view one output and no siblings: a view is computed aside and copied
    by_copy = inplace and grads and x._is_view()
    overwrite = inplace and not by_copy
    parts = _fusable(gate, x, backend, read) if rule == SOFT else "the fused gate has soft thresholds only"
    if not isinstance(parts, str):
        keep = grads and (x.requires_grad or _any_requires_grad(*parts[:6]))
        if fused is not None and fused.requires_grad and grads and not keep:
            fused = None  # added afterwards: its gradient is g, for which nothing need be kept
        gate_shape = GateShape.of(parts)
        step = _step(x, average, rule, gate_shape.outputs, gate_shape, fused, keep, return_tau)
        gated = backend.gated(step)
        if key is not None and fused is residual:
            remember(key, gated, x, residual, parts)
        y, tau = run_gated(x, fused, parts, gated, gate, overwrite)
        return _finish(x, y, tau, residual if residual is not fused else None, overwrite, by_copy, return_tau)
    layout, pool, handle = layout_of(x), None, x
    if grads and x.requires_grad:
        pooled, handle = _pool(x, layout, backend, overwrite)
        pool, source = pooled.grad_fn, x.detach() if overwrite else x  # overwritten, x is the node's own output
        pool.source = source, source._version
    else:
        pooled, _ = backend.reduce(x, layout)
    alpha = call_gate(gate, pooled, x)
    why = not_eager(alpha)
    if why is not None:  # a gate of tensor subclasses
        recording.elsewhere("shrink", x, f"of what the gate returned, {why}", gate=gate)
        if pool is not None:  # there will be no Apply, and in place x is overwritten
            pool.planes, pool.source = backend.reduce(x, layout, keep=True)[1], None
        return _compose(handle, pooled, alpha, average, residual, inplace, return_tau, rule)
    needed = grads and (x.requires_grad or alpha.requires_grad)
    step = _step(x, average, rule, alpha.shape[1], None, fused, needed, return_tau)
    told = recording.active
    if told is not None:
        told(step, x, backend, gate=gate, not_fused=parts)
    if needed or (grads and fused is not None and fused.requires_grad):
        out = _apply(handle, alpha, pooled, fused, step, backend, pool, overwrite)
        y, tau = out if return_tau else (out, None)
    else:
        tau = reference.threshold(alpha, pooled, average)
        y, _ = backend.map(x, layout, tau, rule=rule, residual=fused, out=x if overwrite else None)
        if overwrite:
            overwritten(x)
        if return_tau and average is None:
            tau = tau.clone()  # the gate's own tensor otherwise
    return _finish(x, y, tau, residual if residual is not fused else None, overwrite, by_copy, return_tau)


def _finish(x, y, tau, residual, overwrite, by_copy, return_tau):
    if residual is not None:
        y = y.add_(residual) if overwrite else y + residual
    if by_copy:
        y = x.copy_(y)
    return (y, tau) if return_tau else y


def _fusable(gate, x: torch.Tensor, backend: Backend, read) -> StandardGate | str:
    """The parts of a standard gate that this backend computes itself, or why the gate is called. read: gates.read's."""
    if not backend.fuses_gates:
        return f"the {backend.name} backend calls every gate"
    parts = gates.standard_gate(gate, x, read)
    return parts if isinstance(parts, str) else backend.gate_unsupported(x, parts) or parts


_steps: dict[tuple, Step] = {}


def _step(x, average, rule, outputs, gate, residual, keep, return_tau) -> Step:
    """Kept by all that it is made of."""
    strides = None if residual is None else residual.stride()
    lies, wants = (x.shape, x.stride(), x.dtype, x.device), x.requires_grad
    key = lies, average, rule, outputs, gate, strides, keep, wants, return_tau
    step = _steps.get(key)
    if step is None:
        if len(_steps) >= 4096:
            _steps.clear()
        step = _steps[key] = Step(
            "shrink", layout_of(x), *lies[1:], average, rule, outputs, gate, strides, keep,
            Want(x=wants, tau=return_tau),
        )  # fmt: skip
    return step


def _compose(x, pooled, alpha, average, residual, inplace, return_tau, rule):
    """The rest of shrink from soft_threshold and ordinary autograd: right under every transform, compiler, subclass."""
    tau = reference.threshold(alpha, pooled, average)
    fused = residual if residual is None or residual.dtype == x.dtype else None  # rounded once, as in the kernels
    y = traced_soft_threshold(x, tau, rule, residual=fused, pooled=pooled)
    if residual is not fused:
        y = y + residual
    if inplace:
        y = x.copy_(y)
    return (y, tau) if return_tau else y
