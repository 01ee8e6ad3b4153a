"""Batch normalisation in existing models: each runs as one operator with the ReLU behind it.

Two kinds of modules are converted. A chain, nn.Sequential or a subclass with its forward, goes by the layers that it
has at a call. Any other forward is traced, with its children as single calls; where a normalisation's result goes to a
ReLU and to nothing else, the two are one operator, and all other calls stay as they are, written out as a function.
In both each normalisation and activation is asked at every call: one with hooks, of another class, or with a forward
of its own is called as before, and its mode, statistics and parameters are those that it has then.
"""

import functools
import hashlib
import linecache
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..batch_norm import _NORMS, _is_plain, is_norm, run, run_layers, slope_behind
from ..gates import looks_standard
from .conditions import Conditions, at, class_of, code_of
from .family import step_of
from .plans import Fused, Ref, Sink, Step
from .probe import Finding, Shape, difference, own_dtype, random
from .reasons import Unexplained
from .tracing import Trace, private_copy


@dataclass
class Norms:
    """What was found of a module's batch normalisations; paths below the module."""

    plans: dict[tuple[int, bool], Fused] = field(default_factory=dict)
    detail: str = ""  # what runs now
    why: str = ""  # there are no plans
    own_difference: float | None = None  # the largest of outputs, gradients and statistics, relative


def runs_norms(module: nn.Module) -> bool:
    """Converted for its normalisations, not for a shrinkage."""
    plans = module.__dict__.get("_drsn_plans", {})
    return any(isinstance(fused.plan, (ChainPlan, ForwardPlan)) for fused in plans.values())


def fused_in(module: nn.Module) -> Iterator[nn.Module]:
    """The normalisations that it runs with the activation behind them."""
    for plan in [fused.plan for fused in module._drsn_plans.values()] if runs_norms(module) else ():
        paths = [norm for norm, _ in _in_chain(module)] if isinstance(plan, ChainPlan) else plan.fused
        yield from (at(module, path) for path in paths)


# ---- chains ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainPlan:
    """The layers of an nn.Sequential, whichever they are at the call."""

    scales = True

    def __call__(self, module: nn.Module, x: torch.Tensor, sink: Sink = None) -> torch.Tensor:
        return run_layers(module, x)


def is_chain(module: nn.Module) -> bool:
    """An nn.Sequential, or of a subclass that runs its layers in turn as that does. Those of torch itself are known to
    torch's tools by their class."""
    cls = class_of(module)
    inherits = issubclass(cls, nn.Sequential) and all(
        getattr(cls, name) is getattr(nn.Sequential, name) for name in ("forward", "__iter__", "__call__")
    )
    ours = cls is nn.Sequential or not cls.__module__.startswith("torch.")
    return inherits and ours and "forward" not in module.__dict__ and not looks_standard(module)


def of_chain(chain: nn.Module) -> Norms | None:
    """None: no normalisation in it has an activation behind it. Hooks do not count here, they come and go."""
    pairs = [f"{norm} + {act}" for norm, act in _in_chain(chain)]
    if not pairs:
        return None
    conditions = Conditions(forward=code_of(nn.Sequential.forward), eager=True)
    ranks = {rank for ranks in _NORMS.values() for rank in ranks}
    plans = {(rank, training): Fused(ChainPlan(), conditions) for rank in ranks for training in (False, True)}
    return Norms(plans, _said(pairs, []))


def _in_chain(chain: nn.Module) -> list[tuple[str, str]]:
    layers = [*chain._modules.items()]
    return [
        (name, behind)
        for (name, layer), (behind, act) in zip(layers, layers[1:], strict=False)
        if class_of(layer) in _NORMS and class_of(act) in _ACTIVATIONS
    ]


# ---- forwards --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A normalisation, and the calls behind it that become one with it; by the indices of steps."""

    norm: int
    between: tuple[int, ...] = ()  # of nn.Identity
    act: int | None = None
    slope: float | None = None  # of an activation that is a function, or 1 of none; None: its module says

    @property
    def behind(self) -> tuple[int, ...]:
        return self.between if self.act is None else (*self.between, self.act)


def _slope(norm: nn.Module, between: tuple[nn.Module, ...], act: nn.Module | float) -> float | None:
    """Of the activation, where all of these are what they were found to be and nobody has hooked into them."""
    if not is_norm(norm) or not all(type(m) is nn.Identity and _is_plain(m) for m in between):
        return None
    return act if type(act) is float else slope_behind(act)


@dataclass(frozen=True)
class ForwardPlan:
    """The calls of a traced forward, in which pairs are one call. As a function in Python: what a step costs is what it
    costs in the user's own code."""

    steps: tuple[Step, ...]  # the first is given x as value 0, and makes value 1
    pairs: tuple[Pair, ...]
    y: int
    scales = True

    def __call__(self, module: nn.Module, x: torch.Tensor, sink: Sink = None) -> torch.Tensor:
        return self._function(module, x)

    @property
    def fused(self) -> list[str]:
        return [self.steps[pair.norm - 1].target for pair in self.pairs if pair.act is not None]

    @functools.cached_property
    def _function(self) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        text, names = _Writer(self).written()
        name = f"<drsn_kernels.convert {hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # for tracebacks
        exec(compile(text, name, "exec"), names)
        return names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_function"}


