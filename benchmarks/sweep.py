"""Every choice of a plan timed against its alternatives on a GPU, and the numbers in tuned.py that follow from it.

    python -m benchmarks.sweep [--minutes M] [--out FOLDER]     time; FOLDER/rows.json, refused.json and table.md
    python -m benchmarks.sweep --only DEPENDENT STEP            the choices of these constants alone
    python -m benchmarks.sweep --derive FOLDER/rows.json        the lines to paste into tuned.py, each with its reason

CHOICES is the table of alternatives: other values of the numbers in tuned.py, for the launches that they govern. A unit
is one launch, or one step of Shrinkage, on one input: all alternatives whose launches differ are checked against
float64 and timed in turn, as CUDA graphs, beside a copy. Units come in the order of what they tell, so that a run
which ends early has the shapes of gpu_bench's headlines; torch.compile comes after those.

Kernels are compiled first, by as many processes as there are cores, for at most COMPILING of the time. Rows are
written after each unit, and a later run with the same FOLDER, GPU and kernels goes on where the one before ended.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .installed import ensure_installed

ensure_installed()

from drsn_kernels.backends import gpu  # noqa: E402
from drsn_kernels.backends.gpu import tuned  # noqa: E402
from drsn_kernels.demo.timing import Call, interleaved  # noqa: E402

from . import derive  # noqa: E402
from .calls import floor_bytes  # noqa: E402
from .cases import SHAPES, Case  # noqa: E402
from .clock import clock_for  # noqa: E402
from .gpu_bench import claimed, headlines, said, shared_out  # noqa: E402
from .gpu_sampling import END, device_is_lost, end  # noqa: E402
from .rows import environment, read_json, row, table, write_json  # noqa: E402
from .run import objection  # noqa: E402
from .sweep_calls import BEST, STEPS, STREAMS, Subject, subject, under  # noqa: E402

# ---- what is compared ------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Alternatives for the same constants, which are chosen together. What the tree has is always timed as well."""

    ops: tuple[str, ...]
    alternatives: tuple[dict[str, Any], ...]
    governs: Callable[[Case], bool] = lambda case: True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.alternatives[0])


def _ragged(case: Case) -> bool:
    """Whether rows are not aligned to 16 bytes."""
    inner = case.shape[1] if case.channels_last else case.numel // (case.shape[0] * case.shape[1])
    return inner * case.torch_dtype.itemsize % 16 != 0


def _overlaps() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


