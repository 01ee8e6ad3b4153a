"""The shrinkage operators in plain PyTorch: what every kernel must compute, and what runs wherever a kernel cannot.

Everything here is ordinary differentiable tensor code, so it is right on every device and dtype, under torch.func,
forward-mode AD, torch.export and tensor subclasses, and torch.compile fuses it. It keeps what autograd keeps (several
full tensors); the operators in `drsn_kernels.ops` keep three bits an element instead.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Rule(NamedTuple):
    """What a threshold makes of x: x - sign(x) * offset * tau where |x| > tau, and inside * x elsewhere.

    Soft thresholding is (0, 1), leaky (slope, 1 - slope), hard (slope, 0). dx is 1 or inside, dtau -sign(x) * offset
    or 0.
    """

    inside: float = 0.0
    offset: float = 1.0


SOFT = Rule()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, thresholds and gate statistics: float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def abs_mean(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial) -> (N, C), the mean of |x| over the spatial dimensions, in float32 (float64 for float64)."""
    if x.dim() == 2:
        return x.abs().to(accumulate_dtype(x.dtype))
    return x.abs().mean(dim=list(range(2, x.dim())), dtype=accumulate_dtype(x.dtype))


def align_tau(tau: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rank 2 is (N, 1) or (N, C), aligned left; 0-dim tensors and tensors of x's rank broadcast as they are."""
    return tau.reshape(*tau.shape, *[1] * (x.dim() - 2)) if tau.dim() == 2 and x.dim() > 2 else tau


def soft_threshold(
    x: torch.Tensor, tau: torch.Tensor, residual: torch.Tensor | None = None, rule: Rule = SOFT
) -> torch.Tensor:
    """sign(x) * relu(|x| - tau) [+ residual] in x's dtype, computed in float32 (float64 for float64), rounded once.

    relu makes the derivative 0 where |x| == tau, keeps NaN, and a negative tau expands; sign makes x == 0 stay 0.
    Another rule: |x| == tau and x == 0 count as inside, NaN as outside.
    """
    acc = accumulate_dtype(x.dtype)
    wide, tau = x.to(acc), align_tau(tau.to(acc), x)
    if rule != SOFT:
        outside = ~(wide.abs() <= tau) & (wide != 0)
        y = torch.where(outside, wide - torch.sign(wide) * (rule.offset * tau), rule.inside * wide)
    elif torch.compiler.is_dynamo_compiling():
        # The same numbers, and the same derivatives wherever x and tau are finite, ties and negative tau included, in a
        # form that inductor makes vector code of: on 8 MiB a training step takes 3.2 ms instead of 19.
        positive = torch.relu(tau)
        y = wide - torch.clamp(wide, -positive, positive) - torch.sign(wide) * tau.clamp(max=0)
    else:
        y = torch.sign(wide) * torch.relu(wide.abs() - tau)
    return (y if residual is None else y + residual).to(x.dtype)


def threshold(alpha: torch.Tensor, pooled: torch.Tensor, average: str | None) -> torch.Tensor:
    """tau from the gate's alpha (N, C) or (N, 1) and the pooled |x| (N, C), both in the accumulate dtype."""
    if average == "channel":
        return alpha * pooled
    if average == "sample":
        return alpha * pooled.mean(1, keepdim=True)
    return alpha


def threshold_grad(dtau, tau_grad, alpha, pooled, average, want_alpha, want_pooled):
    """Gradients of alpha and A from dtau (N, C) of the kernel and tau_grad (tau's shape) of the user.

    tau = alpha * M with M = A, or mean_c A: dalpha = M * dtau and dM = alpha * dtau, each summed to its shape.
    """
    columns = pooled.shape[1] if average == "channel" else alpha.shape[1]
    if dtau is not None and dtau.shape[1] != columns:
        dtau = dtau.sum(1, keepdim=True)
    if tau_grad is not None:
        dtau = tau_grad if dtau is None else dtau + tau_grad
    if dtau is None:
        return None, None
    if average is None:
        return dtau, None
    mean = pooled if average == "channel" else pooled.mean(1, keepdim=True)
    alpha_grad = pooled_grad = None
    if want_alpha:
        alpha_grad = mean * dtau
        if alpha_grad.shape != alpha.shape:
            alpha_grad = alpha_grad.sum(1, keepdim=True)
    if want_pooled:
        pooled_grad = alpha * dtau
        if average == "sample":
            pooled_grad = (pooled_grad.sum(1, keepdim=True) / pooled.shape[1]).expand_as(pooled)
    return alpha_grad, pooled_grad


def mean(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial) -> (N, C), the mean over the spatial dimensions, in float32 (float64 for float64)."""
    return x.mean(dim=list(range(2, x.dim())), dtype=accumulate_dtype(x.dtype))


def scale(x: torch.Tensor, s: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x * s [+ residual] in x's dtype, s (N | 1, C | 1), computed in float32 (float64 for float64), rounded once."""
    acc = accumulate_dtype(x.dtype)
    y = x.to(acc) * align_tau(s.to(acc), x)
    return (y if residual is None else y + residual).to(x.dtype)


def batch_norm_act(
    x: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None, weight: torch.Tensor | None,
    bias: torch.Tensor | None, training: bool, momentum: float, eps: float, slope: float,
) -> torch.Tensor:  # fmt: skip
    """PyTorch's own batch normalisation, which moves the running statistics, and z or slope * z by the sign of z."""
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return activation(z, slope)


def activation(z: torch.Tensor, slope: float) -> torch.Tensor:
    """ReLU by slope 0, nothing by slope 1, else leaky."""
    return F.relu(z) if slope == 0 else z if slope == 1 else F.leaky_relu(z, slope)
