"""The command: select cases, check and time them, print and write what came out, compare with a stored run."""

import argparse
import gc
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drsn_kernels import backends
from drsn_kernels._extras import exit_status, require
from drsn_kernels.demo.timing import Call, interleaved

from . import plots, report
from .calls import COMPILE, FLOOR, PLAIN, Provider, build, cost, floor_bytes, providers
from .cases import NETWORKS, OPS, SAMPLE, SHAPES, Case, select
from .checks import Judge
from .clock import CudaClock, WallClock, clock_for, counts
from .rows import environment, read_json, row, write_csv, write_json, write_markdown

ROUNDS = {"quick": 7, "standard": 15, "full": 15}
SECONDS = 0.2  # short calls are repeated for so long, or 10 times as often


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    rounds: int = 15
    compile: str = "auto"
    grid: str = "standard"
    slow_down: tuple[str, float] | None = None  # a provider made slower on purpose, to try the gate with


def compiled_forms(case: Case, settings: Settings) -> str:
    """Which compiled providers a case has; compiling takes longer than timing, so by default not everywhere."""
    if settings.compile != "auto":
        return settings.compile
    if case.op == "paper_network" and settings.grid != "quick":
        return "best"
    if case.op in NETWORKS or case.op == "scaling" or case.mode != "both" or case.dtype != "fp32":
        return "none"
    sampled = case.shape == SHAPES[case.group][SAMPLE[case.group]]
    if sampled and settings.grid != "quick":
        return "all"
    return "best" if case.op == "shrink_train" else "none"


def providers_of(case: Case, settings: Settings) -> list[Provider]:
    return providers(case, settings.device, compiled_forms(case, settings))


def measure(
    case: Case,
    settings: Settings,
    about: dict,
    wanted: Sequence[Provider] | None = None,
    built: Callable = build,
) -> tuple[list[dict], dict[str, str]]:
    """The rows of a case; and for each provider without one, why.

    All of `wanted` (default: all there are) and the floor run in turn, in this process, after each was checked.
    """
    names = {provider.name: provider for provider in [*(wanted or providers_of(case, settings))]}
    names.setdefault(FLOOR.name, FLOOR)
    torch._dynamo.reset()
    calls, port, exact = built(case, names.values(), settings.device)
    judge, refused = Judge(case, port, exact), {}
    clock = clock_for(settings.device)
    for name in list(calls):
        if names[name].form not in PLAIN and (why := objection(judge, calls[name], clock)) is not None:
            refused[name] = why
            del calls[name]
    del judge, port, exact
    if settings.slow_down is not None and settings.slow_down[0] in calls:
        name, factor = settings.slow_down
        calls[name] = clock.slowed(calls[name], factor)
    gc.collect()
    samples = interleaved(calls, settings.rounds, clock, seconds=SECONDS)
    rows = []
    for name, call in calls.items():
        seconds = samples[name][clock.main]
        floor = samples["floor-1-thread" if name.endswith("-1-thread") else "floor"][clock.main]
        rows.append(
            row(
                case, name, clock.way(call), seconds, samples[name].get("host", seconds), floor, floor_bytes(case),
                counts(call, settings.device), cost(case, names[name], call), about,
            )  # fmt: skip
        )
    return rows, refused


def objection(judge: Judge, call: Call, clock: WallClock | CudaClock) -> str | None:
    """Why a call gets no row: it raises, it or its graph is wrong, or it has no GPU time."""
    try:
        why = judge.objection(call)
        if why is None:
            clock(call)
            replay = clock.replay(call)
            if replay is not None and judge.case.mode != "step":  # a step goes on from where the one before ended
                why = judge.objection(replay)
        return why
    except Exception as error:  # a compiler that fails must not end a run of an hour
        return f"raised {said(error)}"


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


HEADER = (f"{'':22s}{'clock':>7s}{'ms':>10s}{'IQR':>9s}{'% floor':>9s}{'GB/s':>7s}{'ops':>6s}{'host us':>10s}"
          f"{'peak MiB':>10s}{'saved':>9s}{'cost':>9s}{'x cost':>9s}")  # fmt: skip


def _mib(value: int | str) -> str:
    return "" if value == "" else f"{value / 2**20:.2f}"


def line(row: dict) -> str:
    gb_s, over = row["gb_s"], row["over_cost"]
    return (
        f"  {row['provider']:20s}{row['clock']:>7s}{row['median_ms']:10.4f}{row['iqr_ms']:9.4f}"
        f"{row['percent_of_floor']:9.1f}{'' if gb_s == '' else format(gb_s, '.1f'):>7s}{row['launches']:>6}"
        f"{row['host_us']:10.1f}{_mib(row['peak_bytes']):>10s}{_mib(row['saved_bytes']):>9s}{_mib(row['cost_bytes']):>9s}"
        f"{'' if over == '' else format(over, '.2f'):>9s}"
    )


