"""Everything that needs a GPU, by one command, in a few minutes, with one report.

    python -m benchmarks.gpu_suite --out FOLDER [--minutes M] [--only STEP ...] [--quick] [--seed N] [--baseline FILE]

compile     kernels of the benchmark, by as many processes as there are cores, into the caches on disk
tests       `pytest -m "gpu and not slow"` under pytest-xdist, a random sample where the time does not allow all
memcheck    small steps under compute-sanitizer
racecheck   the same; races that sanitizer.py knows are no findings
bench       by priority (gpu_bench.py), compared with the stored run of this GPU
sweep       plans against their alternatives (sweep.py), where it is named or there are SWEEP_MINUTES for all

Each step has a share of the time that is left and ends with it; what it has done by then is in the report. FOLDER holds
report.md (a page), report.json (all), tests.jsonl and the like (a line for each test), bench/results.json and whole
outputs in logs; a later run with the same FOLDER begins with the tests that failed. Report and results are written as
they come. A step that fails does not stop the others; the exit code is 0 where all passed, 1 where one did not, 2 where
there is no GPU or an argument is wrong.
"""

import argparse
import importlib.util
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .installed import ROOT, ensure_installed, python_path

ensure_installed()

import drsn_kernels as dk  # noqa: E402

from . import gpu_report  # noqa: E402
from .gpu_report import Benchmark, Result  # noqa: E402
from .gpu_sampling import END  # noqa: E402
from .rows import environment as environment_of  # noqa: E402

BENCHMARKS = ROOT / "benchmarks"
SANITIZERS = ("memcheck", "racecheck")
# shares of the time of what is run
SHARES = {"compile": 12, "tests": 36, "memcheck": 12, "racecheck": 12, "bench": 28, "sweep": 30}
MINUTES, QUICK_MINUTES, SWEEP_MINUTES = 8.0, 3.0, 15.0
TAIL = 40  # lines of a step's output in report.json
EVERY_TEST = (str(ROOT / "tests"), "-m", "gpu and not slow", "--require-gpu")
SMALL_STEPS = (str(ROOT / "tests" / "test_gpu.py"), "-m", "gpu", "-k", "small_step", "--require-gpu")


@dataclass(frozen=True)
class Step:
    """A command, its share of the time and where it runs; or, with `absent`, why it does not."""

    name: str
    command: tuple[str, ...]
    share: float
    cwd: Path = ROOT
    env: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""


def stored_run(gpu: str) -> Path:
    """Where the benchmark of record for this GPU lies: NVIDIA H200 -> docs/benchmarks/nvidia-h200/results.json."""
    return ROOT / "docs" / "benchmarks" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") / "results.json"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


