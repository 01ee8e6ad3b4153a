"""The demo's figures. They are drawn without pyplot, so no display is needed and no global state is touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .._extras import require
from ..train.files import replace

COLOURS = {"DRSN-CW": "tab:red", "ResNet": "tab:blue"}  # as in the plots of experiments/


def _axes(title: str, xlabel: str, ylabel: str):
    figure = require("matplotlib.figure", "demo").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def accuracy(path: Path, snr_db: Sequence[float], curves: Mapping[str, Sequence[float]], chance: float) -> Path:
    """Test accuracy (fractions) of each model against SNR in dB, as a PNG; returns the path."""
    figure, axes = _axes("Test accuracy under noise", "SNR (dB)", "accuracy (%)")
    for (label, values), marker in zip(curves.items(), "osd^", strict=False):
        axes.plot(snr_db, [100 * value for value in values], marker=marker, label=label, color=COLOURS.get(label))
    lowest = 100 * min(min(values) for values in curves.values())
    axes.set_ylim(max(0, lowest - 10) if lowest > 60 else 0, 101)  # saturated curves would lie on one another
    axes.axhline(100 * chance, color="0.5", linestyle=":", label=f"chance, {100 * chance:.0f} %")
    axes.legend()
    return replace(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def thresholds(path: Path, noise_rms: torch.Tensor, tau: torch.Tensor, rho: float | None) -> Path:
    """Relative threshold (N,) against noise RMS (N,) of each window, as a PNG; returns the path."""
    title = "Thresholds against noise, " + ("rank correlation undefined" if rho is None else f"Spearman {rho:+.2f}")
    figure, axes = _axes(title, "RMS of the noise / RMS of the signal", "tau / mean tau, averaged over units")
    axes.scatter(noise_rms.numpy(), tau.numpy(), s=6, alpha=0.4)
    return replace(path, lambda file: figure.savefig(file, dpi=150, format="png"))
