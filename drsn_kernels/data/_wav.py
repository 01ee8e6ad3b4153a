""".wav files, read by scipy; truncated ones are refused, of which scipy would take what there is."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import require

if TYPE_CHECKING:
    import numpy as np

_UNKNOWN = 2**32 - 1  # bytes of samples, in the header of a file that was written to a pipe


class _WholeFile(io.BytesIO):
    """Content to read from, which must be there."""

    def read(self, size: int = -1) -> bytes:
        found = super().read(size)
        # A chunk's name has 4 bytes, and where one is looked for the file may end. A pipe's length is unknown.
        if len(found) < size and size not in (4, _UNKNOWN):
            raise EOFError
        return found


def read_wav(path: Path) -> "tuple[np.ndarray, int]":
    """The samples of one file, (samples, channels) of the file's own dtype, and its sampling rate in Hz.

    Raises:
        ImportError: scipy is missing.
        ValueError: the file is truncated, compressed or empty (the message names it).
    """
    read, content = require("scipy.io.wavfile", "train").read, path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, about chunks that are no sound
            rate, samples = read(_WholeFile(content))
    except Exception as error:  # besides ValueError, whose text is one for users, half a dozen of damaged headers
        reason = str(error).rstrip(".") if isinstance(error, ValueError) else "it is empty, truncated or damaged"
        raise ValueError(f"{path} cannot be read as a .wav file of PCM or float samples: {reason}") from error
    if not samples.size:
        raise ValueError(f"{path} holds no samples")
    return samples.reshape(len(samples), -1), rate
