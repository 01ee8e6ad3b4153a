"""What a forward reads and does beside its tensors, watched while it runs on a copy.

A fused form replaces part of a forward. What that part read must be as it was when the fused form runs, and what it
did, as keeping a threshold in a dict, would be missing. Attributes are watched by classes that the copy's modules get,
all else by Python's profiler: it sees which code runs, and the code names its globals.
"""

import collections
import contextlib
import dis
import io
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .conditions import (
    ABSENT,
    NAMED,
    PLAIN,
    Conditions,
    Global,
    Part,
    Quiet,
    at,
    class_attributes,
    class_of,
    code_of,
    frozen,
    is_own,
    is_shipped,
    same,
    subclass,
)
from .kept import Kept, contents, exactly
from .reasons import Unexplained, place
from .sources import Write, function_of, names_in, writes_of

OF_MODULE = frozenset({*dir(nn.Module()), *vars(nn.Module())} - {"training"})
_TABLES = ("__dict__", "_modules", "_buffers", "_parameters")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Modules that a forward may call but whose answers change, whose calls write somewhere, or that compute only.
_VOLATILE = _words("random time datetime secrets uuid os posix warnings _warnings")
_WRITING = _words("logging warnings pathlib pprint shutil subprocess socket tempfile csv torch.utils.tensorboard")
_COMPUTING = _words("einops timm torchvision torchaudio opt_einsum jaxtyping typing_extensions packaging")
# Functions that ask or set how the caller computes.
_MODES = _words(
    """is_autocast_enabled is_autocast_cpu_enabled is_autocast_cache_enabled get_autocast_dtype get_autocast_gpu_dtype
    is_grad_enabled is_inference_mode_enabled get_default_dtype manual_seed set_autocast_enabled set_autocast_dtype
    set_autocast_cpu_enabled _set_grad_enabled set_default_dtype set_flush_denormal set_num_threads globals
    is_tracing is_scripting is_in_onnx_export is_compiling is_exporting is_dynamo_compiling"""
)
_NUMBERS = _words("item tolist numpy __array__")  # of a tensor: no longer followed
# Methods of containers that change them.
_CHANGING = _words(
    """append appendleft extend extendleft insert update add setdefault pop popleft popitem clear remove discard sort
    reverse rotate fill put itemset resize __setitem__ __delitem__ __iadd__ send"""
)
_WRAPPERS = {"contextlib", "torch.utils._contextlib", "torch.amp.autocast_mode", "torch.cuda.amp.autocast_mode"}
_USERS = "the user's"
_CHECKPOINT = "torch.utils.checkpoint"  # what it calls is seen, but not that it is called again
_LABELS = {"record_function", "profile"}  # contexts that change nothing


def run_forward(inner: nn.Module, x: Any) -> Any:
    return inner.forward(x)


class _Done(NamedTuple):
    during: Any
    what: str


