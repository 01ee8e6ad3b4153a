"""From recordings in folders to a classifier and its predictions: three commands, then the same model in Python.

    python examples/own_data.py [--out FOLDER] [--quick]

Makes recordings of three machines by numpy, trains on them, half a minute on two idle cores, and predicts new ones.
With recordings of your own, leave out the first step: a subfolder for each class is all that --data needs.
"""

import argparse
import shlex
from pathlib import Path

import numpy as np

from drsn_kernels.__main__ import main as drsn
from drsn_kernels.train import load, predict

RATE = 12_000
HZ = {"fan": 730.0, "pump": 790.0, "saw": 850.0}


def record(folder: Path, takes: int, seconds: float, generator: np.random.Generator) -> None:
    """folder/CLASS/TAKE.npy: a tone that drifts, and louder noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    for name, hz in HZ.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for take in range(takes):
            phase = 2 * np.pi * hz * generator.uniform(0.98, 1.02) * time
            np.save(folder / name / f"{take}.npy", np.sin(phase) + generator.normal(0, 1.5, len(time)))


def run(*arguments: object) -> None:
    """A command, printed as it would be typed."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ drsn {shlex.join(words)}", flush=True)
    if status := drsn(words):
        raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("train-example-out"), help="folder for all of it")
    parser.add_argument("--quick", action="store_true", help="too short to learn anything; to see that it runs")
    options = parser.parse_args()
    out, run_folder, table = options.out, options.out / "run", options.out / "predictions.csv"
    seconds, length, epochs = (0.2, 256, 1) if options.quick else (8, 2048, 10)

    generator = np.random.default_rng(0)
    record(out / "recordings", 4, seconds, generator)
    record(out / "new", 2, seconds, generator)

    own = ["--task", "own", "--data", out / "recordings", "--rate", RATE, "--length", length]
    new = [*own, "--noise", "none", "--epochs", epochs, "--batch", 32]
    run("train", *(["--resume"] if run_folder.exists() else new), "--out", run_folder)  # a run is never overwritten
    run("predict", "--run", run_folder, "--out", table, out / "new")

    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    files = [row for row in rows if row[1] == ""]  # of each file as a whole
    right = sum(Path(row[0]).parent.name == row[2] for row in files)
    print(f"\n{right} of {len(files)} new recordings are given their class")

    model, info = load(run_folder)  # the same in Python: windows (N, channels, length) as they are in the files
    signal = np.load(out / "new" / "saw" / "0.npy")
    windows = signal[: 4 * length].reshape(4, 1, length)
    names = [info.class_names[int(i)] for i in predict(model, windows)]
    print(f"the first four windows of new/saw/0.npy: {', '.join(names)}")


if __name__ == "__main__":
    main()
