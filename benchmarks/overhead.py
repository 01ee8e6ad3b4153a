"""What a call costs on a tensor of 32 elements, where there is nothing to compute: microseconds, one thread.

    python -m benchmarks.overhead

`kernel` is the floor of a call: allocate the output, call the C++ function.
"""

import timeit

import torch
from torch import nn

import drsn_kernels as dk
from drsn_kernels.backends import BACKENDS
from drsn_kernels.layout import layout_of


def microseconds(call, number: int = 300, repeat: int = 150) -> float:
    """The fastest of many short runs: interruptions only ever add."""
    return min(timeit.repeat(call, number=number, repeat=repeat)) / number * 1e6


def main() -> None:
    torch.set_num_threads(1)
    x, tau, g = torch.randn(1, 2, 16), torch.rand(1, 2), torch.randn(1, 2, 16)
    leaf = x.clone().requires_grad_()
    pooled = torch.rand(1, 2)
    pooled_leaf = pooled.clone().requires_grad_()
    gate = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2), nn.Sigmoid()).eval()
    cpu, layout = BACKENDS["cpu"], layout_of(x)
    with torch.no_grad():
        kernel = microseconds(lambda: cpu.map(x, layout, tau))
        pool = microseconds(lambda: cpu.reduce(x, layout))
        soft = microseconds(lambda: dk.soft_threshold(x, tau))
        gate_eager = microseconds(lambda: gate(pooled))
        shrink = microseconds(lambda: dk.shrink(x, gate))
    soft_grad = microseconds(lambda: dk.soft_threshold(leaf, tau))
    gate_grad = microseconds(lambda: gate(pooled_leaf))
    shrink_grad = microseconds(lambda: dk.shrink(leaf, gate))
    both = microseconds(lambda: torch.autograd.grad(dk.soft_threshold(leaf, tau), leaf, g))
    rows = [
        ("kernel: soft threshold", kernel, None),
        ("kernel: abs_mean", pool, None),
        ("soft_threshold, no grad", soft, soft - kernel),
        ("soft_threshold, grad, forward", soft_grad, soft_grad - kernel),
        ("soft_threshold, forward and backward", both, None),
        ("gate alone, no grad", gate_eager, None),
        ("shrink, no grad", shrink, shrink - gate_eager),
        ("gate alone, grad", gate_grad, None),
        ("shrink, grad, forward", shrink_grad, shrink_grad - gate_grad),
    ]
    print(f"{'':40s}{'us':>7s}{'beyond kernel or gate':>24s}")
    for name, total, beyond in rows:
        print(f"{name:40s}{total:7.1f}" + (f"{beyond:24.1f}" if beyond is not None else ""))


if __name__ == "__main__":
    main()
