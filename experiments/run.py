"""Train what is missing in the grid of experiments.

    python -m experiments.run --vibration FOLDER --speech FOLDER --image FOLDER [--jobs 2] [--minutes 75] [--quick]
    python -m experiments.run --vibration FOLDER --task cwru --snr -5 --seeds 5 --batch-last

Every run is one row of OUT/results.csv, written when it ends. A command that is stopped, in whatever way, loses the
runs that are under way; the same command goes on with what is missing, and once a seed is complete with the next one.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from drsn_kernels.graphs import graphed
from drsn_kernels.models import NAMES, network, parameter_groups
from drsn_kernels.train.recipe import Recipe, accuracy, epoch_batches, train_step

from . import ROOT, report
from .batch_last import BatchLast, compiled
from .gates import GATES, WarmUp, without_decay, zero_weights
from .results import Result, Run, Selection, append, missing, read
from .tasks import TASKS, data, noise

QUICK_EPOCHS = 2
FOLDERS = {"vibration": "CWRU .mat files", "speech": "LABEL_SPEAKER_TAKE.wav files", "image": "MNIST's idx files"}


@dataclass(frozen=True)
class How:
    """What changes how fast a run is, and its accuracy by rounding only.

    Attributes:
        batch_last: train signals by batch_last.py.
        device: of the network, and of the data where their noise is fixed.
        graph: each step is one CUDA graph.
    """

    batch_last: bool = False
    device: str = "cpu"
    graph: bool = False


def execute(run: Run, folder: Path | None, quick: bool, how: How = How()) -> Result:
    """Train and test one network by the paper's recipe, on one thread; the same run gives the same accuracy.

    The seed decides the weights, the order and all noise; the models of a condition see the same noise.
    """
    torch.set_num_threads(1)
    task, dataset = TASKS[run.task], data(run.task, folder, quick)
    train_noise, test_noise = noise(run.condition, dataset.sampling_rate)
    torch.manual_seed(run.seed)
    options = {"in_channels": dataset.train_x.shape[1], "classes": len(dataset.class_names)} | task.network
    if run.gate_bias is not None:
        options["gate_bias"] = run.gate_bias
    net = network(run.model, **options)
    if run.gate == "zero":
        zero_weights(net)
    model = nn.Sequential(dataset.transform, BatchLast(net) if how.batch_last and net.dims == 1 else net)
    model.to(how.device)
    test_generator = torch.Generator().manual_seed(1_000_000 + run.seed)
    tests = [test_noise(dataset.test_x, test_generator) for _ in range(task.draws)]

    recipe, generator, start = Recipe(epochs=run.epochs), torch.Generator().manual_seed(run.seed), time.process_time()
    x, y = dataset.train_x, dataset.train_y.to(how.device)
    if run.protocol == "fixed":
        x, train_noise = train_noise(x, generator).to(how.device), None
    groups = parameter_groups(model, recipe.weight_decay)
    if run.gate == "no-decay":
        groups = without_decay(groups, net)
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=True)
    schedule = recipe.schedule(optimizer)
    step = partial(train_step, model, optimizer)
    if how.graph:
        step = graphed(step, optimizer)
    curve = []
    warm_up = WarmUp(net, run.epochs * -(-len(x) // recipe.batch)) if run.gate == "warm-up" else None
    for _ in range(run.epochs):
        model.train()
        batches = epoch_batches(x, y, recipe.batch, generator=generator, noise=train_noise)
        right = 0
        for batch in batches:
            if warm_up is not None:
                warm_up()
            right += step(*batch)[1]
        schedule.step()
        curve.append(accuracy(model, tests[0], dataset.test_y))
    seconds = time.process_time() - start
    final = [curve[-1], *(accuracy(model, test, dataset.test_y) for test in tests[1:])]
    train_acc = float(right) / sum(len(target) for _, target in batches)
    return Result(sum(final) / len(final), seconds, train_acc, tuple(curve))


def _end_with_the_command() -> None:
    """In a worker: end at Ctrl-C, and when the command was killed, instead of waiting for it for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()


