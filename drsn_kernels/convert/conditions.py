"""The conditions under which a fused form may run in place of a forward: what that forward reads is as it was."""

import abc
import functools
import hashlib
import io
import os
import pickle
import sys
import types
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import hooks
from ..ops.dispatch import not_eager
from .reasons import Unexplained

_MOST_BYTES = 16 << 10  # of one value, pickled: about 20 us a call


def subclass(cls: type, first: type, names: dict[str, Any]) -> type:
    """A class below `cls`, of which nobody is told: registries of the user's stay as they are."""
    meta, of_user = type(cls), {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    arguments = cls.__name__, (first, cls), {**of_user, **names, "_drsn_class": cls}
    return meta(*arguments) if meta in (type, abc.ABCMeta) else type.__new__(meta, *arguments)


class Quiet:
    """Before a class in the bases: keeps its __init_subclass__ from being called."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class ABSENT:
    """In place of a value: there is none."""


class Frozen(bytes):
    """The content of a container or object, pickled."""


class Code(str):
    """A function by its name and code: one that is compared after a pickle is another object."""


@functools.lru_cache(maxsize=4096)
def _digest(code: types.CodeType) -> str:
    """The same in every process: a set has an order of its own in each."""
    constants = [_digest(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in constants]
    return hashlib.sha1(code.co_code + repr((code.co_names, constants)).encode(), usedforsecurity=False).hexdigest()


def code_of(function: types.FunctionType, within: tuple[types.FunctionType, ...] = ()) -> Code:
    """With the defaults of its arguments and the variables of functions around it. Unexplained: not to be compared."""
    more = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        if isinstance(value, types.FunctionType):
            more += [code_of(value, (*within, function))] if value not in within and value is not function else []
        elif not isinstance(value, type):  # as __class__ of super()
            more.append(value)
    # pickled, because a repr may hold an address; a module has no other content than its name
    more = [value.__name__ if isinstance(value, types.ModuleType) else value for value in more]
    given = hashlib.sha1(frozen(more), usedforsecurity=False).hexdigest() if more else ""
    return Code(f"{function.__module__}.{function.__qualname__} {_digest(function.__code__)} {given}")


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


class _Pickler(pickle.Pickler):
    """exact: compares identities, within this process; all objects that were met are added to it, by their ids."""

    def __init__(self, exact: dict[int, Any] | None) -> None:
        self.buffer, self.exact = io.BytesIO(), exact
        self.classes: dict[type, None] = {}
        self.met: dict[int, Any] = {}
        self.hidden: list[Any] = []  # attributes of objects that say themselves what a pickle holds
        super().__init__(self.buffer, 4)

    def persistent_id(self, value: Any) -> Any:
        if self.exact is not None and type(value) not in PLAIN:
            self.exact[id(value)] = value
        if isinstance(value, torch.Tensor):
            if self.exact is None:
                raise Unexplained("holds tensors")
            return "tensor", id(value), None if value.is_inference() else value._version
        if isinstance(value, (nn.Module, fx.Proxy)):
            if self.exact is None:
                raise Unexplained("holds modules")
            return "object", id(value)
        if isinstance(value, types.FunctionType):  # pickle takes no lambda
            return code_of(value)
        cls = value if isinstance(value, type) else type(value)
        if is_own(cls):
            self.classes.update(dict.fromkeys(base for base in cls.__mro__ if is_own(base)))
            if isinstance(value, type):  # pickle takes no class of a function
                return f"class {value.__module__}.{value.__qualname__}"
            says = any(_SAYS & {*vars(base)} for base in cls.__mro__ if is_own(base))
            if says and id(value) not in self.met and hasattr(value, "__dict__"):
                self.hidden.append(vars(value))
            self.met[id(value)] = value
        return None

    def dump_all(self, value: Any) -> Frozen:
        """With the attributes of the classes that it is made of: an object may read them."""
        self.dump(value)
        known = 0
        while self.hidden or known < len(self.classes):
            hidden, self.hidden = self.hidden, []
            classes, known = [*self.classes][known:], len(self.classes)
            self.dump([hidden, [class_attributes(cls) for cls in classes]])
        return Frozen(self.buffer.getvalue())


_SAYS = {"__getstate__", "__reduce__", "__reduce_ex__"}
_LIBRARIES = {"builtins", "torch", "numpy", "scipy", "triton", __package__.partition(".")[0]}
_STANDARD = os.path.dirname(os.__file__) + os.sep


def is_shipped(name: str, file: str | None) -> bool:
    """Whether a Python module is Python's own, or of a library whose code does not change and keeps nothing for a user.
    A user's test.py or code.py is not: Python has modules of these names, elsewhere."""
    root = name.partition(".")[0]
    if root in _LIBRARIES:
        return True
    return (
        root in sys.stdlib_module_names
        and root != "__main__"
        and (file or _STANDARD).startswith((_STANDARD, "<frozen"))
    )


def is_own(cls: type) -> bool:
    """Whether a class may have attributes that a user changes."""
    return not is_shipped(cls.__module__, getattr(sys.modules.get(cls.__module__), "__file__", None))


def class_attributes(cls: type) -> dict[str, Any]:
    """Values, not methods and descriptors, that a class of the user's has itself."""
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith(("__", "_abc_"))
        and not isinstance(value, _OF_CLASS)
        and not hasattr(type(value), "__get__")
    }


