"""The figures of experiments/pictures.py. Drawn without pyplot, so no display is needed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from drsn_kernels._extras import require

if TYPE_CHECKING:  # for the annotations alone
    from .pictures import Shrunk

COLOURS = {"soft threshold": "tab:red", "ReLU": "tab:blue", "sigmoid": "tab:gray"}
BINS = 10
SIGNALS = 4  # units whose signals are shown, evenly through the network


def _figure(width: float, height: float):
    return require("matplotlib.figure", "train").Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> None:
    """As a PNG of 256 colours, half the size: the pictures lie in the repository."""
    image = require("PIL.Image", "train")  # comes with matplotlib
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    image.open(buffer).convert("RGB").quantize(256, method=1).save(path, optimize=True)


def label(name: str) -> str:
    """stages.0.1.shrinkage -> stage 1, unit 2."""
    stage, unit = name.split(".")[1:3]
    return f"stage {int(stage) + 1}, unit {int(unit) + 1}"


def signed(rho: float | None) -> str:
    return "undefined" if rho is None else f"{rho:+.2f}"


def thresholds(path: Path, rms: torch.Tensor, taus: dict[str, torch.Tensor], numbers: dict[str, dict]) -> None:
    """A panel for each unit, a line for each channel: mean tau (N, C) in ten classes of noise level (N,)."""
    columns = 4
    figure = _figure(11, 2.6 * -(-len(taus) // columns))
    panels = figure.subplots(-(-len(taus) // columns), columns, sharex=True, sharey=True, squeeze=False)
    colours = require("matplotlib", "train").colormaps["coolwarm"]
    parts = rms.argsort().tensor_split(BINS)  # as many windows in each
    level = [float(rms[part].mean()) for part in parts]
    for axes, (name, tau) in zip(panels.flat, taus.items(), strict=False):
        lines = torch.stack([tau[part].mean(0) for part in parts]) / tau.mean(0)
        for channel, rho in enumerate(numbers[name]["channels"]):
            if rho is not None:
                axes.plot(level, lines[:, channel].tolist(), color=colours((rho + 1) / 2), linewidth=1.2)
        title = f"{label(name)}\ntau {signed(numbers[name]['tau'])}, alpha {signed(numbers[name]['alpha'])}"
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel("RMS of the noise / RMS of the signal")
    figure.supylabel("tau / its mean")
    bar = require("matplotlib.cm", "train").ScalarMappable(cmap=colours)
    bar.set_clim(-1, 1)
    figure.colorbar(bar, ax=panels, label="Spearman of the channel's tau and the noise", shrink=0.7)
    _save(figure, path)


def signal(path: Path, windows: torch.Tensor, shown: dict[str, Shrunk], numbers: dict, snr_db: float) -> None:
    """A row for each of some units, one channel of it, clean and noisy: the unit on the left, its shrinkage beside it.

    Args:
        windows: (2, L), clean and noisy.
        shown: unit -> x, y and identity (2, length), tau (2,).
    """
    shown = dict(list(shown.items())[:: -(-len(shown) // SIGNALS)])
    figure = _figure(10, 1.2 * (len(shown) + 1))
    panels = figure.subplots(len(shown) + 1, 4, sharex=True, squeeze=False)
    for clean, noisy in [pair for row in panels for pair in (row[:2], row[2:])]:
        noisy.sharey(clean)
        noisy.tick_params(labelleft=False)
    length = windows.shape[1]
    for column, title in enumerate(("clean", f"noise at {snr_db:g} dB")):
        panels[0, column].plot(windows[column].tolist(), color="black", linewidth=0.7)
        panels[0, column].set_title(f"the window, {title}", fontsize=8)
        for row, (name, unit) in zip(panels[1:], shown.items(), strict=True):
            time = (torch.arange(unit.x.shape[1]) * (length / unit.x.shape[1])).tolist()
            x, y, identity = (part[column].tolist() for part in (unit.x, unit.y, unit.identity))
            output = (unit.y + unit.identity)[column].tolist()
            tau = float(unit.tau[column])
            whole, shrinkage = row[column], row[column + 2]
            whole.plot(time, identity, color="0.6", linewidth=0.9, label="the unit's input, behind the shortcut")
            whole.plot(time, output, color="tab:blue", linewidth=0.9, label="the unit's output")
            shrinkage.plot(time, x, color="tab:olive", linewidth=0.9, label="the shrinkage's input")
            shrinkage.axhspan(-tau, tau, color="tab:orange", alpha=0.25, linewidth=0, label="within plus and minus tau")
            shrinkage.plot(time, y, color="tab:red", linewidth=0.9, label="the shrinkage's output")
            whole.set_title(f"{label(name)}, channel {numbers[name]['channel'] + 1}", fontsize=8, pad=2)
            share = numbers[name]["zeroed_noisy" if column else "zeroed_clean"]
            shrinkage.set_title(f"its shrinkage, {share:.0%} of all zero", fontsize=8, pad=2)
    for axes, of in zip(panels[0, 2:], panels[1, (0, 2)], strict=True):
        axes.axis("off")
        axes.legend(*of.get_legend_handles_labels(), loc="center", fontsize=8)
    for axes in panels.flat:
        axes.tick_params(labelsize=7)
    figure.supxlabel("sample", fontsize=9)
    _save(figure, path)


def zeroed(path: Path, images: torch.Tensor, small: torch.Tensor, maps: dict, numbers: dict[str, dict]) -> None:
    """A row for each image (n, H, W), a column for each unit's map (n, H, W); the mask `small` is outlined."""
    figure = _figure(2.6 * (len(maps) + 1) + 0.6, 2.4 * len(images) + 0.6)
    panels = figure.subplots(len(images), len(maps) + 1, squeeze=False)
    for row, image in zip(panels, images, strict=True):
        row[0].imshow(image.numpy(), cmap="gray")
    for column, (name, of_unit) in enumerate(maps.items(), 1):
        for axes, share in zip(panels[:, column], of_unit, strict=True):
            drawn = axes.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=1)
        means = numbers[name]
        panels[0, column].set_title(
            f"{label(name)}\ndigit {means['digit']:.0%}, pasted {means['pasted']:.0%}, rest {means['background']:.0%}",
            fontsize=8,
        )
    panels[0, 0].set_title("image, pasted digit outlined", fontsize=8)
    for row, mask in zip(panels, small, strict=True):
        for axes in row:
            axes.contour(mask.float().numpy(), levels=[0.5], colors="red", linewidths=1)
            axes.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=panels[:, 1:], label="share of channels set to zero", shrink=0.7)
    _save(figure, path)


