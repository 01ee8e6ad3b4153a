"""shrink: the whole shrinkage step with any gate.

    A     = mean_l |x|
    alpha = gate(A)
    tau   = alpha * A | alpha * mean_c A | alpha
    y     = sign(x) * max(|x| - tau, 0) [+ residual]

Here are the function, its checks and which way a call goes. A standard gate is computed together with the step, in one
autograd node (gated_shrink.py); any other is called between two (called_shrink.py). What is traced or transformed runs
as ordinary PyTorch.
"""

from collections.abc import Callable
from typing import Literal, overload

import torch

from .. import backends, checked, gates, recording, reference
from ..backends.eager import eager
from ..backends.step import Backend, Called, GateShape, Step, Want
from ..gates import StandardGate
from ..layout import layout_of
from ..reference import SOFT, Rule
from . import checks
from .abs_mean import traced_abs_mean
from .called_shrink import run_apply, run_pool
from .dispatch import not_eager, overwritten
from .gated_shrink import look_up, remember, run_gated
from .gating import call_gate
from .soft_threshold import traced_soft_threshold


@overload
def shrink(
    x: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor], *, average: str | None = ...,
    residual: torch.Tensor | None = ..., inplace: bool = ..., return_tau: Literal[False] = ..., threshold: str = ...,
    slope: float = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def shrink(
    x: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor], *, average: str | None = ...,
    residual: torch.Tensor | None = ..., inplace: bool = ..., return_tau: Literal[True], threshold: str = ...,
    slope: float = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def shrink(
    x: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor], *, average: str | None = ...,
    residual: torch.Tensor | None = ..., inplace: bool = ..., return_tau: bool, threshold: str = ...,
    slope: float = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
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
    why, read, key, like = not_eager(x, residual), None, None, None
    if why is None and not inplace and type(slope) is float:
        if threshold == "soft" and slope == 0:
            read = gates.read(gate)
        if read.__class__ is tuple:
            key, gated = look_up(x, residual, *read, average, return_tau)
            if gated is not None:
                y, tau = run_gated(x, residual, read[0], gated, gate, False)
                return (y, tau) if return_tau else y
        else:
            like, call = _look_up_called(x, residual, average, threshold, slope)
            if call is not None and callable(gate):
                return _called(x, gate, call, residual, False, return_tau)
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

    backend = backends.select(x)
    parts = _fusable(gate, x, backend, rule, read)
    if not isinstance(parts, str):
        return _fused(x, gate, parts, backend, average, residual, inplace, return_tau, key)
    call = backend.called(layout_of(x), x.dtype, rule, average)
    if like is not None and backend is not eager:  # a fallback is told of at every call
        checked.keep(like, call)
    return _called(x, gate, call, residual, inplace, return_tau)


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


def _look_up_called(x, residual, average, threshold, slope) -> tuple[tuple | None, Called | None]:
    """The key of a call with a gate that is called, not in place, and what is known of such calls.

    All that the checks look at is in the key, but for the gate.
    """
    try:
        lies = None if residual is None else (residual.shape, residual.dtype, residual.device)
        key = x.shape, x.stride(), x.dtype, x.device, average, threshold, slope, backends.choice.backend, lies
        return key, checked.find(key)
    except (AttributeError, RuntimeError, TypeError):  # None, a sparse tensor, a list: the checks say so
        return None, None


def _where(x: torch.Tensor, inplace: bool) -> tuple[bool, bool]:
    """In place, whether x is overwritten, or y is computed aside and copied.

    autograd allows a node that overwrites a view one output and no siblings.
    """
    by_copy = inplace and torch.is_grad_enabled() and x._is_view()
    return inplace and not by_copy, by_copy


