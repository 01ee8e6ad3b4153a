"""The benchmark on a GPU, by priority: as many cases as the time allows, rows written as they come.

    python -m benchmarks.gpu_bench compile [--jobs N]       fill the disk caches of Triton and inductor, case by case
    python -m benchmarks.gpu_bench time --out FOLDER        FOLDER/results.json and refused.json

Both go through plan() in its order and begin no case after the moment in the environment's GPU_SUITE_END (seconds since
the epoch). Timing is that of `python -m benchmarks`: each provider checked, all of a case in turn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .calls import Provider, backends_for, build, providers
from .cases import NETWORK, NETWORKS, Case, select
from .gpu_sampling import device_is_lost, end
from .rows import environment, write_json
from .run import HEADER, Settings, lines, measure, said

ROUNDS = 7
HEADLINES: list[tuple[str, list[tuple[int, ...]], tuple[str, ...], bool]] = [
    # group, shapes, dtypes, channels last: a training step and a forward pass in eval of each
    ("G", [(512, 64, 256), (4096, 16, 128)], ("fp32", "bf16"), False),
    ("A", [(128, 64, 1024), (128, 512, 128)], ("fp32", "bf16"), False),
    ("C", [(128, 16, 128), (64, 128, 32)], ("fp32",), False),
    ("E", [(64, 64, 56, 56), (64, 512, 7, 7)], ("fp32",), False),
    ("E", [(64, 64, 56, 56)], ("bf16",), True),
    ("D", [(16, 64, 4800), (16, 1024, 300)], ("fp32",), False),
    ("B", [(128, 64, 256), (128, 512, 32)], ("fp32",), False),
]


def headlines() -> list[Case]:
    """One large and one awkward shape of each group."""
    return [
        Case(op, group, shape, mode, dtype, channels_last)
        for group, shapes, dtypes, channels_last in HEADLINES
        for shape in shapes
        for dtype in dtypes
        for op, mode in (("shrink_train", "both"), ("shrink_eval", "forward"))
    ]


def plan() -> list[Case]:
    """The headlines, the networks, then of the standard grid whole steps, and the rest."""
    first = [*headlines(), *(Case(op, "N", NETWORK[op][1][0], "step") for op in NETWORKS)]
    grid = select("GACEDB", "standard", "cuda")
    whole = [case for case in grid if case.mode == ("forward" if case.op == "shrink_eval" else "both")]
    return list(dict.fromkeys([*first, *whole, *grid]))


def wanted(case: Case, device: str, compiled: str = "best") -> list[Provider]:
    """The floor, the port, the best form, also compiled unless it is a network, and our preferred backend."""
    ours = backends_for(device, case.torch_dtype)[0]
    found = providers(case, device, "none" if case.op in NETWORKS else compiled)
    return [provider for provider in found if provider.form != "ours" or provider.backend == ours]


# ---- compiling -------------------------------------------------------------------------------------------------------


def claimed(name: str, claims: Path) -> bool:
    """Whether this process is the first to ask for what is called so."""
    try:
        (claims / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def shared_out(module: str, arguments: Sequence[str], jobs: int, env: Mapping[str, str] | None = None) -> int:
    """`python -m module arguments --claims FOLDER` in so many processes, which share the work out by claims there."""
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, "-m", module, *arguments, "--claims", claims]
        children = [subprocess.Popen(command, env={**os.environ, **(env or {})}) for _ in range(jobs)]
        return int(any([child.wait() for child in children]))


def compile_cases(cases: list[Case], options: argparse.Namespace) -> int:
    """Each call of each case once, in as many processes as asked for; what fails shows again when it is timed."""
    if options.claims is None:
        return shared_out("benchmarks.gpu_bench", sys.argv[1:], options.jobs)
    for case in cases:
        if time.time() > end():
            break
        if not claimed(case.id, options.claims):
            continue
        begin = time.time()
        torch._dynamo.reset()
        try:
            calls, _, _ = build(case, wanted(case, options.device, options.compile), options.device)
            for name, call in calls.items():
                try:
                    call.once()
                except Exception as error:
                    print(f"{case.id} {name}: {said(error)}", flush=True)
        except Exception as error:
            print(f"{case.id}: {said(error)}", flush=True)
        if device_is_lost():
            return 1
        print(f"{case.id} {time.time() - begin:.1f} s", flush=True)
    return 0


# ---- timing ----------------------------------------------------------------------------------------------------------


def time_cases(cases: list[Case], options: argparse.Namespace) -> int:
    settings, about = Settings(options.device, options.rounds), environment(options.device)
    rows: list[dict] = []
    refused: dict[str, dict[str, str]] = {}
    took: list[float] = []
    options.out.mkdir(parents=True, exist_ok=True)
    results, refusals = options.out / "results.json", options.out / "refused.json"
    for earlier in (results, refusals):
        earlier.unlink(missing_ok=True)
    print(HEADER)
    for number, case in enumerate(cases):
        begin = time.time()
        if begin + max(took[1:], default=0) > end():  # the first one loads what all need
            print(f"out of time before {case.id}, {len(cases) - number} of {len(cases)} cases left")
            break
        try:
            new, wrong = measure(case, settings, about, wanted(case, options.device, options.compile))
        except Exception as error:
            new, wrong = [], {"all": f"raised {said(error)}"}
        took.append(time.time() - begin)
        rows += new
        print(f"{case.id} {took[-1]:.1f} s", *lines(new, wrong), sep="\n", flush=True)
        if rows:
            part = write_json(results.with_suffix(".part"), rows, "python -m benchmarks.gpu_suite")
            part.replace(results)  # whole at any moment: the process may be ended in the next one
        if wrong:
            refused[case.id] = wrong
            refusals.write_text(json.dumps(refused, indent=1) + "\n", "utf-8")
        if device_is_lost():
            print("a kernel's error has made the device unusable in this process")
            return 1
    return int(bool(refused))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description="The benchmark by priority.")
    parser.add_argument("what", choices=("compile", "time"))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results of `time`")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="only these of the plan")
    parser.add_argument("--compile", choices=("none", "best"), default="best", help="torch.compile of the best form")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cases = plan()
    if options.cases:
        if unknown := set(options.cases) - {case.id for case in cases}:
            parser.error(f"--cases takes ids of the plan, got {', '.join(sorted(unknown))}")
        cases = [case for case in cases if case.id in options.cases]
    if options.what == "compile":
        return compile_cases(cases, options)
    if options.out is None:
        parser.error("`time` needs --out FOLDER")
    return time_cases(cases, options)


if __name__ == "__main__":
    sys.exit(main())