class _Writer:
    """Of the function: v0 is x, v1 what the first step gives. Each value is let go after its last use."""

    def __init__(self, plan: ForwardPlan) -> None:
        self.plan, self.names = plan, {"run": run, "slope": _slope}

    def written(self) -> tuple[str, dict[str, Any]]:
        pairs = {pair.norm: pair for pair in self.plan.pairs}
        taken = {i for pair in self.plan.pairs for i in pair.behind}
        blocks: list[tuple[list[str], set[int]]] = []  # lines, and the values in them
        for i in range(1, len(self.plan.steps) + 1):
            if i in pairs:
                blocks.append(self._pair(pairs[i]))
            elif i not in taken:
                blocks.append(([self._line(i)], {i, *self._used(i)}))
        last = {value: n for n, (_, values) in enumerate(blocks) for value in values}
        lines = ["def forward(self, v0):"]
        for n, (block, values) in enumerate(blocks):
            gone = [f"v{value}" for value in sorted(values) if last[value] == n and value != self.plan.y]
            lines += [f"    {line}" for line in (*block, *([f"del {', '.join(gone)}"] if gone else []))]
        return "\n".join([*lines, f"    return v{self.plan.y}"]) + "\n", self.names

    def _pair(self, pair: Pair) -> tuple[list[str], set[int]]:
        norm, *between = (self._module(self._step(i).target) for i in (pair.norm, *pair.between))
        act = float(pair.slope) if pair.slope is not None else None
        asked = self._text(act) if act is not None else self._module(self._step(pair.act).target)
        (x,) = self._used(pair.norm)
        made = (pair.norm, *pair.behind)
        lines = [
            f"s = slope({norm}, ({''.join(f'{m}, ' for m in between)}), {asked})",
            "if s is None:", *(f"    {self._line(i)}" for i in made),
            "else:", f"    {' = '.join(f'v{i}' for i in made)} = run({norm}, v{x}, s)",
        ]  # fmt: skip
        return lines, {x, *made}

    def _step(self, i: int) -> Step:
        return self.plan.steps[i - 1]

    def _used(self, i: int) -> set[int]:
        return {*_refs((self._step(i).args, self._step(i).kwargs))}

    def _line(self, i: int) -> str:
        step = self._step(i)
        args = [self._text(a) for a in step.args]
        if step.kind == "call_method":
            called = f"{args.pop(0)}.{step.target}"
        else:
            called = self._text(step.target) if step.kind == "call_function" else self._module(step.target)
        if step.kind == "get_attr":
            return f"v{i} = {called}"
        return f"v{i} = {called}({', '.join([*args, *(f'{k}={self._text(a)}' for k, a in step.kwargs.items())])})"

    def _module(self, path: str) -> str:
        text = "self"
        for name in path.split("."):
            text = f"{text}.{name}" if name.isidentifier() else f"getattr({text}, {name!r})"
        return text

    def _text(self, arg: Any) -> str:
        if type(arg) is Ref:
            return f"v{arg.index}"
        if type(arg) is tuple:
            return f"({''.join(f'{self._text(a)}, ' for a in arg)})"
        if type(arg) is list:
            return f"[{', '.join(map(self._text, arg))}]"
        if type(arg) is dict:
            return f"{{{', '.join(f'{self._text(k)}: {self._text(a)}' for k, a in arg.items())}}}"
        if type(arg) is slice:
            return f"slice({', '.join(map(self._text, (arg.start, arg.stop, arg.step)))})"
        name = f"k{len(self.names)}"
        self.names[name] = arg
        return name


def _refs(arg: Any) -> Iterator[int]:
    if type(arg) is Ref:
        yield arg.index
    elif type(arg) in (tuple, list, dict, slice):
        parts = (arg.start, arg.stop, arg.step) if type(arg) is slice else arg.values() if type(arg) is dict else arg
        for part in parts:
            yield from _refs(part)


def holds_norms(module: nn.Module) -> bool:
    """Whether its own forward may call a normalisation: a child is one, is in a list of children, or ends a chain."""
    return any(
        class_of(child) in _NORMS
        or _ends_in_norm(child)
        or (isinstance(child, (nn.ModuleList, nn.ModuleDict)) and holds_norms(child))
        for child in module.children()
    )


def _ends_in_norm(module: nn.Module) -> bool:
    if class_of(module) is not nn.Sequential or not len(module):
        return False
    last = [*module._modules.values()][-1]
    return class_of(last) in _NORMS or _ends_in_norm(last)


