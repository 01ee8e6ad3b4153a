"""The tables and plots of the experiments, from results.csv.

    python -m experiments.report [--out docs/experiments] [--epochs 40] [--paper docs/experiments/paper.csv]

Prints the tables, writes them into OUT/README.md between its markers, and draws accuracy against SNR beside the paper's
values: a CSV with the columns panel,noise,snr_db,method,accuracy_pct, of which the rows of the panel "test" are used.
paired.py has the tables and pictures of the tasks that are compared seed by seed. Of each task the runs of its own
number of epochs count, or with --epochs those of another.
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

from . import ROOT, paired
from .paired import Cells, label
from .results import Result, Run, read
from .tasks import TASKS, Condition

PAPER = ROOT / "docs" / "experiments" / "paper.csv"
PAPER_NOISE = {"laplacian": "laplace"}


def cells(done: dict[Run, Result], epochs: int | None = None) -> Cells:
    """The results by seed of each (task, condition, network), of the runs of so many epochs; None: of the task's."""
    found: Cells = {}
    for run, result in done.items():
        if run.epochs == (epochs or TASKS[run.task].epochs):
            found.setdefault((run.task, run.condition, run.network), {})[run.seed] = result
    return found


def _cell(results: dict[int, Result]) -> str:
    """Mean test accuracy in %, the standard deviation over seeds where there are several, and their number."""
    if not results:
        return ""
    values = [100 * result.test_acc for result in results.values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def _mean(cells: Cells, task: str, conditions: Iterable[Condition], model: str) -> str:
    """Over the conditions, where none is missing."""
    means = []
    for condition in conditions:
        if not (results := cells.get((task, condition, model))):
            return ""
        means.append(statistics.mean(100 * result.test_acc for result in results.values()))
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
            values = [_cell(cells.get((task, condition, model), {})) for condition in conditions]
            lines.append(_row([label(model), *values, _mean(cells, task, conditions, model)]))
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
    names = {name: model for model, name in paired.LABELS.items()}
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
                c.snr_db: [100 * r.test_acc for r in cells[task, c, model].values()]
                for c in TASKS[task].conditions
                if c.noise == noise and (task, c, model) in cells
            }
            style = {"color": paired.COLOURS[model], "label": label(model), "marker": "o", "markersize": 4}
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


def blocks(found: Cells) -> dict[str, str]:
    """The Markdown of each task with runs, and of "gates" where there are runs with others than the paper's."""
    made = {}
    for name, task in TASKS.items():
        if any(key[0] == name for key in found):
            made[name] = (paired.table if task.paired else tables)(found, name)
    if any(" " in key[2] for key in found):
        made["gates"] = paired.gates(found)
    return made


def write(out: Path, paper: dict[tuple[str, str], dict[float, float]], epochs: int | None = None) -> int:
    """Print the tables, draw the plots, and fill OUT/README.md where there is one; 0.

    epochs: of the runs that count; None: each task's own.
    """
    path = out / "results.csv"
    found = cells(read(path), epochs)
    of_epochs = "" if epochs is None else f" of {epochs} epochs"
    if not found:
        raise ValueError(f"{path} has no runs{of_epochs} yet: python -m experiments.run makes them")
    page, made = out / "README.md", blocks(found)
    for name in (*TASKS, "gates"):
        on_page = page.exists() and f"<!-- {name} -->" in page.read_text(encoding="utf-8")
        text = made.get(name, f"No runs{of_epochs} yet.\n")
        if name in made:
            print(f"\n{name}: test accuracy in %\n\n{text}")
        if on_page:
            insert(page, name, text)
        # Without a run too: an old plot would contradict the page.
        if name in TASKS and (name in made or on_page):
            if TASKS[name].paired:
                paired.curves(out / f"{name}-curves.png", found, name)
            elif any(condition.snr_db is not None for condition in TASKS[name].conditions):
                plot(out / f"{name}.png", found, name, paper)
    if any(TASKS[key[0]].paired for key in found):
        paired.gains(out / "gains.png", found)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "experiments", help="default: docs/experiments")
    parser.add_argument("--epochs", type=int, help="of the runs that count; default: each task's own")
    parser.add_argument("--paper", type=Path, metavar="CSV", default=PAPER, help="default: docs/experiments/paper.csv")
    options = parser.parse_args(arguments)
    try:
        return write(options.out, read_paper(options.paper), options.epochs)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
