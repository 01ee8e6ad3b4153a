"""Reader for the bearing recordings of Case Western Reserve University (drive end), in their original format.

The files carry the names of the data set's index: fault, width in thousandths of an inch, for the outer race its
position against the load zone, and the motor load in horsepower: IR007_0.mat, OR014@6_2.mat, B021_1.mat, and for the
baseline Normal_0.mat. Source of the data: https://engineering.case.edu/bearingdatacenter, which serves them under the
numbers of the recordings: 105.mat for IR007_0.mat.

The files do not hold their sampling rate. Faults are published at 12 kHz and at 48 kHz, the baseline at 48 kHz only.
A recording lasts 5 to 10.3 s, so one of more than 15 s at 12 kHz is one at 48 kHz, and is decimated.
"""

import re
from pathlib import Path

import torch

from .._extras import require
from ._dataset import Dataset, Windows, check_counts, existing_folder, files_below, listed, logged, standardise
from ._matlab import read_matlab

SAMPLING_RATE = 12_000.0
CLASS_NAMES = tuple(f"{fault}{width}" for fault in ("IR", "B", "OR") for width in ("007", "014", "021"))
NORMAL = "normal"
_NAME = re.compile(r"(?P<name>(?:IR|OR|B)\d{3}(?=@|_)|normal)(?:@\d+)?_(?P<load>\d)$", re.IGNORECASE)
# The number of the recording at load 0; those at loads 1 to 3 follow. The baseline, and 12 kHz drive end.
_FIRST = {
    NORMAL: 97, "IR007": 105, "B007": 118, "OR007@6": 130, "IR014": 169, "B014": 185, "OR014@6": 197, "IR021": 209,
    "B021": 222, "OR021@6": 234,
}  # fmt: skip
_NUMBERS = {f"{name}_{load}".upper(): first + load for name, first in _FIRST.items() for load in range(4)}
_STEMS = {str(number): stem for stem, number in _NUMBERS.items()}
_DECIMATION = 4  # from 48 kHz
_LONGEST = round(15 * SAMPLING_RATE)


def _stem(path: Path) -> str:
    """The file's name in the index, in capitals and without its end, also of a file that is named by its number."""
    return _STEMS.get(path.stem, path.stem.upper())


def _read(path: Path) -> torch.Tensor:
    """The drive-end acceleration of one file, float32 (samples,)."""
    contents = read_matlab(path)
    channels = sorted(name for name in contents if name.endswith("_DE_time"))
    own = f"X{_NUMBERS.get(_stem(path), 0):03d}_DE_time"
    if own in channels:  # Normal_2.mat holds Normal_1's channels as well
        channels = [own]
    if len(channels) != 1:
        found = listed(sorted(contents)) or "nothing"
        raise ValueError(f"{path} must hold one drive-end channel, *_DE_time, but holds {found}")
    values = contents[channels[0]]
    if values.dtype.kind not in "fiu" or values.size != max(values.shape, default=1):
        raise ValueError(
            f"{path} must hold real numbers in one row or column as its drive-end channel {channels[0]}, "
            f"but holds {values.dtype} of shape {values.shape}"
        )
    signal = torch.as_tensor(values.astype("float32")).flatten()
    if not signal.isfinite().all():
        raise ValueError(f"{path} holds NaN or Inf in its drive-end channel {channels[0]}")
    return signal


def _select(folder: Path, loads: tuple[int, ...], normal: bool) -> tuple[dict[Path, str], list[str]]:
    """The files to read with the names of their classes, and notes on what is left out."""
    files = files_below(folder, ".mat")
    known = {name.upper(): name for name in (*CLASS_NAMES, *([NORMAL] if normal else []))}
    chosen: dict[Path, str] = {}
    other, seen = [], {}
    for path in files:
        stem = _stem(path)
        match = _NAME.match(stem)
        name = known.get(match["name"].upper()) if match else None
        if name is None or int(match["load"]) not in loads:
            other.append(path.name)
        elif stem in seen:
            raise ValueError(
                f"folder must hold one recording of each name, such as the 12 kHz drive-end set alone, "
                f"but holds {seen[stem]} and {path}"
            )
        else:
            seen[stem] = path
            chosen[path] = name
    if not chosen:
        raise ValueError(
            f"folder must hold CWRU recordings named like IR007_0.mat, OR014@6_2.mat or 105.mat, "
            f"but {folder} has none among its {len(files)} .mat files, hidden ones not counted; "
            f"recordings of your own are read by load_own, train --task own"
        )
    notes = []
    if other:
        notes.append(
            f"Skipped {listed(other)}: not one of {', '.join(known.values())} at load {', '.join(map(str, loads))}."
        )
    missing = [name for name in CLASS_NAMES if name not in chosen.values()]
    if missing:
        notes.append(f"No recordings of {', '.join(missing)}: these classes have no windows.")
    return chosen, notes


