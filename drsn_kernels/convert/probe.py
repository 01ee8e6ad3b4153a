"""Examine one module: find what it takes, what it computes, and whether a fused form does the same in every respect."""

import contextlib
import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import hooks, recording
from ..backends import use_backend
from .conditions import Conditions, class_of, frozen
from .dropped import check_dropped, check_sign, check_zero
from .family import Match, close, factors_of, match_inside, match_module, plans_for, rows_of
from .plans import Fused, Plan, install
from .reasons import Amid, Differs, Unexplained, Untraceable, first_line
from .tracing import Trace, private_copy, state_of, takes_one_argument
from .watch import OF_MODULE, Watch, run_forward

# Spatial sizes to try: odd ones tell most; the others are for strides and for modules of one size.
_SIZES: dict[int, list[tuple[int, ...]]] = {
    3: [(23,), (16,), (32,), (64,), (128,), (256,), (512,), (1024,)],
    4: [(7, 6), (4, 5), (8, 8), (16, 16), (32, 32), (14, 14), (28, 28), (56, 56), (64, 64), (7, 7)],
    5: [(4, 3, 5), (2, 3, 2), (4, 4, 4), (8, 8, 8)],
}
_BATCHES = (5, 3)
_ANY_WIDTH = 6  # for modules that take any number of channels


@dataclass(frozen=True)
class Shape:
    """Probes (N, C, *spatial) that a module was found to take."""

    channels: int
    sizes: tuple[tuple[int, ...], ...]  # one, where it takes no other

    @property
    def rank(self) -> int:
        return 2 + len(self.sizes[0])

    def __call__(self, i: int, batch: int | None = None) -> tuple[int, ...]:
        return (batch or _BATCHES[i], self.channels, *self.sizes[i % len(self.sizes)])


@dataclass
class Finding:
    """What examine found: fused forms, or why there are none."""

    plans: dict[tuple[int, bool], Fused] = field(default_factory=dict)
    why: str = ""
    difference: float | None = None  # in float64, relative, the worst of outputs, gradients and statistics
    own_difference: float | None = None  # of outputs in the module's own dtype
    amid: tuple[Shape, ...] = ()  # the operator may stand in it amid other code
    advice: str = ""  # it does: what to change
    shapes: tuple[Shape, ...] = ()  # that it takes


def examine(module: nn.Module) -> Finding:
    try:
        _accept(module)
        shapes, calls = _shapes(module)
    except Unexplained as reason:
        return Finding(why=str(reason))
    found = Finding(shapes=tuple(shapes))
    for shape, against in shapes.items():
        try:
            if against is not None:
                raise against
            fused, difference = _explain(module, shape, dtype_for(module, shape))
            own = _own_difference(module, fused, shape)
        except Unexplained as reason:
            if isinstance(reason, Differs) or not found.why:
                found.why = _IS_OURS if calls and isinstance(reason, Untraceable) else str(reason)
            if isinstance(reason, Amid) or (against is None and not isinstance(reason, Differs)):
                found.amid += (shape,)
            continue
        found.plans.update({(shape.rank, training): f for training, f in fused.items()})
        found.difference = max(difference, found.difference or 0.0)
        found.own_difference = max(own, found.own_difference or 0.0)
    return found


def configuration(module: nn.Module) -> Hashable | None:
    """Equal for modules of one class that nothing but their numbers tells apart: what is found for one holds for all.
    None where that cannot be told."""
    found: list = []
    order: dict[int, int] = {}  # of tensors and modules: aliases
    try:
        for path, m in module.named_modules(remove_duplicate=False):
            found.append((path, class_of(m), order.setdefault(id(m), len(order))))
            if any(m.__dict__[kind] for kind in hooks.KINDS):
                return None
            for table in (m._parameters, m._buffers, m.__dict__):
                for name, value in table.items():
                    if isinstance(value, torch.Tensor):
                        which = order.setdefault(id(value), len(order))
                        found.append((name, which, value.shape, value.dtype, value.device, value.requires_grad))
                        if not value.is_floating_point() and name != "num_batches_tracked":
                            found.append(tuple(value.flatten().tolist()))
                    elif table is not m.__dict__ or name not in OF_MODULE:
                        found.append((name, type(value), frozen(value)))
    except Unexplained:
        return None
    return tuple(found)


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


