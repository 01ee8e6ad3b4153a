"""What the host pays for a call of the GPU backend, without a GPU: microseconds until the launch is handed over.

    TRITON_INTERPRET=0 python -m benchmarks.launches

The kernels are compiled for an H100 and not run (drsn_kernels/backends/gpu/lowering.py). So the driver's own launch is
not in these figures, and everything before it is: checks, planning, allocation, autograd, the binding. "through Triton"
is the call with every launch through Triton's own binder and specialisation, as it is without `launch.Prepared`.
"""

import contextlib
import statistics

import torch

import drsn_kernels as dk
from drsn_kernels.backends.gpu import launch, lowering
from drsn_kernels.demo.timing import Call, interleaved

from .rows import environment


def _bind_anew(self: launch.Prepared, pointers: dict) -> None:
    self._first(0, pointers, tuple(map(pointers.get, self.fn.pointers)))


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

    @contextlib.contextmanager
    def on_triton(bind):
        kept, launch.Prepared._launch = launch.Prepared._launch, bind
        with lowering.lowering("cuda:90"), dk.use_backend("triton", strict=True):
            yield
        launch.Prepared._launch = kept

    settings = {
        "triton": lambda: on_triton(launch.Prepared._launch),
        "through Triton": lambda: on_triton(_bind_anew),
    }
    print(environment())
    print(f"{'us':42s}" + "".join(f"{name:>16s}" for name in settings))
    for name, call in steps.items():
        calls = {way: Call(call, setting=setting) for way, setting in settings.items()}
        times = interleaved(calls, rounds=2000, warmup=50)
        print(f"{name:42s}" + "".join(f"{statistics.median(times[way]['time']) * 1e6:16.1f}" for way in settings))


if __name__ == "__main__":
    main()
