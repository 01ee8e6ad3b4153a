"""Three ways to launch a call of the GPU backend, without a GPU: microseconds until the driver has every launch.

    TRITON_INTERPRET=0 python -m benchmarks.launcher

Kernels are compiled for an H100 and handed to a driver that does nothing (tests/stub_driver.py), by the launchers that
production uses. So the driver's own work is not in these figures, and everything before it is: checks, planning,
allocation (on the CPU), autograd. Results are what memory held.

    one call         a pass is launched by the compiled launcher (drsn_kernels/backends/gpu/native.py)
    Prepared         every launch by Triton's launcher, with what it binds kept (launch.py)
    through Triton   every launch bound and specialised anew by Triton's JITFunction

The machine's mood doubles such times. Rows with `nothing` are the reference: an autograd.Function with the same inputs
that allocates its output and returns given gradients.
"""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path

import torch

import drsn_kernels as dk
from drsn_kernels.backends.gpu import launch, native
from drsn_kernels.demo.timing import Call, interleaved

from .rows import environment

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import stub_driver  # noqa: E402


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(*parameters)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        return g, *ctx.saved_tensors


def bind_anew(self: launch.Prepared, named: dict) -> None:
    pointers = tuple(map(named.get, self.pointers))
    tail, options = self._specialised(pointers)
    self.fn[self.grid](*pointers, *tail, **options)  # returns no kernel: nothing is learnt


@contextlib.contextmanager
def one_call():
    native.enabled = True
    yield


@contextlib.contextmanager
def prepared():
    native.enabled = False
    yield
    native.enabled = True


@contextlib.contextmanager
def through_triton():
    kept, launch.Prepared._launch = launch.Prepared._launch, bind_anew
    with prepared():
        yield
    launch.Prepared._launch = kept


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.launcher", description=__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(1)
    x, tau = torch.randn(8, 16, 128), torch.rand(8, 16)  # small: memory of the CPU's allocator stays mapped
    leaf, g = x.clone().requires_grad_(), torch.randn_like(x)
    evaluated, trained = dk.Shrinkage(16).eval(), dk.Shrinkage(16)
    parameters = tuple(trained.parameters())
    nothing = super(torch.autograd.Function, Nothing).apply

    def gradients(y):
        return torch.autograd.grad(y, (leaf, *parameters), g)

    def train():
        return gradients(trained(leaf))

    steps = {
        "nothing, forward": lambda: nothing(leaf, *parameters),
        "nothing, forward and backward": lambda: gradients(nothing(leaf, *parameters)),
        "abs_mean": lambda: dk.abs_mean(x),
        "soft_threshold": lambda: dk.soft_threshold(x, tau),
        "Shrinkage, eval": torch.no_grad()(lambda: evaluated(x)),
        "Shrinkage, eval, forward and backward": lambda: torch.autograd.grad(evaluated(leaf), leaf, g),
        "Shrinkage, train, forward": lambda: trained(leaf),
        "Shrinkage, train, forward and backward": train,
    }
    with stub_driver.stub_driver(), dk.use_backend("triton", strict=True):
        if reason := native.missing():
            sys.exit(f"no launcher: {reason}")
        train()
        alone = stub_driver.passes(train)
        launches = sum(len(each.launches) for each, _ in alone)
        steps[f"the {launches} launches of that step alone"] = lambda: [each(given) for each, given in alone]
        settings = {"one call": one_call, "Prepared": prepared, "through Triton": through_triton}
        print(environment())
        print(f"{'us':42s}" + "".join(f"{name:>16s}" for name in settings))
        for name, call in steps.items():
            calls = {way: Call(call, setting=setting) for way, setting in settings.items()}
            times = interleaved(calls, rounds=1000, warmup=50)
            print(f"{name:42s}" + "".join(f"{statistics.median(times[way]['time']) * 1e6:16.1f}" for way in settings))


if __name__ == "__main__":
    main()
