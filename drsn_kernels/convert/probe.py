"""Examine one module: find what it takes, what it computes, and whether a plan does the same in every respect."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import recording
from ..backends import use_backend
from .family import Match, close, lines_of, match_inside, match_module, plans_for
from .plans import GatePlan, Plan, install
from .tracing import Differs, Trace, Unexplained, Untraceable, first_line, private_copy, state_of, takes_one_argument

_SPATIAL = {3: ((23,), (16,)), 4: ((7, 6), (4, 5)), 5: ((4, 3, 5), (2, 3, 2))}
_ANY_WIDTH = 6  # for modules that take any number of channels


@dataclass
class Finding:
    """What examine found: plans, or why there are none."""

    plans: dict[tuple[int, bool], Plan] = field(default_factory=dict)
    why: str = ""
    inline: bool = False
    difference: float | None = None  # in float64, relative, the worst of outputs, gradients and statistics
    own_difference: float | None = None  # of outputs in the module's own dtype


def examine(module: nn.Module) -> Finding:
    try:
        _accept(module)
        shapes, dtype, calls = _shapes(module)
    except Unexplained as reason:
        return Finding(why=str(reason))
    found, inside = Finding(), True
    for shape in shapes:
        rank = len(shape(0))
        try:
            plans, difference = _explain(module, shape, dtype)
            own = _own_difference(module, plans, shape)
        except Unexplained as reason:
            if isinstance(reason, Differs) or not found.why:
                found.why = _IS_OURS if calls and isinstance(reason, Untraceable) else str(reason)
            inside = inside and not isinstance(reason, Differs)
            continue
        found.plans.update({(rank, training): plan for training, plan in plans.items()})
        found.difference = max(difference, found.difference or 0.0)
        found.own_difference = max(own, found.own_difference or 0.0)
    if not found.plans and inside:
        for shape in shapes:
            advice = _inline(module, shape, dtype)
            if advice:
                return Finding(why=advice, inline=True)
    return found


_IS_OURS = "its forward calls the operators of drsn_kernels itself"


def _accept(module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise Unexplained("its forward has been replaced on the object")
    if not takes_one_argument(module):
        raise Unexplained("its forward cannot be called with one tensor")
    for t in (*module.parameters(), *module.buffers()):
        if type(t) not in (torch.Tensor, nn.Parameter):
            raise Unexplained(f"it has a {type(t).__name__}: convert before it is sharded, or after its first run")
        if t.is_meta:
            raise Unexplained("its parameters are on the meta device")


class _Shape:
    """The probe shapes (N, C, *spatial) of a module that was found to take this rank and number of channels."""

    def __init__(self, rank: int, channels: int) -> None:
        self.rank, self.channels = rank, channels

    def __call__(self, i: int, batch: int | None = None) -> tuple[int, ...]:
        return (batch or (5, 3)[i], self.channels, *_SPATIAL[self.rank][i])


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _own_dtype(module: nn.Module) -> torch.dtype:
    floats = (t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _random(shape: tuple[int, ...], module: nn.Module, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=_device(module), dtype=dtype)


def _shapes(module: nn.Module) -> tuple[list[_Shape], torch.dtype, list]:
    """Ranks and widths that its forward takes, the dtype to probe in (float64 where it can), and the calls of our own
    operators that were seen meanwhile."""
    error: Exception | None = None
    calls: list = []
    for dtype in dict.fromkeys((torch.float64, _own_dtype(module))):
        found = []
        try:
            trial = private_copy(module, dtype).eval()
        except Exception as problem:
            raise Unexplained(f"it cannot be copied for a probe: {first_line(problem)}") from None
        for rank in _SPATIAL:
            for channels in _widths(module):
                shape = _Shape(rank, channels)
                try:
                    with torch.no_grad(), _noting(calls):
                        trial.forward(_random(shape(0), module, dtype))
                except Exception as problem:
                    error = error or problem
                    continue
                found.append(shape)
                break
        if found:
            return found, dtype, calls
    raise Unexplained(f"no probe (N, C, *spatial) runs: {first_line(error)}")


@contextlib.contextmanager
def _noting(calls: list) -> Iterator[None]:
    before, recording.active = recording.active, lambda *args, **kwargs: calls.append(args)
    try:
        yield
    finally:
        recording.active = before


def _widths(module: nn.Module) -> list[int]:
    """Numbers of channels to try: what the layers take, in their order."""
    found: list[int] = []
    for m in module.modules():
        for name in ("in_features", "in_channels", "num_features", "num_channels"):
            if isinstance(getattr(m, name, None), int):
                found.append(getattr(m, name))
    for p in module.parameters():
        found.extend(p.shape)
    wide = [width for width in dict.fromkeys(found) if width > 1]
    return [*wide[:8], _ANY_WIDTH, 1]


def _explain(module: nn.Module, shape: _Shape, dtype: torch.dtype) -> tuple[dict[bool, Plan], float]:
    """A plan for each mode, with the largest difference that was measured."""
    plans: dict[bool, Plan] = {}
    worst = 0.0
    for training in (False, True):
        raised: type[Unexplained] = Differs if plans else Unexplained
        mode = "in training " if training else ""
        try:
            trace = Trace(module, _random(shape(0), module, dtype), training)
            match = match_module(trace)
            raised, reason = Differs, None
            for plan in plans_for(trace, match):
                if not _gives(plan, private_copy(module, dtype).train(training), match):
                    continue
                try:
                    worst = max(worst, _difference(module, plan, shape, dtype, training))
                except Unexplained as problem:
                    reason = reason or problem
                    continue
                plans[training] = plan
                break
            if training not in plans:
                raise reason or Unexplained(match.underived)
        except Unexplained as problem:
            kind = type(problem) if raised is Unexplained else raised
            raise kind(f"{mode}{problem}") from None
    return plans, worst


def _probes(module: nn.Module, shape: _Shape, dtype: torch.dtype, training: bool) -> Iterator[torch.Tensor]:
    """Two sizes, three scales, half of x zero; one sample where batch statistics are not at stake."""
    yield _random(shape(1), module, dtype, 1)
    yield _random(shape(0), module, dtype, 2) * 1e-3
    yield (_random(shape(0), module, dtype, 3) * 1e3).relu()
    if not training:
        yield _random(shape(1, batch=1), module, dtype, 4)


def _difference(module: nn.Module, plan: Plan, shape: _Shape, dtype: torch.dtype, training: bool) -> float:
    worst = 0.0
    for x in _probes(module, shape, dtype, training):
        own = _outcome(private_copy(module, dtype), x, training)
        copy = private_copy(module, dtype)
        install(copy, {(x.dim(), training): plan})
        with use_backend("torch"):
            ours = _outcome(copy, x, training)
        if own.keys() != ours.keys():
            other = sorted(own.keys() ^ ours.keys())[0]
            raise Unexplained(f"{'only its own' if other in own else 'only the fused'} form has the {other}")
        largest = max((_largest(v) for k, v in own.items() if k.startswith(_OF_PARAMETER)), default=0.0)
        for name, value in own.items():
            if value.shape != ours[name].shape:
                raise Unexplained(f"the {name} has another shape in the fused form")
            # a gradient that is 0 but for rounding, as of a bias before a BatchNorm, is measured by the others
            size = largest if name.startswith(_OF_PARAMETER) else _largest(value)
            same = (value == ours[name]) | (value.isnan() & ours[name].isnan())
            apart = _largest(torch.where(same, 0.0, value.double() - ours[name].double())) / (size or 1.0)
            if not apart <= (1e-8 if dtype == torch.float64 else 1e-3):
                raise Unexplained(f"the {name} is {apart:.1g} (relative) off the fused form's")
            worst = max(worst, apart)
    return worst


_OF_PARAMETER = "gradient of parameter "


def _largest(t: torch.Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _outcome(module: nn.Module, x: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    """All that a pass forward and backward gives and leaves behind."""
    module.train(training)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    try:
        y = module(x)
        grad = _random(tuple(y.shape), module, y.dtype, 5)
        leaves = {"gradient of x": x, **{_OF_PARAMETER + k: p for k, p in module.named_parameters()}}
        wanted = {k: t for k, t in leaves.items() if t.requires_grad}
        got = torch.autograd.grad(y, list(wanted.values()), grad, allow_unused=True) if y.requires_grad else ()
    except Exception as error:
        raise Unexplained(f"a probe fails: {first_line(error)}") from None
    gradients = {k: g for k, g in zip(wanted, got, strict=False) if g is not None}
    return {"output": y.detach(), **gradients, **state_of(module)}


def _own_difference(module: nn.Module, plans: dict[bool, Plan], shape: _Shape) -> float:
    """The fused form as it will run, in the module's dtype: it must run, and how far its output is off the module's."""
    worst = 0.0
    dtype = _own_dtype(module)
    for training, plan in plans.items():
        x = _random(shape(0), module, dtype, 6)
        own = _outcome(private_copy(module), x, training)["output"]
        copy = private_copy(module)
        install(copy, {(x.dim(), training): plan})
        ours = _outcome(copy, x, training)["output"]
        if ours.dtype != own.dtype:
            raise Unexplained(f"its output is {own.dtype} where the fused form's is {ours.dtype}")
        worst = max(worst, _largest(own - ours) / (_largest(own) or 1.0))
    return worst


# ---- inline code -----------------------------------------------------------------------------------------------------


def _inline(module: nn.Module, shape: _Shape, dtype: torch.dtype) -> str | None:
    """Where a module computes the operator amid other code: the lines, and the call to put there."""
    try:
        trace = Trace(module, _random(shape(0), module, dtype), False)
        match = match_inside(trace)
        if match is None:
            return None
        trace.effects = []
        call = "dk.soft_threshold(x, tau)"
        for plan in plans_for(trace, match):
            if _gives(plan, private_copy(module, dtype).eval(), match):
                call = _call(plan)
                break
    except Unexplained:
        return None
    return f"change {lines_of(trace, match)} to {call}"


def _gives(plan: Plan, module: nn.Module, match: Match) -> bool:
    """Whether it gives y from u on the values of the trace, whose mode the copy `module` is in."""
    with torch.no_grad(), use_backend("torch"):
        torch.manual_seed(0)
        try:
            return close(plan(module, match.u.meta["seen"]), match.y.meta["seen"])
        except Exception:  # code that does not run on a pooled x is no gate
            return False


def _call(plan: Plan) -> str:
    if isinstance(plan, GatePlan) and isinstance(plan.gate, str):
        return f"dk.shrink(x, self.{plan.gate}, average={plan.average!r})"
    if isinstance(plan, GatePlan):
        layers = ", ".join(f"self.{part}" if isinstance(part, str) else f"nn.{part.__name__}()" for part in plan.gate)
        return f"dk.shrink(x, nn.Sequential({layers}), average={plan.average!r})"
    if plan.pool == "abs":
        return "dk.shrink(x, gate, average=None) with a function gate(A), A (N, C) the mean of |x|, for the threshold"
    return "dk.soft_threshold(x, tau)"
