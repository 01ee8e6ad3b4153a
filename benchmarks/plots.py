"""Plots of rows. Drawn without pyplot, so no display is needed and no global state is touched.

A dot is a case, a stroke the geometric mean of its group, and a colour one provider, in every plot. Ratios lie on a log
axis, where 2 and 1/2 are equally far from 1.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from drsn_kernels._extras import require
from drsn_kernels.demo.timing import ratio

from .cases import NETWORKS
from .report import Table

COLOURS = {"port": "0.55", "best": "#56b4e9", "best-compiled": "#0072b2", "ours": "#d55e00"}
NAMES = {"port": "popular port", "best": "best eager form", "best-compiled": "torch.compile", "ours": "drsn_kernels"}
GROUPS = {"A": "core 1-D", "B": "reduced stem", "C": "launch-bound", "D": "long 1-D", "E": "images", "F": "degenerate",
          "G": "one-pass"}  # fmt: skip
FLOORS = {"forward": "a copy", "backward": "a product", "both": "a copy and a product", "step": "the ResNet's step"}
FINE = (0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.4, 1.7, 2, 2.5, 3)  # ticks of a short axis
COARSE = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
Dots = dict[str, dict[str, list[float]]]  # group -> provider -> a ratio for each case


def draw(rows: Sequence[dict], out: Path) -> list[Path]:
    """OUT/OP-MODE-DTYPE.png for each operator, mode and dtype; networks share one."""
    table = Table(rows)
    found: dict[tuple[str, str, str], tuple[Dots, Dots]] = {}
    for by_provider in table.cases.values():
        one = by_provider.get(table.ours)
        if one is None or one["op"] == "scaling":
            continue
        op = "networks" if one["op"] in NETWORKS else one["op"]
        over_floor, over_ours = found.setdefault((op, one["mode"], one["dtype"]), ({}, {}))
        _add(over_floor, by_provider, table.ours)
        if compiled := by_provider.get("best-compiled"):
            gains = over_ours.setdefault(_group(one), {}).setdefault("ours", [])
            gains.append(ratio(compiled["seconds"], one["seconds"]))
    return [
        _figure(out / f"{op}-{mode}-{dtype}.png", f"{op}, {mode}, {dtype}: {device(rows)}",
                {f"time over that of {FLOORS[mode]}": over_floor, "times as fast as torch.compile": over_ours})
        for (op, mode, dtype), (over_floor, over_ours) in found.items()
    ]  # fmt: skip


def summary(runs: Mapping[str, Sequence[dict]], path: Path) -> Path:
    """A training step in float32 over the floor, a panel for each run by its name."""
    panels: dict[str, Dots] = {name: {} for name in runs}
    for name, rows in runs.items():
        table = Table(rows)
        for by_provider in table.cases.values():
            one = by_provider.get(table.ours)
            if one and (one["op"], one["mode"], one["dtype"]) == ("shrink_train", "both", "fp32"):
                _add(panels[name], by_provider, table.ours)
    return _figure(path, "Training step of a shrinkage, float32: time over that of a copy and a product", panels)


def device(rows: Sequence[dict]) -> str:
    return rows[0]["device"] + ("" if rows[0]["clock"] == "wall" else ", GPU time")


def _group(row: dict) -> str:
    return row["op"].replace("_", " ") if row["op"] in NETWORKS else f"{row['group']}  {GROUPS[row['group']]}"


def _add(dots: Dots, by_provider: dict[str, dict], ours: str) -> None:
    """The ratios to the floor of one case."""
    for provider in COLOURS:
        if row := by_provider.get(ours if provider == "ours" else provider):
            of_group = dots.setdefault(_group(row), {}).setdefault(provider, [])
            of_group.append(ratio(row["seconds"], by_provider["floor"]["seconds"]))


def _figure(path: Path, title: str, panels: Mapping[str, Dots]) -> Path:
    """Those panels that have dots, side by side; a line for each group."""
    panels = {name: dots for name, dots in panels.items() if dots}
    size = 8, 1.5 + 0.45 * max(map(len, panels.values()))
    figure = require("matplotlib.figure", "demo").Figure(figsize=size, layout="constrained")
    for axes, (name, dots) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _strips(axes, dict(sorted(dots.items())))
        axes.set_xlabel(name, fontsize=9)
    present = {name for dots in panels.values() for of_group in dots.values() for name in of_group}
    shown = [name for name in COLOURS if name in present]
    patch = require("matplotlib.patches", "demo").Patch
    handles = [patch(color=COLOURS[name], label=NAMES[name]) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return path


def _strips(axes, dots: Dots) -> None:
    """A line for each group, in it one for each provider."""
    providers = [name for name in COLOURS if any(name in of_group for of_group in dots.values())]
    for place, of_group in enumerate(dots.values()):
        for i, provider in enumerate(providers):
            if values := of_group.get(provider):
                height, colour = place + 0.7 * ((i + 0.5) / len(providers) - 0.5), COLOURS[provider]
                axes.plot(values, [height] * len(values), "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
                mean = statistics.geometric_mean(values)
                axes.plot([mean], [height], "|", color=colour, markersize=9, markeredgewidth=2.5)
    everything = [value for of_group in dots.values() for values in of_group.values() for value in values]
    low, high = min(0.9, *everything) / 1.1, max(1.1, *everything) * 1.1
    ticks = [tick for tick in (FINE if high / low < 5 else COARSE) if low <= tick <= high]
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(low, high))
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
    axes.set_yticks(range(len(dots)), list(dots), fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
