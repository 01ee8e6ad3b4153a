"""What the host pays for a call of the Triton backend, without a GPU: microseconds until the launch is handed over.

    TRITON_INTERPRET=0 python -m benchmarks.launches

Kernels are compiled for an H100 and not run (drsn_kernels.triton.lowering), so the driver's own cuLaunchKernel is not
in these figures, and everything before it is: checks, planning, allocation, autograd, Triton. "through Triton" is the
same call with every launch through Triton's own binder and specialisation, as it is without `launch.Prepared`.
"""

import statistics

import torch

import drsn_kernels as dk
from drsn_kernels.bench.measure import Call, interleaved, ratio
from drsn_kernels.bench.record import environment
from drsn_kernels.triton import launch, lowering


def _bind_anew(self: launch.Prepared, pointers: tuple) -> None:
    self.fn[self.grid](*pointers, *self.integers, **self.constants)


def main() -> None:
    torch.set_num_threads(1)
    lowering._Driver._record = lambda *args: None  # writing the launches down is not part of a call
    x, tau = torch.randn(128, 16, 128), torch.rand(128, 16)
    leaf, g = x.clone().requires_grad_(), torch.randn_like(x)
    evaluated, trained = dk.Shrinkage(16).eval(), dk.Shrinkage(16)
    steps = {
        "abs_mean": lambda: dk.abs_mean(x),
        "soft_threshold": lambda: dk.soft_threshold(x, tau),
        "Shrinkage, eval": torch.no_grad()(lambda: evaluated(x)),
        "Shrinkage, eval, forward and backward": lambda: torch.autograd.grad(evaluated(leaf), leaf, g),
        "Shrinkage, train, forward": lambda: trained(leaf),
        "Shrinkage, train, forward and backward": lambda: torch.autograd.grad(trained(leaf), leaf, g),
    }

    kept = launch.Prepared._launch

    def through_triton(call):
        def run():
            launch.Prepared._launch = _bind_anew
            call()
            launch.Prepared._launch = kept

        return run

    print(environment())
    print(f"{'':42s}{'us':>7s}{'through Triton':>16s}{'ratio':>7s}")
    with lowering.lowering("cuda:90"), dk.use_backend("triton", strict=True):
        for name, call in steps.items():
            calls = {"ours": Call(call), "bound": Call(through_triton(call))}
            times = [t["time"] for t in interleaved(calls, rounds=2000, warmup=50).values()]
            ours, through = (statistics.median(t) * 1e6 for t in times)
            print(f"{name:42s}{ours:7.1f}{through:16.1f}{ratio(times[1], times[0]):7.2f}")


if __name__ == "__main__":
    main()
