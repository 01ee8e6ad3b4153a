"""A module's forward as a list of calls with their values, recorded on a copy.

The module's own code is traced by torch.fx; its children are called as they are and appear as one call each. Beside the
symbolic call each real one is made, so every node has a value, the number of dimensions is an ordinary integer, and
code may branch on it. Sizes stay symbolic: what is found holds for every batch and length.
"""

import copy
import dis
import functools
import inspect
import itertools
import linecache
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from .. import hooks
from .conditions import Conditions, class_of, is_own
from .plans import call
from .reasons import Differs, Unexplained, Untraceable, place
from .watch import Watch, is_below, run_forward


def private_copy(module: nn.Module, dtype: torch.dtype | None = None, vary: bool = True) -> nn.Module:
    """A copy to try things on: parameters and buffers of its own (floating-point ones in `dtype`), all of them
    differentiable leaves, and none of the user's hooks. torch's own hooks compute weights (weight_norm) and stay.

    vary: with other numbers, positive ones still positive: a scale that happens to be 1, or a bias of 0, would seem to
    do nothing."""
    generator = torch.Generator().manual_seed(0)

    def ours(t: torch.Tensor) -> torch.Tensor:
        own = t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype, copy=True)
        if vary and own.is_floating_point():
            by = torch.rand(min(own.numel(), 65521), generator=generator, dtype=torch.float32, device="cpu").to(own)
            by = by.repeat(-(-own.numel() // max(by.numel(), 1)))[: own.numel()].view(own.shape)
            size = own.abs().amax() if own.numel() else own
            own.addcmul_(own, by, value=0.25).add_(by.mul_(torch.where((size > 0) & size.isfinite(), size, 1) / 16))
        return own

    memo: dict[int, Any] = {}
    for m in module.modules():
        for p in m._parameters.values():
            if p is not None:
                memo[id(p)] = nn.Parameter(ours(p), requires_grad=p.is_floating_point())
        for value in (*m._buffers.values(), *_plain_tensors(m.__dict__.values())):
            if value is not None and id(value) not in memo:
                own = ours(value) if value.grad_fn is None else value.detach().clone()
                memo[id(value)] = own  # deepcopy refuses a cached tensor that has a graph
    duplicate = copy.deepcopy(module, memo)
    if {*map(id, duplicate.modules())} & {*map(id, module.modules())}:
        raise ValueError("a copy of it shares modules with it")
    for m in duplicate.modules():
        for kind in hooks.KINDS:
            registered = m.__dict__[kind]
            for key in [key for key, hook in registered.items() if not _of_torch(hook)]:
                del registered[key]
    return duplicate


def _of_torch(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def _plain_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from _plain_tensors(value.values() if isinstance(value, dict) else value)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what a forward pass may change: buffers, and tensors cached as attributes."""
    found = {f"buffer {name}": t for name, t in module.named_buffers()}
    for path, m in module.named_modules():
        prefix = f"attribute {path}." if path else "attribute "
        for name, value in m.__dict__.items():
            if isinstance(value, (int, float)) and name != "training":
                found[prefix + name] = torch.tensor(float(value), dtype=torch.float64, device="cpu")
            elif isinstance(value, torch.Tensor):
                found[prefix + name] = value
    return {name: t.detach().clone() for name, t in found.items()}


class _Root(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return run_forward(self.inner, x)


def _in_place(function: Callable) -> Callable:
    def method(self: "_Value", other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class _Value(fx.Proxy):
    """A symbolic value that knows its real one where that is the same for every batch and length."""

    def __getattr__(self, name: str) -> Any:
        value = self.node.meta["value"]
        if isinstance(value, torch.Tensor):
            if name in ("dim", "ndimension"):
                return lambda: value.dim()
            if name == "ndim":
                return value.dim()
            if name == "shape":
                return self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})
        return super().__getattr__(name)

    # torch.fx itself takes y += z for y = y + z, which other names of the same tensor would not see
    __iadd__, __isub__, __imul__ = map(_in_place, (operator.iadd, operator.isub, operator.imul))
    __itruediv__, __ifloordiv__, __ipow__ = map(_in_place, (operator.itruediv, operator.ifloordiv, operator.ipow))

    def __len__(self) -> int:
        value = self.node.meta["value"]
        if isinstance(value, (tuple, list)):
            return len(value)
        raise TraceError("len of a tensor")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, x: torch.Tensor, watch: Watch, opens: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.opens = opens
        self.x, self.watch, self.known, self.calling = x, watch, set(watch.inner.modules()), False
        self.random, self.draws = torch.get_rng_state(), False
        watch.symbol = lambda path: self.create_proxy("get_attr", f"inner.{path}", (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator:
        return (obj[i] for i in range(len(obj)))

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = _users_frame()
        if not _asserted(frame):
            return super().to_bool(obj)
        if isinstance(obj.node.meta["value"], torch.Tensor):
            self.watch.note("asserts something of values", frame)
        return bool(obj.node.meta["value"])

    def is_leaf_module(self, m: nn.Module, path: str) -> bool:
        return True

    def call_module(self, m, forward, args, kwargs):
        if self.calling or m not in self.known:  # one that forward makes for the call, as nn.ReLU()(x)
            return forward(*args, **kwargs)
        if args and _has_planes(args[0]) and self.opens(m) and not any(m.__dict__[kind] for kind in hooks.KINDS):
            self.watch.opened.append(self.path_of_module(m).removeprefix("inner."))
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val if self.calling else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        self.look_at_random()
        symbol, self.calling, self.watch.symbol = self.watch.symbol, True, None
        self.watch.during = node if kind == "call_module" else None
        try:
            value = node.meta["value"] = self._call(kind, target, args, kwargs)
        finally:
            self.calling, self.watch.symbol, self.watch.during = False, symbol, None
        now = torch.get_rng_state()
        node.meta["draws"], self.random = not now.equal(self.random), now
        # what it was when it was made: a later operation may write over it
        node.meta["seen"] = value.clone() if isinstance(value, torch.Tensor) else value
        node.meta["number"], node.meta["frames"] = len(self.graph.nodes), _frames()
        if kind == "call_module":
            node.meta["module"] = self.root.get_submodule(target)
        return node

    def look_at_random(self) -> None:
        """The forward's own code may have drawn a number that is in no operation."""
        if not torch.get_rng_state().equal(self.random):
            self.draws = True

    def _call(self, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["value"])
        if kind == "placeholder":
            return self.x
        if kind == "output":
            return args[0]
        return call(kind, target, args, kwargs, self.root)


def _may_pool(m: nn.Module) -> bool:
    """What in it is the pooling? Asked of helpers, a pooling or a soft threshold, and of chains."""
    return class_of(m) is nn.Sequential or (is_own(class_of(m)) and not [*m.parameters(), *m.buffers()])


def _has_planes(x: Any) -> bool:
    value = x.node.meta["value"] if isinstance(x, _Value) else None
    return isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[2:].numel() > 1


def _users_frame() -> FrameType | None:
    """The user's code that runs."""
    frame = sys._getframe(1)
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    return frame


def _is_users(frame: FrameType) -> bool:
    return not frame.f_globals.get("__name__", "").startswith(("torch.", __package__))


class Frame(NamedTuple):
    """A function of the user's that runs, when an operation is made."""

    key: tuple
    code: CodeType
    line: int
    positions: tuple[int, int, int, int] | None  # of the expression: lines and columns as in ast
    names: dict[str, fx.Node]  # which variable holds which value
    modules: dict[str, nn.Module]
    names_nn: bool  # torch.nn is called nn


def _frames() -> list[Frame]:
    """From the forward inwards."""
    found = []
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not run_forward.__code__:
        if _is_users(frame):
            code, values = frame.f_code, frame.f_locals
            positions = None
            if hasattr(code, "co_positions"):
                line, end, column, end_column = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
                positions = line, end, column, end_column
            # an fx.Attribute, x.shape say, makes its node when it is asked for
            nodes = {n: vars(v).get("node", vars(v).get("_node")) for n, v in values.items() if isinstance(v, fx.Proxy)}
            names = {name: node for name, node in nodes.items() if node is not None}
            modules = {n: v for n, v in values.items() if isinstance(v, nn.Module)}
            key = id(frame), code
            found.append(Frame(key, code, frame.f_lineno, positions, names, modules, frame.f_globals.get("nn") is nn))
        frame = frame.f_back
    return found[::-1]


def _asserted(frame: FrameType | None) -> bool:
    """Whether what the frame asks about goes into an assert: that one is true, or there would be no value."""
    if frame is None:
        return False
    ahead = [i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti][:4]
    return any(i.opname == "LOAD_ASSERTION_ERROR" or i.argrepr == "AssertionError" for i in ahead)


class Trace:
    """One forward pass of `inner`, a private copy: nodes, input x, output y, and attributes that the pass has set.

    opens: of a child, whether the calls that it makes take the place of its own."""

    def __init__(self, inner: nn.Module, x: torch.Tensor, opens: Callable[[nn.Module], bool] = _may_pool) -> None:
        training = inner.training
        self.watch = Watch(inner)
        version = x._version
        torch.manual_seed(0)
        try:
            # without gradients in eval only: else no_grad around some lines would not be seen
            with torch.set_grad_enabled(training), self.watch:
                tracer = _Tracer(x, self.watch, opens)
                self.root = _Root(inner)
                graph = tracer.trace(self.root)
                tracer.look_at_random()
        except TraceError as error:
            raise Unexplained(
                f"its forward branches on sizes or values of x, or loops over them{_where(error)}"
            ) from None
        except Exception as error:
            said = str(error).strip().partition("\n")[0]
            where = _where(error) + (f": {said}" if said else "")
            raise Untraceable(f"its forward cannot be followed{where}{_remedy(error)}") from None
        if x._version != version:
            raise Unexplained("its forward writes over x")
        if tracer.draws:
            raise Differs("its forward draws random numbers")
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        self.x = self.nodes[0]
        returned = next(n for n in graph.nodes if n.op == "output").args[0]
        if not isinstance(returned, fx.Node):
            raise Unexplained("it does not return one tensor")
        self.y: fx.Node = returned
        self.effects: list[tuple[str, fx.Node]] = []
        self.changes: list[tuple[str, str]] = []  # of children
        for path, name in self.watch.changes():
            value = inspect.getattr_static(inner.get_submodule(path), name, None)
            if not path and isinstance(value, fx.Proxy):
                node = value.node
                once = isinstance(getattr(type(inner), name, None), functools.cached_property)
                if once or not isinstance(node.meta["seen"], (torch.Tensor, bool, int, float)):
                    raise Differs(f"its forward keeps self.{name}, which the fused form would not")
                self.effects.append((name, node))
            elif isinstance(value, torch.Tensor):
                continue  # those are compared when it runs
            elif not path:
                raise Differs(f"its forward changes the attribute {name}")
            else:
                self.changes.append((path, name))

    def conditions(self, module: nn.Module, runs: set[fx.Node]) -> Conditions:
        """Under which a plan that makes the calls `runs` itself may stand for the forward."""
        calls = {n: n.target.removeprefix("inner.") for n in self.nodes if n.op == "call_module"}
        run = {n: path for n, path in calls.items() if n in runs}
        for n in self.nodes:
            if n.meta["draws"] and n not in runs:
                raise Unexplained("its forward draws random numbers")
        for path, name in self.changes:
            if not any(is_below(path, called) for called in run.values()):
                raise Unexplained(f"its forward changes the attribute {path}.{name}")
        return self.watch.conditions(module, run, calls, {name for name, _ in self.effects})


def _where(error: Exception) -> str:
    """The last line of the user's that ran."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if _is_users(trace.tb_frame):
            found = f" beyond {place(trace.tb_frame.f_code.co_filename, trace.tb_lineno)}"
        trace = trace.tb_next
    return found


def _remedy(error: Exception) -> str:
    """Of what ports of thresholds are often written with."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if _is_users(trace.tb_frame):
            line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    made = re.search(r"torch\.(zeros|ones)\(", line)
    return f"; write torch.{made[1]}_like(x)" if made else ""


def takes_one_argument(module: nn.Module) -> bool:
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        return False
    except ValueError:  # no signature to be had
        pass
    return True