_OF_CLASS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    staticmethod,
    classmethod,
    property,
    torch.Tensor,
    nn.Module,
)


def frozen(value: Any, exact: dict[int, Any] | None = None) -> Any:
    """What `value` is now, for a comparison by `same`. Unexplained: it cannot be compared."""
    if type(value) in PLAIN or isinstance(value, types.ModuleType):
        return value
    if type(value) is tuple and all(type(item) in PLAIN for item in value):
        return value
    if isinstance(value, types.FunctionType):
        return code_of(value)
    if isinstance(value, type) and not is_own(value):
        return value
    if isinstance(value, (types.MethodType, types.BuiltinFunctionType)):
        owner, function = getattr(value, "__self__", None), getattr(value, "__func__", None)
        if owner is None or isinstance(owner, (types.ModuleType, nn.Module)):
            return (
                value
                if function is None
                else code_of(function)
                if isinstance(function, types.FunctionType)
                else function
            )
        value = (owner, code_of(function) if isinstance(function, types.FunctionType) else value.__name__)
    if exact is None and isinstance(value, nn.Module):
        raise Unexplained("is a module that is not registered")
    try:
        content = _Pickler(exact).dump_all(value)
    except Unexplained:
        raise
    except Exception:  # of the user's own __reduce__, or pickle's
        raise Unexplained(f"is a {type(value).__name__}") from None
    if exact is None and len(content) > _MOST_BYTES:
        raise Unexplained("is large")
    return content


def same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is tuple and type(b) is tuple:  # (1,) is not (True,)
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def class_of(module: nn.Module) -> type:
    """The user's class of a module, be it watched or converted."""
    cls = type(module)
    return cls.__dict__.get("_drsn_class", cls)


def at(module: nn.Module, path: str) -> Any:
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def _is_still(now: Any, expected: Any) -> bool:
    if now is expected:
        return True
    try:
        return same(frozen(now), expected)
    except Unexplained:
        return False


class Part(NamedTuple):
    """The module itself or one below it, and attributes of it that the forward reads."""

    path: tuple[str, ...]
    kind: type | None = (
        None  # of a child that the fused form does not call as the forward does: nobody may listen to it
    )
    children: tuple[str, ...] | None = None  # the names of its modules, parameters and buffers
    reads: tuple[tuple[str, Any], ...] = ()  # what is expected
    tensors: tuple[tuple[str, torch.Size], ...] = ()  # looked up at every call; of this shape
    modules: tuple[tuple[str, type | None], ...] = ()  # called by the fused form; of this class where the forward asks

    def holds(self, module: nn.Module) -> bool:
        path, kind, children, reads, tensors, modules = self  # once: this runs in every call
        for name in path:
            module = module._modules[name]
        own = module.__dict__
        below = own["_modules"]
        if kind is not None and (
            (type(module) is not kind and class_of(module) is not kind) or hooks.is_listened_to(module)
        ):
            return False
        if children is not None and (*below, *own["_parameters"], *own["_buffers"]) != children:
            return False
        for name, expected in reads:
            now = own[name] if name in own else getattr(module, name, ABSENT)
            if now is not expected and not _is_still(now, expected):
                return False
        for name, shape in tensors:
            now = getattr(module, name, None)
            if not isinstance(now, torch.Tensor) or now.shape != shape:
                return False
        for name, kind in modules:
            now = below.get(name)
            if now is None or (kind is not None and class_of(now) is not kind):
                return False
        return True


class Global(NamedTuple):
    """A variable of a Python module, or an attribute of one: SCALE, Config.scale."""

    space: str  # in sys.modules
    chain: tuple[str, ...]
    expected: Any = ABSENT

    def now(self) -> Any:
        value: Any = sys.modules.get(self.space)
        for name in self.chain:
            value = getattr(value, name, ABSENT)
        return value


class Conditions(NamedTuple):
    parts: tuple[Part, ...] = ()
    globals: tuple[Global, ...] = ()
    classes: tuple[tuple[type, Any], ...] = ()  # with their attributes, where they have any
    aliases: tuple[tuple[str, str], ...] = ()  # paths of one module or parameter
    forward: Code | None = None  # the class's
    spatial: tuple[int, ...] | None = None  # the only size that the module takes
    eager: bool = False  # where a call is traced or transformed, the module's own forward runs

    def hold(self, module: nn.Module, x: torch.Tensor) -> bool:
        if self.spatial is not None and x.shape[2:] != self.spatial:
            return False
        if self.eager and not_eager(x) is not None:
            return False
        if torch.compiler.is_compiling():
            if not self._in_graphs():
                return False
        elif self.forward is not None and not _is_still(module._drsn_class.forward, self.forward):
            return False
        if self.parts and any(hooks.OF_ALL_MODULES):
            return False
        try:
            for part in self.parts:
                if not part.holds(module):
                    return False
            for a, b in self.aliases:
                if at(module, a) is not at(module, b):
                    return False
        except (KeyError, AttributeError):  # a child is gone: the module's own forward says so
            return False
        if not (self.globals or self.classes):
            return True
        return all(_is_still(g.now(), g.expected) for g in self.globals) and all(
            _is_still(cls, expected) for cls, expected in self.classes
        )

    def _in_graphs(self) -> bool:
        """A graph may hold no pickling and no look into a Python module; there torch.compile guards the own forward."""
        simple = all(type(expected) not in (Frozen, Code) for p in self.parts for _, expected in p.reads)
        return simple and not self.globals and not self.classes
