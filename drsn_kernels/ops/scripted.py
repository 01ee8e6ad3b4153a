"""The steps as torch.jit.script compiles them: reference.py's formulas in the part of Python that TorchScript knows.

A scripted module is run without Python, so without the kernels. The modules take these where torch.jit.is_scripting().
"""

from typing import Optional

import torch
import torch.nn.functional as F


def averages(x: torch.Tensor, of_magnitude: bool, gate: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial) -> (N, C), in the dtype of the gate's first parameter."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide.abs() if of_magnitude else wide
    return wide.flatten(2).mean(2).to(gate.dtype)


def shrink(
    x: torch.Tensor,
    alpha: torch.Tensor,
    pooled: torch.Tensor,
    average: Optional[str],  # noqa: UP045  what TorchScript knows
    residual: Optional[torch.Tensor],  # noqa: UP045
    threshold: str,
    slope: float,
) -> torch.Tensor:
    tau = alpha.double() if x.dtype == torch.float64 else alpha.float()
    if average is not None:
        mean = pooled.to(tau.dtype)
        tau = tau * (mean if average == "channel" else mean.mean(1, keepdim=True))
    return soft_threshold(x, tau, residual, threshold, slope)


def soft_threshold(
    x: torch.Tensor, tau: torch.Tensor, residual: Optional[torch.Tensor], threshold: str, slope: float  # noqa: UP045
) -> torch.Tensor:
    """tau (N | 1, C | 1), or a number."""
    wide = x if x.dtype == torch.float64 else x.float()
    t = tau.to(wide.dtype)
    if t.dim() == 2:
        t = t.reshape(list(t.shape) + [1] * (x.dim() - 2))
    if threshold == "soft" and slope == 0.0:
        y = wide.sign() * (wide.abs() - t).relu()
    else:
        offset = 0.0 if threshold == "hard" else 1.0 - slope
        outside = torch.logical_and(torch.logical_not(wide.abs() <= t), wide != 0)
        y = torch.where(outside, wide - wide.sign() * (offset * t), slope * wide)
    return _added(y, residual, x.dtype)


def squeeze_excite(x: torch.Tensor, s: torch.Tensor, residual: Optional[torch.Tensor]) -> torch.Tensor:  # noqa: UP045
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * s.to(wide.dtype).reshape(list(s.shape) + [1] * (x.dim() - 2))
    return _added(y, residual, x.dtype)


def batch_norm_act(
    x: torch.Tensor,
    weight: Optional[torch.Tensor],  # noqa: UP045
    bias: Optional[torch.Tensor],  # noqa: UP045
    mean: Optional[torch.Tensor],  # noqa: UP045
    var: Optional[torch.Tensor],  # noqa: UP045
    batches: Optional[torch.Tensor],  # noqa: UP045
    training: bool,
    tracked: bool,
    momentum: Optional[float],  # noqa: UP045
    eps: float,
    activation: Optional[str],  # noqa: UP045
    slope: float,
) -> torch.Tensor:
    """tracked: training moves the running statistics."""
    factor = 0.0 if momentum is None else momentum
    if training and not tracked:
        mean, var = None, None
    elif training and batches is not None:
        batches.add_(1)
        if momentum is None:
            factor = 1.0 / float(batches)
    z = F.batch_norm(x, mean, var, weight, bias, training or mean is None, factor, eps)
    if activation is None:
        return z
    return F.relu(z) if activation == "relu" else F.leaky_relu(z, slope)


def _added(y: torch.Tensor, residual: Optional[torch.Tensor], dtype: int) -> torch.Tensor:  # noqa: UP045
    """Rounded once; a residual of another dtype promotes."""
    if residual is None:
        return y.to(dtype)
    return (y + residual).to(dtype) if residual.dtype == dtype else y.to(dtype) + residual