CHOICES: tuple[Choice, ...] = (
    # streams
    Choice(
        STREAMS,
        tuple({"THREAD": thread, "TILE": tile} for thread, tile in
              ((32, 512), (64, 256), (64, 512), (64, 1024), (64, 2048), (128, 1024))),
    ),
    Choice(STREAMS, tuple({"WHOLE": whole, "PART": part} for whole, part in ((4, 4), (8, 2), (8, 4), (8, 8), (16, 8)))),
    Choice(STREAMS, ({"MOST_WARPS": 4}, {"MOST_WARPS": 8})),
    Choice(
        STREAMS,
        tuple({"SHARED": tiles, "CHANNELS": channels} for tiles in (2, 4, 8) for channels in (64, 128, 256)),
        lambda case: case.channels_last,
    ),
    Choice(STREAMS, tuple({"SHARED_THREAD": held} for held in (16, 32, 64)), lambda case: case.channels_last),
    Choice(
        STREAMS,
        tuple({"RAGGED_THREAD": thread, "RAGGED": tiles} for thread, tiles in ((4, 1), (8, 1), (8, 2), (8, 4))),
        _ragged,
    ),
    Choice(
        ("reduce", "grad_dtau"),
        tuple({"PROGRAMS_PER_SM": n, "PIECE": piece} for n in (2, 4, 8) for piece in (2048, 4096, 8192)),
    ),
    Choice(STREAMS, tuple({"SPARSE": part} for part in (1.25, 1.5, 2.0))),
    # whether launches begin while the one before ends, which GPUs before 9.0 cannot; and behind how many programs
    Choice(STEPS, ({"DEPENDENT": False}, {"DEPENDENT": True}), lambda case: _overlaps()),
    Choice(STEPS, tuple({"LETTING": most} for most in (0, 1024, 4096, 1 << 20)), lambda case: _overlaps()),
    Choice(STEPS[:1], tuple({"COUNTED_WARPS": most} for most in (0, 2, 8)), lambda case: _overlaps()),
    Choice(STEPS, ({"HELD": False}, {"HELD": True})),
    # the gate: fused up to so many channels and products, beyond them called (cuBLAS); then its tiles
    Choice(STEPS, tuple({"MOST_CHANNELS": c} for c in (0, 64, 128, 256, 512, 1024))),
    Choice(STEPS, tuple({"MOST_PRODUCTS": 1 << power} for power in (22, 24, 26, 28))),
    Choice(
        STEPS,
        tuple({"GATE_SAMPLES": n, "GATE_TILE": tile} for n, tile in ((16, 16), (32, 16), (32, 32), (64, 16))),
    ),
    Choice(STEPS, tuple({"MIDDLE": middle} for middle in ((64, 512), (128, 512), (128, 1024), (1024, 1024)))),
    Choice(STEPS, tuple({"WIDE_STAGES": stages} for stages in (2, 3, 4))),
    Choice(STEPS, tuple({"WIDE_SLICES": slices} for slices in (4, 8))),
    Choice(STEPS[:1], ({"BACK_DEPTH": 32}, {"BACK_DEPTH": 64})),
    Choice(STEPS, ({"GATE_DEPTH": 32}, {"GATE_DEPTH": 64})),
    Choice(STEPS, ({"WIDE_DEPTH": 32}, {"WIDE_DEPTH": 64})),
    Choice(STEPS, ({"WIDE_SAMPLES": 16}, {"WIDE_SAMPLES": 32})),
    Choice(STEPS, ({"FORWARD_PRECISION": "ieee"}, {"FORWARD_PRECISION": "tf32x3"})),
    Choice(STEPS[:1], ({"BACKWARD_PRECISION": "ieee"}, {"BACKWARD_PRECISION": "tf32x3"})),
    Choice(STEPS[:1], ({"WEIGHT_PRECISION": "ieee"}, {"WEIGHT_PRECISION": "tf32x3"})),
    Choice(STEPS[:1], tuple({"WEIGHT_TILES": n} for n in (16, 64, 256))),
    Choice(STEPS[:1], tuple({"LOGITS_APART": n} for n in (64, 128, 1024)), lambda case: case.shape[1] > 64),
    Choice(STEPS, ({"GATE_WARPS": 4}, {"GATE_WARPS": 8})),
    Choice(STEPS[:1], tuple({"STEP": n, "GATE_WALK": walk} for n in (32, 64) for walk in (64, 128, 256, 512))),
    Choice(STEPS[:1], tuple({"MERGED_BY_ALL": n, "MOST_GROUPS": m} for n in (0, 64) for m in (32, 128))),
    Choice(("shrink_eval",), tuple({"WHOLE_GATE": most, "WHOLE_WARPS": n} for most, n in ((0, 8), (64, 4), (64, 8)))),
    # one pass: whole samples in registers, walked from L2 too, or neither, which leaves several launches
    Choice(
        ("shrink_eval",),
        tuple({"ON_CHIP": held, "L2_BYTES": walked} for held in (0, 8192, 16384) for walked in (0, 36 << 20)),
    ),
    Choice(("shrink_eval",), tuple({"CROWDED_BYTES": kib << 10} for kib in (8, 16, 32, 1 << 20))),  # the last: never
    Choice(
        ("shrink_eval",),
        tuple({"WALKED": tile, "CROWDED_REGISTERS": registers} for tile, registers in
              ((4096, 64), (4096, 80), (4096, 128), (8192, 128))),
    ),
    Choice(("shrink_eval",), ({"PRODUCTS": 8}, {"PRODUCTS": 16}, {"PRODUCTS": 32})),
    Choice(("shrink_eval",), ({"ONE_PASS_UNITS": 32}, {"ONE_PASS_UNITS": 64})),
    Choice(("shrink_eval",), ({"ONE_PASS_CHANNELS": 64}, {"ONE_PASS_CHANNELS": 128})),
)  # fmt: skip


def present(case: Case) -> dict[str, Any]:
    """The values, now, of every constant that is compared on this case."""
    return {name: getattr(tuned, name) for choice in of(case) for name in choice.names}


def of(case: Case) -> list[Choice]:
    return [choice for choice in CHOICES if case.op in choice.ops and choice.governs(case)]