def _sanitizer() -> str | None:
    """compute-sanitizer comes with the CUDA toolkit, which need not be in PATH."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)])
    return shutil.which("compute-sanitizer", path=places)


def pytest_step(
    name: str, out: Path, seed: int, selection: Sequence[str], jobs: int, under: Sequence[str] = ()
) -> Step:
    """pytest with gpu_sampling.py; not from ROOT, where python -m would import the source tree. jobs 1: no xdist."""
    command = (
        *under, sys.executable, "-m", "pytest", *selection,
        "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--tb=short", "--continue-on-collection-errors",
        "-p", "no:cacheprovider", "-p", "gpu_sampling", "--suite-results", str(out / f"{name}.jsonl"),
        "--suite-earlier", str(out / f"{name}.earlier.jsonl"), "--suite-seed", str(seed),
        # a few tests at a time: the order holds, and no worker sits on long ones while others are done
        *(("-n", str(jobs), "--maxschedchunk", "2") if jobs > 1 else ("-p", "no:xdist")),
    )  # fmt: skip
    env = {"PYTHONPATH": python_path(BENCHMARKS)}
    if jobs > 1:
        env |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the workers have the cores
    if under:  # each tensor its own allocation: inside a block of torch's cache no access is out of bounds
        env |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(name, command, SHARES[name], out, env)


def steps(out: Path, quick: bool, seed: int, minutes: float, only: Sequence[str] | None = None) -> list[Step]:
    """What is run, in this order, in so many minutes: all, or only what is named."""
    bench = (sys.executable, "-m", "benchmarks.gpu_bench")
    sanitizer = _sanitizer()
    absent = "left out by --quick" if quick else "" if sanitizer else "compute-sanitizer is not present"
    found = [
        Step("compile", (*bench, "compile", "--jobs", str(cores())), SHARES["compile"],
             env={"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}),
        pytest_step("tests", out, seed, EVERY_TEST, cores() if has_xdist() else 1),
    ]  # fmt: skip
    for tool, options in zip(SANITIZERS, (("--error-exitcode", "99"), ("--racecheck-report", "analysis")), strict=True):
        under = (sanitizer or "compute-sanitizer", "--tool", tool, *options, "--print-limit", "0",
                 "--target-processes", "application-only")  # fmt: skip
        step = pytest_step(tool, out, seed, SMALL_STEPS, 1, under)
        found.append(Step(step.name, step.command, step.share, step.cwd, step.env, absent))
    found.append(Step("bench", (*bench, "time", "--out", str(out / "bench")), SHARES["bench"]))
    sweep = (sys.executable, "-m", "benchmarks.sweep", "--minutes", f"{minutes:g}", "--out", str(out / "sweep"))
    short = "" if minutes >= SWEEP_MINUTES or only else f"left out below {SWEEP_MINUTES:g} minutes"
    found.append(Step("sweep", sweep, SHARES["sweep"], absent=short))
    return [step for step in found if not only or step.name in only]


def run(step: Step, logs: Path, seconds: float) -> Result:
    """One step in a process group of its own, which ends with its time; the output goes to logs/NAME.log.

    The step is told to begin nothing new in its last seconds, so that it comes to its end by itself.
    """
    command = shlex.join(step.command)
    log = logs / f"{step.name}.log"
    start = time.monotonic()
    soft_end = time.time() + seconds - min(20, seconds / 5)
    with open(log, "wb") as output:
        try:
            process = subprocess.Popen(
                step.command, cwd=step.cwd, env={**os.environ, **step.env, END: str(soft_end)}, stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Result(step.name, command, "failed", limit=round(seconds, 1), tail=str(error))
        try:
            code = process.wait(seconds)
            state = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, state = None, "timed out"
        finally:  # what a step leaves running would share the GPU with the next one
            _end(process)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
    took = round(time.monotonic() - start, 1)
    return Result(step.name, command, state, code, took, round(seconds, 1), tail=tail)


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def allotted(chosen: Sequence[Step], left: float) -> float:
    """Seconds of the first step, of those left for all: what one leaves over, the others get."""
    shares = [0 if step.absent else step.share for step in chosen]
    return max(left, 0) * shares[0] / sum(shares)


def run_all(
    chosen: Sequence[Step], out: Path, deadline: float, environment: dict, baseline: Path | None = None,
    notes: Sequence[str] = (),
) -> int:  # fmt: skip
    """Run each until `deadline` (time.monotonic), keep the report up to date; 1 if one failed or was not reached."""
    logs, bench = out / "logs", Benchmark()
    logs.mkdir(parents=True, exist_ok=True)
    for step in chosen:
        if (results := out / f"{step.name}.jsonl").is_file():
            results.replace(out / f"{step.name}.earlier.jsonl")
    results = {step.name: Result(step.name, shlex.join(step.command), step.absent or "not reached") for step in chosen}
    gpu_report.write(out, environment, list(results.values()), bench, notes)
    for number, step in enumerate(chosen):
        left = deadline - time.monotonic()
        if step.absent or left <= 0:
            continue
        print(f"{step.name:12s}", end="", flush=True)
        result = run(step, logs, allotted(chosen[number:], left))
        log = logs / f"{step.name}.log"
        result, benchmark = gpu_report.examined(result, log.read_text(errors="replace"), out, baseline)
        results[step.name], bench = result, benchmark or bench
        print(f"{result.state}, {result.seconds:.0f} s of {result.limit:.0f}: {result.done}", flush=True)
        gpu_report.write(out, environment, list(results.values()), bench, notes)
    print("\n" + (out / "report.md").read_text(encoding="utf-8"))
    return int(any(result.is_bad for result in results.values()))


def describe_machine() -> dict:
    """What a reader of the report must know to read a figure in it."""
    found = {**environment_of("cuda"), "cuda": torch.version.cuda or f"hip {torch.version.hip}"}
    return found | {"python": platform.python_version(), "drsn_kernels": f"{dk.__version__} in {dk.__file__}"}


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"takes minutes from 1 to 1440, got {text!r}")
    return value


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description="Everything that needs a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the report, logs and results")
    parser.add_argument("--minutes", type=minutes, metavar="M",
                        help=f"for all of it (default {MINUTES:g}, {QUICK_MINUTES:g} with --quick)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=SHARES, metavar="STEP", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MINUTES:g} minutes, and no sanitizers")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sample of tests (default: drawn, and printed)")
    parser.add_argument("--baseline", type=Path, metavar="FILE",
                        help="stored run to compare with (default: docs/benchmarks/NAME/results.json)")  # fmt: skip
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device, which all of this needs; without one: make test", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    baseline, notes = (options.baseline or stored_run(gpu)).resolve(), []
    if options.baseline and not baseline.is_file():
        parser.error(f"--baseline must be a file that `python -m benchmarks` wrote, got {options.baseline}")
    if not baseline.is_file():
        notes = [f"Nothing was compared: there is no stored run of {gpu}, which would be {baseline.relative_to(ROOT)}."]
        print(f"::notice::{notes[0]}" if os.environ.get("GITHUB_ACTIONS") else notes[0])
    if not has_xdist():
        notes.append("pytest-xdist is not installed: the tests run one after the other.")
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    out = options.out.resolve()
    given = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    chosen, time_left = steps(out, options.quick, seed, given, options.only), 60 * given
    environment = describe_machine() | {"seed": seed}
    print(f"seed {seed}, {time_left / 60:g} minutes, report: {out / 'report.md'}")
    found = baseline if baseline.is_file() else None
    return run_all(chosen, out, start + time_left, environment, found, notes)


if __name__ == "__main__":
    sys.exit(main())
