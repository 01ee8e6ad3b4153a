"""Networks compared seed by seed: differences, their intervals, learning curves.

A seed gives all networks the same order and the same noise, so the difference to the ResNet is taken within a seed. Its
interval is Student's, at 95 %, over the seeds. (With five seeds Wilcoxon's smallest two-sided p is 1/16, so it cannot
say more than how many seeds agree, which the tables give.)
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from drsn_kernels._extras import require
from drsn_kernels.models import NAMES

from .gates import GATES
from .results import Result
from .tasks import TASKS, Condition

BASE = "resnet"
LABELS = {"convnet": "ConvNet", "resnet": "ResNet", "senet": "SENet", "drsn-cs": "DRSN-CS", "drsn-cw": "DRSN-CW"}
COLOURS = dict(zip(NAMES, ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))
OTHER = "tab:purple"  # with other gates
Cells = dict[tuple[str, Condition, str], dict[int, Result]]  # (task, condition, network) -> seed -> result


def label(network: str) -> str:
    """ "drsn-cw -2" -> "DRSN-CW, gate bias -2"; "drsn-cw warm-up" -> "DRSN-CW, gate warm-up"."""
    model, *changes = network.split(" ")
    return LABELS[model] + "".join(f", gate {one if one in GATES else f'bias {one}'}" for one in changes)


def _order(network: str) -> tuple[int, list[str]]:
    model, *changes = network.split(" ")
    return NAMES.index(model), changes


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of at least two differences by Student's t."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = require("scipy.stats", "train").t.ppf(0.975, len(differences) - 1) * spread
    middle = statistics.mean(differences)
    return middle - reach, middle + reach


def differences(ours: Mapping[int, Result], base: Mapping[int, Result]) -> list[float]:
    """Points of test accuracy over the other network, of each seed that both have."""
    return [100 * (ours[seed].test_acc - base[seed].test_acc) for seed in sorted(ours.keys() & base.keys())]


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def over(ours: Mapping[int, Result], base: Mapping[int, Result]) -> tuple[str, str]:
    """Mean difference with its interval, and how many seeds are ahead."""
    found = differences(ours, base)
    if not found:
        return "", ""
    bounds = " ({:+.1f} to {:+.1f})".format(*interval(found)) if len(found) > 1 else ""
    return f"{statistics.mean(found):+.1f}{bounds}", f"{sum(one > 0 for one in found)} of {len(found)}"


def networks(cells: Cells, task: str, condition: Condition) -> list[str]:
    """Those with runs, in the order of the models."""
    return sorted((key[2] for key in cells if key[:2] == (task, condition)), key=_order)


def _shown(cells: Cells, task: str, condition: Condition) -> list[str]:
    """Those of the package's own options; what is tried with gates.py stands in the table of gates."""
    return [name for name in networks(cells, task, condition) if not GATES.keys() & set(name.split(" "))]


def table(cells: Cells, task: str) -> str:
    """Markdown: a line for each network under each noise that has runs."""
    lines = ["| noise | network | seeds | test | training | test over ResNet | seeds ahead |", "|---" * 7 + "|"]
    for condition in TASKS[task].conditions:
        base = cells.get((task, condition, BASE), {})
        for number, name in enumerate(_shown(cells, task, condition)):
            results = cells[task, condition, name]
            test = _mean([100 * one.test_acc for one in results.values()])
            training = _mean([100 * one.train_acc for one in results.values()])
            gained, ahead = ("", "") if name == BASE else over(results, base)
            noise = "" if number else str(condition)
            lines.append(f"| {noise} | {label(name)} | {len(results)} | {test} | {training} | {gained} | {ahead} |")
    return "\n".join(lines) + "\n"


def gates(cells: Cells) -> str:
    """Markdown: networks whose gates begin or learn otherwise beside the same with the paper's, seed by seed."""
    lines = ["| data | noise | network | seeds | paper's gates | these | gained |", "|---" * 7 + "|"]
    for name, task in TASKS.items():
        for condition in task.conditions:
            for network in networks(cells, name, condition):
                model, *changes = network.split(" ")
                changed, plain = cells[name, condition, network], cells.get((name, condition, model), {})
                seeds = sorted(changed.keys() & plain.keys())
                if not changes or not seeds:
                    continue
                values = [_mean([100 * of[seed].test_acc for seed in seeds]) for of in (plain, changed)]
                row = (name, str(condition), label(network), str(len(seeds)), *values, over(changed, plain)[0])
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _style(network: str) -> dict:
    model, *changes = network.split(" ")
    return {"color": OTHER if changes else COLOURS[model], "label": label(network)}


def curves(path: Path, cells: Cells, task: str) -> None:
    """Test accuracy against epochs under each noise that has runs: the mean over seeds, and the range of the seeds."""
    conditions = [c for c in TASKS[task].conditions if _shown(cells, task, c)]
    across = min(max(len(conditions), 1), 3)
    down = max(-(-len(conditions) // across), 1)
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(max(3.6 * across, 6), 1 + 3 * down), layout="constrained"
    )
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for empty in axes[len(conditions) :]:
        empty.set_axis_off()
    for one, condition in zip(axes, conditions, strict=False):
        for network in _shown(cells, task, condition):
            runs = [[100 * value for value in r.curve] for r in cells[task, condition, network].values()]
            epochs = range(1, min(map(len, runs)) + 1)
            columns = [[run[epoch - 1] for run in runs] for epoch in epochs]
            style = _style(network)
            one.plot(epochs, [statistics.mean(column) for column in columns], linewidth=1.3, **style)
            one.fill_between(
                epochs, *([pick(column) for column in columns] for pick in (min, max)), color=style["color"], alpha=0.12
            )
        one.set_title(f"{task}, {condition}", fontsize=10)
        one.set_xlabel("epoch")
        one.grid(alpha=0.3)
    for first in axes[::across]:
        first.set_ylabel("test accuracy (%)")
    by_label = {name: handle for one in axes for handle, name in zip(*one.get_legend_handles_labels(), strict=True)}
    if by_label:
        columns = min(len(by_label), 5)
        figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def gains(path: Path, cells: Cells) -> None:
    """Points over the ResNet with their intervals, a row for each paired task, noise and network."""
    rows = []
    for name, task in TASKS.items():
        for condition in task.conditions if task.paired else ():
            base = cells.get((name, condition, BASE), {})
            for network in _shown(cells, name, condition):
                found = differences(cells[name, condition, network], base)
                if network != BASE and found:
                    rows.append((f"{name}, {condition}", network, found))
    figure = require("matplotlib.figure", "train").Figure(figsize=(7, 1.2 + 0.22 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, (_, network, found) in enumerate(rows):
        style = _style(network)
        if len(found) > 1:
            axis.plot(interval(found), (place, place), color=style["color"], linewidth=1.5)
        axis.plot(found, [place] * len(found), ".", color=style["color"], markersize=3, alpha=0.6)
        axis.plot(statistics.mean(found), place, "o", color=style["color"], markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{where}: {label(network)}" for where, network, _ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("points over the ResNet (small dots: seeds)", fontsize=9)
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