def run_all(
    runs: list[Run], folders: dict[str, Path], path: Path, *, jobs: int, until: float, quick: bool, how: How = How()
) -> int:
    """Do the runs in processes of one thread each, none begun after the time `until`; the number of runs done."""
    left, done = list(reversed(runs)), 0
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, context, _end_with_the_command) as pool:
        under_way = {}
        while left or under_way:
            while left and len(under_way) < jobs and time.monotonic() < until:
                run = left.pop()
                folder = folders.get(TASKS[run.task].source)
                under_way[pool.submit(execute, run, folder, quick, how)] = run
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                result = future.result()
                append(path, run, result)
                done += 1
                print(f"{done}/{len(runs)} {run}: {result.test_acc:.2%} in {result.seconds:.0f} s", flush=True)
    return done


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__.split("\n")[0])
    for task, what in FOLDERS.items():
        parser.add_argument(f"--{task}", type=Path, metavar="FOLDER", help=f"with {what}: do its tasks")
    parser.add_argument("--simulated", action="store_true", help="simulated vibration, which needs no files")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=tuple(TASKS), help="of those; default: all")
    parser.add_argument("--model", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--noise", nargs="+", help="default: all of the task's")
    parser.add_argument("--snr", nargs="+", type=float, metavar="DB", help="default: all of the task's")
    parser.add_argument("--gate-bias", type=float, metavar="B", help="DRSNs whose gates begin with this bias")
    parser.add_argument("--gate", choices=GATES, help="DRSNs whose gates begin or learn otherwise: gates.py")
    parser.add_argument("--epochs", type=int, help="default: the task's")
    parser.add_argument("--batch-last", action="store_true", help="train signals by batch_last.cpp; needs a compiler")
    parser.add_argument("--seeds", type=int, help="of every cell; default: complete the first that is not complete")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: each step one CUDA graph")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--quick", action="store_true", help="a few samples and epochs, to see that everything works")
    parser.add_argument("--out", type=Path, help="default: docs/experiments; with --quick experiments-quick")
    parser.add_argument(
        "--paper",
        type=Path,
        metavar="CSV",
        default=report.PAPER,
        help="for the plots; default: docs/experiments/paper.csv",
    )
    options = parser.parse_args(arguments)
    if options.batch_last and options.device != "cpu":
        parser.error("--batch-last is for --device cpu")
    for name in ("epochs", "seeds", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    options.folders = {task: getattr(options, task).resolve() for task in FOLDERS if getattr(options, task)}
    options.tasks = [
        name
        for name in options.task
        if (source := TASKS[name].source) in options.folders or (source is None and options.simulated)
    ]
    if not options.tasks:
        parser.error("name what to do: --vibration, --speech or --image with a folder, or --simulated")
    options.chosen = Selection(
        tuple(options.tasks),
        tuple(options.model),
        options.epochs or (QUICK_EPOCHS if options.quick else None),
        options.noise and tuple(options.noise),
        options.snr and tuple(options.snr),
        options.gate_bias,
        options.gate,
    )
    options.out = options.out or (Path("experiments-quick") if options.quick else ROOT / "docs" / "experiments")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    path = options.out / "results.csv"
    try:
        paper = report.read_paper(options.paper)
        for task in options.tasks:  # what is wrong with a folder is said before hours are spent on another
            print(data(task, options.folders.get(TASKS[task].source), options.quick).description, flush=True)
        if options.batch_last:
            compiled()
        runs = missing(read(path), options.chosen, options.seeds)
        print(f"{len(runs)} runs are missing in {path}", flush=True)
        until = time.monotonic() + 60 * options.minutes
        how = How(options.batch_last, options.device, graph=options.device == "cuda")
        run_all(runs, options.folders, path, jobs=options.jobs, until=until, quick=options.quick, how=how)
        return report.write(options.out, paper, options.chosen.epochs)
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is in {path}, the same command goes on with the rest", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