def of_forward(module: nn.Module, found: Finding) -> Norms | None:
    """found: of its examination, whose probes ran. None: it holds no normalisation."""
    if not holds_norms(module):
        return None
    norms, why = Norms(), found.why
    for shape in found.shapes:
        try:
            for training in (False, True):
                norms.plans[shape.rank, training] = _fused(module, shape, training, norms)
        except Unexplained as reason:
            why = str(reason)
            norms.plans.pop((shape.rank, False), None)
    if not norms.plans:
        return Norms(why=why)
    return norms


def _fused(module: nn.Module, shape: Shape, training: bool, norms: Norms) -> Fused:
    dtype = own_dtype(module)  # on the torch backend the plan's operations are the forward's, and rounded alike
    trace = Trace(private_copy(module, dtype).train(training), random(shape(0), module, dtype), _ends_in_norm)
    try:
        if trace.effects:
            raise Unexplained(f"its forward keeps the attribute {trace.effects[0][0]}")
        index = {node: i for i, node in enumerate(trace.nodes)}  # the first is x
        steps = tuple(step_of(node, index) for node in trace.nodes[1:])
        pairs = [_pair(node, index) for node in trace.nodes if _is_norm_call(node)]
        said = [_shown(pair, steps) for pair in pairs if pair.act is not None]
        alone = [f"{steps[p.norm - 1].target} ({_goes_to(trace.nodes[p.norm])})" for p in pairs if p.act is None]
        if not said:
            raise Unexplained(f"none of its norms feeds a ReLU alone: {', '.join(alone) or 'its forward calls none'}")
        plan = ForwardPlan(steps, tuple(pairs), index[trace.y])
        conditions = trace.conditions(module, {*trace.nodes})._replace(eager=True)
        apart = difference(module, plan, [random(shape(1), module, dtype, 1)], dtype, training)
    finally:
        trace.watch.restore()
    if len(shape.sizes) == 1:
        conditions = conditions._replace(spatial=shape.sizes[0])
    norms.detail, norms.own_difference = _said(said, alone), max(apart, norms.own_difference or 0.0)
    return Fused(plan, conditions)


def _is_norm_call(node: fx.Node) -> bool:
    plain = node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
    return plain and class_of(node.meta["module"]) in _NORMS


def _pair(norm: fx.Node, index: dict[fx.Node, int]) -> Pair:
    between, last = [], norm
    while (after := _only_user(last)) is not None and _calls(after, last, (nn.Identity,)):
        between.append(after)
        last = after
    act = next(iter(last.users), None)  # in the order of the calls
    alone = Pair(index[norm], slope=1.0)
    if act is None or act not in index:
        return alone
    path = tuple(index[n] for n in between)
    if _calls(act, last, _ACTIVATIONS):
        return Pair(index[norm], path, index[act]) if len(last.users) == 1 else alone
    slope, in_place = _of_function(act, last)
    if slope is None or (len(last.users) > 1 and not in_place):  # whoever comes after one in place gets its result
        return alone
    return Pair(index[norm], path, index[act], slope)


_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
_RELU, _RELU_ = (torch.relu, F.relu, "relu"), (torch.relu_, F.relu_, "relu_")
_LEAKY, _LEAKY_ = (F.leaky_relu,), (F.leaky_relu_,)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(node: fx.Node, x: fx.Node, classes: tuple[type[nn.Module], ...]) -> bool:
    """The node is a module of one of these classes, called on x."""
    called = node.op == "call_module" and node.args == (x,) and not node.kwargs
    return called and class_of(node.meta["module"]) in classes


def _of_function(node: fx.Node, x: fx.Node) -> tuple[float | None, bool]:
    """The slope of an activation that is a function or method of x, else None; and whether it is in place."""
    if node.op not in ("call_function", "call_method") or node.target not in _RELU + _RELU_ + _LEAKY + _LEAKY_:
        return None, False
    names = ("input", "negative_slope", "inplace") if node.target in _LEAKY + _LEAKY_ else ("input", "inplace")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    slope = given.get("negative_slope", 0.01) if "negative_slope" in names else 0.0
    if given.get("input") is not x or type(slope) not in (int, float):
        return None, False
    return float(slope), given.get("inplace") is True or node.target in _RELU_ + _LEAKY_


# ---- what is said ----------------------------------------------------------------------------------------------------


def _said(pairs: list[str], alone: list[str]) -> str:
    return "batch_norm_relu: " + ", ".join(pairs) + (f"; without an activation: {', '.join(alone)}" if alone else "")


def _shown(pair: Pair, steps: tuple[Step, ...]) -> str:
    return f"{steps[pair.norm - 1].target} + {_name(steps[pair.act - 1].target)}"


def _goes_to(norm: fx.Node) -> str:
    users = [user.target for user in norm.users]
    return "its result goes to " + (" and ".join(_name(user) for user in users) or "nothing")


def _name(target: Any) -> str:
    if not isinstance(target, str):
        return {operator.add: "+", operator.iadd: "+="}.get(target) or getattr(target, "__name__", str(target))
    return "the output" if target == "output" else target.removeprefix("inner.")
