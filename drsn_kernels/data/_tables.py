"""Tables of windows: an .npz file with x and y, or text with a window and its label in each row."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._extras import require
from ._dataset import listed
from ._recordings import check_numbers, found_rate, load_numpy
from ._text import LABEL, is_time, layout, read_columns

if TYPE_CHECKING:
    import numpy as np


def read_table(
    path: Path, length: int | None = None, *, labelled: bool = True
) -> "tuple[torch.Tensor, list[str], float | None]":
    """Windows (N, C, length), their labels as texts, and the sampling rate where the file says one.

    Args:
        path: .npz with x and y, .npy, or .csv or .txt.
        length: samples a window, where that is known: then a .csv file may have a column of labels or not.
        labelled: whether labels are needed; else they are not read.

    Raises:
        ValueError: no such table; the message names the file.
    """
    np = require("numpy", "train")
    suffix, rate = path.suffix.lower(), None
    if suffix in (".csv", ".txt"):
        values, labels = _read_rows(path, length, labelled)
    elif suffix == ".npz":
        arrays = load_numpy(path)
        missing = [name for name in ("x", "y")[: 1 + labelled] if name not in arrays]
        if missing:
            raise ValueError(
                f"{path} must hold x (N, length) or (N, channels, length) and y (N,), but holds "
                f"{listed(sorted(arrays)) or 'nothing'}"
            )
        values, rate = arrays["x"], found_rate(path, arrays)
        labels = _labels(path, arrays["y"]) if labelled else []
    elif suffix == ".npy" and not labelled:
        values, labels = load_numpy(path), []
    else:
        raise ValueError(f"{path} must be a table with labels, .npz or .csv, or --data a folder of recordings")
    check_numbers(path, values, "x")
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"{path} must hold x of shape (N, length) or (N, channels, length), got {values.shape}")
    if labelled and len(labels) != len(values):
        raise ValueError(f"{path} must hold a label for each window, but has {len(labels)} for {len(values)}")
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise ValueError(f"{path} holds NaN or Inf: the first in row {int(np.nonzero(~finite)[0][0])}")
    x = torch.from_numpy(np.array(values, np.float32, order="C"))
    return (x.unsqueeze(1) if x.dim() == 2 else x), labels, rate


def _labels(path: Path, values: "np.ndarray") -> list[str]:
    if values.dtype.kind not in "iufU" or values.ndim != 1:
        raise ValueError(
            f"{path} must hold numbers or texts as labels y (N,), but holds {values.dtype} of shape {values.shape}"
        )
    if values.dtype.kind == "f":
        whole = values.astype("int64")
        if not (values == whole).all():
            raise ValueError(
                f"{path} must hold whole numbers or texts as labels y, but holds {values[values != whole][0]}"
            )
        values = whole
    return [str(value) for value in values.tolist()]


def _read_rows(path: Path, length: int | None, labelled: bool) -> "tuple[np.ndarray, list[str]]":
    """The numbers (N, length) of a text table, and the labels of its rows."""
    found = layout(path, labelled=True)
    names = [name.lower() for name in found.names] if len(found.names) == found.columns else [""] * found.columns
    columns = [i for i, name in enumerate(names) if not (found.names and is_time(name))]
    place = names.index(LABEL) if LABEL in names else columns[-1]
    if not labelled and LABEL not in names and len(columns) == length:
        return read_columns(path, found, columns), []
    columns.remove(place)
    if not columns:
        raise ValueError(f"{path} must have a window in each row and then its label, but has one column")
    if not labelled:
        return read_columns(path, found, columns), []
    codes: dict[str, int] = {}

    def code(text: str) -> float:
        text = text.strip()
        if not text:
            raise ValueError("a label is missing")
        return codes.setdefault(text, len(codes))

    values = read_columns(path, found, [*columns, place], label=(place, code))
    texts = list(codes)
    return values[:, :-1], [texts[int(i)] for i in values[:, -1]]
