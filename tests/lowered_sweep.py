"""What the sweep's alternatives become on compute capability 9.0, compiled without a GPU: run by test_sweep.py.

    python tests/lowered_sweep.py --json FILE [--part I --parts N | --sample | --one-pass]

Triton must compile, not interpret, so this is a process of its own, without TRITON_INTERPRET=1. Each alternative's call
is made on CPU tensors; FILE gets {case: {alternative: [[kernel, registers, bytes spilled a thread], ...]}}. With
--one-pass it is what Shrinkage in eval takes in one launch, on the benchmarks' shapes in every dtype and layout; with
--sample some of both.
"""

import argparse
import itertools
import json
from pathlib import Path

import ptx
import repository  # noqa: F401 - benchmarks/
import torch

import drsn_kernels as dk
from benchmarks import sweep
from benchmarks.cases import SHAPES, Case
from benchmarks.sweep_calls import subject
from drsn_kernels.backends.gpu import plans
from drsn_kernels.backends.gpu.launch import SMS_ASSUMED
from drsn_kernels.backends.gpu.lowering import lowering
from drsn_kernels.backends.gpu.walk import walk
from drsn_kernels.layout import layout_of

# Both layouts, aligned and ragged rows, a gate that is fused and a sample of one pass.
SAMPLE = [
    *(Case(op, "C", (64, 32, 128), "forward", "bf16") for op in ("reduce", "map", "grad_dtau")),
    Case("map", "E", (64, 512, 7, 7), "forward", "fp32"),
    Case("grad_dx", "E", (128, 128, 16, 16), "forward", "bf16", True),
    Case("shrink_train", "C", (128, 16, 128), "both", "fp32"),
    Case("shrink_eval", "G", (512, 64, 256), "forward", "fp32"),
]


def lower(cases: list[Case], every: int = 1) -> dict[str, dict[str, list]]:
    """Of the cases' alternatives one in so many, the first among them: as planned."""
    found: dict[str, dict[str, list]] = {}
    known: dict[int, list] = {}  # Triton keeps what it has compiled
    with lowering("cuda:90") as launches, dk.use_backend("triton", strict=True):
        for case in cases:
            on, found[case.id] = subject(case, "cpu"), {}
            for name, _, call, twin in list(sweep.distinct(on, case))[::every]:
                if twin:
                    continue
                launches.clear()
                call.once()
                found[case.id][name] = [known.setdefault(id(one.compiled), _resources(one)) for one in launches]
    return found


ONE_PASS_SAMPLE = {(512, 64, 256), (1024, 32, 512), (4096, 16, 128)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def one_passes(sample: bool) -> dict[str, dict[str, list]]:
    found: dict[str, dict[str, list]] = {}
    shapes = [shape for group in SHAPES.values() for shape in group if not sample or shape in ONE_PASS_SAMPLE]
    known = set()
    with lowering("cuda:90") as launches, dk.use_backend("triton", strict=True), torch.no_grad():
        for shape, dtype, last in itertools.product(shapes, DTYPES[: 2 if sample else 4], (False, True)):
            x = torch.empty(shape, dtype=dtype)
            if last and len(shape) != 4:
                continue
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            on = walk(layout_of(x), x.stride(), x.stride(), x.stride())
            plan = plans.one_pass(on, shape[1], shape[1], dtype.itemsize, SMS_ASSUMED, False)
            if isinstance(plan, str) or (key := (plan, dtype, on.align, last)) in known:
                continue
            known.add(key)
            launches.clear()
            dk.Shrinkage(shape[1]).to(torch.promote_types(dtype, torch.float32)).eval()(x)
            name = f"{'x'.join(map(str, shape))} {dtype}{' channels_last' if last else ''}"
            found[name] = {str(plan): [_resources(one) for one in launches]}
    return found


def _resources(launch) -> list:
    measured = ptx.Measured(launch)
    return [launch.kernel, measured.registers, measured.stack]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--one-pass", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.sample:
        found = lower(SAMPLE, every=3) | one_passes(sample=True)
    elif options.one_pass:
        found = one_passes(sample=False)
    else:
        cases = list(dict.fromkeys(unit.case for unit in sweep.units()))
        found = lower(cases[options.part :: options.parts])
    options.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
