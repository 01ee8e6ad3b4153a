"""What the fused operator is compared with: the shrinkage step as people write it in PyTorch."""

import torch
from torch import nn


def _gate(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, channels),
        nn.BatchNorm1d(channels),
        nn.ReLU(inplace=True),
        nn.Linear(channels, channels),
        nn.Sigmoid(),
    )


class PortShrinkage(nn.Module):
    """DRSN-CW as the popular PyTorch ports write it, operation by operation (13 kernels, 5 full tensors kept)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = _gate(channels)

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
    """The fewest operations in pure PyTorch: x - clamp(x, -tau, tau), the form torch.compile does best with."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = _gate(channels)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        average = x.abs().mean(dim=list(range(2, x.dim())))
        tau = (average * self.fc(average)).view(*average.shape, *[1] * (x.dim() - 2))
        y = x - torch.clamp(x, -tau, tau)
        return y if residual is None else y + residual