def curves(path: Path, values: dict[str, torch.Tensor]) -> None:
    """Soft threshold and ReLU on the left, their derivatives on the right."""
    figure = _figure(8, 3.4)
    function, derivative = figure.subplots(1, 2)
    x = values["x"].tolist()
    for name, style in (("soft threshold", "-"), ("ReLU", "--")):
        function.plot(x, values[name].tolist(), style, color=COLOURS[name], label=name)
        derivative.plot(x, values[f"{name}, derivative"].tolist(), style, color=COLOURS[name], label=name)
    function.set(title="y, tau = 1", xlabel="x")
    derivative.set(title="dy / dx", xlabel="x")
    function.legend()
    for axes in (function, derivative):
        axes.grid(alpha=0.3)
    _save(figure, path)


def gradients(path: Path, found: dict[str, dict[str, torch.Tensor]], numbers: dict[str, dict]) -> None:
    """Gradient norm against layer, norms (seeds, depth): geometric mean, and from the least to the greatest seed."""
    figure = _figure(10, 3.8)
    titles = {"He": "weights of variance 2 / fan-in", "own": "weights of variance 1 / (fan-in * share kept)"}
    for axes, (kind, by_name) in zip(figure.subplots(1, 2), found.items(), strict=True):
        for name, norms in by_name.items():
            layer = list(range(1, norms.shape[1] + 1))
            kept = f", {numbers[name]['kept']:.0%} kept" if name != "sigmoid" else ""
            axes.plot(layer, norms.log().mean(0).exp().tolist(), color=COLOURS[name], label=f"{name}{kept}")
            axes.fill_between(
                layer, norms.amin(0).tolist(), norms.amax(0).tolist(), color=COLOURS[name], alpha=0.25, linewidth=0
            )
        axes.set(title=titles[kind], xlabel="layer", yscale="log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.1), max(high, 10))  # what stays near 1 should look like it
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.supylabel("gradient norm / that at the last layer", fontsize=10)
    _save(figure, path)
