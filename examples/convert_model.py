"""A model that exists, converted in one line: dk.convert finds what computes a shrinkage, by whatever name.

    python examples/convert_model.py
"""

import torch
from torch import nn

import drsn_kernels as dk


class Denoise(nn.Module):
    """Thresholding as somebody wrote it: one threshold for each channel, from a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, width), nn.Sigmoid())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        level = features.abs().mean((2, 3))
        threshold = (level * self.score(level))[:, :, None, None]
        return torch.sign(features) * torch.relu(features.abs() - threshold)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.denoise = Denoise(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.denoise(self.convolutions(x))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), Block(32), Block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    ).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        print(dk.convert(model))  # what was converted, and why not where it was not
        after = model(x)
        print(f"largest difference of the outputs {(after - before).abs().max():.1e}")
        dk.revert(model)
        print(f"reverted, the same to the bit: {torch.equal(model(x), before)}")


if __name__ == "__main__":
    main()
