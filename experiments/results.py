"""results.csv: a row for each run, which nothing but the end of the run writes."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drsn_kernels.models import NAMES

from .tasks import TASKS, Condition

FIELDS = ("task", "model", "noise", "snr_db", "seed", "epochs", "test_acc", "seconds")


@dataclass(frozen=True)
class Run:
    """What decides a run's result: with it the run can be repeated."""

    task: str
    model: str
    condition: Condition
    seed: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.task}, {self.condition}, {self.model}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    test_acc: float
    seconds: float


def read(path: Path) -> dict[Run, Result]:
    """The finished runs, in the file's order; none where there is no file. A row that was cut off is not one."""
    if not path.exists():
        return {}
    found = {}
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    for row in csv.DictReader(whole):
        try:
            condition = Condition(row["noise"], float(row["snr_db"]) if row["snr_db"] else None)
            run = Run(row["task"], row["model"], condition, int(row["seed"]), int(row["epochs"]))
            found[run] = Result(float(row["test_acc"]), float(row["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
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
        writer.writerow((*row, f"{result.test_acc:.5f}", f"{result.seconds:.1f}"))
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def grid(tasks: Iterable[str], seeds: Iterable[int], epochs: int, models: Sequence[str] = NAMES) -> Iterator[Run]:
    """All runs: seed by seed, and of each condition all models together, so that a part of it can be compared."""
    for seed in seeds:
        for task in tasks:
            for condition in TASKS[task].conditions:
                for model in models:
                    yield Run(task, model, condition, seed, epochs)


def missing(
    done: Mapping[Run, Result], tasks: Sequence[str], epochs: int, seeds: int | None, models: Sequence[str] = NAMES
) -> list[Run]:
    """The runs to do for so many seeds; with None for the first seed that is not complete."""
    if seeds is not None:
        return [run for run in grid(tasks, range(seeds), epochs, models) if run not in done]
    seed = 0
    while not (left := [run for run in grid(tasks, [seed], epochs, models) if run not in done]):
        seed += 1
    return left
