"""What the host pays for a call, the table of record: microseconds until it returns, beside a node that does nothing.

    TRITON_INTERPRET=0 python -m benchmarks.launches [--before FOLDER]

cpu      the whole call: at this size there is next to nothing to compute.
triton   kernels compiled for an H100, launched on a driver that does nothing (tests/stub_driver.py), on CPU tensors:
         checks, planning, allocation, autograd and the launcher are in it, the driver's own work is not.

A busy machine doubles such times, so every row has a reference: an autograd.Function that allocates its output, returns
gradients that exist and does nothing else, with the same inputs, timed in the same rounds. Ratios to it carry over from
one machine to another; microseconds do not. Of the paper's network, DRSN-CW, it is PyTorch's ResNet, and the ratio the
median of those of the rounds: both run PyTorch's convolutions in between, so that nothing of ours is in the caches. An
H200's host took 1.45 times as long for it (commit 4174a5c), this way found 1.46 (51a78b5). FOLDER holds another
drsn_kernels package (the site-packages of another installation): both are timed in one run, round by round, each in a
process of its own.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SHAPE = (4, 8, 16)
NETWORK, NEW = "paper's network, training step", "Shrinkage, train, forward and backward, a new shape"
ONCE = {NETWORK, NEW}  # a round
ROUNDS, CALLS = 60, 40
BACKENDS = ("cpu", "triton")


# ---- what is timed, in a process that has one of the packages --------------------------------------------------------


def nothing(outputs: tuple[int, ...], *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call of a node that does nothing: a fresh output, and gradients that were there before."""
    gradients = tuple(torch.zeros_like(t) for t in inputs)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *parameters):
            return x.new_empty(outputs)

        @staticmethod
        def backward(ctx, g):
            return gradients if len(gradients) > 1 else gradients[0]

    apply = super(torch.autograd.Function, Nothing).apply
    return lambda: apply(*inputs)


def steps() -> dict[str, tuple[Callable, Callable]]:
    """By name: a call, and its reference."""
    import drsn_kernels as dk

    x, tau, leaf, g = torch.randn(SHAPE), torch.rand(SHAPE[:2]), torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE)
    evaluated, trained, identity = dk.Shrinkage(SHAPE[1]).eval(), dk.Shrinkage(SHAPE[1]), torch.nn.Identity()
    inputs = (leaf, *trained.parameters())

    def both(call: Callable, inputs: tuple[torch.Tensor, ...]) -> Callable:
        return lambda: torch.autograd.grad(call(), inputs, g)

    alone, with_tau, whole = nothing(SHAPE, leaf), nothing(SHAPE, x, tau), nothing(SHAPE, *inputs)
    no_grad = torch.no_grad()
    return {
        "abs_mean": (lambda: dk.abs_mean(x), nothing(SHAPE[:2], x)),
        "soft_threshold": (lambda: dk.soft_threshold(x, tau), with_tau),
        "soft_threshold, forward and backward": (
            both(lambda: dk.soft_threshold(leaf, tau), (leaf,)), both(alone, (leaf,)),
        ),
        "Shrinkage, eval": (no_grad(lambda: evaluated(x)), no_grad(nothing(SHAPE, x, *evaluated.parameters()))),
        "Shrinkage, train, forward": (lambda: trained(leaf), whole),
        "Shrinkage, train, forward and backward": (both(lambda: trained(leaf), inputs), both(whole, inputs)),
        "shrink, nn.Identity called, forward and backward": (
            both(lambda: dk.shrink(leaf, identity), (leaf,)), both(alone, (leaf,)),
        ),
        NEW: (new_shapes(trained, inputs), both(whole, inputs)),
        NETWORK: (step_of(dk.models.network("drsn-cw")), step_of(dk.models.network("resnet", fused=False))),
    }  # fmt: skip


def new_shapes(shrinkage: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable:
    lengths = itertools.count(SHAPE[2] + 1)

    def step() -> None:
        x = torch.empty(*SHAPE[:2], next(lengths), requires_grad=True)
        torch.autograd.grad(shrinkage(x), (x, *inputs[1:]), torch.empty_like(x))

    return step


def step_of(network: torch.nn.Module) -> Callable[[], None]:
    x = torch.randn(2, 1, 64)

    def step() -> None:
        network.zero_grad()
        network(x).sum().backward()

    return step


@contextlib.contextmanager
def on(backend: str) -> Iterator[None]:
    import drsn_kernels as dk

    with contextlib.ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(stub_driver())
        stack.enter_context(dk.use_backend(backend, strict=True))
        yield


@contextlib.contextmanager
def stub_driver() -> Iterator[None]:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    import stub_driver

    from drsn_kernels.backends.gpu import native

    with stub_driver.stub_driver():
        if reason := native.missing():
            raise RuntimeError(f"no launcher: {reason}")
        yield


def microseconds(call: Callable, calls: int) -> float:
    start = time.thread_time()  # of this thread alone: nothing waits, and other processes do not count
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls * 1e6


def child() -> None:
    """A line in, a line out: {backend: {step: [microseconds, those of its reference]}} of one round."""
    torch.set_num_threads(1)
    calls = steps()
    for _ in sys.stdin:
        found = {}
        for backend in BACKENDS:
            with contextlib.suppress(ImportError, RuntimeError), on(backend):  # without Triton, or interpreted: no row
                found[backend] = {
                    name: [microseconds(call, 1 if name in ONCE else CALLS) for call in pair]
                    for name, pair in calls.items()
                }
        print(json.dumps(found), flush=True)


# ---- the table -------------------------------------------------------------------------------------------------------


def start(folder: str | None) -> subprocess.Popen:
    environment = {"TRITON_INTERPRET": "0", **os.environ}
    if folder is not None:
        environment["PYTHONPATH"] = folder
    command = [sys.executable, "-P", os.path.abspath(__file__), "--child"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def one_round(process: subprocess.Popen) -> dict[str, dict[str, list[float]]]:
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches")
    parser.add_argument("--before", metavar="FOLDER", help="with another drsn_kernels package")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child()
    from benchmarks.rows import environment

    packages = {"now": start(None)} if given.before is None else {"before": start(given.before), "now": start(None)}
    for process in packages.values():
        one_round(process)  # compiles
    order, rounds = [*packages.items()], []
    for _ in range(ROUNDS):
        rounds.append({name: one_round(process) for name, process in order})
        order.reverse()  # each is the first in half of them
    for process in packages.values():
        process.stdin.close()
    print(environment())
    print(f"{SHAPE}, float32, one thread, the fastest of {ROUNDS} rounds, microseconds and (ratio to the reference)")
    for backend, names in rounds[0]["now"].items():
        print(f"\n{backend:52s}{'reference':>12s}" + "".join(f"{name:>18s}" for name in packages))
        for step in names:
            pairs = {
                name: [r[name].get(backend, {}).get(step, (float("nan"),) * 2) for r in rounds] for name in packages
            }
            reference = min(pair[1] for of_package in pairs.values() for pair in of_package)
            line = f"{step:52s}{reference:12.1f}"
            for of_package in pairs.values():
                fastest = min(pair[0] for pair in of_package)
                ratio = fastest / reference
                if step == NETWORK:
                    ratio = statistics.median(ours / resnet for ours, resnet in of_package)
                line += f"{fastest:11.1f} ({ratio:4.2f})"
            print(line)


if __name__ == "__main__":
    main()
