"""What the Triton kernels become on each GPU, compiled without one: run by test_triton_lowering.py, and makes a table.

    python tests/lowered_plans.py --json FILE                        every case, as the tests read it
    python tests/lowered_plans.py --table FILE                       the same as a table

Triton must compile, not interpret, so this is a process of its own, without TRITON_INTERPRET=1. A case is one call in
one layout; it runs through the public operator and its backward pass, and every launch on the way is recorded. A new
kernel joins by cases appended to CASES in lowered_cases.py.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ptx
import torch
from lowered_cases import (
    CASES,
    F32,
    FIRST_STEPS,
    INSTRUCTIONS,
    SAMPLE,
    SIZES,
    Case,
    feature_map,
    tile_elements,
    tile_steps,
)
from torch.utils._python_dispatch import TorchDispatchMode

import drsn_kernels as dk
from drsn_kernels.ops import dispatch

CUDA = ("cuda:80", "cuda:90", "cuda:100")
TARGETS = (*CUDA, "hip:gfx942")
AMD_SHAPES = ((8, 16, 1024), (8, 16, 196), (4, 64, 28, 28))


# ---- running them ----------------------------------------------------------------------------------------------------


class FullSize(TorchDispatchMode):
    """Collects the aten operations that write a new tensor of at least a quarter of the feature map's size."""

    def __init__(self, elements: int):
        super().__init__()
        self.least, self.names = elements / 4, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and "empty" not in func.__name__:
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.numel() >= self.least:
                    self.names.append(str(func))
        return out


@contextlib.contextmanager
def watched(elements: int) -> Iterator[list[str]]:
    """The names of full-size aten operations. The operators are told that nobody watches, or they would step aside."""
    counted, dispatch._dispatch_modes = dispatch._dispatch_modes, lambda: 0
    try:
        with FullSize(elements) as mode:
            yield mode.names
    finally:
        dispatch._dispatch_modes = counted


def run_case(case: Case, launches: list) -> dict:
    call = case.make()
    elements = torch.Size(case.shape).numel()
    launches.clear()
    with watched(elements) as forward_ops:
        out = call()
    forward = list(launches)
    launches.clear()
    backward_ops: list[str] = []
    out = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if t is not None and t.requires_grad]
    if out:
        gradients = [torch.randn_like(t) for t in out]
        with watched(elements) as backward_ops:
            torch.autograd.backward(out, gradients)
    back = list(launches)
    return {
        "forward": [describe(launch, case) for launch in forward],
        "backward": [describe(launch, case) for launch in back],
        "full_size_ops": forward_ops + backward_ops,
        "launches": [[launch.kernel for launch in launches] for launches in (forward, back)],
        "budgeted": [[k for k in cost.kernels if not k.startswith("aten::")] for cost in case.cost()],
        "bytes": [(cost.read, cost.written) for cost in case.cost()],
    }


def describe(recorded, case: Case) -> dict:
    """What the tests and the table need, as JSON can hold it."""
    from drsn_kernels.backends.gpu.lowering import TARGETS as limits

    launch = ptx.Measured(recorded)
    pointers = sorted({name for access in launch.accesses for name in access.pointers})
    return {
        "kernel": recorded.kernel,
        "grid": recorded.grid,
        "warps": launch.num_warps,
        "registers": launch.registers,
        "stack": launch.stack,
        "shared": launch.shared,
        "shared_limit": limits[launch.target].shared_program,
        "occupancy": launch.occupancy,
        "instructions": _an_element(launch, tile_elements(recorded))
        if launch.target == CUDA[1] and case.name in INSTRUCTIONS
        else None,
        "widths": launch.widths,
        # straight-line code, and a turn of a loop
        "moved": {kind: [launch.moved(kind), launch.moved(kind, loop=True)] for kind in ("ld", "st")},
        "by_argument": {
            f"{kind} {name}": {
                "bytes": [launch.moved(kind, name), launch.moved(kind, name, loop=True)],
                "widths": sorted(launch.widths_of(kind, name)),
            }
            for name in pointers
            for kind in ("ld", "st")
        },
        "unattributed": sum(not access.attributed for access in launch.accesses),
        "tile_bytes": tile_elements(recorded) * case.dtype.itemsize,
        "steps": tile_steps(recorded),
    }


def _an_element(launch: ptx.Measured, tile: int) -> float | None:
    """Instructions for each element of a tile; None where a loop runs some of them again, or there is no tile."""
    each = tile / (32 * launch.num_warps)
    return launch.instructions / each if each and launch.instructions is not None else None


def compilations(target: str, first_steps: bool = True) -> dict[str, list[int]]:
    """Kernels compiled by a training step on one size after another, of SIZES and FIRST_STEPS."""
    from drsn_kernels.backends.gpu.lowering import lowering

    counts: dict[str, list[int]] = {}
    with lowering(target) as launches, dk.use_backend("triton", strict=True):
        for what, (make_gate, shapes) in (SIZES | (FIRST_STEPS if first_steps else {})).items():
            known: set[int] = set()
            counts[what] = []
            for shape in shapes:
                launches.clear()
                y = dk.shrink(feature_map(shape, F32).requires_grad_(), make_gate(shape[1]))
                y.backward(torch.randn_like(y))
                # Triton keeps every kernel that it has compiled, so no two have one id
                new = {id(launch.compiled) for launch in launches} - known
                counts[what].append(len(new))
                known |= new
    return counts


