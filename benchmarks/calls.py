"""Who computes a case, and the calls: each provider's module with the same parameters, on the same x."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from drsn_kernels import FusedSequential, Shrinkage, abs_mean, backends, models, recording, soft_threshold
from drsn_kernels.backends.step import Cost, Plan
from drsn_kernels.demo.port import PortShrinkage, standard_gate, swap
from drsn_kernels.demo.timing import Call

from .cases import NETWORK, Case
from .checks import clear_hidden_units, clear_thresholds

# ---- providers: the floor, the popular port, the best eager form, the compiler, and each backend of ours ------------


@dataclass(frozen=True)
class Provider:
    """A form of the step (floor, port, best, ours; resnet), and how it runs."""

    name: str
    form: str
    backend: str = "auto"
    compiled: bool = False
    threads: int | None = None

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        with backends.use_backend(self.backend, strict=self.backend != "auto"):
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                if self.threads is not None:
                    torch.set_num_threads(threads)

    def __str__(self) -> str:
        return self.name


FLOOR, PORT = Provider("floor", "floor"), Provider("port", "port")
PLAIN = ("floor", "resnet")  # forms without a shrinkage, which are not judged by the port's results
_EAGER, _COMPILED = ("triton", "cpu", "torch"), ("ours", "triton", "cpu")
OURS = (*_EAGER, *(f"{name}-compiled" for name in _COMPILED))  # names that the gate watches
COMPILE = ("none", "best", "all")


def backends_for(device: str, dtype: torch.dtype) -> list[str]:
    """Our backends that have kernels for this device here, the preferred one first; "torch" is always the last.

    Triton on CPU tensors is its interpreter, where times mean nothing.
    """
    sample = torch.empty(0, dtype=dtype, device=device)
    able = [name for name, backend in backends.BACKENDS.items() if backend.unsupported(sample) is None]
    return [name for name in able if not (name == "triton" and device == "cpu")]


def providers(case: Case, device: str, compile: str) -> list[Provider]:
    """Those of a case, in the order of its rows. compile: "none", "best" (best-compiled only) or "all"."""
    names = backends_for(device, case.torch_dtype)
    if case.op == "scaling":
        return [
            Provider(name + label, form, backend, threads=threads)
            for name, form, backend in (("floor", "floor", "auto"), (names[0], "ours", names[0]))
            for label, threads in (("", 2), ("-1-thread", 1))
        ]
    found = [FLOOR, PORT, Provider("best", "best")]
    if compile != "none":
        found.append(Provider("best-compiled", "best", compiled=True))
    if compile == "all":
        found.append(Provider("port-compiled", "port", compiled=True))
    found += [Provider(name, "ours", name) for name in names]
    if case.op in NETWORK:  # of a ResNet, whose floor is PyTorch's own: what our normalisation alone makes of it
        found.append(Provider("resnet-fused", "resnet", names[0]))
        if compile != "none":
            found.append(Provider("floor-compiled", "floor", compiled=True))
            found += [Provider("ours-compiled", "ours", compiled=True)] if compile == "best" else []
    if compile == "all":
        # by default a compiled call is the reference, which the compiler fuses; a forced backend is opaque operators
        found.append(Provider("ours-compiled", "ours", compiled=True))
        found += [Provider(f"{name}-compiled", "ours", name, compiled=True) for name in names if name != "torch"]
    return found


# ---- the step as people write it in PyTorch --------------------------------------------------------------------------


def port_abs_mean(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial) -> (N, C), as the popular ports write it."""
    return torch.flatten(nn.functional.adaptive_avg_pool1d(torch.abs(x).flatten(2), 1), 1)


def best_abs_mean(x: torch.Tensor) -> torch.Tensor:
    """The same in the fewest operations of PyTorch."""
    return x.abs().mean(dim=list(range(2, x.dim())))


