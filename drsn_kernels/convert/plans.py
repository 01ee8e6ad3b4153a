"""What a converted module runs instead of its own forward, and how it stays what it was.

A converted module is the same object with another class: a subclass of its own whose forward looks up a plan. So every
name, alias, hook, parameter, buffer, optimizer entry and state_dict key is untouched, isinstance still holds, a replica
of DataParallel runs on its own parameters, and a pickle names the user's class. (torch's parametrizations and FSDP2
change a module's class for the same reasons.) Plans hold paths, never modules: a child that is swapped afterwards, for
instance by SyncBatchNorm.convert_sync_batchnorm, is the one that is called.
"""

import copyreg
import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..ops import shrink, soft_threshold, squeeze_excite
from .conditions import Conditions, Part, Quiet, at, subclass

Sink = Callable[[torch.Tensor], None] | None  # of record_tau


class Ref(NamedTuple):
    """The result of an earlier step."""

    index: int


class Step(NamedTuple):
    kind: str  # call_function, call_method, call_module, get_attr: torch.fx's names
    target: Any  # a function, a method's name, or a path below the module
    args: tuple
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, values: list) -> Any:
        args = [_fill(a, values) for a in self.args]
        return call(self.kind, self.target, args, {k: _fill(a, values) for k, a in self.kwargs.items()}, module)


def _fill(arg: Any, values: list) -> Any:
    if type(arg) is Ref:
        return values[arg.index]
    if type(arg) in (tuple, list):
        return type(arg)([_fill(a, values) for a in arg])
    if type(arg) is dict:
        return {k: _fill(a, values) for k, a in arg.items()}
    if type(arg) is slice:
        return slice(_fill(arg.start, values), _fill(arg.stop, values), _fill(arg.step, values))
    return arg


def call(kind: str, target: Any, args: Sequence, kwargs: dict[str, Any], module: nn.Module) -> Any:
    if kind == "call_function":
        return target(*args, **kwargs)
    if kind == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    found = at(module, target)
    return found(*args, **kwargs) if kind == "call_module" else found


