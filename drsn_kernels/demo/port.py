"""What the fused operator is compared with: the shrinkage step as people write it in PyTorch."""

from collections.abc import Callable

import torch
from torch import nn

from ..models import ResidualShrinkageUnit


def standard_gate(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, channels),
        nn.BatchNorm1d(channels),
        nn.ReLU(inplace=True),
        nn.Linear(channels, channels),
        nn.Sigmoid(),
    )


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


def swap(model: nn.Module, form: Callable[[int], nn.Module]) -> nn.Module:
    """Replace the shrinkage of every unit by form(channels), another form of it, with its parameters."""
    for unit in model.modules():
        if isinstance(unit, ResidualShrinkageUnit) and unit.shrinkage is not None:
            other = form(unit.out_channels)
            other.load_state_dict(unit.shrinkage.state_dict())
            unit.shrinkage = other
    return model
