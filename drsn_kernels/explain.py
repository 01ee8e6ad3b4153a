"""explain: how every operator call of a model or function runs, what it may cost, and why not in a faster way."""

import contextlib
import dataclasses
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from . import backends, recording
from .backends.step import Backend, Cost, Plan, Step
from .gates import looks_standard, standard_gate
from .layout import is_dense, layout_of
from .ops.dispatch import DECOMPOSED, OPAQUE, in_graph
from .untouched import untouched


@dataclass(frozen=True)
class Call:
    """One operator call."""

    op: str  # abs_mean, soft_threshold, shrink, squeeze_excite or batch_norm_relu
    module: str  # qualified name of the innermost module it happened in, "" outside of modules
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str  # rows, channels_last or strided
    backend: str  # cpu, triton, torch; reference: plain differentiable PyTorch; compiler: torch.compile has the graph
    why: str  # this backend
    plan: Plan
    fused: bool | None  # the gate is computed by the backend; None where there is no gate
    gate: str  # why it is not, or ""
    fallback: str  # why the call is slower than it could be on this device, or ""

    @property
    def forward(self) -> Cost | None:
        """None where PyTorch or a compiler decides what the reference becomes."""
        return self.plan.forward

    @property
    def backward(self) -> Cost | None:
        return self.plan.backward

    @property
    def saved(self) -> int | None:
        """Bytes kept for the backward pass."""
        return None if self.forward is None else self.forward.saved


