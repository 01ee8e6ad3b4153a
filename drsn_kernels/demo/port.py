"""What the fused operators are compared with: the shrinkage step as people write it in PyTorch."""

import torch
from torch import nn


def standard_gate(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, channels),
        nn.BatchNorm1d(channels),
        nn.ReLU(inplace=True),
        nn.Linear(channels, channels),
        nn.Sigmoid(),
    )


def port_abs_mean(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial) -> (N, C), as the popular ports write it."""
    return torch.flatten(nn.functional.adaptive_avg_pool1d(torch.abs(x).flatten(2), 1), 1)


def best_abs_mean(x: torch.Tensor) -> torch.Tensor:
    """The same in the fewest operations of PyTorch."""
    return x.abs().mean(dim=list(range(2, x.dim())))


def port_soft_threshold(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """x (N, C, *spatial), tau (N, C), as the popular ports write it."""
    sub = torch.abs(x) - tau.view(*tau.shape, *[1] * (x.dim() - 2))
    zeros = sub - sub
    return torch.mul(torch.sign(x), torch.max(sub, zeros))


def best_soft_threshold(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """x - clamp(x, -tau, tau): the form torch.compile does best with."""
    tau = tau.view(*tau.shape, *[1] * (x.dim() - 2))
    return x - torch.clamp(x, -tau, tau)


class PortShrinkage(nn.Module):
    """DRSN-CW as the popular PyTorch ports write it, operation by operation (13 kernels, 5 full tensors kept)."""

    def __init__(self, channels: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = standard_gate(channels) if gate is None else gate

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        x_raw = x
        x_abs = torch.abs(x)
        average = torch.flatten(nn.functional.adaptive_avg_pool1d(x_abs.flatten(2), 1), 1)
        x = torch.mul(average, self.fc(average)).view(*average.shape, *[1] * (x_raw.dim() - 2))
        sub = x_abs - x
        zeros = sub - sub
        n_sub = torch.max(sub, zeros)
        y = torch.mul(torch.sign(x_raw), n_sub)
        return y if residual is None else y + residual


class BestShrinkage(nn.Module):
    """The fewest operations in pure PyTorch, with the same gate."""

    def __init__(self, channels: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = standard_gate(channels) if gate is None else gate

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        average = best_abs_mean(x)
        y = best_soft_threshold(x, average * self.fc(average))
        return y if residual is None else y + residual
