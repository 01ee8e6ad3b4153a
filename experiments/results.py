"""results.csv: a row for each run, which nothing but the end of the run writes."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from drsn_kernels.models import NAMES

from .tasks import TASKS, Condition

FIELDS = (
    "task", "model", "noise", "snr_db", "seed", "epochs", "test_acc", "seconds", "protocol", "gate_bias", "gate",
    "train_acc", "curve",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What decides a run's result: with it the run can be repeated."""

    task: str
    model: str
    condition: Condition
    seed: int
    epochs: int
    protocol: str = "fresh"
    gate_bias: float | None = None
    gate: str | None = None

    @property
    def network(self) -> str:
        """The model, and what is other than the default in its gates: "drsn-cw", "drsn-cw -2", "drsn-cw warm-up"."""
        changes = ([] if self.gate_bias is None else [f"{self.gate_bias:g}"]) + ([self.gate] if self.gate else [])
        return " ".join([self.model, *changes])

    def __str__(self) -> str:
        return f"{self.task}, {self.condition}, {self.network}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What a run gave; accuracies between 0 and 1.

    Attributes:
        test_acc: after the last epoch.
        seconds: of the processor.
        train_acc: over the steps of the last epoch, in training mode; None in rows of before it was kept.
        curve: test accuracy after each epoch; empty in rows of before it was kept.
    """

    test_acc: float
    seconds: float
    train_acc: float | None = None
    curve: tuple[float, ...] = ()


def read(path: Path) -> dict[Run, Result]:
    """The finished runs, in the file's order; none where there is no file. A row that was cut off is not one."""
    if not path.exists():
        return {}
    found = {}
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    for row in csv.DictReader(whole):
        try:
            condition = Condition(row["noise"], float(row["snr_db"]) if row["snr_db"] else None)
            bias = float(row["gate_bias"]) if row["gate_bias"] else None
            size = int(row["seed"]), int(row["epochs"])
            run = Run(row["task"], row["model"], condition, *size, row["protocol"], bias, row["gate"] or None)
            train_acc = float(row["train_acc"]) if row["train_acc"] else None
            curve = tuple(map(float, row["curve"].split()))
            found[run] = Result(float(row["test_acc"]), float(row["seconds"]), train_acc, curve)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must have the columns {','.join(FIELDS)}, but has the row {row}") from error
    return found


def append(path: Path, run: Run, result: Result) -> None:
    """Add a row by one write, which is then on the disk: a kill before it loses this run, after it none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    snr = "" if run.condition.snr_db is None else f"{run.condition.snr_db:g}"
    row = (run.task, run.model, run.condition.noise, snr, run.seed, run.epochs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with open(path, "a+b") as file:  # every write of "a" goes to the end, whoever else writes
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)  # a row that was cut off
        if not whole:
            writer.writerow(FIELDS)
        train_acc = "" if result.train_acc is None else f"{result.train_acc:.5f}"
        bias = "" if run.gate_bias is None else f"{run.gate_bias:g}"
        curve = " ".join(f"{value:.4f}" for value in result.curve)
        writer.writerow(
            (*row, f"{result.test_acc:.5f}", f"{result.seconds:.1f}", run.protocol, bias, run.gate, train_acc, curve)
        )
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Selection:
    """Which runs of the grid are meant.

    Attributes:
        tasks, models: names.
        epochs: None for each task's own.
        noises, snr_db: None for all.
        gate_bias, gate: of the networks with thresholds, which alone are then meant.
    """

    tasks: tuple[str, ...]
    models: tuple[str, ...] = NAMES
    epochs: int | None = None
    noises: tuple[str, ...] | None = None
    snr_db: tuple[float, ...] | None = None
    gate_bias: float | None = None
    gate: str | None = None

    def runs(self, seeds: Iterable[int]) -> Iterator[Run]:
        """Seed by seed, and of each condition all models together, so that a part of it can be compared."""
        changed = self.gate_bias is not None or self.gate is not None
        models = [name for name in self.models if not changed or name.startswith("drsn")]
        for seed in seeds:
            for name in self.tasks:
                task = TASKS[name]
                for condition in task.conditions:
                    if self.noises is not None and condition.noise not in self.noises:
                        continue
                    if self.snr_db is not None and condition.snr_db not in self.snr_db:
                        continue
                    for model in models:
                        length = self.epochs or task.epochs
                        yield Run(name, model, condition, seed, length, task.protocol, self.gate_bias, self.gate)


def missing(done: Mapping[Run, Result], chosen: Selection, seeds: int | None) -> list[Run]:
    """The runs to do for so many seeds; with None for the first seed that is not complete."""
    if seeds is not None:
        return [run for run in chosen.runs(range(seeds)) if run not in done]
    seed = 0
    while not (left := [run for run in chosen.runs([seed]) if run not in done]):
        seed += 1
    return left