@dataclass(frozen=True)
class GatePlan:
    """shrink(x, gate, average=...) or squeeze_excite(x, gate), the gate being one module, or a chain that makes up the
    standard gate."""

    gate: str | tuple[str | Callable[[], nn.Module], ...]  # a path; or paths and, for functions, classes
    average: str | None
    scales: bool = False  # squeeze_excite, which has no threshold

    def __call__(self, module: nn.Module, x: torch.Tensor, sink: Sink = None) -> torch.Tensor:
        gate = at(module, self.gate) if isinstance(self.gate, str) else self._chain(module)
        if self.scales:
            return squeeze_excite(x, gate)
        if sink is None:
            return shrink(x, gate, average=self.average)
        y, tau = shrink(x, gate, average=self.average, return_tau=True)
        sink(tau.detach())
        return y

    def _chain(self, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        parts = [at(module, part) if isinstance(part, str) else None for part in self.gate]
        gate = module.__dict__.get("_drsn_chain")
        if gate is None or any(p is not None and p is not q for p, q in zip(parts, gate, strict=True)):
            made = [p if p is not None else part() for p, part in zip(parts, self.gate, strict=True)]
            if torch.compiler.is_compiling():  # a graph may not make modules
                return _Gate(_in_turn, made)
            gate = module.__dict__["_drsn_chain"] = nn.Sequential(*made)  # not registered: the children are already
        return gate

    def __str__(self) -> str:
        gate = f"self.{self.gate}" if isinstance(self.gate, str) else "the standard gate of its layers"
        if self.scales:
            return f"squeeze_excite(x, {gate})"
        return f"shrink(x, {gate}, average={self.average!r})"


class _Gate:
    """functools.partial, which torch.compile of torch 2.6 does not take for a callable."""

    def __init__(self, function: Callable[..., torch.Tensor], *args: Any) -> None:
        self.function, self.args = function, args

    def __call__(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.function(*self.args, pooled)


def _in_turn(layers: list[nn.Module], a: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        a = layer(a)
    return a


@dataclass(frozen=True)
class ThresholdPlan:
    """The module's own code from the pooled x to the threshold, or to the factors, and the fused operators around it.

    The code runs on tensors that are their own average: A as (N, C, 1, ...), or wherever the average appears in it.
    """

    pool: str | None  # "abs", "signed"; None: the threshold does not depend on x
    ranks: tuple[int, ...]  # of the inputs: A seen as a tensor of this many dimensions
    steps: tuple[Step, ...]
    tau: int
    effects: tuple[tuple[str, int], ...]  # attributes that forward sets, as thresholds kept for a look
    scales: bool = False  # squeeze_excite: `tau` is the factors

    def __call__(self, module: nn.Module, x: torch.Tensor, sink: Sink = None) -> torch.Tensor:
        if self.scales:
            return squeeze_excite(x, _Gate(self._threshold, module, x, None))
        if self.pool == "abs":
            return shrink(x, _Gate(self._threshold, module, x, sink), average=None)
        pooled = x.mean(list(range(2, x.dim()))) if self.pool == "signed" else None
        return soft_threshold(x, self._threshold(module, x, sink, pooled))

    def _threshold(self, module: nn.Module, x: torch.Tensor, sink: Sink, pooled: torch.Tensor | None) -> torch.Tensor:
        values: list[Any] = []
        if pooled is not None:
            pooled = pooled.to(x.dtype)  # what the module's own pooling would have given its gate
            values = [pooled.reshape(*pooled.shape, *[1] * (rank - 2)) for rank in self.ranks]
        for step in self.steps:
            values.append(step.run(module, values))
        for name, index in self.effects:
            setattr(module, name, values[index])
        tau = values[self.tau]
        if self.pool is None:
            tau = tau.reshape(()) if tau.numel() == 1 else tau
        else:
            tau = tau.reshape(tau.shape[:2])
        if sink is not None:
            sink(tau.detach())
        return tau

    def __str__(self) -> str:
        if self.scales:
            return "squeeze_excite(x, its own code)"
        if self.pool == "abs":
            return "shrink(x, its own code, average=None)"
        return f"soft_threshold(x, its own code of {'the mean of x' if self.pool else 'its parameters'})"


class Plan(Protocol):
    scales: bool  # it has no threshold that record_tau could tell

    def __call__(self, module: nn.Module, x: torch.Tensor, sink: Sink = None) -> torch.Tensor: ...


class Fused(NamedTuple):
    plan: Plan
    conditions: Conditions = Conditions()


class Converted(Quiet):
    """Before the user's class in the bases of a converted module. Fused forms are looked up by x's rank and the mode.
    A call that has none (another rank, a second argument) runs the module's own forward, and so does every call while
    anything that it reads is not what it was, or somebody listens to a child that the fused form does not call."""

    _drsn_plans = {}  # of a slice of a Sequential, which has the class only; torch.jit.script takes no annotation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            x = args[0]
            fused = self._drsn_plans.get((x.dim(), self.training))
            if fused is not None and fused.conditions.hold(self, x):
                return fused.plan(self, x, self.__dict__.get("_tau_sink"))
        return super().forward(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        # in older pickles the plans stand alone, and the numbers of the module beside them
        numbers = Part((), reads=tuple(self.__dict__.pop("_drsn_constants", ())))
        for key, found in self._drsn_plans.items():
            if not isinstance(found, Fused):
                self._drsn_plans[key] = Fused(found, Conditions((numbers,)))

    def __reduce_ex__(self, protocol: int) -> tuple:
        make, args, *rest = super().__reduce_ex__(protocol)
        if make is copyreg.__newobj__ and args[0] is converted_class(self._drsn_class):
            make, args = _remade, (self._drsn_class, {"_drsn_plans": self._drsn_plans}, *args[1:])
        if rest and isinstance(rest[0], dict):  # the state: without a running record_tau, and what is made again
            rest[0] = {k: v for k, v in rest[0].items() if k not in ("_tau_sink", "_drsn_chain")}
        return make, args, *rest


@functools.cache
def converted_class(cls: type[nn.Module]) -> type[nn.Module]:
    own = cls.forward
    return subclass(cls, Converted, {"forward": _forward_for(own)} if isinstance(own, types.FunctionType) else {})


def _forward_for(own: types.FunctionType) -> types.FunctionType:
    """Converted.forward, which torch.jit.script takes for the module's own: by its source and the names in its file."""
    converted = Converted.forward

    def forward(self, *args, **kwargs):
        return converted(self, *args, **kwargs)

    made = types.FunctionType(forward.__code__, own.__globals__, "forward", None, forward.__closure__)
    return functools.update_wrapper(made, own)


def _remade(cls: type[nn.Module], ours: dict[str, Any], *args: Any) -> nn.Module:
    """For pickle and deepcopy: the class is made again, the user's attributes come from the state."""
    new = converted_class(cls)
    module = new.__new__(new, *args)
    module.__dict__.update(ours)  # also where the user's __getstate__ leaves them out
    return module


def install(module: nn.Module, plans: dict[tuple[int, bool], Fused]) -> None:
    object.__setattr__(
        module, "__class__", converted_class(type(module))
    )  # may raise TypeError: nothing is changed then
    module.__dict__["_drsn_plans"] = plans


def remove(module: nn.Module) -> None:
    object.__setattr__(module, "__class__", module._drsn_class)
    for name in ("_drsn_plans", "_drsn_chain"):
        module.__dict__.pop(name, None)