# ---- what it takes ---------------------------------------------------------------------------------------------------


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def own_dtype(module: nn.Module) -> torch.dtype:
    floats = (t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next(floats, torch.get_default_dtype())


def random(shape: tuple[int, ...], module: nn.Module, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """On the module's device, whatever the default device is."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(device=_device(module), dtype=dtype)


def dtype_for(module: nn.Module, shape: Shape) -> torch.dtype:
    """float64 where the module runs in it: there rounding is told from everything else."""
    with contextlib.suppress(Exception), torch.no_grad():
        trial = private_copy(module, torch.float64).eval()
        with Watch(trial):
            run_forward(trial, random(shape(0), module, torch.float64))
        return torch.float64
    return own_dtype(module)


def _shapes(module: nn.Module) -> tuple[dict[Shape, Unexplained | None], list]:
    """Probes that its forward takes, each with what speaks against the operator by the output alone; and the calls of
    our own operators that were seen meanwhile."""
    calls: list = []
    error: Exception | None = None
    found: dict[Shape, Unexplained | None] = {}
    dtype = own_dtype(module)
    try:
        trial = private_copy(module).eval()
    except Exception as problem:
        raise Unexplained(f"it cannot be copied for a probe: {first_line(problem)}") from None
    watch = Watch(trial)

    def run(channels: int, size: tuple[int, ...]) -> Unexplained | bool | None:
        """None: it does not take this."""
        nonlocal error
        x = random((_BATCHES[0], channels, *size), module, dtype)
        try:
            with torch.no_grad(), _noting(calls), watch:
                y = run_forward(trial, x.clone())
        except Exception as problem:
            error = error or problem
            return None
        return _against(trial, x, y) or True

    ranks, widths = _ranks(module), _widths(module)
    large = sum(p.numel() for p in module.parameters()) > 1 << 20  # a network or a block: one rank will do
    few = ((rank, channels, size) for rank in ranks for channels in widths for size in _SIZES[rank][:2])
    more = (
        (rank, channels, size)
        for rank in ranks
        for channels in widths[:3]
        for size in _more_sizes(module, rank, channels)
    )
    for tries in (few, more):
        for rank, channels, size in tries:
            if any(shape.rank == rank or large for shape in found):
                continue
            said = run(channels, size)
            if said is None:
                continue
            others = [s for s in (*_SIZES[rank], *_more_sizes(module, rank, channels)) if s != size]
            other = next((s for s in others if run(channels, s) is not None), None)
            found[Shape(channels, (size, other) if other else (size,))] = said if said is not True else None
        if found:
            return found, calls
    raise Unexplained(f"no probe (N, C, *spatial) runs: {first_line(error)}")


def _against(trial: nn.Module, x: torch.Tensor, y: object) -> Unexplained | None:
    """Why y is neither x soft thresholded nor x scaled, where x's dtype tells. Amid: the operator is in it."""
    if x.dtype not in (torch.float32, torch.float64):
        return None
    try:
        rows_of(x, y)
    except Differs:
        return None  # perhaps by rounding
    except Unexplained as reason:
        if factors_of(x, y) is not None:
            return None
        try:
            return Amid(str(reason)) if match_inside(Trace(trial, x)) else reason
        except Unexplained:
            return reason
    return None


_SPATIAL_LAYER = re.compile(r"(?:Conv|ConvTranspose|AvgPool|MaxPool|AdaptiveAvgPool|AdaptiveMaxPool)([123])d")


def _ranks(module: nn.Module) -> list[int]:
    """Those first that the layers take: of their probes is the reason that is given."""
    names = (_SPATIAL_LAYER.fullmatch(base.__name__) for m in module.modules() for base in type(m).__mro__)
    asked = {2 + int(name[1]) for name in names if name}
    return sorted(_SIZES, key=lambda rank: (rank not in asked, rank))


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


def _more_sizes(module: nn.Module, rank: int, channels: int) -> list[tuple[int, ...]]:
    """Also those that the shapes of its parameters, and the numbers that it holds, may stand for."""
    dims = rank - 2
    hints = [tuple(t.shape[-dims:]) for t in (*module.parameters(), *module.buffers()) if t.dim() > dims]
    numbers = [n for m in module.modules() for n in m.__dict__.values() if type(n) is int]
    numbers += [n // channels for n in numbers if n % channels == 0]
    hints += [(n,) * dims for n in numbers]
    return [*(h for h in dict.fromkeys(hints) if all(1 < n <= 1024 for n in h))][:12] + _SIZES[rank][2:]


@contextlib.contextmanager
def _noting(calls: list) -> Iterator[None]:
    before, recording.active = recording.active, lambda *args, **kwargs: calls.append(args)
    try:
        yield
    finally:
        recording.active = before


# ---- what it computes ------------------------------------------------------------------------------------------------


def _explain(module: nn.Module, shape: Shape, dtype: torch.dtype) -> tuple[dict[bool, Fused], float]:
    """A fused form for each mode, with the largest difference that was measured."""
    found: dict[bool, Fused] = {}
    worst = 0.0
    for training in (False, True):
        raised: type[Unexplained] = Differs if found else Unexplained
        mode = "in training " if training else ""
        trace = None
        try:
            trace = Trace(private_copy(module, dtype).train(training), random(shape(0), module, dtype))
            match = match_module(trace)
            raised, reason = Differs, None
            positive = check_sign(trace, match)
            for candidate in plans_for(trace, match):
                plan = candidate.plan
                if not gives(plan, private_copy(module, dtype).train(training), match):
                    continue
                try:
                    check_dropped(trace, match, candidate)
                    above_zero = check_zero(trace, match)
                    conditions = trace.conditions(module, candidate.steps - candidate.pooled)
                    conditions = conditions._replace(parts=(*conditions.parts, *positive, *above_zero))
                    if len(shape.sizes) == 1:
                        conditions = conditions._replace(spatial=shape.sizes[0])
                    xs = _probes(module, shape, dtype, training)
                    worst = max(worst, difference(module, plan, xs, dtype, training))
                except Unexplained as problem:
                    reason = reason or problem
                    continue
                found[training] = Fused(plan, conditions)
                break
            if training not in found:
                raise reason or Unexplained(match.underived)
        except Unexplained as problem:
            kind = type(problem) if raised is Unexplained else raised
            raise kind(f"{mode}{problem}") from None
        finally:
            if trace is not None:
                trace.watch.restore()
    return found, worst


def gives(plan: Plan, module: nn.Module, match: Match) -> bool:
    """Whether it gives y from u on the values of the trace, whose mode the copy `module` is in."""
    with torch.no_grad(), use_backend("torch"):
        torch.manual_seed(0)
        try:
            return close(plan(module, match.u.meta["seen"]), match.y.meta["seen"])
        except Exception:  # code that does not run on a pooled x is no gate
            return False


def _probes(module: nn.Module, shape: Shape, dtype: torch.dtype, training: bool) -> Iterator[torch.Tensor]:
    """Two sizes, three scales, half of x zero; one sample where batch statistics are not at stake."""
    yield random(shape(1), module, dtype, 1)
    yield random(shape(0), module, dtype, 2) * 1e-3
    yield (random(shape(0), module, dtype, 3) * 1e3).relu()
    if not training:
        yield random(shape(1, batch=1), module, dtype, 4)


def difference(module: nn.Module, plan: Plan, xs: Iterable[torch.Tensor], dtype: torch.dtype, training: bool) -> float:
    """The largest of the plan's outputs, gradients and what it leaves behind from the module's own, relative."""
    worst = 0.0
    for x in xs:
        own = _outcome(private_copy(module, dtype), x, training)
        copy = private_copy(module, dtype)
        install(copy, {(x.dim(), training): Fused(plan)})
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
        grad = random(tuple(y.shape), module, y.dtype, 5)
        leaves = {"gradient of x": x, **{_OF_PARAMETER + k: p for k, p in module.named_parameters()}}
        wanted = {k: t for k, t in leaves.items() if t.requires_grad}
        got = torch.autograd.grad(y, list(wanted.values()), grad, allow_unused=True) if y.requires_grad else ()
    except Exception as error:
        raise Unexplained(f"a probe fails: {first_line(error)}") from None
    gradients = {k: g for k, g in zip(wanted, got, strict=False) if g is not None}
    return {"output": y.detach(), **gradients, **state_of(module)}


def _own_difference(module: nn.Module, fused: dict[bool, Fused], shape: Shape) -> float:
    """The fused form as it will run, in the module's dtype: it must run, and how far its output is off the module's."""
    worst = 0.0
    dtype = own_dtype(module)
    for training, form in fused.items():
        x = random(shape(0), module, dtype, 6)
        own = _outcome(private_copy(module, vary=False), x, training)["output"]
        copy = private_copy(module, vary=False)
        install(copy, {(x.dim(), training): form._replace(conditions=Conditions())})
        ours = _outcome(copy, x, training)["output"]
        if ours.dtype != own.dtype:
            raise Unexplained(f"its output is {own.dtype} where the fused form's is {ours.dtype}")
        _check_dtype(module, form, x)
        apart = _largest(own - ours) / (_largest(own) or 1.0)
        if not apart <= (1e-3 if dtype.itemsize > 2 else 0.1):  # a number that was read from a tensor, say
            raise Differs(f"its output is {apart:.1g} (relative) off the fused form's")
        worst = max(worst, apart)
    return worst


def _check_dtype(module: nn.Module, form: Fused, x: torch.Tensor) -> None:
    """In bfloat16 a constant of float32 amid the code makes its result float32."""
    x, dtypes = x.to(torch.bfloat16), []
    for plan in (None, form._replace(conditions=Conditions())):
        copy = private_copy(module, torch.bfloat16).eval()
        if plan is not None:
            install(copy, {(x.dim(), False): plan})
        try:
            with torch.no_grad():
                dtypes.append(copy(x).dtype)
        except Exception:  # it takes no bfloat16: nothing to compare
            return
    if dtypes[0] != dtypes[1]:
        raise Differs(f"of a bfloat16 x its output is {dtypes[0]} where the fused form's is {dtypes[1]}")
