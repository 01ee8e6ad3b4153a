"""Reader for the bearing recordings of Case Western Reserve University (12 kHz, drive end), in their original format.

The files carry the names of the data set's index: fault, width in thousandths of an inch, for the outer race its
position against the load zone, and the motor load in horsepower: IR007_0.mat, OR014@6_2.mat, B021_1.mat.
Source of the data: https://engineering.case.edu/bearingdatacenter
"""

import logging
import re
from pathlib import Path

import torch

from .._extras import require
from ._windows import Windows, standardise

SAMPLING_RATE = 12_000.0
CLASS_NAMES = tuple(f"{fault}{width}" for fault in ("IR", "B", "OR") for width in ("007", "014", "021"))
_NAME = re.compile(r"(?P<fault>IR|OR|B)(?P<width>\d{3})(?:@\d+)?_(?P<load>\d)$", re.IGNORECASE)
_log = logging.getLogger("drsn_kernels")


def _read(path: Path) -> torch.Tensor:
    """The drive-end acceleration of one file, float32 (samples,)."""
    loadmat = require("scipy.io", "demo").loadmat
    try:
        contents = loadmat(path)
    except Exception as error:  # scipy raises half a dozen types here, zlib.error and struct.error among them
        raise ValueError(f"{path} cannot be read as a MATLAB file, so it may be truncated: {error}") from error
    channels = sorted(name for name in contents if name.endswith("_DE_time"))
    if len(channels) != 1:
        found = ", ".join(sorted(name for name in contents if not name.startswith("__"))) or "nothing"
        raise ValueError(f"{path} must hold one drive-end channel, *_DE_time, but holds {found}")
    signal = torch.as_tensor(contents[channels[0]].astype("float32")).flatten()
    if not signal.isfinite().all():
        raise ValueError(f"{path} holds NaN or Inf in its drive-end channel {channels[0]}")
    return signal


def _select(folder: Path, loads: tuple[int, ...]) -> tuple[dict[Path, int], list[str]]:
    """The files to read with their class indices, and notes on what is left out."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".mat" and path.is_file())
    chosen: dict[Path, int] = {}
    normal, other, seen = [], [], {}
    for path in files:
        match = _NAME.match(path.stem)
        name = f"{match['fault']}{match['width']}".upper() if match else ""
        if path.stem.lower().startswith("normal"):
            normal.append(path.name)
        elif name not in CLASS_NAMES or int(match["load"]) not in loads:
            other.append(path.name)
        elif path.stem.upper() in seen:
            raise ValueError(
                f"folder must hold one recording of each name, such as the 12 kHz drive-end set alone, "
                f"but holds {seen[path.stem.upper()]} and {path}"
            )
        else:
            seen[path.stem.upper()] = path
            chosen[path] = CLASS_NAMES.index(name)
    if not chosen:
        raise ValueError(
            f"folder must hold CWRU recordings named like IR007_0.mat, OR014@6_2.mat or B021_1.mat, "
            f"but {folder} has none among its {len(files)} .mat files"
        )
    notes = []
    if normal:
        notes.append(
            f"Skipped {', '.join(normal)}: the normal baseline is published at 48 kHz, the faults here are "
            "12 kHz, and the two would be told apart by their bandwidth alone."
        )
    if other:
        notes.append(
            f"Skipped {', '.join(other)}: not one of {', '.join(CLASS_NAMES)} at load {', '.join(map(str, loads))}."
        )
    missing = [name for index, name in enumerate(CLASS_NAMES) if index not in chosen.values()]
    if missing:
        notes.append(f"No recordings of {', '.join(missing)}: these classes have no windows.")
    return chosen, notes


def load_cwru(
    folder: str | Path,
    *,
    length: int = 2048,
    stride: int = 1024,
    train_fraction: float = 0.7,
    loads: tuple[int, ...] = (0, 1, 2),
) -> Windows:
    """Windows of the nine CWRU drive-end faults at 12 kHz, every recording split in time.

    The first part of each recording gives training windows, which may overlap; the rest gives test windows without
    overlap. No window crosses the split, so training and test share no sample. (Windows drawn at random from the
    whole recording would overlap across the split, and such a test measures memory.)

    Args:
        folder: searched with its sub-folders for files named like IR007_0.mat, OR014@6_2.mat, B021_1.mat; the
            outer race's position (@3, @6, @12) is not part of the class.
        length: samples a window.
        stride: samples from one training window to the next; below `length` they overlap.
        train_fraction: part of each recording that is for training, between 0 and 1.
        loads: motor loads in horsepower to use.

    Returns:
        Windows with classes IR007 ... OR021. The normal baseline is skipped, with a note that says why; notes are
        logged as well.

    Raises:
        ImportError: scipy is missing.
        FileNotFoundError, NotADirectoryError: `folder`.
        ValueError: no such files; a file that cannot be read, has no drive-end channel, or is too short for a
            window on both sides of the split (the message names the file); a number out of range.
    """
    for name, value in (("length", length), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must lie between 0 and 1, got {train_fraction}")
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"folder does not exist: {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"folder must be a directory with CWRU .mat files, got the file {folder}")

    chosen, notes = _select(folder, tuple(loads))
    parts: dict[str, list[torch.Tensor]] = {"train_x": [], "train_y": [], "test_x": [], "test_y": []}
    for path, label in chosen.items():
        signal = _read(path)
        split = int(len(signal) * train_fraction)
        if min(split, len(signal) - split) < length:
            raise ValueError(
                f"{path} is too short: {len(signal)} samples split at {split} leave no window of {length} on both sides"
            )
        for part, windows in (
            ("train", signal[:split].unfold(0, length, stride)),
            ("test", signal[split:].unfold(0, length, length)),
        ):
            if (windows == windows[:, :1]).all(1).any():
                raise ValueError(f"{path} holds {length} equal samples in a row: a dead channel has nothing to learn")
            parts[f"{part}_x"].append(windows)
            parts[f"{part}_y"].append(torch.full((len(windows),), label))
    for note in notes:
        _log.warning(note)
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    for name in ("train_x", "test_x"):
        joined[name] = standardise(joined[name]).unsqueeze(1)
    return Windows(
        **joined,
        class_names=CLASS_NAMES,
        sampling_rate=SAMPLING_RATE,
        description=f"CWRU drive end, {len(chosen)} recordings at {SAMPLING_RATE / 1000:g} kHz: training windows of "
        f"{length} samples from the first {train_fraction:.0%} of each (stride {stride}), test windows "
        "from the rest.",
        notes=tuple(notes),
    )
