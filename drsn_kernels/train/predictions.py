"""`python -m drsn_kernels predict`: classes, probabilities and thresholds of recordings that a run has never seen."""

import argparse
import csv
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data._dataset import check_counts, files_below
from ..data._recordings import SUFFIXES, check_rate, cut, read_recording, resampled
from ..data._tables import read_table
from ..data.own import constant, moved
from ..data.speech import fit_length
from ..modules import Shrinkage, record_tau
from . import files
from .ranks import join, leave
from .recipe import device_of, evaluating, samples
from .saved import RunInfo, load

if TYPE_CHECKING:
    from .recipe import Array

COLUMNS = ("file", "start", "class", "probability")
BATCH = 256  # windows
_log = logging.getLogger("drsn_kernels")


@torch.no_grad()
def probabilities(
    model: nn.Module, x: "Array", *, thresholds: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Class probabilities (N, classes) of windows x (N, *shape), float32 on the CPU, in eval mode.

    Args:
        x: as in :func:`.predict`, a tensor or a NumPy array.
        thresholds: also return the threshold of every shrinkage, its mean over the channels: module name -> (N,); else
            the dict is empty.
    """
    x, device = samples(model, x), device_of(model)
    found: list[torch.Tensor] = []
    recorded: dict[str, list[torch.Tensor]] = {}
    with evaluating(model):
        for batch in x.split(BATCH):
            batch = batch.to(device)
            if thresholds:
                with record_tau(model) as taus:
                    logits = model(batch)
                for name, tau in taus.items():
                    recorded.setdefault(name, []).append(tau.float().mean(1).cpu())
            else:
                logits = model(batch)
            found.append(logits.float().softmax(1).cpu())
    return torch.cat(found), {name: torch.cat(parts) for name, parts in recorded.items()}


def _files(given: Sequence[Path]) -> list[Path]:
    """The files, and those in folders."""
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for suffix in SUFFIXES for file in files_below(path, suffix))
        if not inside:
            raise ValueError(f"{path} must hold recordings ({', '.join(SUFFIXES)}), but has none")
        found += inside
    return found


def _table_windows(path: Path, info: RunInfo) -> tuple[torch.Tensor, list[float]]:
    x, _, rate = read_table(path, info.windows.length, labelled=False)
    if x.shape[1:] != info.shape:
        raise ValueError(
            f"{path} must hold windows of {' x '.join(map(str, info.shape))} (channels x samples), as the run was "
            f"trained on, but holds {x.shape[1]} x {x.shape[2]}"
        )
    if None not in (rate, info.sampling_rate) and rate != info.sampling_rate:
        raise ValueError(f"{path} holds windows at {rate:g} Hz, but the run was trained at {info.sampling_rate:g} Hz")
    return x, [float(i) for i in range(len(x))]


def file_windows(
    path: str | Path, info: RunInfo, *, rate: float | None = None, channels: Sequence[int | str] | None = None,
    stride: int | None = None,
) -> tuple[torch.Tensor, list[float]]:  # fmt: skip
    """The windows (N, C, length) of a file as a run's model takes them, and where each starts.

    Starts are in seconds; in samples where the run has no sampling rate, and row numbers of a table.

    Args:
        rate: Hz, where the file does not say its own; by default the run's. Another rate than the run's is resampled,
            and a note is logged.
        channels: instead of the run's.
        stride: samples from one window to the next; by default the length.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, is too short, or has other channels, and the message names it; or the run
            is one on images.

    Example::

        model, info = load("run")
        x, starts = file_windows("new.wav", info)
        found, _ = probabilities(model, x)
    """
    path, windows, wanted = Path(path), info.windows, info.sampling_rate
    if windows is None:
        raise ValueError(f"{path} cannot be cut into windows: the run was trained on images")
    if windows.table:
        return _table_windows(path, info)
    channels = windows.channels if channels is None else channels
    recording = read_recording(path, channels, centre=windows.mean is None)
    signal = recording.signal.mean(0, keepdim=True) if windows.clip and channels is None else recording.signal
    if len(signal) != info.shape[0]:
        raise ValueError(
            f"{path} has {len(signal)} channels, but the run was trained on {info.shape[0]}: choose with --channels"
        )
    if not windows.clip and moved(recording.names, windows.names):
        raise ValueError(
            f"{path} must have its channels in the order in which the run was trained, {', '.join(windows.names)}, but "
            f"has {', '.join(recording.names)}: choose by name with --channels"
        )
    if wanted is None and recording.rate is not None:
        raise ValueError(
            f"{path} is at {recording.rate:g} Hz, but the run does not know at which rate it was trained: "
            "train with --rate"
        )
    found = recording.rate or rate
    check_rate(path, found, wanted)
    if found is not None and wanted is not None and found != wanted:
        _log.warning("%s is resampled from %g to %g Hz.", path, found, wanted)
        signal = resampled(signal, found, wanted)
    if windows.clip:
        return fit_length(signal[0], windows.length)[None, None], [0.0]
    if signal.shape[1] < windows.length:
        at = "" if wanted is None else f" at {wanted:g} Hz"
        raise ValueError(f"{path} is too short: it has {signal.shape[1]} samples{at}, a window {windows.length}")
    stride = windows.length if stride is None else stride
    x = cut(signal, windows.length, stride)
    if windows.mean is None and (dead := constant(x, signal)).any():
        _log.warning("%s has %d windows without any change: no class can be told by them.", path, int(dead.sum()))
    return x, [i * stride / (wanted or 1) for i in range(len(x))]


def _rows(
    path: Path, starts: list[float], found: torch.Tensor, taus: dict[str, torch.Tensor], info: RunInfo
) -> Iterator[list]:
    """Lines of the table: of every window, then of the file as a whole, the means."""
    places = [*(f"{start:.10g}" for start in starts), ""]
    best = torch.cat([found, found.mean(0, keepdim=True)]).max(1)
    columns = [best.values, *(torch.cat([tau, tau.mean(0, keepdim=True)]) for tau in taus.values())]
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    for place, index, values in zip(places, best.indices.tolist(), numbers, strict=True):
        yield [path, place, info.class_names[index], *(f"{value:.6g}" for value in values)]


def command(options: argparse.Namespace) -> int:
    """Run the options of `predict`; the exit status.

    Raises:
        ImportError, OSError, ValueError: an option, a file or a package, said in one sentence; then nothing is written.
    """
    if options.stride is not None:
        check_counts(1, stride=options.stride)
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise ValueError(f"--rate must be a positive number of Hz, got {options.rate:g}")
    if options.out is not None:
        files.check_writable("--out", options.out)
    model, info = load(options.run)
    if info.windows is None:
        raise ValueError(
            f"predict takes runs on signals, but {options.run} is one on images: use drsn_kernels.train.load in Python"
        )
    if options.rate is not None and info.sampling_rate is None:
        raise ValueError(f"--rate has no effect: the run in {options.run} does not know at which rate it was trained")
    if info.windows.table and (options.rate, options.channels, options.stride) != (None, None, None):
        raise ValueError("--rate, --channels and --stride belong to recordings, but the run was trained on a table")
    if options.thresholds and not any(isinstance(module, Shrinkage) for module in model.modules()):
        raise ValueError(f"--thresholds needs thresholds, those of drsn-cw or drsn-cs, but the run is of {info.model}")
    if info.trained < info.epochs:
        _log.warning("The run in %s has trained %d of its %d epochs.", options.run, info.trained, info.epochs)
    try:
        model.to(join(options.device).device)
    finally:
        leave()
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    for number, path in enumerate(_files(options.files)):
        x, starts = file_windows(path, info, rate=options.rate, channels=options.channels, stride=options.stride)
        found, taus = probabilities(model, x, thresholds=options.thresholds)
        if number == 0:
            table.writerow([*COLUMNS, *(name.removeprefix("network.") for name in taus)])
        *_, whole = rows = list(_rows(path, starts, found, taus, info))
        table.writerows(rows)
        if options.out is not None:
            windows = "1 window" if len(starts) == 1 else f"{len(starts)} windows"
            print(f"{path}: {whole[2]}, probability {float(whole[3]):.3f}, {windows}")
    if options.out is None:
        sys.stdout.write(text.getvalue())
    else:
        files.replace(options.out, lambda file: file.write(text.getvalue().encode()))
        print(f"Written to {options.out}")
    return 0
