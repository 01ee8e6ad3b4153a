"""MATLAB files as dicts of arrays: the versions to 7 by scipy, version 7.3, which is HDF5, by h5py."""

from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import require

if TYPE_CHECKING:
    import h5py
    import numpy as np

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK = 512  # bytes that MATLAB puts before the signature; they begin with the version


def _is_hdf5(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(_USER_BLOCK + len(_SIGNATURE))
    return head.startswith((b"MATLAB 7.3", _SIGNATURE)) or head.endswith(_SIGNATURE)


def _value(item: "h5py.Dataset | h5py.Group") -> "np.ndarray":
    """What scipy makes of a variable. HDF5 has the dimensions in reverse, texts as numbers, structs as groups."""
    np = require("numpy", "train")
    if not hasattr(item, "shape"):
        return np.empty((1, 1), object)
    values, kind = np.asarray(item[()]), item.attrs.get("MATLAB_class")
    if item.attrs.get("MATLAB_empty", 0):  # then it holds its dimensions
        values = np.empty(values.tolist()[::-1], float)
    return values.T.astype(str) if kind in (b"char", "char") else values.T


def _read_hdf5(file: "h5py.File") -> dict[str, "np.ndarray"]:
    with file:
        return {name: _value(item) for name, item in file.items() if not name.startswith("#")}  # "#refs#": of cells


def read_matlab(path: Path) -> dict[str, "np.ndarray"]:
    """The variables of a file by name. Texts, cells and structs are arrays of other kinds than numbers.

    Raises:
        ImportError: scipy, or h5py for version 7.3, is missing.
        ValueError: the file cannot be read. Both messages name it.
    """
    hdf5 = _is_hdf5(path)
    try:
        library, asarray = require("h5py" if hdf5 else "scipy.io", "train"), require("numpy", "train").asarray
    except ImportError as error:
        kind = "is a MATLAB file of version 7.3" if hdf5 else "is a MATLAB file"
        raise ImportError(f"{path} {kind}: {error}") from error
    try:
        contents = _read_hdf5(library.File(path)) if hdf5 else library.loadmat(path)
    except Exception as error:  # scipy raises half a dozen types here, zlib.error and struct.error among them
        raise ValueError(f"{path} cannot be read as a MATLAB file, so it may be truncated: {error}") from error
    return {name: asarray(value) for name, value in contents.items() if not name.startswith("__")}
