"""Training time of the paper's networks against the ResNet's, with the fused operators and without.

    python -m experiments.timing [--rounds 30] [--threads 1] [--out docs/experiments]

The paper: ConvNet 961.8 s (0.983), ResNet 978.0 s, DRSN-CS 1,585.3 s (1.621), DRSN-CW 1,511.1 s (1.545).
"fused" is what runs without doing anything, "eager" the same under use_backend("torch"), "port" the shrinkage as the
popular PyTorch port writes it. All run in turn, so that a busy machine hits all of them; the ratio is the median of
the ratios of each round.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

import drsn_kernels as dk
from drsn_kernels.demo.port import PortShrinkage, swap
from drsn_kernels.demo.timing import Call, interleaved, quartiles, ratios
from drsn_kernels.models import paper_network
from drsn_kernels.train.recipe import Recipe, train_step

from . import ROOT
from .paired import LABELS
from .report import insert

PAPER = {"convnet": 0.983, "resnet": 1.0, "drsn-cs": 1.621, "drsn-cw": 1.545}
FORMS = {
    "resnet": ("eager", "fused"),
    "convnet": ("fused",),
    "senet": ("fused", "eager"),
    "drsn-cs": ("fused", "eager"),
    "drsn-cw": ("fused", "eager", "port"),
}


def call(model: str, form: str, batch: int, length: int) -> Call:
    """A training step of the paper's recipe."""
    torch.manual_seed(0)
    net = paper_network(model)
    net = swap(net, PortShrinkage) if form == "port" else net
    x, y = torch.randn(batch, 1, length), torch.randint(8, (batch,))
    step = partial(train_step, net, Recipe().optimizer(net), x, y)
    return Call(step, setting=partial(dk.use_backend, "torch" if form == "eager" else "auto"))


def measure(rounds: int, batch: int = 128, length: int = 2048) -> str:
    """A Markdown table of milliseconds a step and ratios to PyTorch's ResNet."""
    names = [(model, form) for model, forms in FORMS.items() for form in forms]
    samples = interleaved({f"{m} {f}": call(m, f, batch, length) for m, f in names}, rounds)
    lines = ["| network | form | ms a step | time over ResNet's (quartiles) | in the paper |", "|---|---|---|---|---|"]
    for model, form in names:
        times = samples[f"{model} {form}"]["time"]
        over = ratios(times, samples["resnet eager"]["time"])
        low, high = quartiles(over)
        lines.append(
            f"| {LABELS[model]} | {form if len(FORMS[model]) > 1 else ''} | {1e3 * statistics.median(times):.1f} | "
            f"{statistics.median(over):.2f} ({low:.2f} to {high:.2f}) | {PAPER.get(model, '')} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.timing", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps of each (default: 30)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, as in the grid)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "experiments", help="its README.md gets the table")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    table = measure(options.rounds)
    threads = "one thread" if options.threads == 1 else f"{options.threads} threads"
    text = f"Batches of 128 x 1 x 2048, {threads}, {options.rounds} steps of each.\n\n{table}"
    print(text)
    page = options.out / "README.md"
    if page.exists():
        insert(page, "timing", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
