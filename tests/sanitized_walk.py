"""Run by test_sanitize.py under ASan and UBSan: every kernel, instruction set, dtype and layout, against PyTorch.

python sanitized_walk.py PATH_OF_THE_SANITIZED_EXTENSION
"""

import importlib.util
import sys

import torch

import drsn_kernels.backends.cpu as cpu
from drsn_kernels.backends import eager
from drsn_kernels.planes import geometry

SHAPES = (
    (2, 3, 1),
    (2, 3, 7),
    (3, 70, 1),
    (2, 5, 16),
    (2, 3, 63),
    (2, 4, 129),
    (2, 3, 513),
    (3, 65, 7, 9),
    (1, 2, 32771),
)


def layouts(x: torch.Tensor):
    yield x
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield torch.cat([x, x], -1)[..., 1::2]
    yield x[:, :1].expand_as(x)


def check(a: torch.Tensor | None, b: torch.Tensor | None, low: bool) -> None:
    if a is not None:
        torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-4, atol=1e-3)


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("drsn_kernels._cpu", path)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    cpu._cpu, cpu.MISSING = native, None
    native.set_parallel_for(cpu._torch_parallel_for())
    torch.manual_seed(0)
    calls = 0
    for isa in native.available_isas():
        native.set_isa(isa)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            low, acc = dtype.itemsize == 2, torch.float64 if dtype == torch.float64 else torch.float32
            for shape in SHAPES:
                for x in layouts(torch.randn(shape).to(dtype)):
                    geo, tau = geometry(x), torch.rand(shape[:2], dtype=acc)
                    pooled, bits = cpu.reduce(x, geo, True)
                    check(pooled, eager.reduce(x, geo, False)[0], low)
                    for g in layouts(torch.randn(shape).to(dtype)):
                        y, kept = cpu.apply(x, geo, tau, g, None, 2)
                        check(y, eager.apply(x, geo, tau, g, None, 0)[0], low)
                        for arguments in (
                            dict(g=g, kept=kept[0], sign=kept[1], want_dtau=True),
                            dict(g=g, kept=kept[0], sign=bits[0], want_dx=False, want_dtau=True),
                            dict(g=g, kept=kept[0], sign=bits[0], nonzero=bits[1], pooled_grad=tau),
                            dict(g=None, kept=None, sign=bits[0], nonzero=bits[1], pooled_grad=tau),
                        ):
                            ours = cpu.grad(geo, dtype, **arguments)
                            for a, b in zip(ours, eager.grad(geo, dtype, **arguments), strict=True):
                                check(a, b, low)
                            calls += 1
    print(f"sanitized walk: {calls} backward calls ok on {', '.join(native.available_isas())}")


if __name__ == "__main__":
    main(sys.argv[1])
