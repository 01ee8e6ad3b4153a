"""What the sweep times: a launch that streams over x or g by itself, or a step of Shrinkage, on one input.

reduce, map (with three planes), map_eval (with none), grad_dtau and grad_dx are called as the operators call them. Each
has a floor, a copy of x, and its formula in PyTorch for torch.compile. shrink_train and shrink_eval are the cases of
`python -m benchmarks`; their floor is theirs. Nothing here knows how a kernel is written: an alternative is a set of
other numbers in tuned.py, under which the same call is made.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from drsn_kernels import backends
from drsn_kernels.backends.eager import eager
from drsn_kernels.backends.gpu import tuned
from drsn_kernels.backends.step import Step, Want
from drsn_kernels.demo.timing import Call
from drsn_kernels.layout import Planes, layout_of, unpack
from drsn_kernels.reference import align_tau

from .calls import FLOOR, Provider, best_abs_mean, best_soft_threshold, build, plans_of
from .cases import Case
from .checks import FLOOR as ROUNDING
from .checks import Judge, norm_error

STREAMS = ("reduce", "map", "map_eval", "grad_dtau", "grad_dx")
STEPS = ("shrink_train", "shrink_eval")
OPS = (*STREAMS, *STEPS)
OURS, BEST = Provider("triton", "ours", "triton"), Provider("best-compiled", "best", compiled=True)


@dataclass(frozen=True)
class Subject:
    """Calls of one case on the same tensors."""

    floor: Call
    ours: Call
    judge: Any  # has `case`, and objection(call): what is wrong with this very call's results, or None
    planned: Callable[[], tuple]  # the launches that `ours` would make now, equal only where they are the same
    best: Call | None = None  # under torch.compile, where it was asked for


def subject(case: Case, device: str, compiled: bool = False) -> Subject:
    torch.manual_seed(0)
    return _step(case, device, compiled) if case.op in STEPS else _stream(case, device, compiled)


def under(call: Call, constants: dict[str, Any]) -> Call:
    """The same call, planned by these constants."""

    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        with tuned.using(**constants), call.setting():
            yield

    return replace(call, setting=setting)


# ---- steps -----------------------------------------------------------------------------------------------------------


def _step(case: Case, device: str, compiled: bool) -> Subject:
    calls, port, exact = build(case, (FLOOR, OURS, *((BEST,) if compiled else ())), device)
    ours = calls[OURS.name]
    judge = Judge(case, port, exact) if device != "cpu" else None  # on the CPU launches are compiled, not run

    def planned() -> tuple:
        return tuple(launch for plan in plans_of(ours) for launch in plan.launches)

    return Subject(calls[FLOOR.name], ours, judge, planned, calls.get(BEST.name))


# ---- streams ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operands:
    x: torch.Tensor
    g: torch.Tensor
    tau: torch.Tensor  # (N, C), as dA
    dA: torch.Tensor
    planes: Planes

    def double(self) -> "_Operands":
        return _Operands(self.x.double(), self.g.double(), self.tau.double(), self.dA.double(), self.planes)

    def run(self, op: str, by: backends.Backend) -> tuple[torch.Tensor, ...]:
        """What a backend's kernel returns: values first, then planes as bools."""
        layout, dtype = layout_of(self.x), self.x.dtype
        if op == "reduce":
            return (by.reduce(self.x, layout)[0],)
        if op in ("map", "map_eval"):
            y, planes = by.map(self.x, layout, self.tau, keep=3 if op == "map" else 0)
            return (y,) if planes is None else (y, planes.bits)
        wanted = {"want_dx": False, "want_dtau": True} if op == "grad_dtau" else {"dA": self.dA}
        return tuple(t for t in by.grad(layout, dtype, self.planes, self.g, **wanted) if t is not None)


def _operands(case: Case, device: str) -> _Operands:
    x = torch.randn(case.shape, device=device).to(case.torch_dtype)
    g = torch.randn(case.shape, device=device).to(case.torch_dtype)
    if case.channels_last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    layout = layout_of(x)
    tau = 1.5 * torch.rand(case.shape[:2], device=device)
    _, planes = eager.map(x, layout, tau, keep=3)
    return _Operands(x, g, tau, torch.randn_like(tau), planes)


class _StreamJudge:
    """Compares a kernel's results with the same in float64; planes must be the same bits."""

    def __init__(self, case: Case, operands: _Operands) -> None:
        self.case, self.layout = case, layout_of(operands.x)
        self.want, *self.planes = operands.double().run(case.op, eager)

    def objection(self, call: Call) -> str | None:
        value, *planes = call.once()
        limit = 4 * ROUNDING[self.case.dtype]
        if not (found := norm_error((value,), (self.want,))) <= limit:
            return f"{self.case.op} differs from float64 by {found:.1e} (norm), allowed {limit:.1e}"
        for got, want in zip(planes, self.planes, strict=True):
            for number, (a, b) in enumerate(zip(got, want, strict=True)):
                if wrong := int((unpack(a, self.layout) != unpack(b, self.layout)).sum()):
                    return f"plane {number} of {self.case.op} has {wrong} wrong bits"
        return None


def _stream(case: Case, device: str, compiled: bool) -> Subject:
    operands = _operands(case, device)
    gpu = backends.BACKENDS["triton"]
    judge = _StreamJudge(case, operands) if device != "cpu" else None
    best = None
    if compiled:
        formula = torch.compile(_FORMULAS[case.op], dynamic=False)
        best = Call(lambda: (formula(operands.x, operands.g, operands.tau.to(operands.x.dtype), operands.dA),))
    ours = Call(lambda: operands.run(case.op, gpu))
    return Subject(Call(lambda: (operands.x.clone(),)), ours, judge, lambda: _planned(case, operands), best)


def _planned(case: Case, operands: _Operands) -> tuple:
    """Of the launches of a shrinkage step with any gate, the one that this is."""
    layout = layout_of(operands.x)
    step = Step("shrink", layout, layout.strides, operands.x.dtype, operands.x.device, "channel", outputs=layout.c,
                keep=case.op != "map_eval", want=Want(x=True, threshold=True))  # fmt: skip
    number = {"reduce": 0, "map": 1, "map_eval": 1, "grad_dtau": 2, "grad_dx": 3}[case.op]
    return backends.BACKENDS["triton"].plan(step).launches[number : number + 1]


def _best_dtau(x, g, tau, dA):
    return -torch.where(x.abs() > align_tau(tau, x), torch.sign(x) * g, 0.0).flatten(2).sum(2)


def _best_dx(x, g, tau, dA):
    share = align_tau(dA / x[0, 0].numel(), x)
    return (torch.where(x.abs() > align_tau(tau, x), g, 0.0) + torch.sign(x) * share).to(x.dtype)


_FORMULAS: dict[str, Callable] = {
    "reduce": lambda x, g, tau, dA: best_abs_mean(x),
    "map": lambda x, g, tau, dA: best_soft_threshold(x, tau),
    "map_eval": lambda x, g, tau, dA: best_soft_threshold(x, tau),
    "grad_dtau": _best_dtau,
    "grad_dx": _best_dx,
}
"""In PyTorch, from x, because torch.compile keeps no planes."""
