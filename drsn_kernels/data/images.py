"""Images: readers for the idx files of MNIST and Fashion-MNIST, and scikit-learn's small digits.

The idx format (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/): two zero bytes, a type byte (8: unsigned
bytes), the number of dimensions, the dimensions as big-endian 32-bit integers, then the values, the last index fastest.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch

from .._extras import require
from ._dataset import Dataset, absent, existing_folder, listed, logged

_UNSIGNED_BYTES = 8


def _find(folder: Path, part: str, kind: str) -> Path:
    """The one file such as train-images-idx3-ubyte, packed or not, with "-" or "." before idx."""
    names = [f"{part}-{kind.replace('-idx', mark + 'idx')}{end}" for end in ("", ".gz") for mark in ("-", ".")]
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    for name in names:  # an unpacked file before its archive
        if name in found:
            return found[name]
    raise ValueError(f"folder must hold {names[0]} or {names[0]}.gz, but {folder} has neither")


def _read(path: Path, rank: int) -> torch.Tensor:
    """The uint8 tensor of one idx file, which must have so many dimensions."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked, so it may be truncated: {error}") from error
    head = 4 + 4 * rank
    if len(content) < head or content[:4] != bytes((0, 0, _UNSIGNED_BYTES, rank)):
        raise ValueError(
            f"{path} must be an idx file of bytes in {rank} dimensions, which begins with 0 0 8 {rank}, "
            f"but it begins with {' '.join(map(str, content[:4])) or 'nothing'} and has {len(content)} bytes"
        )
    shape = struct.unpack(f">{rank}I", content[4:head])
    if len(content) - head != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} values for its shape {tuple(shape)}, but holds "
            f"{len(content) - head}: it is truncated or damaged"
        )
    if not math.prod(shape):
        raise ValueError(f"{path} holds no values: its shape is {tuple(shape)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[head:].reshape(shape)


def _part(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images in [0, 1], labels, and the name of the labels' file, of "train" or "t10k"."""
    images_path, labels_path = _find(folder, part, "images-idx3-ubyte"), _find(folder, part, "labels-idx1-ubyte")
    images, labels = _read(images_path, 3), _read(labels_path, 1)
    if len(images) != len(labels):
        raise ValueError(f"{labels_path} must hold a label for each image, but has {len(labels)} for {len(images)}")
    return images.unsqueeze(1).float() / 255, labels.long(), labels_path.name


def _span(labels: torch.Tensor) -> str:
    """Labels in a row, such as "0 to 9"."""
    first, last = int(labels[0]), int(labels[-1])
    return str(first) if first == last else f"{first} to {last}"


def _strays(labels: dict[str, torch.Tensor]) -> list[str]:
    """A note on labels that unused numbers part from the most samples' labels, with their count in each file."""
    counts = torch.stack([torch.bincount(y, minlength=256) for y in labels.values()])
    used = counts.sum(0).nonzero().flatten()
    rows = used.tensor_split((used.diff() > 1).nonzero().flatten() + 1)
    most = max(rows, key=lambda row: int(counts[:, row].sum()))
    strays = []
    for row in rows:
        if row is not most:
            found = zip(counts[:, row].sum(1).tolist(), labels, strict=True)
            strays.append(f"{_span(row)} ({', '.join(f'{count} in {file}' for count, file in found)})")
    if not strays:
        return []
    classes = f"every label that occurs is a class, {len(used)} in all"
    return [f"Labels apart from {_span(most)}: {listed(strays)}; {classes}."]


def load_idx(folder: str | Path) -> Dataset:
    """MNIST, Fashion-MNIST, KMNIST or another set in their four files, gzipped or not, with its official split.

    Args:
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each with or without .gz (the unpacked one is read where both exist).

    Returns:
        Dataset with x (N, 1, height, width) in [0, 1]. The classes are the labels that occur, in order, and are named
        by their numbers: a stray label of 255 makes one class more. Labels that are apart from the most, and classes
        that are not in both parts, are said in notes, which are logged as well.

    Raises:
        FileNotFoundError, NotADirectoryError: `folder`.
        ValueError: a file is missing, truncated or no such idx file, or files do not belong together (the message
            names the file).
    """
    folder = existing_folder(folder, "idx files")
    (train_x, train_y, train_name), (test_x, test_y, test_name) = _part(folder, "train"), _part(folder, "t10k")
    if train_x.shape[1:] != test_x.shape[1:]:
        sizes = [" x ".join(map(str, x.shape[2:])) for x in (train_x, test_x)]
        raise ValueError(
            f"folder must hold images of one size, but {folder} has {sizes[0]} in train, {sizes[1]} in t10k"
        )
    strays = _strays({train_name: train_y, test_name: test_y})
    labels = torch.cat([train_y, test_y]).unique()
    train_y, test_y = torch.searchsorted(labels, train_y), torch.searchsorted(labels, test_y)
    class_names = tuple(map(str, labels.tolist()))
    height, width = train_x.shape[2:]
    return Dataset(
        train_x,
        train_y,
        test_x,
        test_y,
        class_names=class_names,
        sampling_rate=None,
        description=f"Images of {height} x {width} from the idx files in {folder.name}: {len(train_x)} for training, "
        f"{len(test_x)} for testing, the official split.",
        notes=logged([*strays, *absent(class_names, train_y, test_y)]),
    )


def load_digits(test_fraction: float = 0.3) -> Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; nothing is downloaded.

    Digits of one writer stand together in the file, so the last ones are the test set: drawn at random, nearly every
    writer would be in both.

    Args:
        test_fraction: part of the digits that is for testing, between 0 and 1.

    Returns:
        Dataset with x (N, 1, 8, 8) in [0, 1].

    Raises:
        ImportError: scikit-learn is missing.  ValueError: test_fraction out of range.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    digits = require("sklearn.datasets", "train").load_digits()
    x = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # counts of 4 x 4 pixels
    y = torch.as_tensor(digits.target, dtype=torch.int64)
    split = round(len(x) * (1 - test_fraction))
    return Dataset(
        x[:split],
        y[:split],
        x[split:],
        y[split:],
        class_names=tuple(map(str, range(10))),
        sampling_rate=None,
        description=f"Handwritten digits of 8 x 8 pixels from scikit-learn: the first {split} for training, the last "
        f"{len(x) - split} for testing.",
    )
