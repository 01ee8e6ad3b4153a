"""What a run leaves in its folder. Every file is written aside and moved into place, so none is ever half written."""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._extras import require

COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "test_acc", "seconds", "samples_per_s")
READABLE = 30  # classes whose names and counts find room in a picture of a page
LONGEST_NAME = 24  # characters of a class's name in a picture


def replace(path: Path, write: Callable) -> Path:
    """Call write(file), a binary file beside `path`, and put it in the place of `path` when it is on the disk.

    Raises:
        OSError: where that fails, on a full disk say; `path` is as it was.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        kept = ", what was there is kept" if path.exists() else ""
        raise OSError(f"{path} cannot be written{kept}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)  # where it could not be written or moved
    return path


def check_writable(option: str, path: Path) -> None:
    """Before long work: OSError naming the option where a file of this name cannot be made."""
    if path.exists() and not path.is_file():  # a device would be moved out of its place
        raise ValueError(f"{option} must be a file, got the {'folder' if path.is_dir() else 'device'} {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path} lies in a folder that does not exist: {path.parent}")


def write_json(path: Path, content: dict) -> Path:
    return replace(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def write_log(path: Path, history: Sequence[dict]) -> Path:
    """log.csv: a row for each epoch."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({name: f"{row[name]:.6g}" for name in COLUMNS} for row in history)
    return replace(path, lambda file: file.write(text.getvalue().encode()))


def write_checkpoint(path: Path, state: dict) -> Path:
    content = io.BytesIO()  # torch.save hides the system's error for a file behind one of its own
    torch.save(state, content)
    return replace(path, lambda file: file.write(content.getbuffer()))


def read_checkpoint(path: Path) -> dict:
    """The state that :func:`write_checkpoint` wrote, on the CPU; ValueError naming the file if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        said = str(error).split("\n")[0].split(". ")[0]  # torch goes on to advise weights_only=False
        raise ValueError(f"{path} cannot be read as a checkpoint, so it may be damaged: {said}") from error


def _figure(**options):
    return require("matplotlib.figure", "train").Figure(layout="constrained", **options)


def draw_curves(path: Path, history: Sequence[dict]) -> Path:
    """Loss, and accuracy in training and test, by epoch, as a PNG; returns the path."""
    figure = _figure(figsize=(9, 3.5))
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], marker=".", label="training")
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    for name, label in (("train_acc", "training"), ("test_acc", "test")):
        accuracy.plot(epochs, [100 * row[name] for row in history], marker=".", label=label)
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="%")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return replace(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def draw_confusion(path: Path, confusion: torch.Tensor, class_names: Sequence[str]) -> Path:
    """Counts (true class, predicted class), coloured by the share of the true class, as a PNG; returns the path.

    The picture is 13 by 12 inches at most. Of more than READABLE classes it has the colours alone, and the names of
    every second class, every third, and so on.
    """
    classes = len(class_names)
    size = min(max(4.0, 0.5 * classes + 2), 12.0)
    figure = _figure(figsize=(size + 1, size))
    axes = figure.add_subplot()
    shares = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ticks = range(0, classes, math.ceil(classes / READABLE))
    names = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in class_names]
    for place, options in ((axes.set_xticks, {"rotation": 60, "ha": "right"}), (axes.set_yticks, {})):
        place(ticks, names[:: ticks.step], parse_math=False, **options)  # two dollar signs make no formula
    axes.set(title="Test set", xlabel="predicted", ylabel="true")
    for i, j in confusion.nonzero().tolist() if classes <= READABLE else ():
        colour = "w" if shares[i, j] > 0.5 else "k"
        text = axes.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=7, color=colour)
        text.set_in_layout(False)  # it lies inside the axes: nothing to make room for
    figure.colorbar(image, label="share of the true class")
    return replace(path, lambda file: figure.savefig(file, dpi=150, format="png", pil_kwargs={"compress_level": 1}))
