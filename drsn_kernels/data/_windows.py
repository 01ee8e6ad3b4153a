"""What every data source returns: labelled windows, split into training and test recordings."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Windows:
    """Labelled signal windows.

    Attributes:
        train_x, test_x: float32 (N, 1, length), every window with zero mean and unit variance.
        train_y, test_y: int64 (N,), indices into class_names.
        class_names: one name for each class.
        sampling_rate: Hz.
        description: one paragraph: where the windows come from and how they are split.
        notes: what was left out, and why.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    class_names: tuple[str, ...]
    sampling_rate: float
    description: str
    notes: tuple[str, ...] = ()


def standardise(x: torch.Tensor) -> torch.Tensor:
    """Give every row of (..., length) zero mean and unit variance; a constant row becomes zeros."""
    x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
