"""Everything that needs a GPU, by one command and with one report.

    python -m benchmarks.gpu_suite --out FOLDER [--only STEP ...] [--quick] [--baseline FILE]

FOLDER/report.md and report.json: GPU, driver, versions and commit, then each step with its command, exit code,
seconds and the end of its output; whole outputs lie in FOLDER/logs, the benchmark's files in FOLDER/bench. The report
is written anew after each step, so a run that is cut short still tells what it did. A step that fails does not stop the
others; the exit code is 0 where all passed, 1 where one did not, 2 where there is no GPU or an argument is wrong.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import drsn_kernels as dk

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck")
TAIL = 40  # lines of a step's output that the report shows


@dataclass(frozen=True)
class Step:
    """A command, where it runs and for how long at most; or, with `absent`, why it does not."""

    name: str
    command: tuple[str, ...]
    seconds: float
    cwd: Path = ROOT
    env: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""


@dataclass(frozen=True)
class Result:
    name: str
    command: str
    state: str  # "passed", "failed", "timed out", "not reached", or why there was nothing to run
    exit_code: int | None = None
    seconds: float = 0.0
    tail: str = ""

    @property
    def is_bad(self) -> bool:
        return self.state in ("failed", "timed out", "not reached")


def stored_run(gpu: str) -> Path:
    """Where the benchmark of record for this GPU lies: NVIDIA H200 -> docs/benchmarks/nvidia-h200/results.json."""
    return ROOT / "docs" / "benchmarks" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") / "results.json"


def _sanitizer() -> str | None:
    """compute-sanitizer comes with the CUDA toolkit, which need not be in PATH."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)])
    return shutil.which("compute-sanitizer", path=places)


def steps(out: Path, quick: bool, baseline: Path | None) -> list[Step]:
    """What is run, in this order; with a baseline the benchmark is compared with it and a regression fails."""
    # not from ROOT: python -m would import the source tree there, where nothing is compiled
    pytest = (sys.executable, "-m", "pytest", str(ROOT / "tests"), "-c", str(ROOT / "pyproject.toml"),
              "--rootdir", str(ROOT), "-m", "gpu", "--require-gpu")  # fmt: skip
    bench = (sys.executable, "-m", "drsn_kernels", "bench", "--device", "cuda", "--out", str(out / "bench"))
    bench += (("--quick",) if quick else ()) + (("--compare", str(baseline)) if baseline else ())
    sanitizer = _sanitizer()
    absent = "left out by --quick" if quick else "" if sanitizer else "compute-sanitizer is not present"
    # each tensor its own allocation: inside a block of torch's cache no access is out of bounds
    checked = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("tests", (*pytest, "-k", "not gradients", "--junit-xml", str(out / "tests.xml")), 3600, out),
        Step("gradients", (*pytest, "-k", "gradients", "--junit-xml", str(out / "gradients.xml")), 1800, out),
        *(
            Step(tool, (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *pytest,
                        "-k", "small_step"), 1800, out, checked, absent)
            for tool in SANITIZERS
        ),
        Step("bench", bench, 900 if quick else 3600, out),
        # on a machine with a GPU too, this one is about the host: kernels are compiled, launches recorded
        Step("launches", (sys.executable, "-m", "benchmarks.launches"), 600, ROOT, {"TRITON_INTERPRET": "0"}),
    ]  # fmt: skip


def run(step: Step, logs: Path) -> Result:
    """One step in a process group of its own, which ends with its time; the output goes to logs/NAME.log."""
    command = shlex.join(step.command)
    if step.absent:
        return Result(step.name, command, step.absent)
    log = logs / f"{step.name}.log"
    start = time.monotonic()
    with open(log, "wb") as output:
        try:
            process = subprocess.Popen(
                step.command, cwd=step.cwd, env={**os.environ, **step.env}, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Result(step.name, command, "failed", None, 0.0, str(error))
        try:
            code = process.wait(step.seconds)
            state = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, state = None, "timed out"
        finally:  # what a step leaves running would share the GPU with the next one
            _end(process)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
    return Result(step.name, command, state, code, round(time.monotonic() - start, 1), tail)


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def write_report(out: Path, environment: dict, results: Sequence[Result], notes: Sequence[str]) -> None:
    passed = not any(r.is_bad for r in results)
    report = {"passed": passed, "environment": environment, "notes": list(notes), "steps": [asdict(r) for r in results]}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = ["# What needs a GPU: " + ("passed" if passed else "failed"), "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in environment.items()]
    lines += ["", *(f"{note}\n" for note in notes), "| step | result | exit code | seconds |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.state} | {'' if r.exit_code is None else r.exit_code} | {r.seconds} |" for r in results]
    for r in results:
        lines += ["", f"## {r.name}: {r.state}", "", f"`{r.command}`"]
        if r.tail:
            fence = "`" * (max(map(len, re.findall("`+", r.tail)), default=0) + 3)
            lines += ["", f"{fence}text", r.tail, fence]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_all(chosen: Sequence[Step], out: Path, environment: dict, notes: Sequence[str] = ()) -> int:
    """Run each, keep the report up to date; 1 if a step failed or took too long, 0 otherwise."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = {step.name: Result(step.name, shlex.join(step.command), "not reached") for step in chosen}
    for step in chosen:
        print(f"{step.name:12s}", end="", flush=True)
        results[step.name] = result = run(step, logs)
        print(f"{result.state}, {result.seconds:.0f} s", flush=True)
        write_report(out, environment, list(results.values()), notes)
    print(f"report: {out / 'report.md'}")
    return int(any(r.is_bad for r in results.values()))


def describe_machine() -> dict:
    """What a reader of the report must know to read a figure in it."""
    from drsn_kernels.bench import record

    found = {**record.environment("cuda"), "cuda": torch.version.cuda or f"hip {torch.version.hip}"}
    return found | {"python": platform.python_version(), "drsn_kernels": f"{dk.__version__} in {dk.__file__}"}


def main(arguments: list[str] | None = None) -> int:
    names = [step.name for step in steps(Path(), False, None)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description="Everything that needs a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the report, logs and results")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="a short benchmark, and no sanitizers")
    parser.add_argument("--baseline", type=Path, metavar="FILE",
                        help="stored run to compare with (default: docs/benchmarks/NAME/results.json)")  # fmt: skip
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device, which all of this needs; without one: make test", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    baseline, notes = (options.baseline or stored_run(gpu)).resolve(), []
    if options.baseline and not baseline.is_file():
        parser.error(f"--baseline must be a file that `python -m drsn_kernels bench` wrote, got {options.baseline}")
    if not baseline.is_file():
        notes = [f"Nothing was compared: there is no stored run of {gpu}, which would be {baseline.relative_to(ROOT)}."]
        print(f"::notice::{notes[0]}" if os.environ.get("GITHUB_ACTIONS") else notes[0])
    out = options.out.resolve()
    chosen = steps(out, options.quick, baseline if baseline.is_file() else None)
    chosen = [step for step in chosen if not options.only or step.name in options.only]
    return run_all(chosen, out, describe_machine(), notes)


if __name__ == "__main__":
    sys.exit(main())
