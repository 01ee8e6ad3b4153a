"""A network with a shrinkage module as the PyTorch ports have it, and the same network with drsn_kernels.Shrinkage.

    python examples/drop_in.py

The parameters have the same names and shapes, so a checkpoint of the port loads as it is.
"""

import torch
from torch import nn

import drsn_kernels as dk


class PortShrinkage(nn.Module):
    """The module of the popular PyTorch ports of the paper: soft thresholding with a threshold for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gap = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, channels),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        magnitude = x.abs()
        average = self.gap(magnitude).flatten(1)
        tau = (self.fc(average) * average).unsqueeze(2)
        return torch.sign(x) * torch.clamp(magnitude - tau, min=0)


def network(shrinkage: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, stride=2, padding=4), shrinkage(16), nn.Conv1d(16, 32, 9, stride=2, padding=4),
        shrinkage(32), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of the first convolution."""
    loss = nn.functional.cross_entropy(model(x), y)
    (grad,) = torch.autograd.grad(loss, [model[0].weight])
    return loss.detach(), grad


def main() -> None:
    torch.manual_seed(0)
    port, fused = network(PortShrinkage), network(dk.Shrinkage)
    print("keys:", fused.load_state_dict(port.state_dict()))

    x, y = torch.randn(32, 1, 1024), torch.randint(4, (32,))
    (loss, grad), (fused_loss, fused_grad) = step(port, x, y), step(fused, x, y)
    print(f"loss {loss:.6f}, fused {fused_loss:.6f}")
    # A value that lies on its threshold may round to either side, and its gradient is one or zero.
    print(f"largest difference of the gradient {(grad - fused_grad).abs().max():.1e} of {grad.abs().max():.1e}")

    port.eval()
    fused.eval()
    with torch.no_grad(), dk.record_tau(fused) as taus:
        difference = (port(x) - fused(x)).abs().max()
    print(f"largest difference in eval mode {difference:.1e}")
    for name, tau in taus.items():
        print(f"thresholds of module {name}: {tuple(tau.shape)}, mean {tau.mean():.4f}")


if __name__ == "__main__":
    main()