def _fused(x, gate, parts, backend, average, residual, inplace, return_tau, key):
    """A standard gate, computed together with the step. key: look_up's."""
    fused, grads, (overwrite, by_copy) = _same_dtype(residual, x), torch.is_grad_enabled(), _where(x, inplace)
    keep = grads and (x.requires_grad or _any_requires_grad(*parts[:6]))
    if fused is not None and fused.requires_grad and grads and not keep:
        fused = None  # added afterwards: its gradient is g, for which nothing need be kept
    gate_shape = GateShape.of(parts)
    step = _step(x, average, SOFT, gate_shape.outputs, gate_shape, fused, keep, return_tau)
    gated = backend.gated(step)
    if key is not None and fused is residual:
        remember(key, gated, x, residual, parts)
    y, tau = run_gated(x, fused, parts, gated, gate, overwrite)
    return _finish(x, y, tau, residual if residual is not fused else None, overwrite, by_copy, return_tau)


def _called(x, gate, call, residual, inplace, return_tau):
    """Any gate, between two nodes."""
    fused, grads, pool, handle = _same_dtype(residual, x), torch.is_grad_enabled(), None, x
    overwrite, by_copy = _where(x, inplace) if inplace else (False, False)
    if inplace and call.backend is eager:  # x will not be there for the backward pass
        call = Called(eager, call.layout, call.dtype, call.rule, call.average)
    if grads and x.requires_grad:
        if overwrite:
            pooled, handle = run_pool(x, call, True)
            source = x.detach()  # x is the node's own output
        else:
            pooled, source, handle = run_pool(x, call, False), x, None
        pool = pooled.grad_fn
        pool.source = source, source._version
    else:
        pooled = call.pool(x)
    alpha = call_gate(gate, pooled, x)
    why = None if type(alpha) is torch.Tensor and not alpha.is_neg() else not_eager(alpha)
    if why is not None:  # a gate of tensor subclasses
        why = f"of what the gate returned, {why}"
    elif handle is None and pooled.grad_fn is None:  # nothing leads from Apply to Pool
        why = "the gate detaches its input in place"
    if why is not None:
        recording.elsewhere("shrink", x, why, gate=gate)
        if pool is not None:  # there will be no Apply, and in place x is overwritten
            with torch.no_grad():
                _, bits = call.shrink(x, pooled, keep=3)
            if bits is not x:
                pool.planes, pool.source = bits, None
        x = x if handle is None else handle
        return _compose(x, pooled, alpha, call.average, residual, inplace, return_tau, call.rule)
    if overwrite and call.average is None and _share_memory(x, alpha):
        alpha = alpha.clone()
    needed = grads and (x.requires_grad or alpha.requires_grad)
    told = recording.active
    if told is not None:
        step = _step(x, call.average, call.rule, alpha.shape[1], None, fused, needed, return_tau)
        told(step, x, call.backend, gate=gate, not_fused=_fusable(gate, x, call.backend, call.rule))
    if needed or (grads and fused is not None and fused.requires_grad):
        out = run_apply(handle, alpha, pooled, fused, call, pool, return_tau, overwrite)
        y, tau = out if return_tau else (out, None)
    else:
        tau = reference.threshold(alpha, pooled, call.average)
        y, _ = call.shrink(x, tau, fused, x if overwrite else None)
        if overwrite:
            overwritten(x)
        if return_tau and call.average is None:
            tau = tau.clone()  # the gate's own tensor otherwise
    return _finish(x, y, tau, residual if residual is not fused else None, overwrite, by_copy, return_tau)


def _same_dtype(residual, x):
    """A residual of another dtype is added afterwards: the sum's dtype may not be x's."""
    return residual if residual is None or residual.dtype == x.dtype else None


def _finish(x, y, tau, residual, overwrite, by_copy, return_tau):
    if residual is not None:
        y = y.add_(residual) if overwrite else y + residual
    if by_copy:
        y = x.copy_(y)
    return (y, tau) if return_tau else y


def _fusable(gate, x: torch.Tensor, backend: Backend, rule: Rule, read=None) -> StandardGate | str:
    """The parts of a standard gate that this backend computes itself, or why the gate is called. read: gates.read's."""
    if rule != SOFT:
        return "the fused gate has soft thresholds only"
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
