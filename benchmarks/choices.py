"""A step of Shrinkage kernel by kernel, as planned and under other numbers of tuned.py, on a GPU.

    python -m benchmarks.choices shrink_train-B-128x512x32-fp32-both --constants WIDE_SLICES=16 WIDE=32,WIDE_STAGES=1

For finding out where a step's time goes and what a change of plan does to each launch; sweep.py then compares whole
steps under a cold cache. Times are the profiler's, of launches one after the other with a warm cache; each alternative
is checked against float64 first. --compile only fills the caches on disk, by all cores.
"""

import argparse
import ast
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .installed import ensure_installed

ensure_installed()

from drsn_kernels.demo.timing import Call  # noqa: E402

from .cases import Case  # noqa: E402
from .clock import clock_for  # noqa: E402
from .gpu_bench import claimed, plan, said, shared_out  # noqa: E402
from .rows import environment  # noqa: E402
from .run import objection  # noqa: E402
from .sweep_calls import STEPS, subject, under  # noqa: E402

RUNS = 20


def constants_of(text: str) -> dict[str, Any]:
    """ "A=1,B='x'" -> {"A": 1, "B": "x"}; a value that is no literal is text."""
    found = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def kernels(call: Call) -> dict[str, tuple[float, float]]:
    """Microseconds of a call by kernel, and how often it is launched; the order is that of the first launches."""
    with call.setting():
        for _ in range(3):
            call.run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(RUNS):
                call.run()
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    return {name: (round(sum(times) / RUNS, 2), len(times) / RUNS) for name, times in found.items()}


def rows_of(case: Case, alternatives: list[dict[str, Any]], about: dict) -> list[dict]:
    """One for each alternative: the sum, by kernel, or why it is wrong."""
    on, clock, rows = subject(case, "cuda"), clock_for("cuda"), []
    for constants in alternatives:
        call = under(on.ours, constants)
        row = {"case": case.id, "constants": constants, "commit": about["commit"], "device": about["device"]}
        try:
            if (wrong := objection(on.judge, call, clock)) is not None:
                row["wrong"] = wrong
            row["kernels"] = kernels(call)
            row["us"] = round(sum(us for us, _ in row["kernels"].values()), 1)
        except Exception as error:
            row["wrong"] = f"raised {said(error)}"
        rows.append(row)
        shown = ", ".join(f"{name[:30]} {us:.1f}" for name, (us, _) in row.get("kernels", {}).items())
        print(case.id, constants, row.get("us", ""), row.get("wrong", ""), shown, sep="  ", flush=True)
    return rows


def compile_all(cases: list[Case], alternatives: list[dict[str, Any]], claims: Path) -> int:
    for case in cases:
        for number, constants in enumerate(alternatives):
            if claimed(f"{case.id}-{number}", claims):
                try:
                    under(subject(case, "cuda").ours, constants).once()
                except Exception as error:
                    print(f"{case.id} {constants}: {said(error)}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", metavar="ID", help="steps of gpu_bench's plan")
    parser.add_argument("--constants", nargs="+", default=[], type=constants_of, metavar="NAME=VALUE[,...]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows as JSON")
    parser.add_argument("--compile", action="store_true", help="fill the caches only")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = {case.id: case for case in plan() if case.op in STEPS}
    if unknown := set(options.cases) - known.keys():
        parser.error(f"takes ids of steps of the plan, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("error: there is no CUDA device, which this needs", file=sys.stderr)
        return 2
    cases, alternatives = [known[name] for name in options.cases], [{}, *options.constants]
    if options.compile:
        if options.claims is None:
            jobs = len(os.sched_getaffinity(0))
            return shared_out("benchmarks.choices", arguments or sys.argv[1:], jobs, {"OMP_NUM_THREADS": "1"})
        return compile_all(cases, alternatives, options.claims)
    about, rows = environment("cuda"), []
    for case in cases:
        rows += rows_of(case, alternatives, about)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return int(any("wrong" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