def lower(target: str, part: int = 0, parts: int = 1, names: Collection[str] | None = None) -> dict:
    """Every case for one GPU, by name, or those of `names`; or every `parts`th of them."""
    from drsn_kernels.backends.gpu.lowering import lowering

    torch.manual_seed(0)
    # nothing is asserted for AMD, so some of the cases will do
    cases = [case for case in CASES if target in CUDA or (case.dtype == F32 and case.shape in AMD_SHAPES)]
    cases = [case for case in cases if names is None or case.name in names][part::parts]
    with lowering(target) as launches, dk.use_backend("triton", strict=True):
        return {case.name: run_case(case, launches) for case in cases}


def collect(targets: tuple[str, ...] = TARGETS) -> dict:
    import triton
    from triton import knobs

    # processes: compiling holds the interpreter lock
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        counts = pool.submit(compilations, CUDA[1])
        halves = {target: [pool.submit(lower, target, part, 2) for part in range(2)] for target in targets}
        cases = {target: both[0].result() | both[1].result() for target, both in halves.items()}
        return {
            "triton": triton.__version__,
            "ptxas": knobs.nvidia.ptxas.version,
            "ptxas_blackwell": knobs.nvidia.ptxas_blackwell.version,
            "cases": cases,
            "compilations": counts.result(),
        }


def sample() -> dict:
    """The cases of SAMPLE for cuda:90, in this process: what the cases have compiled, the counting loads."""
    return {"cases": {CUDA[1]: lower(CUDA[1], names=SAMPLE)}, "compilations": compilations(CUDA[1], first_steps=False)}


# ---- the table -------------------------------------------------------------------------------------------------------

HEAD = """\
# What the Triton kernels become

What the compiler says, not what a GPU does (docs/inside/measurements.md). Compiled by Triton {triton}, ptxas {ptxas}
(cuda:80 and cuda:90) and {ptxas_blackwell} (cuda:100), through the launchers that production uses. Made by
`python tests/lowered_plans.py --table FILE`; `tests/test_triton_lowering.py` asserts what is a
budget: launches, bytes, widths, no spills.

Where the targets differ, a cell holds the values of cuda:80 / cuda:90 / cuda:100. All numbers are those of one program
or one of its threads.

* *tile*: elements of the feature map that a program works on at a time.
* *registers*, *stack*: a thread's; stack is what is spilled, in bytes. *gfx942*: vector registers there, not asserted.
* *shared*: bytes. *fit*: programs that one multiprocessor holds at a time, by registers, shared memory and threads.
* *loads*, *stores*: bytes a thread x instructions. *Bytes in, out*: what a program loads and stores outside of loops,
  then + what one turn of each of its loops does. Masked lanes count, and so does every thread that loads the same
  threshold or word of a bit plane as its neighbour does: an upper bound for all but the feature map.

| case | launch | grid | warps | tile | registers | stack | gfx942 | shared | fit | loads | stores | bytes in, out |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def table(results: dict) -> str:
    lines = [HEAD.format(**results)]
    for case in CASES:
        runs = [results["cases"][target][case.name] for target in CUDA]
        amd = results["cases"]["hip:gfx942"].get(case.name)
        for phase in ("forward", "backward"):
            for i, launches in enumerate(zip(*(run[phase] for run in runs), strict=True)):
                lines.append(_row(case, phase, launches, amd and amd[phase][i]))
    return "".join(lines)


def _row(case: Case, phase: str, launches: tuple[dict, ...], amd: dict | None) -> str:
    def cell(value: Callable[[dict], object]) -> str:
        values = [str(value(one)) for one in launches]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    cells = [
        case.name,
        f"{phase} `{launches[0]['kernel'].removesuffix('_kernel')}`",
        cell(lambda one: one["grid"][0]),
        cell(lambda one: one["warps"]),
        cell(lambda one: one["tile_bytes"] // case.dtype.itemsize or "-"),
        cell(lambda one: one["registers"]),
        cell(lambda one: one["stack"]),
        "" if amd is None else str(amd["registers"]),
        cell(lambda one: one["shared"]),
        cell(lambda one: one["occupancy"]),
        cell(lambda one: _widths(one, "ld")),
        cell(lambda one: _widths(one, "st")),
        cell(_bytes),
    ]
    return f"| {' | '.join(cells)} |\n"


def _bytes(launch: dict) -> str:
    once, turn = zip(launch["moved"]["ld"], launch["moved"]["st"], strict=True)
    return f"{once[0]}, {once[1]}" + (f" + {turn[0]}, {turn[1]}" if any(turn) else "")


def _widths(launch: dict, kind: str) -> str:
    return ", ".join(f"{width} x {count}" for width, count in launch["widths"].get(kind, {}).items()) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--sample", action="store_true", help="for cuda:90 alone, the cases that make test takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results for the tests")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args()
    results = sample() if options.sample else collect(tuple(options.targets))
    if options.json:
        options.json.write_text(json.dumps(results), encoding="utf-8")
    if options.table:
        options.table.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