@dataclass(frozen=True)
class Explanation:
    """The calls in their order; printed as a table, and below it each reason with the calls that it is for."""

    calls: tuple[Call, ...] = ()

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, i: int) -> Call:
        return self.calls[i]

    def __str__(self) -> str:
        if not self.calls:
            return "no operator of drsn_kernels was called"
        rows = [_HEAD, *(_row(i, call) for i, call in enumerate(self.calls, 1))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        reasons: dict[str, list[int]] = {}
        for i, call in enumerate(self.calls, 1):
            for reason in _reasons(call):
                found = reasons.setdefault(reason, [])
                if i not in found:  # the same launch twice in a call
                    found.append(i)
        return "\n".join([*table, "", *(f"{_ranges(found)}: {reason}" for reason, found in reasons.items())])

    __repr__ = __str__


def explain(fn: Callable, /, *args: Any, strict: bool = False, **kwargs: Any) -> Explanation:
    """Run fn(*args, **kwargs) once, and return how each operator call in it ran; ``print`` shows it as a table.

    Nothing else is left behind (`untouched.untouched`): buffers, BatchNorm statistics, gradients, random numbers,
    training flags and the tensors among the arguments (in dicts, lists and tuples too) are as before, for `fn` itself
    and for modules that it is bound to, closes over or is given. What torch.compile would trace is run eagerly, and
    reported as compiled. Calls of other threads are not looked at.

    Args:
        fn: a module or any callable; args, kwargs: what it is called with.
        strict: not given to fn; raise instead of reporting a fallback.

    Raises:
        TypeError: fn is not callable. RuntimeError: with `strict`, a call runs in pure PyTorch although its device has
        kernels, or has a gate of the standard structure that is not fused. What fn raises.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a module or a callable, got {type(fn).__name__}")
    modules = _modules_of(fn, args, kwargs)
    recorder = _Recorder(modules, strict)
    before = recording.active
    with untouched(modules.values(), (args, kwargs)), _not_compiling():
        recording.active = recorder
        try:
            fn(*args, **kwargs)
        finally:
            recording.active = before
    return Explanation(tuple(recorder.calls))


def _not_compiling() -> contextlib.AbstractContextManager:
    """Compiled functions run as they are written: a graph made for a look would stay, and count as a recompilation."""
    return torch.compiler.set_stance("force_eager")


# ---- recording -------------------------------------------------------------------------------------------------------


@dataclass
class _Recorder:
    modules: dict[str, nn.Module]
    strict: bool
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.get_ident()
        self.names: dict[int, str] = {}
        for prefix, root in self.modules.items():
            for name, module in root.named_modules(prefix=prefix):
                parts = (part for part in name.split(".") if part != "_orig_mod")  # of torch.compile(module)
                self.names.setdefault(id(module), ".".join(parts))

    def __call__(
        self, step: Step | str, x: torch.Tensor, backend: Backend | None, *, gate: Any = None, not_fused: str = "",
        why: str | None = None, rows: bool = True,
    ) -> None:  # fmt: skip
        """not_fused: why the gate is called. Without a backend, step is the operator's name, and why says why.

        rows: whether the operator was given a threshold for each plane, which a kernel's step may no longer show.
        """
        if threading.get_ident() != self.thread:
            return
        op = step.op if isinstance(step, Step) else step
        module, compiled = _place(sys._getframe(1), self.names)
        place = {"op": op, "module": module, "shape": tuple(x.shape), "dtype": x.dtype, "layout": _layout(x)}
        if compiled:
            return self._compiled(place, x, gate, rows)
        if backend is None:
            return self._reference(place, x, gate, why)
        plan = backend.plan(step)
        if not_fused:
            plan = dataclasses.replace(plan, not_taken=(*plan.not_taken, ("gate fused", not_fused)))
        reason, fell_back = backends.why(x)
        fallback = f"running in pure PyTorch: {reason}" if fell_back else ""
        # where the backend itself prefers to call a gate, that is its plan
        declined = step.op == "shrink" and backend.fuses_gates and isinstance(standard_gate(gate, x), str)
        if not fallback and declined and looks_standard(gate):
            fallback = f"the standard gate is not fused: {not_fused}"
        fused = None if gate is None else step.gate is not None
        self._add(Call(
            **place, backend=backend.name, why=reason, plan=plan, fused=fused, gate=not_fused, fallback=fallback
        ))  # fmt: skip

    def _reference(self, place: dict, x: torch.Tensor, gate: Any, why: str | None) -> None:
        kernels = (x.is_cpu or x.is_cuda) and why is not None and backends.choice.backend != "torch"
        why = why or "x has no elements"
        plan = Plan("PyTorch operations", "the reference", (("kernels", why),), None)
        self._add(Call(
            **place, backend="reference", why=why, plan=plan, fused=None if gate is None else False,
            gate="the reference calls the gate", fallback=why if kernels else "",
        ))  # fmt: skip

    def _compiled(self, place: dict, x: torch.Tensor, gate: Any, rows: bool) -> None:
        has_ops = place["op"] not in ("squeeze_excite", "batch_norm_relu")
        form, reason = in_graph(x, rows) if has_ops else (DECOMPOSED, "it has none")
        plan = Plan(DECOMPOSED, _FUSES, ((OPAQUE, reason),), None)
        if form == OPAQUE:
            plan = Plan(OPAQUE, reason, (), None)
        self._add(Call(
            **place, backend="compiler", why="torch.compile traces this call", plan=plan,
            fused=None if gate is None else False, gate="in a graph the gate is called", fallback="",
        ))  # fmt: skip

    def _add(self, call: Call) -> None:
        if self.strict and call.fallback:
            where = f" in {call.module}" if call.module else ""
            raise RuntimeError(f"strict: {call.op}{where} of {call.shape} {call.dtype}: {call.fallback}")
        self.calls.append(call)


_FUSES = "the compiler fuses the reference with what surrounds it"


def _layout(x: torch.Tensor) -> str:
    if x.dim() < 2 or type(x) not in (torch.Tensor, nn.Parameter):
        return "rows"
    layout = layout_of(x)
    if not is_dense(layout, x.stride()):
        return "strided"
    return "channels_last" if layout.channels_last else "rows"


def _place(frame: FrameType | None, names: dict[int, str]) -> tuple[str, bool]:
    """The innermost module on the stack, and whether torch.compile was to trace it. No hooks: they unfuse a gate."""
    module, compiled = None, None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if module is None and isinstance(owner, nn.Module):
            module = names.get(id(owner), type(owner).__name__)
        if compiled is None and frame.f_code.co_filename.endswith("_dynamo/eval_frame.py"):
            compiled = {"OptimizeContext": True, "DisableContext": False}.get(type(owner).__name__)
        frame = frame.f_back
    return module or "", bool(compiled)


def _modules_of(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, nn.Module]:
    """By name: the modules that fn is, is bound to, closes over, names in its own file, or is given."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def look(name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            found.setdefault(name, value)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                look(f"{name}[{i}]", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                look(f"{name}[{key!r}]", item)
        elif isinstance(value, functools.partial):
            look(name, value.func), look(f"{name} argument", value.args), look(f"{name} argument", value.keywords)
        elif inspect.ismethod(value):
            look(name, value.__self__), look(name, value.__func__)
        elif inspect.isfunction(value) and id(value) not in seen:
            seen.add(id(value))
            value = inspect.unwrap(getattr(value, "_torchdynamo_orig_callable", value))
            variables = inspect.getclosurevars(value)
            look("default", (value.__defaults__, value.__kwdefaults__))
            for key, item in {**variables.globals, **variables.nonlocals}.items():
                if not inspect.isfunction(item) or item.__globals__ is value.__globals__:
                    look(key, item)

    look("", fn)
    look("argument", args)
    look("argument", kwargs)
    return found


# ---- printing --------------------------------------------------------------------------------------------------------

_HEAD = ("#", "module", "op", "shape", "dtype", "layout", "backend", "plan", "index", "gate", "forward R + W",
         "backward R + W", "launches", "saved")  # fmt: skip


def _row(i: int, call: Call) -> tuple[str, ...]:
    costs = ("?", "?", "?", "?")
    if call.forward is not None:
        ahead, back = call.forward, call.backward
        costs = (
            f"{_size(ahead.read)} + {_size(ahead.written)}",
            f"{_size(back.read)} + {_size(back.written)}" if back.launches else "-",
            f"{ahead.launches} + {back.launches}" if back.launches else f"{ahead.launches}",
            _size(ahead.saved),
        )
    gate = "-" if call.fused is None else "fused" if call.fused else "called"
    return (
        str(i), call.module or "-", call.op, "x".join(map(str, call.shape)), str(call.dtype).removeprefix("torch."),
        call.layout, call.backend, call.plan.name, str(call.plan.index_bits or "?"), gate, *costs,
    )  # fmt: skip


def _reasons(call: Call) -> Iterator[str]:
    yield f"{call.backend}: {call.why}"
    yield f"{call.plan.name}: {call.plan.why}"
    for plan, reason in call.plan.not_taken:
        yield f"not {plan}: {reason}"
    yield from map(str, call.plan.launches)
    if call.fallback:
        yield f"FALLBACK: {call.fallback}"


def _size(n: int) -> str:
    for unit, bytes_in in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= bytes_in:
            return f"{n / bytes_in:.3g} {unit}"
    return f"{n} B"


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> 1-3, 5"""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)
