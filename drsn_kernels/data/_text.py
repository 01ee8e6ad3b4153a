"""Columns of numbers in text: .csv and .txt, with commas, semicolons, tabs or blanks between them.

The numbers are parsed by numpy.loadtxt; here is what it has to be told of a file, and what is better refused than
misread: decimal commas.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import require

if TYPE_CHECKING:
    import numpy as np

LABEL = "label"
_HEAD = 200  # lines that are looked at
_MARKS = (";", "\t", ",")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+([eE][-+]?\d+)?$")
_SPLIT_NUMBER = re.compile(r"[-+]?0\d+$|-0$|[-+]?\d+\s+[-+]?\d+$")  # what commas between numbers leave of 0,05 or -0,5
_TIME = re.compile(
    r"$|(unnamed: 0|index|t|time|timestamp|date|datetime)([_ ]?(s|sec|seconds|[mun]s)|\s*[\[(/].*)?$", re.I
)


@dataclass(frozen=True)
class Layout:
    """Of a text file.

    Attributes:
        mark: between the columns; None for blanks.
        names: of the columns, as the first line gives them; else empty.
        skip: lines before the first numbers.
        columns: how many there are.
    """

    mark: str | None
    names: tuple[str, ...]
    skip: int
    columns: int


def is_time(name: str) -> bool:
    """Whether a column or variable of this name counts the samples, and is no signal."""
    return _TIME.match(name.strip()) is not None


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cells(line: str, mark: str | None) -> list[str]:
    cells = [cell.strip().strip('"').strip() for cell in line.split(mark)]
    return cells[:-1] if len(cells) > 1 and not cells[-1] else cells  # a mark that ends the line


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The first lines with their numbers from 0, without empty ones and comments."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(islice(file, _HEAD)):
            line = line.split("#")[0].rstrip()
            if line.strip() and not line.startswith("sep="):  # for a spreadsheet, in front of all lines
                yield number, line


def layout(path: Path, *, labelled: bool = False) -> Layout:
    """How the columns of a file are written; ValueError naming it if it is empty, no text or has decimal commas.

    labelled: the last column may hold texts, so that a text there makes no line of names.
    """
    lines = list(_lines(path))
    if not lines:
        raise ValueError(f"{path} holds no numbers")
    if any("\0" in line for _, line in lines):
        raise ValueError(f"{path} must be text in UTF-8 or ASCII, but holds zero bytes: UTF-16 or a binary file")
    mark = next((mark for mark in _MARKS if any(mark in line for _, line in lines[1:] or lines)), None)
    rows = [_cells(line, mark) for _, line in lines]
    commas = _DECIMAL_COMMA if mark != "," else _SPLIT_NUMBER
    numbers = rows if len(rows) == 1 else rows[1:]  # of whole numbers alone, commas may be decimal ones
    if (mark != "," or not any("." in cell for row in numbers for cell in row)) and any(
        commas.match(cell) for row in numbers for cell in row
    ):
        raise ValueError(
            f"{path} must have decimal points, but has decimal commas, as in {lines[-1][1].strip()[:40]!r}: "
            "export it with points"
        )
    first = rows[0][:-1] if labelled and rows[0][-1].lower() != LABEL else rows[0]
    named = not all(map(is_number, first))
    numbered = len(first) > 1 and first == [str(i) for i in range(len(first))]  # as pandas writes columns without names
    numbered = numbered and any("." in cell for row in rows[1:] for cell in row)
    if named and len(lines) == 1:
        raise ValueError(f"{path} holds no numbers, but the line {lines[0][1].strip()[:40]!r}")
    return Layout(mark, tuple(rows[0]) if named else (), lines[0][0] + (named or numbered), max(map(len, numbers)))


def read_columns(
    path: Path, found: Layout, columns: list[int], label: tuple[int, Callable[[str], float]] | None = None
) -> "np.ndarray":
    """The numbers of these columns, float64 (rows, columns).

    Args:
        label: a column, and what to make a number of its text with.

    Raises:
        ValueError: a cell that is no number, or rows of different lengths; the message names the file.
    """
    np = require("numpy", "train")
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            values = np.loadtxt(
                file, delimiter=found.mark, skiprows=found.skip, usecols=columns, ndmin=2, quotechar='"',
                converters=None if label is None else {label[0]: label[1]}, encoding=None,
            )  # fmt: skip
    except ValueError as error:
        reason = str(error).split(";")[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as columns of numbers: {reason}") from error
    if not values.size:
        raise ValueError(f"{path} holds no numbers")
    return values
