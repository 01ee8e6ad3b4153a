"""What launches of the Triton backend should take on an H200, predicted without one.

    python -m benchmarks.model                the tables of docs/inside/gpu.md, written there between their markers
    python -m benchmarks.model --cases ID     a case, and its launches one by one
    python -m benchmarks.model --norms        the table of batch_norm_relu alone, written to the page as well
    python -m benchmarks.model --check            predicted against measured, of kernels that were timed

    time = START + max(bytes / BANDWIDTH, what all warps issue, how long one program's chain is x how often it follows)

Bytes are the plan's (backends/cost.py), instructions the compiled kernel's (instructions.py). The constants were fitted
to one run of an earlier tree (docs/benchmarks/nvidia-h200/kernels.json), whose kernels `--check` predicts; everything
else that this prints is a prediction, and no measurement.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .installed import ROOT, ensure_installed

ensure_installed()

import drsn_kernels as dk  # noqa: E402
from drsn_kernels.backends import cost, use_backend  # noqa: E402
from drsn_kernels.backends.gpu.lowering import lowering  # noqa: E402
from drsn_kernels.backends.gpu.tuned import L2_BYTES  # noqa: E402
from drsn_kernels.demo.timing import Call  # noqa: E402

from .calls import module, plans_of  # noqa: E402
from .cases import Case  # noqa: E402
from .gpu_bench import headlines  # noqa: E402
from .instructions import Work, work  # noqa: E402
from .rows import read_json  # noqa: E402

RECORDS = ROOT / "docs" / "benchmarks" / "nvidia-h200"
PAGE = ROOT / "docs" / "inside" / "gpu.md"

# ---- one launch ------------------------------------------------------------------------------------------------------

# An H200: 132 multiprocessors of four quarters, each of which issues one warp instruction a clock.
SMS, QUARTERS = 132, 4
# Fitted to the timed kernels, in microseconds; `--check` prints what is left.
START = 1.0  # of any kernel, from its first instruction to its last
BANDWIDTH = 3.9e6  # bytes, read and written together
ISSUE = 1400.0  # clocks of a quarter that issue, of the 1,755 there are
CHAIN = 1 / 455  # an instruction of one warp that has few beside it: 3.9 clocks
UNROLLED = 1.7  # SASS instructions for one of PTX in a kernel with loops
# Between the parts of a CUDA graph, to the kernels' own times: fitted to the same run's replays. A launch that begins
# while the one before ends has no gap: steps of three and more such launches saved 0.5 to 0.6 us each (overlap.json).
GRAPH, GAP = 3.5, 0.6
# What torch launches around ours, in the same run: matrix products of a gate took 2.1 to 8.4, all else 0.9 to 2.6.
PRODUCT, SMALL = 4.5, 1.5


@dataclass(frozen=True)
class Predicted:
    kernel: str
    bytes: int
    instructions: float  # of all threads
    memory: float
    issue: float
    chain: float

    @property
    def us(self) -> float:
        return START + max(self.memory, self.issue, self.chain)

    @property
    def bound(self) -> str:
        return max(("memory", self.memory), ("issue", self.issue), ("latency", self.chain), key=lambda one: one[1])[0]


def predict(kernel: str, moved: int, of: Work) -> Predicted:
    """A launch that moves so many bytes."""
    instructions = UNROLLED * of.followed if of.loops else of.sass
    issued = of.programs * of.warps * instructions * of.clocks / of.sass
    waves = math.ceil(of.programs / (SMS * of.fit))
    return Predicted(
        kernel, moved, 32 * of.programs * of.warps * instructions, moved / BANDWIDTH,
        issued / (SMS * QUARTERS * ISSUE), waves * instructions * CHAIN,
    )  # fmt: skip


# ---- a case ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictedStep:
    """Predicted launches of ours, and the operations that torch launches between them."""

    case: Case
    launches: tuple[Predicted, ...]
    overlapping: int  # launches of ours that begin while the one before ends
    products: int
    others: int

    @property
    def us(self) -> float:
        """As the replay of a CUDA graph."""
        count = len(self.launches) + self.products + self.others
        torchs = PRODUCT * self.products + SMALL * self.others
        return GRAPH + GAP * (count - 1 - self.overlapping) + torchs + sum(one.us for one in self.launches)


def step(case: Case) -> PredictedStep:
    """Compiles what the case launches."""
    with lowering("cuda:90") as recorded, use_backend("triton", strict=True):
        plans = plans_of(Call(partial(_run, case)))
        launches = list(recorded)
    planned = [launch for plan in plans for launch in plan.launches]
    if [one.kernel for one in planned] != [one.kernel for one in launches]:
        names = ", ".join(one.kernel for one in launches)
        raise RuntimeError(f"{case.id} launches {names}, which is not what was planned")
    found = tuple(predict(a.kernel, a.cost.bytes, work(b)) for a, b in zip(planned, launches, strict=True))
    parts = [part for plan in plans for part in (plan.forward, plan.backward)]
    torchs = [name for part in parts for name in part.kernels if name.startswith("aten::")]
    if any("gate of torch's" in plan.why for plan in plans):
        torchs += _called(case)
    products = sum("mm" in name for name in torchs)
    overlapping = sum(
        b.arguments["DEPENDENT"] % 2
        and a.programs <= a.arguments["DEPENDENT"] // 2
        and not a.arguments.get("counted")  # it lets nothing begin before it has ended
        for a, b in itertools.pairwise(launches)
    )
    return PredictedStep(case, found, overlapping, products, len(torchs) - products)


def _run(case: Case) -> None:
    """The case on CPU tensors that hold nothing: launches are compiled and recorded."""
    x = torch.empty(case.shape, dtype=case.torch_dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    training = case.op == "shrink_train"
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
        y = module(case, "ours")(x.requires_grad_(training))
    if training:
        y.backward(torch.empty_like(y))


def _called(case: Case) -> list[str]:
    """The operations of a gate that torch computes, forward and, in training, backward."""
    gate = module(case, "ours").fc
    pooled = torch.rand(case.shape[:2], requires_grad=case.op == "shrink_train")
    with cost.Counting() as counted:
        out = gate(pooled)
        if out.requires_grad and case.op == "shrink_train":
            torch.autograd.grad(out.sum(), [pooled, *gate.parameters()])
    return counted.kernels


# ---- tables ----------------------------------------------------------------------------------------------------------


def measured(path: Path = RECORDS / "results.json") -> dict[str, dict[str, float]]:
    """Microseconds by case and provider, of the run of record."""
    found: dict[str, dict[str, float]] = {}
    for one in read_json(path):
        found.setdefault(one["case"], {})[one["provider"]] = 1e3 * one["median_ms"]
    return found


def steps_table(steps: Sequence[PredictedStep], record: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "| case | launches | **predicted** us | floor | compiled | compiled / predicted | predicted / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in steps:
        known = record.get(one.case.id, {})
        floor, compiled = known.get("floor"), known.get("best-compiled")
        torchs = f" + {one.products + one.others} of torch's" if one.products + one.others else ""
        cells = [one.case.id, f"{len(one.launches)}{torchs}", f"{one.us:.1f}"]
        cells += ["" if t is None else f"{t:.1f}" for t in (floor, compiled)]
        cells += [f"{compiled / one.us:.2f}" if compiled else "", f"{one.us / floor:.2f}" if floor else ""]
        lines.append(f"| {' | '.join(cells)} |")
        if floor and compiled:
            ratios.setdefault((one.case.op, one.case.dtype), []).append((compiled / one.us, one.us / floor))
    lines += ["", "Geometric means, predicted:", "", "| | cases | compiled / ours | least | ours / floor | most |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for (op, dtype), found in ratios.items():
        faster, over = zip(*found, strict=True)
        lines.append(
            f"| {op} {dtype} | {len(found)} | {statistics.geometric_mean(faster):.2f} | {min(faster):.2f} "
            f"| {statistics.geometric_mean(over):.2f} | {max(over):.2f} |"
        )
    return lines


def launches_table(steps: Iterable[PredictedStep]) -> list[str]:
    lines = [
        "| case | launch | bytes | SASS instructions an element | **predicted** us | bound by |",
        "|---|---|---|---|---|---|",
    ]
    for of in steps:
        for one in of.launches:
            each = f"{one.instructions / of.case.numel:.1f}" if one.bytes > of.case.bytes / 2 else ""
            lines.append(f"| {of.case.id} | `{one.kernel}` | {one.bytes:,} | {each} | {one.us:.1f} | {one.bound} |")
    return lines


MARKERS = {
    name: (f"<!-- {name}: python -m benchmarks.model -->", f"<!-- end of {name} -->")
    for name in ("check", "steps", "norms")
}


def written(text: str, name: str, lines: Sequence[str]) -> str:
    """The page with these lines between the markers of `name`.

    Raises:
        ValueError: the markers are not there.
    """
    begin, finish = MARKERS[name]
    pattern = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(finish)})", re.S)
    if not pattern.search(text):
        raise ValueError(f"the page has no {begin} ... {finish}")
    return pattern.sub(lambda _: "\n".join(["", *lines, "", ""]), text)


# ---- batch normalisation ---------------------------------------------------------------------------------------------

# Shape, dtype, channels_last: of the paper's network, of the benchmarks' groups A, D and E.
NORMS = [
    ((128, 4, 512), "fp32", False), ((128, 16, 128), "fp32", False), ((128, 64, 1024), "fp32", False),
    ((128, 512, 128), "fp32", False), ((16, 64, 4800), "fp32", False), ((64, 64, 56, 56), "fp32", False),
    ((64, 512, 7, 7), "fp32", False), ((128, 64, 1024), "bf16", False), ((64, 64, 56, 56), "bf16", True),
]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def norm_passes(shape: tuple[int, ...], dtype: str, channels_last: bool) -> tuple[list[Predicted], list[Predicted]]:
    """Launches of batch_norm_relu in training, forward and backward, with nothing in the L2.

    What a pass's last launch reads for the second time, `again`, is in the L2 up to L2_BYTES.
    """
    x = torch.empty(shape, dtype=DTYPES[dtype])
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def call() -> None:
        module = dk.BatchNormReLU(shape[1])
        y = module(x.requires_grad_())
        y.backward(torch.empty_like(y))

    with lowering("cuda:90") as recorded, use_backend("triton", strict=True):
        (plan,) = plans_of(Call(call))
    found = [predict(a.kernel, a.cost.bytes, work(b)) for a, b in zip(plan.launches, recorded, strict=True)]
    return found[: plan.forward.launches], found[plan.forward.launches :]


def in_graph(launches: Sequence[Predicted], again: int) -> tuple[float, float]:
    """Microseconds of launches in a CUDA graph: everything from memory, and `again` bytes of the last from the L2."""
    total = sum(one.us for one in launches)  # of one pass: they overlap
    last = launches[-1]
    found = min(again, L2_BYTES) if len(launches) > 1 else 0
    return total, total - last.us + replace(last, memory=last.memory - found / BANDWIDTH).us


def norms_table() -> list[str]:
    lines = [
        "| case | MB | forward: launches | SASS an element | **predicted** us | accesses | backward: launches "
        "| SASS an element | **predicted** us | accesses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, dtype, channels_last in NORMS:
        size = math.prod(shape)
        full = size * DTYPES[dtype].itemsize
        cells = [f"{'x'.join(map(str, shape))} {dtype}{' channels_last' if channels_last else ''}", f"{full / 1e6:.1f}"]
        for reads, launches in zip((1, 2), norm_passes(shape, dtype, channels_last), strict=True):
            cold, warm = in_graph(launches, reads * full)
            each = sum(one.instructions for one in launches) / size
            cells += [f"{len(launches)}", f"{each:.0f}", f"{cold:.1f}, {warm:.1f}"]
            cells += [f"{cold / (full / BANDWIDTH):.1f}, {warm / (full / BANDWIDTH):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---- the check -------------------------------------------------------------------------------------------------------


def records(path: Path = RECORDS / "kernels.json") -> list[tuple[str, str, float, float]]:
    """(case, kernel, measured us, predicted us) of the kernels that were timed; of two launches, their sum."""
    return [
        (one["case"], one["kernel"], one["us"],
         sum(predict(one["kernel"], part["bytes"], Work(**part["work"])).us for part in one["launches"]))
        for one in json.loads(path.read_text("utf-8"))["kernels"]
    ]  # fmt: skip


def check_table(found: Sequence[tuple[str, str, float, float]]) -> list[str]:
    def line(name: str, ratios: list[float]) -> str:
        errors = sorted(max(ratio, 1 / ratio) for ratio in ratios)
        return (
            f"| {name} | {len(ratios)} | {statistics.geometric_mean(ratios):.2f} | {statistics.median(errors):.2f} "
            f"| {errors[int(0.9 * len(errors))]:.2f} | {errors[-1]:.2f} |"
        )

    by_kernel: dict[str, list[float]] = {}
    for _, kernel, us, predicted in found:
        by_kernel.setdefault(kernel, []).append(predicted / us)
    lines = ["| kernel | times | predicted / measured, geometric mean | error, as a factor: median | 90 % | worst |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [line(f"`{name}`", ratios) for name, ratios in by_kernel.items()]
    return [*lines, line("all", [predicted / us for *_, us, predicted in found])]


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="predicted against measured, of kernels that were timed")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="print these of the page's cases, and write nothing")
    parser.add_argument("--norms", action="store_true", help="write the table of batch_norm_relu alone")
    options = parser.parse_args(arguments)
    if options.check:
        print("\n".join(check_table(records())))
        return 0
    os.environ["TRITON_INTERPRET"] = "0"
    if options.norms:
        PAGE.write_text(written(PAGE.read_text("utf-8"), "norms", norms_table()), "utf-8")
        return 0
    cases = sorted(headlines(), key=lambda case: case.group)
    if options.cases:
        if unknown := set(options.cases) - {case.id for case in cases}:
            parser.error(f"--cases takes ids of the page's, got {', '.join(sorted(unknown))}")
        cases = [case for case in cases if case.id in options.cases]
    steps = []
    for case in cases:
        steps.append(step(case))
        print(f"{case.id} {steps[-1].us:.1f} us predicted", file=sys.stderr, flush=True)
    tables = {"check": check_table(records()), "steps": steps_table(steps, measured())}
    if not options.cases:
        tables["norms"] = norms_table()
    if options.cases:
        print("\n".join([*tables["steps"], "", *launches_table(steps)]))
        return 0
    page = PAGE.read_text("utf-8")
    for name, lines in tables.items():
        page = written(page, name, lines)
    PAGE.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