def port_soft_threshold(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """x (N, C, *spatial), tau (N, C), as the popular ports write it."""
    sub = torch.abs(x) - tau.view(*tau.shape, *[1] * (x.dim() - 2))
    zeros = sub - sub
    return torch.mul(torch.sign(x), torch.max(sub, zeros))


def best_soft_threshold(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """x - clamp(x, -tau, tau): the form torch.compile does best with."""
    tau = tau.view(*tau.shape, *[1] * (x.dim() - 2))
    return x - torch.clamp(x, -tau, tau)


class BestShrinkage(nn.Module):
    """The fewest operations in pure PyTorch, with the same gate."""

    def __init__(self, channels: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = standard_gate(channels) if gate is None else gate

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        average = best_abs_mean(x)
        y = best_soft_threshold(x, average * self.fc(average))
        return y if residual is None else y + residual


# ---- modules ---------------------------------------------------------------------------------------------------------

TRAINING = ("shrink_train", "shrink_any_gate", "norm_relu", "unit")  # forward is recorded for a backward pass
SHRINKAGE = {"port": PortShrinkage, "best": BestShrinkage, "ours": Shrinkage}
_POOL = {"port": port_abs_mean, "best": best_abs_mean, "ours": abs_mean}
_THRESHOLD = {"port": port_soft_threshold, "best": best_soft_threshold, "ours": soft_threshold}


class _Pool(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.function = _POOL[form]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class _Threshold(nn.Module):
    """Soft thresholding with a threshold (N, C), whose gradient is wanted too; PyTorch's forms need it in x's dtype."""

    def __init__(self, form: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.rand(shape[:2]))
        self.function, self.cast = _THRESHOLD[form], form != "ours"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.tau.to(x.dtype) if self.cast else self.tau)


def _any_gate(form: str, channels: int) -> nn.Module:
    """A gate that is not the standard one: GELU, no batch normalisation."""
    if form == "ours":
        return Shrinkage(channels, norm=False, activation=nn.GELU)
    gate = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.Sigmoid())
    return SHRINKAGE[form](channels, gate)


def _norm_relu(form: str, channels: int, spatial: int) -> nn.Module:
    norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(spatial, nn.BatchNorm1d)
    return (FusedSequential if form == "ours" else nn.Sequential)(norm(channels), nn.ReLU())


def _formed(build: Callable[..., nn.Module], form: str) -> nn.Module:
    """A unit or network with this form of shrinkage; its floor is the same without one, with PyTorch's own norms."""
    fused = form in ("ours", "resnet")
    if form in PLAIN:
        return build(attention=None, fused=fused)
    return swap(build(attention="cw", fused=fused), SHRINKAGE[form])


def network(op: str, form: str, in_channels: int) -> models.DRSN:
    """A network of cases.NETWORK; its floor is PyTorch's ResNet, form "resnet" the same with fused norms."""
    options, _ = NETWORK[op]
    return _formed(partial(models.DRSN, in_channels, **options), form)


def module(case: Case, form: str) -> nn.Module:
    """What a provider of this form runs, in training or eval mode."""
    channels = case.shape[1]
    if case.op == "abs_mean":
        built = _Pool(form)
    elif case.op == "soft_threshold":
        built = _Threshold(form, case.shape)
    elif case.op == "shrink_any_gate":
        built = _any_gate(form, channels)
    elif case.op == "norm_relu":
        built = _norm_relu(form, channels, len(case.shape) - 2)
    elif case.op == "unit":
        unit = partial(models.ResidualShrinkageUnit, channels, channels, dims=len(case.shape) - 2)
        built = _formed(unit, form)
    elif case.op in NETWORK:
        built = network(case.op, form, channels)
    else:
        built = SHRINKAGE[form](channels)
    return built.train(case.op in TRAINING or case.op in NETWORK)


def own_floor(case: Case) -> bool:
    """Whether the floor is the same without shrinkage; otherwise it is a copy of x (forward) and a product (backward).

    A copy reads once and writes once, a product reads twice and writes once: the least that the steps can move.
    """
    return case.op == "unit" or case.op in NETWORK


def floor_bytes(case: Case) -> int | None:
    return None if own_floor(case) else {"forward": 2, "backward": 3, "both": 5}[case.mode] * case.bytes


def cost(case: Case, provider: Provider, call: Call) -> dict[str, int]:
    """{"bytes", "saved"}: what a call of ours should move and keep, by the plans of the operators in it.

    {} for what is not ours, is compiled or has more than our operators.
    """
    if provider.form != "ours" or provider.compiled or own_floor(case):
        return {}
    plans = plans_of(call)
    forward, backward = (sum((getattr(plan, way) for plan in plans), Cost()) for way in ("forward", "backward"))
    moved = {"forward": forward.bytes, "backward": backward.bytes, "both": forward.bytes + backward.bytes}
    return {"bytes": moved[case.mode], "saved": forward.saved}


def plans_of(call: Call) -> list[Plan]:
    """Of the operators that the call makes, in order."""
    plans = []
    before, recording.active = recording.active, lambda step, x, backend, **_: plans.append(backend.plan(step))
    try:
        call.once()
    finally:
        recording.active = before
    return plans


def _floor(case: Case, x: torch.Tensor, g: torch.Tensor) -> Callable[[], tuple]:
    return {
        "forward": lambda: (x.clone(),),
        "backward": lambda: (torch.mul(x, g),),
        "both": lambda: (x.clone(), torch.mul(x, g)),
    }[case.mode]


# ---- calls -----------------------------------------------------------------------------------------------------------


class _Calls:
    """The tensors that all calls of a case share."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        x = torch.randn(case.shape).to(device=device, dtype=case.torch_dtype)
        g = torch.randn(case.shape[:2] if case.op == "abs_mean" else case.shape).to(x)
        if case.channels_last:
            x, g = (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (x, g))
        self.x, self.g, self.leaf = x, g, x.clone().requires_grad_()
        self._g = {g.dtype: g}  # a result may have another dtype than x, and its gradient is given in it
        self.target = torch.randint(8, case.shape[:1], device=device)

    def clear_of_ties(self, port: nn.Module) -> None:
        """Change the port's parameters and x (ties.py). bfloat16 is too coarse for it, a network too deep."""
        if self.x.dtype == torch.float32 and self.case.op not in (*NETWORK, "abs_mean", "norm_relu"):
            clear_hidden_units(port, self.x)
            if self.case.op != "unit":
                clear_thresholds(port, self.x)
                self.leaf.data.copy_(self.x)

    def gradient(self, dtype: torch.dtype) -> torch.Tensor:
        """g, cast once: in the timed call that would be a launch of the caller's."""
        if dtype not in self._g:
            self._g[dtype] = self.g.to(dtype)
        return self._g[dtype]

    def exact(self) -> "_Calls":
        """The same tensors in float64."""
        other = object.__new__(_Calls)
        other.case, other.device, other.target = self.case, self.device, self.target
        other.x, other.g, other._g = self.x.double(), self.g.double(), {}
        other.leaf = other.x.clone().requires_grad_()
        return other

    def call(self, built: nn.Module, provider: Provider) -> Call:
        case, parameters = self.case, [p for p in built.parameters() if p.requires_grad]
        model = torch.compile(built, dynamic=False) if provider.compiled else built
        # bfloat16 as people train with it: float32 parameters under autocast
        mixed = partial(torch.autocast, self.device, torch.bfloat16, enabled=self.x.dtype == torch.bfloat16)
        make = partial(Call, setting=provider.setting, parameters=tuple(parameters))
        if case.mode == "step":
            return make(_step(model, parameters, self.x, self.target, mixed))
        recorded: dict[str, torch.Tensor] = {}

        def forward() -> torch.Tensor:
            with mixed():
                return model(self.leaf)

        def inference() -> tuple[torch.Tensor]:
            with torch.no_grad(), mixed():
                return (model(self.x),)

        def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(y, [self.leaf, *parameters], self.gradient(y.dtype))

        def both() -> tuple[torch.Tensor, ...]:
            y = forward()
            return (y.detach(), *gradients(y))

        if case.mode == "both":
            return make(both)
        if case.mode == "backward":
            record = partial(_record, recorded, forward)
            return make(lambda: gradients(recorded.pop("y")), record)
        run = (lambda: (forward(),)) if case.op in TRAINING else inference
        return make(run)


def _record(recorded: dict, forward: Callable[[], torch.Tensor]) -> None:
    recorded["y"] = forward()


def _step(model, parameters, x, target, mixed) -> Callable[[], tuple]:
    """A training step with SGD; returns the loss and the gradients."""
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def step() -> tuple[torch.Tensor, ...]:
        optimizer.zero_grad()
        with mixed():
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return (loss.detach(), *[p.grad for p in parameters])

    return step


def build(case: Case, providers: Iterable[Provider], device: str, seed: int = 0) -> tuple[dict[str, Call], Call, Call]:
    """Calls by provider's name; the port's call; and the port's in float64, which the others are judged by."""
    torch.manual_seed(seed)
    shared = _Calls(case, device)
    port = module(case, "port")
    shared.clear_of_ties(port)
    state = port.state_dict()

    def made(form: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        built = module(case, form)
        built.load_state_dict(state, strict=form not in PLAIN)
        built = built.to(device=device, dtype=dtype)
        return built.to(memory_format=torch.channels_last) if case.channels_last else built

    calls = {}
    for provider in providers:
        if provider.form == "floor" and not own_floor(case):
            calls[provider.name] = Call(_floor(case, shared.x, _like(shared)), setting=provider.setting)
        else:
            calls[provider.name] = shared.call(made(provider.form), provider)
    exact = shared.exact().call(made("port", torch.float64), PORT)
    return calls, shared.call(made("port"), PORT), exact


def _like(shared: _Calls) -> torch.Tensor:
    """A second operand of x's size for the floor of a backward pass."""
    return shared.g if shared.g.shape == shared.x.shape else torch.randn_like(shared.x)
