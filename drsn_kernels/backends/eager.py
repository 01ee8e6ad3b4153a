"""The `torch` backend: the kernels' contract in pure PyTorch, on every device. Fallback, and oracle for the others.

It keeps the same bit planes as the compiled backends, so it saves the same memory; only the speed differs.
"""

import math

import torch

from .. import reference
from ..planes import Geometry, lay_out, pack, unpack, words
from ..reference import SOFT, Rule, abs_mean, accumulate_dtype, soft_threshold
from ..traffic import Plan, like, traced

name = "torch"


def unsupported(x: torch.Tensor) -> str | None:
    return None


def reduce(x: torch.Tensor, geo: Geometry, planes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A = mean |x| over the spatial dimensions; with `planes` also the planes sign and nonzero."""
    pooled = abs_mean(x)
    if not planes:
        return pooled, None
    return pooled, torch.stack([pack(torch.signbit(x), geo), pack(x != 0, geo)])


def apply(
    x: torch.Tensor,
    geo: Geometry,
    tau: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    planes: int,
    rule: Rule = SOFT,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = sign(x) relu(|x| - tau) [+ residual], tau (N | 1, C | 1); `planes`: 0, 1 (kept) or 2 (kept, sign)."""
    tau = tau.reshape(*tau.shape, *[1] * (x.dim() - 2))
    bits = None
    if planes:
        bits = torch.stack(
            [
                pack(~(x.abs().to(tau.dtype) <= tau) & (x != 0), geo),
                *([pack(torch.signbit(x), geo)] if planes == 2 else []),
            ]
        )
    y = soft_threshold(x, tau, residual, rule)
    return (lay_out(y, geo) if out is None else out.copy_(y)), bits


def grad(
    geo: Geometry,
    dtype: torch.dtype,
    g: torch.Tensor | None,
    kept: torch.Tensor | None,
    sign: torch.Tensor | None,
    nonzero: torch.Tensor | None = None,
    pooled_grad: torch.Tensor | None = None,
    want_dx: bool = True,
    want_dtau: bool = False,
    rule: Rule = SOFT,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dx = kept * g + s * dA / L in `dtype`, and dtau (N, C) = -sum_L s * kept * g in the accumulate dtype.

    By another rule, rule.inside * g takes the place of 0 where it is not kept, and dtau is rule.offset times that sum.
    Written with differentiable operations on g and dA: the second and higher derivatives run through this function.
    """
    acc = accumulate_dtype(dtype)
    shape = geo[0]
    spatial = list(range(2, len(shape)))
    signs = None if sign is None else torch.where(unpack(sign, geo), -1.0, 1.0).to(acc)
    masked = None if g is None else torch.where(unpack(kept, geo), g.to(acc), 0.0)
    dx = dtau = None
    if want_dtau:
        product = masked * signs
        dtau = -(product.sum(spatial) if spatial else product)
        dtau = dtau if rule.offset == 1 else rule.offset * dtau
    if want_dx:
        dx = masked
        if g is not None and rule.inside:
            dx = torch.where(unpack(kept, geo), masked, rule.inside * g.to(acc))
        if pooled_grad is not None:
            length = 1
            for d in spatial:
                length *= shape[d]
            share = (pooled_grad / length).reshape(*pooled_grad.shape, *[1] * len(spatial))
            direct = torch.where(unpack(nonzero, geo), signs * share, 0.0)
            dx = direct if dx is None else dx + direct
        dx = lay_out(dx.to(dtype), geo)
    return dx, dtau


# ---- squeeze_excite --------------------------------------------------------------------------------------------------


def mean(x: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """A = mean x over the spatial dimensions, (N, C)."""
    return reference.mean(x)


def scale(x: torch.Tensor, geo: Geometry, s: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """y = x * s [+ residual], s (N, C | 1) in the accumulate dtype."""
    return lay_out(reference.scale(x, s, residual), geo)


def scale_sums(geo: Geometry, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """ds (N, C) = sum_L g * x in the accumulate dtype. Differentiable, as scale_grad is: for higher derivatives."""
    acc = accumulate_dtype(x.dtype)
    return (g.to(acc) * x.to(acc)).sum(list(range(2, x.dim())))


def scale_grad(
    geo: Geometry, dtype: torch.dtype, g: torch.Tensor | None, s: torch.Tensor | None, mean_grad: torch.Tensor | None
) -> torch.Tensor:
    """dx = g * s + dA / L in `dtype`; g and s, or dA, may be absent. The other backends are given g and s."""
    shape = geo[0]
    ones = [1] * (len(shape) - 2)
    dx = 0.0
    if g is not None:
        dx = g.to(accumulate_dtype(dtype)) * s.reshape(*s.shape, *ones)
    if mean_grad is not None:
        dx = dx + (mean_grad / math.prod(shape[2:])).reshape(*mean_grad.shape, *ones)
    return lay_out(dx.to(dtype).expand(shape), geo)


# ---- budgets and plans (traffic.py, explain.py): counted on tensors without memory, for the code above changes ----


def reduce_budget(geo, strides, dtype, device, planes):
    return traced(reduce, torch.empty_strided(geo[0], strides, dtype=dtype, device="meta"), geo, planes)


def apply_budget(geo, strides, dtype, device, tau, residual, planes, rule=SOFT):
    x = torch.empty_strided(geo[0], strides, dtype=dtype, device="meta")
    added = torch.empty_strided(*geo, dtype=dtype, device="meta") if residual else None
    return traced(apply, x, geo, like(*tau, dtype=accumulate_dtype(dtype)), added, None, planes, rule)


def grad_budget(geo, strides, dtype, device, masked, pooled, dx, dtau, rule=SOFT):
    g = torch.empty_strided(geo[0], strides, dtype=dtype, device="meta") if masked else None
    da = like(*geo[0][:2], dtype=accumulate_dtype(dtype)) if pooled else None
    plane = like(words(geo), dtype=torch.int32)
    return traced(grad, geo, dtype, g, plane, plane, plane, da, dx, dtau, rule)


def squeeze_excite_budgets(geo, strides, dtype, device, s, residual, pooled):
    """mean, scale, scale_sums and scale_grad, for a g that lies as geo says; s: the factors' shape."""
    x = torch.empty_strided(geo[0], strides, dtype=dtype, device="meta")
    g = torch.empty_strided(*geo, dtype=dtype, device="meta")
    s, da = like(*s, dtype=accumulate_dtype(dtype)), like(*geo[0][:2], dtype=accumulate_dtype(dtype))
    return (
        traced(mean, x, geo),
        traced(scale, x, geo, s, g if residual else None),
        traced(scale_sums, geo, g, x),
        traced(scale_grad, geo, dtype, g, s, da if pooled else None),
    )


def plan(op, geo, strides, dtype, device, gate, planes):
    reason = () if gate is None else (("gate fused", gate),)
    return Plan("PyTorch operations", "the kernels' contract in PyTorch, on every device", reason)


def describe() -> str:
    return "available: pure PyTorch, every device"
