"""What every data source returns: labelled signals or images, split into training and test data that share nothing."""

import logging
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

# Of macOS's archives and of Synology's disks: companions of files, under the files' own names.
_COMPANIONS = ("__MACOSX", "@eaDir")
_log = logging.getLogger("drsn_kernels")


@dataclass(frozen=True)
class Windows:
    """How a recording becomes samples: what has to be done with a new one before a trained network sees it.

    Attributes:
        length: samples a window.
        stride: samples from one training window to the next; test windows do not overlap.
        channels: which of a file's channels, numbers from 0 or names; None for all of them.
        clip: a recording makes one window, its middle or all of it between zeros, of the mean of its channels.
        table: a file is a table and has a window in each row.
        mean, std: of each channel over the training data, by which it is normalised; None where every channel of every
            window has zero mean and unit variance of its own.
        names: of the channels, where the files say; a new recording has those that it shares in the same places.
    """

    length: int
    stride: int
    channels: tuple[int | str, ...] | None = None
    clip: bool = False
    table: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    names: tuple[str, ...] = ()


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
        windows: how recordings became samples; None for images.
        preview: a table of what was read, to look at before training; may be empty.
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
    windows: Windows | None = None
    preview: str = ""


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


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over."""
    return name.startswith(".") or name in _COMPANIONS


def files_below(folder: Path, suffix: str) -> list[Path]:
    """The files with this suffix, in capitals or not, of the folder and its sub-folders, sorted.

    Passed over are hidden files and folders, whose names begin with a dot (._7.wav, .git, .ipynb_checkpoints), and
    folders of companion files (__MACOSX, @eaDir).
    """

    def data(path: Path) -> bool:
        return not any(map(hidden, path.relative_to(folder).parts))

    return sorted(p for p in folder.rglob("*") if p.suffix.lower() == suffix and data(p) and p.is_file())


def listed(names: Sequence[str], most: int = 40) -> str:
    """The names as a sentence has them: of many the first ones and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def absent(class_names: Sequence[str], train_y: torch.Tensor, test_y: torch.Tensor) -> list[str]:
    """Notes on classes that training or test data have no sample of."""
    notes = []
    for y, what in ((train_y, "train on"), (test_y, "test")):
        counts = torch.bincount(y, minlength=len(class_names)).tolist()
        names = [name for name, count in zip(class_names, counts, strict=True) if not count]
        if names:
            notes.append(f"No samples to {what} of {listed(names)}.")
    return notes


def logged(notes: Iterable[str]) -> tuple[str, ...]:
    """The notes of a Dataset, each logged as a warning."""
    notes = tuple(notes)
    for note in notes:
        _log.warning(note)
    return notes