def alternatives(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the tree has, then all that differs from it in one choice: the name of its rows, and the constants."""
    now = present(case)
    yield PLANNED, {}
    for choice in of(case):
        for other in choice.alternatives:
            if any(now[name] != value for name, value in other.items()):
                yield " ".join(f"{name}={value}" for name, value in other.items()), other


# ---- units -----------------------------------------------------------------------------------------------------------

PLANNED = "as planned"
DTYPES = ("fp32", "bf16")
ROUNDS = 5
COMPILING = 0.4  # of the time, at most
COMPILED = True  # whether torch.compile is timed beside; not where some constants alone are compared
MINUTES = 5.0


class Unit(NamedTuple):
    """One case: its alternatives, or what torch.compile makes of the best form beside what the tree has."""

    case: Case
    compiled: bool = False

    @property
    def id(self) -> str:
        return f"{self.case.id}{'-compiled' if self.compiled else ''}"


def _cases(group: str, shape: tuple[int, ...], channels_last: bool) -> list[Case]:
    return [
        Case(op, group, shape, "both" if op == "shrink_train" else "forward", dtype, channels_last)
        for dtype in DTYPES
        for op in (*STREAMS, *STEPS)
    ]


def units() -> list[Unit]:
    """Headlines, steps under torch.compile on them, other shapes, channels_last, and streams under torch.compile."""
    shapes = dict.fromkeys((case.group, case.shape, case.channels_last) for case in headlines())
    first = [case for one in shapes for case in _cases(*one)]
    rest = [case for group in "GACEDB" for shape in SHAPES[group] for case in _cases(group, shape, False)]
    rest += [case for shape in SHAPES["E"] for case in _cases("E", shape, True)]
    ordered = [*map(Unit, first), *(Unit(case, True) for case in first if case.op in STEPS), *map(Unit, rest)]
    ordered += [Unit(case, True) for case in first if case.op in STREAMS]
    return [unit for unit in dict.fromkeys(ordered) if of(unit.case) and (COMPILED or not unit.compiled)]


def distinct(on: Subject, case: Case) -> Iterator[tuple[str, dict[str, Any], Call, str]]:
    """(name, constants, call, name of an earlier one that makes the same launches or "")."""
    seen: dict[tuple, str] = {}
    for name, constants in alternatives(case):
        with tuned.using(**constants):
            launches = on.planned()
        same = seen.setdefault(launches, name) if launches else name  # without launches of ours nothing can be said
        yield name, constants, under(on.ours, constants), "" if same == name else same


def measure(unit: Unit, about: dict, make: Callable[..., Subject] = subject, clock_of: Callable = clock_for):
    """The rows of a unit; and for each alternative without one, why."""
    case, refused, same = unit.case, {}, {}
    torch._dynamo.reset()
    on, clock = make(case, "cuda", unit.compiled), clock_of("cuda")
    calls, constants = {"floor": on.floor}, {}  # of what is a plan of ours
    for name, changed, call, twin in () if unit.compiled else distinct(on, case):
        calls[name], constants[name], same[name] = call, changed, twin
    if unit.compiled:
        calls |= {PLANNED: on.ours, BEST.name: on.best}
        constants[PLANNED] = {}
    for name, call in list(calls.items()):
        if same.get(name):
            del calls[name]
        elif name != "floor" and (why := objection(on.judge, call, clock)) is not None:
            refused[name] = why
            del calls[name]
        elif clock.way(call) != "graph":
            refused[name] = "cannot be captured in a CUDA graph"
            del calls[name]
    samples = interleaved(calls, ROUNDS, clock.graph, warmup=1)
    now, rows = present(case), []
    moved = floor_bytes(case) if case.op in STEPS else 2 * case.bytes
    for name in (*calls, *(name for name, twin in same.items() if twin)):
        timed = samples.get(same.get(name) or name)
        if timed is None:  # it is as another that was refused
            continue
        made = row(case, name, "graph", timed["gpu"], [], samples["floor"]["gpu"], moved, {}, {}, about)
        by = now | constants[name] if name in constants else {}
        rows.append(made | {"constants": by, "same_as": same.get(name, "")})
    return rows, refused


# ---- the two halves of a run -----------------------------------------------------------------------------------------


def compile_units(todo: list[Unit], claims: Path) -> int:
    """Each distinct launch once, for the caches on disk; what fails shows again when it is timed."""
    for unit in todo:
        if time.time() > end():
            break
        if not claimed(unit.id, claims):
            continue
        torch._dynamo.reset()
        try:
            on = subject(unit.case, "cuda", unit.compiled)
            if unit.compiled:
                on.best.once()
            for *_, call, twin in distinct(on, unit.case):
                if not twin:
                    call.once()
        except Exception as error:
            print(f"{unit.id}: {said(error)}", flush=True)
        if device_is_lost():
            return 1
    return 0


def time_units(
    todo: list[Unit], out: Path, until: float, about: dict, measured: Callable = measure, now: Callable = time.time
) -> int:
    """Rows of one unit after the other until the time is up; 1 where an alternative was wrong."""
    rows, refused = earlier(out, about)
    done = {(one["case"], one["provider"] == BEST.name) for one in rows if one["provider"] in (PLANNED, BEST.name)}
    todo = [unit for unit in todo if (unit.case.id, unit.compiled) not in done]
    longest = {True: 0.0, False: 0.0}
    for number, unit in enumerate(todo):
        begin = now()
        if begin + longest[unit.compiled] > until:
            print(f"out of time before {unit.id}, {len(todo) - number} of {len(todo)} units left")
            break
        try:
            new, wrong = measured(unit, about)
        except Exception as error:
            new, wrong = [], {"all": f"raised {said(error)}"}
        if number:  # the first one loads what all need
            longest[unit.compiled] = max(longest[unit.compiled], now() - begin)
        rows += [one for one in new if not unit.compiled or one["provider"] == BEST.name]
        refused |= {unit.id: wrong} if wrong else {}
        _keep(out, rows, refused)
        print(f"{unit.id}: {len(new)} rows" + "".join(f"\n  {n} WRONG: {why}" for n, why in wrong.items()), flush=True)
        if device_is_lost():
            print("a kernel's error has made the device unusable in this process")
            return 1
    return int(bool(refused))


def kernels() -> str:
    """What the rows are of: a digest of the kernels' sources and of these alternatives."""
    files = [*sorted(Path(gpu.__file__).parent.glob("*.py")), Path(__file__), Path(derive.__file__)]
    compared = repr([choice.names for choice in CHOICES]).encode()
    return hashlib.sha256(b"".join([*(path.read_bytes() for path in files), compared])).hexdigest()[:12]


def earlier(out: Path, about: dict) -> tuple[list[dict], dict]:
    """Rows and refusals of a run before this one, of the same GPU and kernels; none where they are of others."""
    path, refusals = out / "rows.json", out / "refused.json"
    rows = read_json(path) if path.is_file() else []
    kept = [one for one in rows if all(one.get(name) == about[name] for name in ("device", "kernels"))]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows of other kernels or another GPU in {path} are replaced")
        return [], {}
    return kept, json.loads(refusals.read_text("utf-8")) if rows and refusals.is_file() else {}


def _keep(out: Path, rows: list[dict], refused: dict) -> None:
    """Whole at any moment: the process may be ended in the next one."""
    if rows:
        write_json(out / "rows.part", rows, "python -m benchmarks.sweep").replace(out / "rows.json")
    (out / "refused.json").write_text(json.dumps(refused, indent=1) + "\n", "utf-8")


def summary(rows: list[dict]) -> str:
    """Tables of GPU time by launch, and what follows for tuned.py."""
    lines = ["# Plans against their alternatives", "", f"{rows[0]['device']}, commit {rows[0]['commit']}", ""]
    for op in (*STREAMS, *STEPS):
        if found := [one for one in rows if one["op"] == op]:
            lines += table(f"{op}: GPU time in a CUDA graph, cold L2, milliseconds.", found, "median_ms")
    return "\n".join([*lines, "", "```", *derive.lines(rows, [choice.names for choice in CHOICES]), "```", ""])


# ---- the command -----------------------------------------------------------------------------------------------------


def restrict(names: list[str]) -> None:
    """Compare these constants only, and those that are chosen together with them."""
    global CHOICES, COMPILED
    if unknown := sorted(set(names) - {name for choice in CHOICES for name in choice.names}):
        raise ValueError(f"--only takes constants that the sweep compares, got {', '.join(unknown)}")
    CHOICES = tuple(choice for choice in CHOICES if not set(choice.names).isdisjoint(names))
    COMPILED = False


def main(arguments: list[str] | None = None) -> int:
    start = time.time()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help=f"for all of it ({MINUTES:g})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for rows and table (sweep-out, sweep-only-out)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="compare these numbers of tuned.py (all)")
    parser.add_argument("--derive", type=Path, metavar="FILE", help="rows.json of a run: print lines for tuned.py")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.derive:
        try:
            rows = read_json(options.derive)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print("\n".join(derive.lines(rows, [choice.names for choice in CHOICES])))
        return 0
    if options.only:
        try:
            restrict(options.only)
        except ValueError as error:
            parser.error(str(error))
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if not torch.cuda.is_available():
        print("error: there is no CUDA device, which the sweep needs", file=sys.stderr)
        return 2
    if options.claims:
        return compile_units(units(), options.claims)
    options.out = options.out or Path("sweep-only-out" if options.only else "sweep-out")
    until = min(end(), start + 60 * options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    env = {END: str(start + COMPILING * (until - start)), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    shared_out("benchmarks.sweep", ["--only", *options.only] if options.only else [], options.jobs, env)
    print(f"compiled in {time.time() - start:.0f} s")
    failed = time_units(units(), options.out, until, environment("cuda") | {"kernels": kernels()})
    if not (options.out / "rows.json").is_file():
        print(f"nothing was timed in {options.minutes:g} minutes")
        return 1
    rows = read_json(options.out / "rows.json")
    (options.out / "table.md").write_text(summary(rows), "utf-8")
    print("\n".join(derive.lines(rows, [choice.names for choice in CHOICES])))
    return failed


if __name__ == "__main__":
    sys.exit(main())