def _at_12_khz(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every part low-pass filtered below 6 kHz without phase shift and decimated by 4, apart from the others."""
    resample_poly = require("scipy.signal", "train").resample_poly
    # "line": a part begins and ends at its own level, not in a step from zero
    return [torch.from_numpy(resample_poly(part.numpy(), 1, _DECIMATION, padtype="line")).float() for part in parts]


def load_cwru(
    folder: str | Path,
    *,
    length: int = 2048,
    stride: int = 1024,
    train_fraction: float = 0.7,
    loads: tuple[int, ...] = (0, 1, 2),
    normal: bool = True,
) -> Dataset:
    """Windows of the nine CWRU drive-end faults, and the normal baseline, at 12 kHz, every recording split in time.

    The first part of each recording gives training windows, which may overlap; the rest gives test windows without
    overlap. No window crosses the split, so training and test share no sample. (Windows drawn at random from the
    whole recording would overlap across the split, and such a test measures memory.) A recording at 48 kHz is split
    before it is brought to 12 kHz, so the filter mixes no sample of one side into the other.

    Args:
        folder: searched with its sub-folders for files named like IR007_0.mat, OR014@6_2.mat, B021_1.mat; the
            outer race's position (@3, @6, @12) is not part of the class. Or named by the recordings' numbers, as the
            source serves them: for loads 0 to 3 the baseline 97 to 100 (48 kHz), and at 12 kHz IR007 105 to 108, B007
            118 to 121, OR007@6 130 to 133, IR014 169 to 172, B014 185 to 188, OR014@6 197 to 200, IR021 209 to 212,
            B021 222 to 225, OR021@6 234 to 237; other numbers are left out. Hidden files are passed over.
        length: samples a window.
        stride: samples from one training window to the next; below `length` they overlap.
        train_fraction: part of each recording that is for training, between 0 and 1.
        loads: motor loads in horsepower to use.
        normal: use the baseline Normal_0.mat (97.mat) ... as class "normal", where the folder has it.

    Returns:
        Dataset with x (N, 1, length) and classes IR007 ... OR021, then "normal" where it is used. What was left out or
        decimated is said in notes, which are logged as well.

    Raises:
        ImportError: scipy is missing, or h5py, which reads files that MATLAB saved as version 7.3.
        FileNotFoundError, NotADirectoryError: `folder`.
        ValueError: no such files; a file that cannot be read, has no drive-end channel of real numbers, or is too
            short for a window on both sides of the split (the message names the file); a number out of range.
    """
    check_counts(1, length=length, stride=stride)
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must lie between 0 and 1, got {train_fraction}")
    folder = existing_folder(folder, "CWRU .mat files")
    chosen, notes = _select(folder, tuple(loads), normal)
    class_names = CLASS_NAMES + ((NORMAL,) if NORMAL in chosen.values() else ())
    parts: dict[str, list[torch.Tensor]] = {"train_x": [], "train_y": [], "test_x": [], "test_y": []}
    decimated = []
    for path, name in chosen.items():
        signal = _read(path)
        split = int(len(signal) * train_fraction)
        sides = [signal[:split], signal[split:]]
        if len(signal) > _LONGEST:
            decimated.append(path.name)
            sides = _at_12_khz(sides)
        if min(map(len, sides)) < length:
            raise ValueError(
                f"{path} is too short: its {len(sides[0])} samples for training and {len(sides[1])} for testing leave "
                f"no window of {length} on both sides"
            )
        for part, windows in (
            ("train", sides[0].unfold(0, length, stride)),
            ("test", sides[1].unfold(0, length, length)),
        ):
            if (windows.amax(1) - windows.amin(1) <= 1e-6 * signal.abs().max()).any():  # the filter rounds
                raise ValueError(f"{path} holds {length} equal samples in a row: a dead channel has nothing to learn")
            parts[f"{part}_x"].append(windows)
            parts[f"{part}_y"].append(torch.full((len(windows),), class_names.index(name)))
    if decimated:
        notes.append(f"Decimated from 48 to 12 kHz: {', '.join(decimated)}.")
    if NORMAL in class_names and len(decimated) < len(chosen):
        notes.append(
            "The class normal may be told by its recording chain (another sampling rate, filter and day) rather than "
            "by its condition: do not read its accuracy as fault detection."
        )
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    for name in ("train_x", "test_x"):
        joined[name] = standardise(joined[name]).unsqueeze(1)
    return Dataset(
        **joined,
        class_names=class_names,
        sampling_rate=SAMPLING_RATE,
        description=f"CWRU drive end, {len(chosen)} recordings at {SAMPLING_RATE / 1000:g} kHz: training windows of "
        f"{length} samples from the first {train_fraction:.0%} of each (stride {stride}), test windows "
        "from the rest.",
        notes=logged(notes),
        windows=Windows(length, stride),
    )
