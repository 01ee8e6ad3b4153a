"""The operator against plain PyTorch on random features, in every available backend: y, dx and the gate's gradients."""

import copy

import torch
from torch import nn

from .. import backends
from ..modules import Shrinkage
from .port import PortShrinkage

SHAPES = ((32, 24, 333), (16, 32, 17, 19))
# An error is fine up to twice PyTorch's own in that dtype, plus this.
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-11}
PARTS = ("y", "dx", "gate")


def _step(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], g)]


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm: an element that flips at |x| == tau by rounding does not decide."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> tuple[float, float, float]:
    # got[3] is the bias in front of the gate's batch norm: its gradient is zero but for rounding
    errors = [_error(a, b) for i, (a, b) in enumerate(zip(got, want, strict=True)) if i != 3]
    return errors[0], errors[1], max(errors[2:])


def _compare(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[tuple, tuple]:
    """Errors of the fused module and of plain PyTorch in this dtype, both against plain PyTorch in float64."""
    torch.manual_seed(sum(shape))
    exact = PortShrinkage(shape[1]).double()
    plain, fused = PortShrinkage(shape[1]).to(dtype), Shrinkage(shape[1]).to(dtype)
    for module in (plain, fused):
        module.load_state_dict(copy.deepcopy(exact.state_dict()))
    x, g = (torch.randn(shape, dtype=dtype) for _ in range(2))
    want = _step(exact, x.double(), g.double())
    with backends.use_backend(name, strict=True):
        got = _step(fused, x, g)
    return _errors(got, want), _errors(_step(plain, x, g), want)


def run() -> list[dict]:
    """Print and return a row for each backend and dtype; raises RuntimeError if one is wrong."""
    rows = []
    print(f"{'backend':10s}{'dtype':10s}" + "".join(f"{part:>10s}" for part in PARTS) + "   relative error (norm)")
    for name, backend in backends.BACKENDS.items():
        for dtype, floor in FLOOR.items():
            if (reason := backend.unsupported(torch.empty(0, dtype=dtype))) is not None:
                print(f"{name:10s}not available: {reason}")
                break
            ok, worst = True, [0.0, 0.0, 0.0]
            for shape in SHAPES:
                ours, plain = _compare(name, dtype, shape)
                ok &= all(a <= 2 * b + floor for a, b in zip(ours, plain, strict=True))
                worst = [max(w, e) for w, e in zip(worst, ours, strict=True)]
            label = str(dtype).removeprefix("torch.")
            rows.append({"backend": name, "dtype": label, "ok": ok, **dict(zip(PARTS, worst, strict=True))})
            print(f"{name:10s}{label:10s}" + "".join(f"{e:10.1e}" for e in worst) + ("   ok" if ok else "   WRONG"))
    if not all(row["ok"] for row in rows):
        raise RuntimeError("the fused operator does not agree with plain PyTorch on this machine; please report this")
    return rows