class Watch:
    """`with watch:` around a run of `inner`, a copy of a module; `during`: the call of a child that runs now, or None
    for the forward's own code."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner, self.during, self._on = inner, None, False
        self.outside: dict[int, Any] = {}  # by id: what was there before the run, at any depth
        self.asks_classes = self.asks_types = False  # its code names type(), isinstance(), __class__
        self.opened: list[str] = []  # the paths of children whose own children were watched as the forward's
        self.symbol: Callable[[str], Any] | None = None  # what stands for a plain tensor that is an attribute
        self.root = class_of(inner).__module__.partition(".")[0]
        for t in (*inner.parameters(), *inner.buffers()):
            self.outside[id(t)] = t
        self._reads: dict[tuple[str, str], set] = collections.defaultdict(set)
        self._globals: dict[Global, set] = collections.defaultdict(set)
        self._done: list[_Done] = []
        self._assigned: dict[str, str] = {}  # attributes of the module itself, and where
        self._codes: set[tuple[types.CodeType, Any]] = set()
        self._kept: dict[str, tuple[Kept, set]] = {}
        self._kinds: dict[types.CodeType, str] = {}
        self._writes: dict[types.CodeType, dict[int, list[Write]]] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._of_watched: dict[str, set[str]] = {}  # what a class of the copy's has from the start
        for base in {base: None for m in inner.modules() for base in class_of(m).__mro__ if is_own(base)}:
            tensors = {name: value for name, value in vars(base).items() if isinstance(value, torch.Tensor)}
            for name, value in (class_attributes(base) | tensors).items():
                self._keep(f"{base.__name__}.{name}", base, name, value)
        for path, m in inner.named_modules():
            self._own[path] = {n: exactly(v, self.outside) for n, v in m.__dict__.items() if n not in OF_MODULE}
            with contextlib.suppress(TypeError):  # a class that does not let its objects change theirs
                object.__setattr__(m, "__class__", self._watched(class_of(m), path))

    # ---- attributes

    def _watched(self, cls: type, path: str) -> type:
        def get(module: nn.Module, name: str) -> Any:
            if name in OF_MODULE:
                own = cls.__getattribute__(module, name)
                if name in _TABLES and self._is_users(sys._getframe(1)):  # vars(self)["scale"]
                    for other in object.__getattribute__(module, "__dict__").keys() - OF_MODULE:
                        self._read(path, other)
                return own
            own = object.__getattribute__(module, "__dict__")
            try:
                value = cls.__getattribute__(module, name)
            except AttributeError:  # nn.Module looks on
                self._read(path, name)
                raise
            if isinstance(value, torch.Tensor):
                self._read(path, name)
                stored = name in own or not isinstance(getattr(cls, name, None), property)
                return self.symbol(f"{path}.{name}" if path else name) if stored and self.symbol else value
            if isinstance(value, fx.Proxy) or isinstance(getattr(cls, name, None), property):
                return value  # what a property reads is seen in its turn
            if name != "training" or path:
                self._read(path, name)
            return value

        made = subclass(cls, Quiet, {"__getattribute__": get})
        self._of_watched[path] = {*vars(made)}
        return made

    def _read(self, path: str, name: str) -> None:
        if self._on:
            self._reads[path, name].add(self.during)

    def _keep(self, shown: str, owner: Any, name: str, value: Any) -> None:
        if isinstance(value, (types.FunctionType, nn.Module)):
            return
        if shown not in self._kept:
            reached: dict[int, Any] = {}
            exact = exactly(value, reached)
            self.outside.update(reached)
            self._kept[shown] = Kept(owner, name, value, exact, contents(reached)), set()
        self._kept[shown][1].add(self.during)

    # ---- Python's profiler

    def __enter__(self) -> "Watch":
        self._outer = sys.getprofile(), sys.gettrace()
        self._on = True
        sys.settrace(lambda frame, event, argument: self._line if self._kind_of(frame) == _USERS else None)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(self._outer[0])
        sys.settrace(self._outer[1])
        self._on = False
        self.restore()

    def restore(self) -> None:
        """Globals and what belongs to classes, as they were before the first run."""
        for shown, (kept, during) in self._kept.items():
            if kept.changed(self.outside):
                kept.restore()
                self._done += [_Done(d, f"changes {shown}") for d in during]

    def _is_users(self, frame: types.FrameType | None) -> bool:
        if frame is None:
            return False
        name = frame.f_globals.get("__name__") or ""
        return self._is_users_file(name, frame.f_code.co_filename)

    def _is_users_file(self, name: str, file: str | None) -> bool:
        """The user's code; and that of the library that the module is from, but of no other, which may have caches."""
        if is_shipped(name, file):
            return False
        installed = {"site-packages", "dist-packages"} & {*(file or "").split(os.sep)}
        return not installed or name.partition(".")[0] == self.root

    def _kind(self, frame: types.FrameType) -> str:
        """Of the code that runs: most of it is torch's, of which nothing is to be seen."""
        name, code = frame.f_globals.get("__name__") or "", frame.f_code
        root = name.partition(".")[0]
        if self._is_users(frame):
            return _USERS
        if name == _CHECKPOINT:
            return _CHECKPOINT
        if code.co_name in ("__enter__", "__init__"):
            return "context"
        if not (is_shipped(name, code.co_filename) or root in _COMPUTING):
            return f"calls {name}.{code.co_name}, which may do more than compute"
        if name in _WRITING or root in _WRITING:
            return f"calls {name}.{code.co_name}"
        if code.co_name in _MODES:
            return f"calls torch.{code.co_name}"
        return f"asks {name}.{code.co_name}" if name in _VOLATILE else ""

    def _kind_of(self, frame: types.FrameType) -> str:
        kind = self._kinds.get(frame.f_code)
        if kind is None:
            kind = self._kinds[frame.f_code] = self._kind(frame)
        return kind

    def _event(self, frame: types.FrameType, event: str, argument: Any) -> None:
        kind = self._kind_of(frame)  # asked a million times for a network
        if not kind:
            return
        if event == "call":
            if kind == _USERS:
                self._code(frame)
            elif kind == "context":
                self._context(frame)
            elif kind == _CHECKPOINT:
                caller = frame.f_back  # torch calls it through decorators
                while caller is not None and not self._is_users(caller):
                    caller = caller.f_back
                if caller is not None:
                    self.note(f"calls {_CHECKPOINT}", caller)
            elif self._is_users(frame.f_back):
                self.note(kind, frame.f_back)
        elif event == "c_call" and kind == _USERS:
            owner, module = getattr(argument, "__self__", None), getattr(argument, "__module__", None)
            if id(owner) in self.outside and argument.__name__ in _CHANGING:
                self.note(f"changes what it found by {argument.__name__}", frame)
            elif isinstance(owner, torch.Tensor) and id(owner) in self.outside and argument.__name__ in _NUMBERS:
                self.note(f"asks a tensor of its own for numbers by {argument.__name__}", frame)
            elif argument.__name__ in _MODES and module != "builtins" or argument is globals:
                self.note(f"calls {argument.__name__}", frame)
            elif argument in (print, open, input, exec, setattr, delattr) or isinstance(owner, io.IOBase):
                self.note(f"calls {argument.__name__}", frame)
            elif module in _VOLATILE or isinstance(owner, random.Random):
                self.note(f"asks {module or 'random'}.{argument.__name__}", frame)

    def _line(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        """A line of the user's begins: does it assign to what was there before? The same value as before, perhaps."""
        code = frame.f_code
        if event == "line":
            if code not in self._writes:
                self._writes[code] = writes_of(code)
            for write in self._writes[code].get(frame.f_lineno, ()):
                target = frame.f_locals.get(write.root, ABSENT)  # ABSENT: a global, or no variable
                if target is self.inner and write.attribute:
                    self._assigned.setdefault(write.attribute, place(code.co_filename, frame.f_lineno))
                elif isinstance(target, (nn.Module, *NAMED)) or id(target) in self.outside:
                    self.note(f"assigns {write.text}", frame)
        return self._line

    def note(self, what: str, frame: types.FrameType) -> None:
        self._done.append(_Done(self.during, f"{what} ({place(frame.f_code.co_filename, frame.f_lineno)})"))

    def _context(self, frame: types.FrameType) -> None:
        """torch.autocast, no_grad and their like, around lines of the forward or decorating it."""
        manager = next(iter(frame.f_locals.values()), None)
        kind = type(manager)
        if not kind.__module__.startswith("torch.") or kind.__name__ in _LABELS:
            return
        if frame.f_code.co_name == "__init__" and not isinstance(manager, torch.set_grad_enabled):
            return
        caller = frame.f_back
        while caller is not None and caller.f_globals.get("__name__") in _WRAPPERS:
            caller = caller.f_back
        if caller is not None and caller.f_code is run_forward.__code__:
            self._done.append(_Done(self.during, f"runs under torch.{kind.__name__}"))
        elif self._is_users(caller):
            self.note(f"runs lines under torch.{kind.__name__}", caller)

    def _code(self, frame: types.FrameType) -> None:
        """A function of the user's begins: what its code names outside of itself."""
        code = frame.f_code
        if (code, self.during) in self._codes:
            return
        self._codes.add((code, self.during))
        for name in code.co_freevars:
            value = frame.f_locals.get(name, ABSENT)
            if name != "__class__" and not isinstance(value, (type, types.FunctionType, types.ModuleType)):
                if not self._is_local(frame.f_back, name):
                    self.note(f"uses {name}, a variable of the function around it", frame)
        if {"type", "__class__"} & {*code.co_names, *code.co_freevars}:
            self.asks_classes = True
        self.asks_types |= bool({"type", "isinstance", "__class__", "issubclass"} & {*code.co_names})
        for default in self._defaults(frame):
            self.note(f"has a default that may change, in {code.co_name}", frame)
            self._keep(f"a default of {code.co_name}", types.SimpleNamespace(default=default), "default", default)
        if function_of(code) is None and code.co_name[0] != "<":
            if any(i.opname in ("STORE_ATTR", "STORE_SUBSCR") for i in dis.get_instructions(code)):
                self.note("assigns something, in code without a source", frame)
        for how, chain in names_in(code):
            if how == "read":
                self._name(frame, chain)
            elif how == "assigns the global" or self._is_users_file(chain[0], None):
                self.note(f"{how} {'.'.join(chain)}", frame)

    def _is_local(self, frame: types.FrameType | None, name: str) -> bool:
        """Of a function that the forward is in now, as x in (x for _ in ...)."""
        while frame is not None and frame.f_code is not run_forward.__code__:
            if name in frame.f_code.co_cellvars and self._is_users(frame):
                return True
            frame = frame.f_back
        return False

    @staticmethod
    def _defaults(frame: types.FrameType) -> list[Any]:
        """Containers that are the default of an argument, where the function can be found: a method, a global."""
        code, first = frame.f_code, next(iter(frame.f_locals.values()), None)
        spaces = [vars(base) for base in type(first).__mro__] + [frame.f_globals]
        function = spaces and next(
            (s[code.co_name] for s in spaces if getattr(s.get(code.co_name), "__code__", None) is code), None
        )
        if function is None:
            return []
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        return [value for value in defaults if type(value) not in PLAIN and not isinstance(value, NAMED)]

    def _name(self, frame: types.FrameType, chain: tuple[str, ...]) -> None:
        if chain[0] not in frame.f_globals:
            return  # a builtin
        space = frame.f_globals.get("__name__")
        value: Any = sys.modules.get(space)
        if value is None or vars(value) is not frame.f_globals:
            if not isinstance(frame.f_globals.get(chain[0]), NAMED):
                self.note(f"uses {chain[0]}, of code that is in no file", frame)
            return
        owners, length = [], 0
        for name in chain:
            if isinstance(value, types.ModuleType):
                open_to_users = length == 0 or self._is_users_file(value.__name__, getattr(value, "__file__", None))
            elif isinstance(value, (type, types.FunctionType)):
                home = sys.modules.get(value.__module__)
                open_to_users = self._is_users_file(value.__module__, getattr(home, "__file__", None))
            else:
                open_to_users = hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, nn.Module, *NAMED))
            if not open_to_users:
                break
            owners.append(value)
            value, length = getattr(value, name, ABSENT), length + 1
        if isinstance(value, types.ModuleType) and length < len(chain):
            if getattr(getattr(value, chain[length], None), "__name__", None) == "numpy.random":
                self.note("asks numpy.random", frame)
        owner = getattr(value, "__self__", None)
        if isinstance(value, (types.MethodType, types.BuiltinFunctionType)) and length > 1 and owner is not None:
            value, length = owner, length - 1  # TRACKER.update, Settings.get: what counts is the tracker
        if chain[0] == "os" and chain[1:2] in (("environ",), ("getenv",)):
            self.note(f"asks {'.'.join(chain[:2])}", frame)
        if isinstance(value, types.ModuleType):
            return
        if isinstance(value, type) and value is not ABSENT and not is_own(value):
            return
        shown = ".".join(chain[:length])
        if isinstance(value, torch.Tensor):
            self.note(f"uses the tensor {shown}, which is not the module's", frame)
            return
        self._globals[Global(space, chain[:length])].add(self.during)
        self._keep(shown, owners[length - 1], chain[length - 1], value)

    # ---- what came of it

    def changes(self) -> Iterator[tuple[str, str]]:
        """Attributes (path, name) that are not what they were."""
        for path, m in self.inner.named_modules():
            now = {n: v for n, v in object.__getattribute__(m, "__dict__").items() if n not in OF_MODULE}
            before = self._own[path]
            for name in now | before:
                if not same(exactly(now.get(name, ABSENT), self.outside), before.get(name, ABSENT)):
                    yield path, name
            if "_drsn_class" in vars(type(m)):
                yield from (
                    (path, name) for name in vars(type(m)).keys() - self._of_watched.get(path, {*vars(type(m))})
                )

    def refuse(self, runs: set, sets: set[str]) -> None:
        """What the forward did, in its own code or in a child's call that is none of `runs`, would be missing, but for
        the attributes that the fused form `sets` too."""
        for name, where in self._assigned.items():
            if name not in sets:
                raise Unexplained(f"its forward assigns self.{name} ({where})")
        for during, what in self._done:
            if during is None or during not in runs:
                raise Unexplained(f"its forward {what}")

    def conditions(self, module: nn.Module, runs: dict, calls: dict, sets: set[str]) -> Conditions:
        """For a fused form of `module` that makes the calls `runs` of children itself and `sets` the same attributes;
        `calls` are the forward's, each with the child's path."""
        self.refuse({*runs}, sets)

        def counts(during: set) -> bool:
            return any(d is None or d not in runs for d in during)

        kinds = {path: class_of(at(module, path)) for path in self.opened}
        for path in {path for call, path in calls.items() if call not in runs}:
            kinds.update((below, class_of(child)) for below, child in at(module, path).named_modules(prefix=path))
        parts = {path: collections.defaultdict(list) for path in ("", *kinds)}
        for (path, name), during in self._reads.items():
            if not counts(during):
                continue
            owner, own = at(module, path), f"{path}.{name}" if path else name
            value = getattr(at(self.inner, path) if name == "training" else owner, name, ABSENT)
            part = parts.setdefault(path, collections.defaultdict(list))
            if isinstance(value, torch.Tensor):
                part["tensors"].append((name, value.shape))
            elif isinstance(value, nn.Module) and name in owner._modules:
                below = any(is_below(c, own) for c in runs.values())
                if own not in runs.values():
                    parts.setdefault(own, collections.defaultdict(list))  # a list of modules, say, which may grow
                if own not in kinds:
                    part["modules"].append((name, None if below and not self.asks_types else class_of(value)))
            else:
                part["reads"].append((name, _comparable(value, f"self.{own}")))
        found = []
        for path, about in parts.items():
            names, owner = tuple(filter(None, path.split("."))), at(module, path)
            children = (*owner._modules, *owner._parameters, *owner._buffers)
            found.append(Part(names, kinds.get(path), children, **{kind: tuple(of) for kind, of in about.items()}))
        named = tuple(
            name._replace(expected=_comparable(name.now(), ".".join(name.chain)))
            for name, during in self._globals.items()
            if counts(during)
        )
        classes = {class_of(at(module, path)) for path in parts} if self.asks_classes else ()
        with_values = tuple(
            (cls, frozen(cls)) for cls in classes if any(map(class_attributes, filter(is_own, cls.__mro__)))
        )
        forward = class_of(module).forward
        return Conditions(tuple(found), named, with_values, _aliases(module), code_of(forward))


def _aliases(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Paths of one module or tensor: the second may be replaced alone, and the fused form goes by the first."""
    first: dict[int, str] = {}
    found = []
    for path, value in (*module.named_modules(remove_duplicate=False), *module.named_parameters(remove_duplicate=False),
                        *module.named_buffers(remove_duplicate=False)):  # fmt: skip
        if first.setdefault(id(value), path) != path:
            found.append((first[id(value)], path))
    return tuple(found)


def is_below(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def _comparable(value: Any, shown: str) -> Any:
    try:
        return frozen(value)
    except Unexplained as reason:
        raise Unexplained(f"its forward reads {shown}, which {reason}: changes of it could not be noticed") from None
