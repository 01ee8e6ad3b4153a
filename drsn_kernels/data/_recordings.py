"""One recording from a file of a common format: channels, samples, and the sampling rate where the file has it.

======================  ==============================================================  ======================
.npy                    (samples,), (samples, channels) or (channels, samples)          no rate
.npz, .mat              one such array, or several of as many samples: the channels     a number named rate, fs
.csv, .txt              a column for each channel, with a line of names or not          no rate
.wav                    PCM or float                                                    has it
======================  ==============================================================  ======================

Of two dimensions the longer one is time. A column or variable named time, t, index or the like is left out, and so is a
first column that rises evenly from the first line to the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._extras import require
from ._dataset import listed
from ._matlab import read_matlab
from ._text import is_time, layout, read_columns
from ._wav import read_wav

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".npy", ".npz", ".csv", ".txt", ".mat", ".wav")
RATE_NAMES = ("rate", "fs", "sr", "sampling_rate", "sample_rate", "samplerate", "samplingrate")
Channels = Sequence[int | str] | None


@dataclass(frozen=True)
class Recording:
    """What a file holds.

    Attributes:
        path: of the file.
        signal: float32 (channels, samples), finite.
        rate: Hz; None where the file does not say.
        names: of the channels; empty where the file has none.
        notes: what was left out.
    """

    path: Path
    signal: torch.Tensor
    rate: float | None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_numbers(path: Path, values: "np.ndarray", what: str = "") -> None:
    """ValueError naming the file where an array does not hold real numbers."""
    if values.dtype.kind not in "fiu":
        kind = {"c": "complex numbers", "b": "truth values", "O": "objects"}.get(values.dtype.kind, str(values.dtype))
        raise ValueError(f"{path} must hold real numbers, but {what or 'it'} holds {kind}")


def load_numpy(path: Path) -> "np.ndarray | dict[str, np.ndarray]":
    """The array of a .npy file, mapped and not read, or the arrays of a .npz file by name."""
    np = require("numpy", "train")
    try:
        found = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except Exception as error:  # ValueError, EOFError, BadZipFile, struct.error and others of damaged files
        if "pickle" in str(error) or "Python objects" in str(error):
            error = "it holds Python objects, or is no such file"
        raise ValueError(f"{path} cannot be read as a {path.suffix.lower()} file of numbers: {error}") from None


def found_rate(path: Path, arrays: "dict[str, np.ndarray]") -> float | None:
    """The sampling rate among the variables of a file; ValueError naming it where that is no positive number."""
    for name, value in arrays.items():
        if name.lower() in RATE_NAMES:
            rate = float(value.reshape(-1)[0]) if value.size == 1 and value.dtype.kind in "fiu" else 0.0
            if not 0 < rate < float("inf"):
                raise ValueError(f"{path} must hold a positive number as its sampling rate {name}")
            return rate
    return None


def _rows(path: Path, values: "np.ndarray", what: str = "") -> "np.ndarray":
    """(channels, samples) of an array: the longer of two dimensions is time."""
    check_numbers(path, values, what)
    if values.ndim == 1:
        return values[None]
    if values.ndim != 2:
        raise ValueError(
            f"{path} must hold a signal in one or two dimensions, but {what or 'it'} has shape {values.shape}"
        )
    if values.shape[0] == values.shape[1] > 1:
        raise ValueError(
            f"{path} must hold more samples than channels, but {what or 'it'} has shape {values.shape}: which "
            "dimension is time cannot be told"
        )
    return values.T if values.shape[0] > values.shape[1] else values


def _chosen(
    path: Path, arrays: "dict[str, np.ndarray]", channels: Channels
) -> "tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]":
    """Channels, names and what was left out of the variables of a file."""
    np = require("numpy", "train")
    numeric = {name: value for name, value in arrays.items() if value.dtype.kind in "fiuc" and value.size > 1}
    if channels and all(isinstance(name, str) and name in numeric for name in channels):
        numeric = {name: numeric[name] for name in channels}
    left_out = tuple(name for name in numeric if is_time(name)) if len(numeric) > 1 else ()
    signals = {name: _rows(path, numeric[name], name) for name in numeric if name not in left_out}
    if not signals:
        kinds = [f"{name} (a struct or cell, not read)" if arrays[name].dtype.kind in "OV" else name for name in arrays]
        raise ValueError(f"{path} holds no signal, but {listed(sorted(kinds)) or 'nothing'}")
    if len({signal.shape[1] for signal in signals.values()}) > 1:
        sizes = listed([f"{name} {numeric[name].shape}" for name in signals])
        raise ValueError(f"{path} must hold signals of as many samples, but holds {sizes}: choose with --channels NAME")
    names = [f"{name}[{i}]" if len(rows) > 1 else name for name, rows in signals.items() for i in range(len(rows))]
    return np.concatenate(list(signals.values())), tuple(names), left_out


def _read_text(path: Path) -> "tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]":
    np = require("numpy", "train")
    found = layout(path)
    names = found.names if len(found.names) == found.columns else ()
    if names:
        columns = [i for i, name in enumerate(names) if found.columns == 1 or not is_time(name)]
        left_out = tuple(name or "without a name" for i, name in enumerate(names) if i not in columns)
        if not columns:
            raise ValueError(f"{path} holds no signal, but the columns {listed(names)}")
        return read_columns(path, found, columns).T, tuple(names[i] for i in columns), left_out
    values = read_columns(path, found, list(range(found.columns)))
    steps = np.diff(values[:, 0])
    rises = len(steps) > 1 and steps.min() > 0 and np.ptp(steps) <= 1e-3 * steps.mean()
    if rises and values.shape[1] > 1 and len(values) > values.shape[1]:
        return values[:, 1:].T, (), ("of evenly rising numbers",)
    return _rows(path, values), (), ()


def _select(path: Path, count: int, names: tuple[str, ...], channels: Sequence[int | str]) -> list[int]:
    """The numbers of the channels that are asked for."""
    there = listed(names) if names else f"{count}, numbered from 0"
    chosen: list[int] = []
    for channel in channels:
        if isinstance(channel, str):  # of a variable with several channels, all of them
            found = [i for i, name in enumerate(names) if name == channel or name.startswith(f"{channel}[")]
        else:
            found = [channel] if 0 <= channel < count else []
        if not found:
            raise ValueError(f"{path} must hold the channel {channel} of --channels, but its channels are {there}")
        chosen += found
    return chosen


def _float32(path: Path, values: "np.ndarray", centre: bool) -> torch.Tensor:
    """Channels (C, samples) as float32, which must hold them."""
    np = require("numpy", "train")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row, sample = (int(place[0]) for place in np.nonzero(~np.isfinite(values)))
        raise ValueError(f"{path} holds NaN or Inf: the first in channel {row} at sample {sample}")
    if centre and values.dtype.itemsize > 2 and values.dtype != np.float32:
        values = values - values.mean(1, keepdims=True, dtype=np.float64)  # a small signal on a large offset
    with np.errstate(over="ignore"):
        signal = torch.from_numpy(np.array(values, np.float32, order="C"))
    if not signal.isfinite().all():
        raise ValueError(f"{path} holds numbers beyond those of float32")
    return signal


def read_recording(path: Path, channels: Channels = None, *, centre: bool = True) -> Recording:
    """Read one file.

    Args:
        path: a file with one of SUFFIXES, in capitals or not.
        channels: which of its channels, by number from 0 or by name (of a column, of a variable); None for all.
        centre: take the mean off where float32 would lose a small signal on a large offset.

    Raises:
        ImportError: scipy is missing, or h5py for MATLAB's version 7.3.
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or holds no signal of finite real numbers; the message names it.
    """
    suffix, rate = path.suffix.lower(), None
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must be one of {', '.join(SUFFIXES)}")
    if not path.exists():
        raise FileNotFoundError(f"file does not exist: {path}")
    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if suffix == ".wav":
        values, rate = read_wav(path)
        values = values.T
    elif suffix == ".npy":
        values = _rows(path, load_numpy(path))
    elif suffix in (".csv", ".txt"):
        values, names, left_out = _read_text(path)
    else:
        arrays = read_matlab(path) if suffix == ".mat" else load_numpy(path)
        rate = found_rate(path, arrays)
        arrays = {name: value for name, value in arrays.items() if name.lower() not in RATE_NAMES}
        values, names, left_out = _chosen(path, arrays, channels)
    if not values.size:
        raise ValueError(f"{path} holds no samples")
    if channels is not None:
        chosen = _select(path, len(values), names, channels)
        values, names = values[chosen], tuple(names[i] for i in chosen) if names else ()
    notes = tuple(f"Left the column {name} out of {path}." for name in left_out)
    return Recording(path, _float32(path, values, centre), None if rate is None else float(rate), names, notes)


def resampled(signal: torch.Tensor, rate: float | None, wanted: float | None) -> torch.Tensor:
    """A signal (channels, samples) at another rate, low-pass filtered without phase shift where that is lower.

    The same tensor where the rates are equal, or where one is not known.
    """
    if rate is None or wanted is None or rate == wanted:
        return signal
    ratio = _ratio(rate, wanted)
    resample_poly = require("scipy.signal", "train").resample_poly
    # "line": it begins and ends at its own level, not in a step from zero
    values = resample_poly(signal.numpy(), ratio.numerator, ratio.denominator, axis=1, padtype="line")
    return torch.from_numpy(values).float()


def resampled_length(samples: int, rate: float | None, wanted: float | None) -> int:
    """Samples of what :func:`resampled` makes of so many."""
    if rate is None or wanted is None or rate == wanted:
        return samples
    ratio = _ratio(rate, wanted)
    return -(-samples * ratio.numerator // ratio.denominator)


def _ratio(rate: float, wanted: float) -> Fraction:
    return (Fraction(wanted) / Fraction(rate)).limit_denominator(10_000)


def check_rate(path: Path, rate: float | None, wanted: float | None) -> None:
    """ValueError naming the file where its rate is too far from the wanted one."""
    if rate is not None and wanted is not None and not 1e-3 < wanted / rate < 1e3:
        raise ValueError(f"{path} is at {rate:g} Hz, which cannot be brought to {wanted:g} Hz")


def cut(signal: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """The windows (N, channels, length) of a signal (channels, samples), which share its memory."""
    return signal.unfold(1, length, stride).transpose(0, 1)
