"""What every data source returns: labelled signals or images, split into training and test data that share nothing."""

import numbers
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Dataset:
    """Labelled samples, clean.

    Noise is added to them, and what a network sees is ``transform`` of the sum: for speech the log-mel spectrogram,
    which is no place to add noise to; else the sum itself.

    Attributes:
        train_x, test_x: float32 (N, C, *lengths). Signals have zero mean and unit variance each, images lie in [0, 1].
        train_y, test_y: int64 (N,), indices into class_names.
        class_names: one name for each class.
        sampling_rate: Hz; None for images.
        description: one paragraph: where the samples come from and how they are split.
        notes: what was left out or changed, and why.
        transform: a module without parameters, (N, C, *lengths) -> input of the network. Train and test
            ``nn.Sequential(data.transform, network)``.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    class_names: tuple[str, ...]
    sampling_rate: float | None
    description: str
    notes: tuple[str, ...] = ()
    transform: nn.Module = field(default_factory=nn.Identity)


def standardise(x: torch.Tensor) -> torch.Tensor:
    """Give every row of (..., length) zero mean and unit variance; a constant row becomes zeros."""
    constant = (x == x[..., :1]).all(-1, keepdim=True)  # its mean may round
    # Scaled by a power of two, which rounds nothing, so that no square over- or underflows.
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent.clamp(-126, 126)
    x = torch.ldexp(x, -exponent)
    x = (x - x.mean(-1, keepdim=True)).masked_fill(constant, 0)
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).tiny)


def check_counts(low: int, **counts: int) -> None:
    """ValueError naming the first that is not a whole number of at least `low`."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def existing_folder(folder: str | Path, contents: str) -> Path:
    """The folder as a Path; FileNotFoundError or NotADirectoryError, saying what it should hold."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"folder does not exist: {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"folder must be a directory with {contents}, got the file {folder}")
    return folder
