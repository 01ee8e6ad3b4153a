"""The shrinkage step on the shapes of public models, against what people run today.

    python -m benchmarks.shrinkage [--shapes ABCDE] [--rounds 15] [--no-compile] [--out FILE.json]

For each shape: a training step of the module (forward and backward) as the popular port in eager mode, as the best pure
PyTorch form under torch.compile, and as drsn_kernels; and the forward pass in eval over a clone of x, which reads and
writes once. All of a shape run interleaved; a row is printed only if the outputs agree.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn

import drsn_kernels as dk
from drsn_kernels.demo.baselines import BestShrinkage, PortShrinkage

from .timing import environment, geometric_mean, interleaved, median_ms, ratio, write

SHAPES = {
    "A": [(n, c, length) for n in (32, 64, 128) for c, length in ((64, 1024), (128, 512), (256, 256), (512, 128))],
    "B": [(128, 64, 256), (128, 128, 128), (128, 256, 64), (128, 512, 32), (128, 32, 512)],
    "C": [(128, 4, 512), (128, 8, 256), (128, 16, 128), (64, 16, 256), (64, 32, 128), (64, 64, 64), (64, 128, 32)],
    "D": [(16, 16, 9600), (16, 32, 9600), (16, 64, 4800), (16, 128, 2400), (16, 1024, 300)],
    "E": [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7),
          (128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4)],
}  # fmt: skip
LARGE = 16 << 20  # bytes from which a forward pass is compared with a clone


def training_step(module: nn.Module, x: torch.Tensor, g: torch.Tensor):
    def step() -> None:
        module(x).backward(g)
        x.grad = None
        module.zero_grad(set_to_none=True)

    return step


def agree(module: nn.Module, other: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        a, b = module(x).double(), other(x).double()
    return float((a - b).norm() / b.norm()) < 1e-5


def measure(shape: tuple[int, ...], compile_best: bool, rounds: int) -> dict:
    torch.manual_seed(0)
    x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
    port, best, ours = PortShrinkage(shape[1]), BestShrinkage(shape[1]), dk.Shrinkage(shape[1])
    for module in (best, ours):
        module.load_state_dict(port.state_dict())
    assert agree(ours, port, x) and agree(best, port, x), f"outputs differ on {shape}"
    steps = {"port": training_step(port, x, g), "ours": training_step(ours, x, g)}
    if compile_best:
        torch._dynamo.reset()
        steps["compiled"] = training_step(torch.compile(best), x, g)
    train = interleaved(steps, rounds)
    row = {"shape": shape, "mib": math.prod(shape) * 4 / 2**20, **{k: median_ms(v) for k, v in train.items()},
           "over_port": ratio(train["port"], train["ours"])}  # fmt: skip
    if compile_best:
        row["over_compiled"] = ratio(train["compiled"], train["ours"])
    evaluating, features = ours.eval(), x.detach()
    with torch.no_grad():
        forward = interleaved({"clone": features.clone, "forward": lambda: evaluating(features)}, 2 * rounds)
    row.update({k: median_ms(v) for k, v in forward.items()}, over_clone=ratio(forward["forward"], forward["clone"]))
    return row


def show(name: str, row: dict) -> None:
    shape = "x".join(map(str, row["shape"]))
    compiled = f"{row['compiled']:9.2f}{row['over_compiled']:7.2f}" if "compiled" in row else " " * 16
    print(f"{name} {shape:18s}{row['mib']:6.1f}{row['port']:9.2f}{row['ours']:9.2f}{row['over_port']:7.1f}{compiled}"
          f"{row['clone']:9.3f}{row['forward']:9.3f}{row['over_clone']:7.2f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="ABCDE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"--shapes takes letters of {''.join(SHAPES)}, got {''.join(sorted(unknown))}")
    env = environment()
    print(", ".join(f"{key} {value}" for key, value in env.items()))
    print("  shape                MiB  port ms  ours ms  speed  comp ms  speed clone ms  eval ms  ratio")
    rows: dict[str, list[dict]] = {}
    for name in options.shapes:
        for shape in SHAPES[name]:
            row = measure(shape, not options.no_compile, options.rounds)
            rows.setdefault(name, []).append(row)
            show(name, row)
    core = [row for name in "ABDE" for row in rows.get(name, [])]
    large = [row for name in rows for row in rows[name] if row["mib"] * 2**20 >= LARGE]
    summary = {
        "training, over the port in eager mode, A B D E": geometric_mean([r["over_port"] for r in core]),
        "training, over the best form under torch.compile, A B D E":
            geometric_mean([r["over_compiled"] for r in core if "over_compiled" in r]),
        "forward in eval over clone, 16 MiB and more": geometric_mean([r["over_clone"] for r in large]),
        **{f"training, over the port, {name}": geometric_mean([r["over_port"] for r in rows[name]]) for name in rows},
    }  # fmt: skip
    print("geometric means")
    for key, value in summary.items():
        print(f"  {value:6.2f}  {key}")
    if options.out:
        write(options.out, {"environment": env, "command": f"python -m benchmarks.shrinkage --shapes {options.shapes} "
                            f"--rounds {options.rounds}", "summary": summary, "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
