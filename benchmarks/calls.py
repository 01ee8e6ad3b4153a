"""The calls of a case: each provider's module with the same parameters, on the same x, returning what it computed."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import models
from ..modules import Shrinkage
from ..ops import abs_mean, soft_threshold
from . import baselines
from .cases import NETWORK, Case
from .measure import Call
from .providers import PORT, Provider
from .ties import clear_hidden_units, clear_thresholds

TRAINING = ("shrink_train", "shrink_any_gate", "unit")  # their forward pass is recorded for a backward pass
SHRINKAGE = {"port": baselines.PortShrinkage, "best": baselines.BestShrinkage, "ours": Shrinkage}
_POOL = {"port": baselines.port_abs_mean, "best": baselines.best_abs_mean, "ours": abs_mean}
_THRESHOLD = {"port": baselines.port_soft_threshold, "best": baselines.best_soft_threshold, "ours": soft_threshold}


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


def swap(model: nn.Module, form: str) -> nn.Module:
    """Replace the shrinkage of every unit by another form of it, with its parameters."""
    for unit in model.modules():
        if isinstance(unit, models.ResidualShrinkageUnit) and unit.shrinkage is not None:
            other = SHRINKAGE[form](unit.out_channels)
            other.load_state_dict(unit.shrinkage.state_dict())
            unit.shrinkage = other
    return model


def network(op: str, form: str, in_channels: int) -> models.DRSN:
    """A network of cases.NETWORK; its floor is the ResNet."""
    options, _ = NETWORK[op]
    return swap(models.DRSN(in_channels, attention=None if form == "floor" else "cw", **options), form)


def module(case: Case, form: str) -> nn.Module:
    """What a provider of this form runs, in training or eval mode."""
    channels = case.shape[1]
    if case.op == "abs_mean":
        built = _Pool(form)
    elif case.op == "soft_threshold":
        built = _Threshold(form, case.shape)
    elif case.op == "shrink_any_gate":
        built = _any_gate(form, channels)
    elif case.op == "unit":
        attention = None if form == "floor" else "cw"
        dims = len(case.shape) - 2
        built = swap(models.ResidualShrinkageUnit(channels, channels, dims=dims, attention=attention), form)
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


def _floor(case: Case, x: torch.Tensor, g: torch.Tensor) -> Callable[[], tuple]:
    return {
        "forward": lambda: (x.clone(),),
        "backward": lambda: (torch.mul(x, g),),
        "both": lambda: (x.clone(), torch.mul(x, g)),
    }[case.mode]


class _Calls:
    """The tensors that all calls of a case share."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        x = torch.randn(case.shape).to(device=device, dtype=case.torch_dtype)
        g = torch.randn(case.shape[:2] if case.op == "abs_mean" else case.shape).to(x)
        if case.channels_last:
            x, g = (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (x, g))
        self.x, self.g, self.leaf = x, g, x.clone().requires_grad_()
        self.target = torch.randint(8, case.shape[:1], device=device)

    def clear_of_ties(self, port: nn.Module) -> None:
        """Change the port's parameters and x (ties.py). bfloat16 is too coarse for it, a network too deep."""
        if self.x.dtype == torch.float32 and self.case.op not in (*NETWORK, "abs_mean"):
            clear_hidden_units(port, self.x)
            if self.case.op != "unit":
                clear_thresholds(port, self.x)
                self.leaf.data.copy_(self.x)

    def exact(self) -> "_Calls":
        """The same tensors in float64."""
        other = object.__new__(_Calls)
        other.case, other.device, other.target = self.case, self.device, self.target
        other.x, other.g = self.x.double(), self.g.double()
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
            return torch.autograd.grad(y, [self.leaf, *parameters], self.g.to(y.dtype))

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
        built.load_state_dict(state, strict=form != "floor")
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
