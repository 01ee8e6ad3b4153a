"""The tables and plots of the experiments, from results.csv.

    python -m experiments.report [--out docs/experiments] [--epochs 40] [--paper docs/experiments/paper.csv]

Prints the tables of the runs of so many epochs, writes them into OUT/README.md between its markers, and draws accuracy
against SNR beside the paper's values: a CSV with the columns panel,noise,snr_db,method,accuracy_pct, of which the rows
of the panel "test" are used.
"""

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from drsn_kernels._extras import require
from drsn_kernels.models import NAMES

from . import ROOT
from .results import Result, Run, read
from .tasks import EPOCHS, TASKS, Condition

PAPER = ROOT / "docs" / "experiments" / "paper.csv"
LABELS = {"convnet": "ConvNet", "resnet": "ResNet", "senet": "SENet", "drsn-cs": "DRSN-CS", "drsn-cw": "DRSN-CW"}
PAPER_NOISE = {"laplacian": "laplace"}
COLOURS = dict(zip(NAMES, ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))
Cells = dict[tuple[str, Condition, str], list[Result]]


def cells(done: dict[Run, Result], epochs: int) -> Cells:
    """The results of all seeds by (task, condition, model)."""
    found: Cells = {}
    for run, result in done.items():
        if run.epochs == epochs:
            found.setdefault((run.task, run.condition, run.model), []).append(result)
    return found


def _cell(results: list[Result]) -> str:
    """Mean test accuracy in %, the standard deviation over seeds where there are several, and their number."""
    if not results:
        return ""
    values = [100 * result.test_acc for result in results]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def _mean(cells: Cells, task: str, conditions: Iterable[Condition], model: str) -> str:
    """Over the conditions, where none is missing."""
    means = []
    for condition in conditions:
        if not (results := cells.get((task, condition, model))):
            return ""
        means.append(statistics.mean(100 * result.test_acc for result in results))
    return f"{statistics.mean(means):.1f}"


def _row(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def tables(cells: Cells, task: str) -> str:
    """Markdown: for each noise with SNRs a table of models by SNR, one for all noises without."""
    groups: dict[str, list[Condition]] = {}
    for condition in TASKS[task].conditions:
        groups.setdefault("" if condition.snr_db is None else condition.noise, []).append(condition)
    lines = []
    for noise, conditions in groups.items():
        heads = [c.noise if c.snr_db is None else f"{c.snr_db:g} dB" for c in conditions]
        lines += [_row([noise or "noise", *heads, "mean"]), "|---" * (len(conditions) + 2) + "|"]
        for model in NAMES:
            values = [_cell(cells.get((task, condition, model), [])) for condition in conditions]
            lines.append(_row([LABELS[model], *values, _mean(cells, task, conditions, model)]))
        lines.append("")
    return "\n".join(lines)


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands in the page between <!-- name --> and <!-- end name -->."""
    content = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if len(pattern.findall(content)) != 1:
        raise ValueError(f"{page} must have <!-- {name} --> and <!-- end {name} --> once")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", content), encoding="utf-8")


def read_paper(path: Path) -> dict[tuple[str, str], dict[float, float]]:
    """The paper's test accuracies in %: (model, noise) -> SNR in dB -> accuracy."""
    names = {label: model for model, label in LABELS.items()}
    found: dict[tuple[str, str], dict[float, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                if row["panel"] == "test":
                    key = names[row["method"]], PAPER_NOISE.get(row["noise"], row["noise"])
                    found.setdefault(key, {})[float(row["snr_db"])] = float(row["accuracy_pct"])
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{path} must have the columns panel,noise,snr_db,method,accuracy_pct, but has the row {row}"
                ) from error
    return found


def plot(path: Path, cells: Cells, task: str, paper: dict[tuple[str, str], dict[float, float]]) -> None:
    """Accuracy against SNR for each noise; the paper's values, where it has them, in a second row."""
    noises = list(dict.fromkeys(c.noise for c in TASKS[task].conditions if c.snr_db is not None))
    compared = any(noise in noises for _, noise in paper)
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(max(2.9 * len(noises), 6), 6 if compared else 3.4), layout="constrained"
    )
    axes = figure.subplots(1 + compared, len(noises), sharex=True, sharey="row", squeeze=False)
    for column, noise in enumerate(noises):
        for model in NAMES:
            points = {
                c.snr_db: [100 * r.test_acc for r in cells[task, c, model]]
                for c in TASKS[task].conditions
                if c.noise == noise and (task, c, model) in cells
            }
            style = {"color": COLOURS[model], "label": LABELS[model], "marker": "o", "markersize": 4}
            means = [statistics.mean(values) for values in points.values()]
            spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in points.values()]
            axes[0, column].errorbar(list(points), means, spread, capsize=3, **style)
            if published := paper.get((model, noise)):
                axes[1, column].plot(list(published), list(published.values()), linestyle="--", **style)
        axes[0, column].set_title(f"{task}, {noise} noise", fontsize=10)
        if compared:
            axes[1, column].set_title(f"the paper's data, {noise} noise", fontsize=10)
        axes[-1, column].set_xlabel("SNR (dB)")
    for row in axes:
        row[0].set_ylabel("test accuracy (%)")
        for one in row:
            one.grid(alpha=0.3)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def write(out: Path, paper: dict[tuple[str, str], dict[float, float]], epochs: int) -> int:
    """Print the tables of the runs of so many epochs, draw the plots, and fill OUT/README.md where there is one; 0."""
    path = out / "results.csv"
    found = cells(read(path), epochs)
    if not found:
        raise ValueError(f"{path} has no runs of {epochs} epochs yet: python -m experiments.run makes them")
    page = out / "README.md"
    for task in TASKS:
        on_page = page.exists() and f"<!-- {task} -->" in page.read_text(encoding="utf-8")
        made = any(key[0] == task for key in found)
        if not (made or on_page):
            continue
        text = tables(found, task) if made else f"No runs of {epochs} epochs yet.\n"
        print(f"\n{task}: test accuracy in %, mean ± standard deviation (seeds)\n\n{text}")
        if any(condition.snr_db is not None for condition in TASKS[task].conditions):
            plot(out / f"{task}.png", found, task, paper)  # without a run too: an old plot would contradict the page
        if on_page:
            insert(page, task, text)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "experiments", help="default: docs/experiments")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of the runs that count (default: {EPOCHS})")
    parser.add_argument("--paper", type=Path, metavar="CSV", default=PAPER, help="default: docs/experiments/paper.csv")
    options = parser.parse_args(arguments)
    try:
        return write(options.out, read_paper(options.paper), options.epochs)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
