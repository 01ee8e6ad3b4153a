"""A person's own signals: a folder with a subfolder for each class, or one table with a label in each row.

Recordings are cut into windows and split in time: the first part of each is for training, the rest for testing, so that
no window crosses the border and the two share no sample. Recordings too short for a window on both sides are not split:
of a class's short ones the last are for testing, in the order of their names.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ._dataset import Dataset, Windows, check_counts, existing_folder, files_below, hidden, logged, standardise
from ._recordings import (
    SUFFIXES,
    Channels,
    Recording,
    check_rate,
    cut,
    read_recording,
    resampled,
    resampled_length,
)
from ._tables import read_table
from ._text import is_number

NORMALISATIONS = ("window", "training")
LENGTH = 2048
SHORTEST = 16  # the paper's network halves a length four times
TRAINING, TEST = 0, 1


@dataclass
class _Class:
    """What is read of one class.

    Attributes:
        windows: of the training data, of the test data: tensors (N, C, length).
        recordings, samples: how many, and how long in all.
    """

    name: str
    windows: tuple[list[torch.Tensor], list[torch.Tensor]] = field(default_factory=lambda: ([], []))
    recordings: int = 0
    samples: int = 0

    def count(self, part: int) -> int:
        return sum(map(len, self.windows[part]))


def _folders(folder: Path) -> dict[str, list[Path]]:
    """The files of each class, by its name."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not hidden(path.name))
    found = {path.name: sorted(file for suffix in SUFFIXES for file in files_below(path, suffix)) for path in folders}
    if len(found) < 2:
        there = f"only {folders[0].name}" if folders else "none"
        raise ValueError(f"--data must have a subfolder for each of at least two classes, but {folder} has {there}")
    for path in folders:
        if not found[path.name]:
            raise ValueError(
                f"{path} must hold recordings ({', '.join(SUFFIXES)}), but has none: take it out of --data"
            )
    return found


def _common_rate(recordings: list[Recording], rate: float | None) -> float | None:
    """The rate that all are brought to; None where neither they nor --rate say one."""
    if rate is not None:
        return rate
    first = recordings[0]
    for other in recordings:
        if other.rate != first.rate:
            rates = [
                f"{r.path} " + ("does not say its own" if r.rate is None else f"has {r.rate:g} Hz")
                for r in (first, other)
            ]
            raise ValueError(
                f"recordings must have one sampling rate, but {' and '.join(rates)}: give --rate HZ, to which they are "
                "resampled; a file that does not say its rate is taken to be at it"
            )
    return first.rate


def check_channels(recording: Recording, first: Recording) -> None:
    """ValueError naming both files where one has other channels than the first."""
    ours, theirs = recording.signal.shape[0], first.signal.shape[0]
    if ours != theirs:
        raise ValueError(
            f"recordings must have the same channels, but {first.path} has {theirs} and {recording.path} has {ours}: "
            "choose with --channels"
        )
    if moved(recording.names, first.names):
        raise ValueError(
            f"recordings must have their channels in the same order, but they are {', '.join(first.names)} in "
            f"{first.path} and {', '.join(recording.names)} in {recording.path}: choose by name with --channels"
        )