def lines(rows: list[dict], refused: dict[str, str]) -> list[str]:
    return [*map(line, rows), *(f"  {name:20s}WRONG: {why}" for name, why in refused.items())]


def check_device(device: str | None) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def command(options: argparse.Namespace) -> int:
    """Run, print, write and compare; the exit status. Raises ValueError, OSError before any work is done."""
    device = check_device(options.device)
    grid = "quick" if options.quick else "full" if options.full else "standard"
    letters = ("ABCDEG" if device == "cuda" else "ABCDE") if options.shapes is None else options.shapes
    cases = select(letters, grid, device, options.ops)
    rounds = ROUNDS[grid] if options.rounds is None else options.rounds
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not options.tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {options.tolerance}")
    stored = read_json(options.compare) if options.compare else None
    settings = Settings(device, rounds, options.compile, grid, options.slow_down)
    about = environment(device)
    if stored is not None:
        report.check_same_device([about], stored)
        report.check_cases({case.id for case in cases}, stored)
    if options.slow_down and not any(options.slow_down[0] == p.name for c in cases for p in providers_of(c, settings)):
        raise ValueError(f"slow-down: no case here has a provider {options.slow_down[0]!r}")
    if options.out:
        _check_folder(options.out)
    for name, value in about.items():
        print(f"{name:10s}{value}")
    if device == "cpu" and backends.cpu.MISSING:
        print(f"without the cpu backend: {backends.cpu.MISSING}")
    rows: list[dict] = []
    try:
        refusals = _measure_all(cases, settings, about, rows)
    except BaseException:  # Ctrl-C too: an hour's rows are not thrown away
        print(f"\nstopped after {len({one['case'] for one in rows})} of {len(cases)} cases")
        if options.out and rows:
            _write(options.out, rows)
        raise
    print("\nsummary")
    for figure in report.figures(rows):
        print(figure)
    if options.out:
        _write(options.out, rows)
    failed = bool(refusals)
    if refusals:
        print(f"{refusals} rows refused: see WRONG above")
    if stored is not None:
        lost = report.missing(rows, stored, {c.id for c in cases if compiled_forms(c, settings) != "all"})
        print("".join(f"{text}\n" for text in lost), end="")
        lines, regression = report.verdict(report.compare(rows, stored, options.tolerance))
        print("\n".join(lines))
        failed |= regression or bool(lost)
    return int(failed)


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"out must be a folder that can be written, got {out}: {error.strerror}") from error


def _measure_all(cases: Sequence[Case], settings: Settings, about: dict, rows: list[dict]) -> int:
    """Fill `rows` case by case; how many were refused."""
    refusals = 0
    print(f"\n{len(cases)} cases\n{HEADER}")
    for case in cases:
        new, refused = measure(case, settings, about)
        print(case.id)
        print(*lines(new, refused), sep="\n", flush=True)
        rows += new
        refusals += len(refused)
    return refusals


def _write(out: Path, rows: list[dict]) -> None:
    command = f"python -m benchmarks {shlex.join(sys.argv[1:])}"
    written = [write_json(out / "results.json", rows, command), write_csv(out / "results.csv", rows),
               write_markdown(out / "results.md", rows, report.figures(rows), command)]  # fmt: skip
    try:
        require("matplotlib", "demo")
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        written += plots.draw(rows, out)
    print(f"written: {', '.join(map(str, written))}")


def _parser() -> argparse.ArgumentParser:
    """`pytest --benchmark` has the same options under its own prefix."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time every operator beside ports, compiler and copies; compare runs."
    )
    parser.add_argument("--shapes", metavar="LETTERS", help=f"of {''.join(SHAPES)}; default ABCDE, on CUDA ABCDEG")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a training step and a forward pass on one shape a letter")
    size.add_argument("--full", action="store_true", help="every operator, mode, dtype and format on every shape")
    parser.add_argument("--ops", nargs="+", metavar="OP", help=f"only these of {', '.join(OPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, metavar="N", help="of all providers in turn (default 15, 7 with --quick)")
    parser.add_argument("--compile", choices=("auto", *COMPILE), default="auto",
                        help="torch.compile of: nothing, the best form, every form; default: by case")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results.json, results.csv and plots")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a stored results.json; a regression exits with 1")
    parser.add_argument("--tolerance", type=float, default=report.TOLERANCE, metavar="SHARE",
                        help=f"of the stored ratio to the floor (default {report.TOLERANCE})")  # fmt: skip
    parser.add_argument("--slow-down", type=_slow_down, metavar="PROVIDER=FACTOR",
                        help="make a provider slower on purpose, to see the gate catch it")  # fmt: skip
    return parser


def _slow_down(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    try:
        value = float(factor)
    except ValueError:
        value = 0
    if not name or not 1 <= value < math.inf:  # nor nan
        raise argparse.ArgumentTypeError(f"takes PROVIDER=FACTOR with a finite factor of at least 1, got {text!r}")
    return name, value


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_status(lambda: command(options))