def moved(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a name that both have stands elsewhere; files that name none of their channels alike may be mixed."""
    return any(name != other and name in others for name, other in zip(names, others, strict=False))


def _side_lengths(recording: Recording, rate: float | None, fraction: float) -> tuple[int, int]:
    """Samples on both sides of the border, after resampling."""
    border = int(recording.signal.shape[1] * fraction)
    first, second = border, recording.signal.shape[1] - border
    return resampled_length(first, recording.rate, rate), resampled_length(second, recording.rate, rate)


def _chosen_length(classes: dict[str, list[Recording]], rate: float | None, length: int | None, fraction: float) -> int:
    """Samples a window: what is asked for, or LENGTH, or less where a recording has no room for it.

    Of a class with a single recording, both sides of that must have it.
    """
    at = "" if rate is None else f" at {rate:g} Hz"
    room = LENGTH if length is None else length
    for found in classes.values():
        for recording in found:
            sides = _side_lengths(recording, rate, fraction)
            samples = (
                min(sides) if len(found) == 1 else resampled_length(recording.signal.shape[1], recording.rate, rate)
            )
            if length is None:
                room = min(room, samples)
            if samples < (SHORTEST if length is None else length):
                wanted = f"windows need at least {SHORTEST}" if length is None else f"--length is {length}"
                has = f"{samples} samples{at}"
                if len(found) == 1:
                    has = (
                        f"{sides[0]} samples{at} for training and {sides[1]} for testing, as its class's only recording"
                    )
                raise ValueError(f"{recording.path} is too short: it has {has}, and {wanted}")
    return room


def constant(windows: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    """Which windows (N, C, length) of a signal (C, samples) are constant in every channel, but for rounding."""
    spread = (windows.amax(2) - windows.amin(2)).amax(1)
    return spread <= 1e-6 * (signal.amax(1) - signal.amin(1)).amax()


def _sides(
    recordings: list[Recording], rate: float | None, length: int, fraction: float
) -> list[tuple[Recording, int, torch.Tensor]]:
    """Recordings of a class with the part they are for and the signal: both sides of the long ones, the short whole."""
    sides: list[tuple[Recording, int, torch.Tensor]] = []
    short = []
    for recording in recordings:
        signal = recording.signal
        if min(_side_lengths(recording, rate, fraction)) < length:
            short.append(recording)
        else:  # apart from each other, so that the filter mixes no sample of one into the other
            border = int(signal.shape[1] * fraction)
            sides += [(recording, TRAINING, signal[:, :border]), (recording, TEST, signal[:, border:])]
    # At least one is tested and one trained on, where no long recording is for both.
    tested = min(max(round(len(short) * (1 - fraction)), not sides), len(short) - (not sides))
    for number, recording in enumerate(short):
        sides.append((recording, TEST if number >= len(short) - tested else TRAINING, recording.signal))
    return sides


def _read_class(
    name: str, recordings: list[Recording], rate: float | None, windows: Windows, fraction: float, levels: bool
) -> tuple[_Class, list[str]]:
    """The windows of a class, and notes on constant ones, which are left out where levels are not kept."""
    found, notes = _Class(name, recordings=len(recordings)), []
    for recording, part, signal in _sides(recordings, rate, windows.length, fraction):
        signal = resampled(signal, recording.rate, rate)
        found.samples += signal.shape[1]
        cuts = cut(signal, windows.length, windows.stride if part == TRAINING else windows.length)
        if not levels and (dead := constant(cuts, signal)).any():
            cuts = cuts[~dead]
            notes.append(f"Left {int(dead.sum())} windows without any change out of {recording.path}.")
        found.windows[part].append(cuts)
    for part, what in ((TRAINING, "train on"), (TEST, "test")):
        if not found.count(part):
            raise ValueError(
                f"{recordings[0].path.parent} must hold recordings of {name} to {what}, but all windows are constant"
            )
    return found, notes


def _statistics(classes: list[_Class]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all training windows."""
    parts = [windows.double() for found in classes for windows in found.windows[TRAINING]]
    count = sum(part.shape[0] * part.shape[2] for part in parts)
    mean = sum(part.sum((0, 2)) for part in parts) / count
    std = (sum((part - mean[:, None]).square().sum((0, 2)) for part in parts) / count).sqrt()
    if not (std > 0).all():
        raise ValueError(
            f"channel {int((std == 0).nonzero()[0])} is constant in all training data: leave it out with --channels"
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def normalised(x: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Windows (N, C, length) as a network sees them."""
    if windows.mean is None:
        return standardise(x)
    return (x - torch.tensor(windows.mean)[:, None]) / torch.tensor(windows.std)[:, None]


def _preview(classes: list[_Class], rate: float | None, unit: str) -> str:
    rows = [("class", unit, "seconds" if rate else "samples", "training windows", "test windows")]
    for found in classes:
        size = f"{found.samples / rate:.1f}" if rate else str(found.samples)
        rows.append((found.name, str(found.recordings), size, str(found.count(TRAINING)), str(found.count(TEST))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _dataset(classes: list[_Class], windows: Windows, normalise: str, **described) -> Dataset:
    if normalise == "training":
        mean, std = _statistics(classes)
        windows = replace(windows, mean=mean, std=std)
    tensors = []
    for part in (TRAINING, TEST):
        x = torch.cat([piece for found in classes for piece in found.windows[part]])
        labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([found.count(part) for found in classes]))
        tensors += [normalised(x, windows), labels]
    return Dataset(*tensors, class_names=tuple(found.name for found in classes), windows=windows, **described)


def _rates(recordings: list[Recording], rate: float | None) -> str:
    """A sentence on the sampling rates that the files say."""
    counts = Counter(recording.rate for recording in recordings)
    said = []
    for own, count in sorted(counts.items(), key=lambda item: item[0] or 0):
        if own is None:
            said.append(f"{count} files that do not say one" + (f", taken to be at {rate:g} Hz" if rate else ""))
        else:
            said.append(f"{count} at {own:g} Hz" + (f", resampled to {rate:g} Hz" if rate not in (None, own) else ""))
    return f"Sampling rates: {'; '.join(said)}."


def load_own(
    source: str | Path,
    *,
    length: int | None = None,
    stride: int | None = None,
    rate: float | None = None,
    channels: Channels = None,
    normalise: str = "window",
    train_fraction: float = 0.7,
) -> Dataset:
    """Windows of a person's own recordings, every recording split in time; or the rows of a table.

    Args:
        source: a folder with a subfolder for each class, searched with its own subfolders for .npy, .npz, .csv, .txt,
            .mat and .wav files, which may be mixed; hidden files are passed over. Of an array with two dimensions the
            longer one is time. An .npz or .mat file holds one array, or several of as many samples, and its sampling
            rate as a number named rate or fs. A text has a column for each channel, with a line of names or not. A
            column or array named time, index or the like is left out, and so is a first column without a name that
            rises evenly.
            Or a table: an .npz file with x (N, length) or (N, channels, length) and y (N,), or a .csv file with a
            window in each row and its label, a text or a number, in the column ``label`` or in the last one.
        length: samples a window, after resampling; by default 2048, or as many as every recording has room for.
        stride: samples from one training window to the next; by default half the length, so that they overlap.
        rate: Hz. Recordings of another rate are resampled to it, and a file that does not say its own is taken to be at
            it. By default that of the files, which then must have one.
        channels: which channels of the files, by number from 0 or by name; by default all.
        normalise: "window", every channel of every window to zero mean and unit variance, or "training", by the mean
            and deviation of each channel over the training data, which keeps levels.
        train_fraction: part of each recording that is for training, between 0 and 1; of a table, part of each class's
            rows, in their order.

    Returns:
        Dataset with x (N, channels, length), classes in the order of their names, and a preview of what was read.
        Windows without any change were left out, unless levels are kept; notes say of which file, and are logged.

    Raises:
        ImportError: scipy or h5py is missing, where a file needs it.
        FileNotFoundError: no such folder or file.
        ValueError: a file that cannot be read, holds NaN or Inf, complex numbers or texts, is too short, or has other
            channels or another rate than the rest; a class without recordings; fewer than two classes. The message
            names the file or folder.
    """
    check_counts(SHORTEST, **({} if length is None else {"length": length}))
    check_counts(1, **({} if stride is None else {"stride": stride}))
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"rate must be a positive number of Hz, got {rate}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must lie between 0 and 1, got {train_fraction}")
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {normalise!r}")
    source = Path(source)
    if source.is_file():
        if length is not None or stride is not None or channels is not None:
            raise ValueError(
                f"--length, --stride and --channels belong to recordings, but {source} is a table of windows"
            )
        return _load_table(source, rate, normalise, train_fraction)

    files = _folders(existing_folder(source, "a subfolder for each class"))
    centre = normalise == "window"
    recordings = {
        name: [read_recording(path, channels, centre=centre) for path in paths] for name, paths in files.items()
    }
    every = [recording for found in recordings.values() for recording in found]
    for recording in every:
        check_channels(recording, every[0])
    common = _common_rate(every, rate)
    for recording in every:
        check_rate(recording.path, recording.rate, common)
    length = _chosen_length(recordings, common, length, train_fraction)
    stride = max(length // 2, 1) if stride is None else stride
    windows = Windows(length, stride, None if channels is None else tuple(channels), names=every[0].names)
    notes = [note for recording in every for note in recording.notes]
    classes = []
    for name, found in recordings.items():
        read, left_out = _read_class(name, found, common, windows, train_fraction, levels=not centre)
        classes.append(read)
        notes += left_out
    counted = len(every[0].signal)
    whole = sum(min(_side_lengths(recording, common, train_fraction)) < length for recording in every)
    split = f"those for training from the first {train_fraction:.0%} of each recording (stride {stride}), those for "
    split += "testing from the rest" + (f"; {whole} too short for both are in one part as a whole" if whole else "")
    return _dataset(
        classes,
        windows,
        normalise,
        sampling_rate=common,
        description=f"Recordings in {source}: {len(every)} of {len(classes)} classes, {counted} "
        f"{'channel' if counted == 1 else 'channels'}; windows of {length} samples"
        f"{'' if common is None else f' ({length / common:g} s)'}, {split}. {_rates(every, common)}",
        notes=logged(_shortened(notes)),
        preview=_preview(classes, common, "recordings"),
    )


def _load_table(path: Path, rate: float | None, normalise: str, fraction: float) -> Dataset:
    x, labels, own = read_table(path)
    names = sorted(set(labels), key=(lambda name: (float(name), name)) if all(map(is_number, set(labels))) else None)
    if len(names) < 2:
        raise ValueError(f"{path} must hold at least two classes, but every label is {names[0]!r}")
    if x.shape[2] < SHORTEST:
        raise ValueError(f"{path} must hold windows of at least {SHORTEST} samples, but its rows have {x.shape[2]}")
    if None not in (rate, own) and rate != own:
        raise ValueError(f"{path} holds windows at {own:g} Hz, which are not resampled: leave --rate {rate:g} out")
    classes, notes = [], []
    for name in names:
        rows = x[[i for i, label in enumerate(labels) if label == name]]
        if normalise == "window" and (dead := constant(rows, rows.flatten(0, 1))).any():
            rows = rows[~dead]
            notes.append(f"Left {int(dead.sum())} rows of {name} without any change out of {path}.")
        if len(rows) < 2:
            raise ValueError(
                f"{path} must hold two rows of each class, to train on and to test, but {name} has {len(rows)}"
            )
        border = len(rows) - max(1, round(len(rows) * (1 - fraction)))
        found = _Class(name, recordings=len(rows), samples=rows.shape[0] * rows.shape[2])
        found.windows[TRAINING].append(rows[: max(border, 1)])
        found.windows[TEST].append(rows[max(border, 1) :])
        classes.append(found)
    length, rate = x.shape[2], own if rate is None else rate
    return _dataset(
        classes,
        Windows(length, length, table=True),
        normalise,
        sampling_rate=rate,
        description=f"Table {path}: {len(x)} rows of {len(classes)} classes, windows of {length} samples of "
        f"{x.shape[1]} {'channel' if x.shape[1] == 1 else 'channels'}; of each class the first {fraction:.0%} of the "
        "rows for training, the rest for testing.",
        notes=logged(_shortened(notes)),
        preview=_preview(classes, rate, "rows"),
    )


def _shortened(notes: list[str], most: int = 5) -> list[str]:
    rest = len(notes) - most
    return notes[:most] + ([f"And {rest} more notes of these kinds."] if rest > 0 else [])
