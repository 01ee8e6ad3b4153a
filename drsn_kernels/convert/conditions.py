"""The conditions under which a fused form may run in place of a forward: what that forward reads is as it was."""

import io
import pickle
import sys
import types
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module

from .reasons import Unexplained

_MOST_BYTES = 16 << 10  # of one value, pickled: about 20 us a call


class ABSENT:
    """In place of a value: there is none."""


class Frozen(bytes):
    """The content of a container or object, pickled."""


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


class _Pickler(pickle.Pickler):
    """exact: compares identities, within this process; all objects that were met are added to it, by their ids."""

    def __init__(self, exact: dict[int, Any] | None) -> None:
        self.buffer, self.exact = io.BytesIO(), exact
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
            return "function", value.__module__, value.__qualname__, value.__code__.co_code, repr(value.__defaults__)
        return None


def frozen(value: Any, exact: dict[int, Any] | None = None) -> Any:
    """What `value` is now, for a comparison by `same`. Unexplained: it cannot be compared."""
    if type(value) in PLAIN or isinstance(value, NAMED):
        return value
    if type(value) is tuple and all(type(item) in PLAIN for item in value):
        return value
    if isinstance(value, types.MethodType):
        return value.__func__
    if exact is None and isinstance(value, nn.Module):
        return class_of(value)
    pickler = _Pickler(exact)
    try:
        pickler.dump(value)
    except Unexplained:
        raise
    except Exception:  # of the user's own __reduce__, or pickle's
        raise Unexplained(f"is a {type(value).__name__}") from None
    content = Frozen(pickler.buffer.getvalue())
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
    kind: type | None  # of a child that the fused form does not call as the forward does: nobody may listen to it
    reads: tuple[tuple[str, Any], ...]  # what is expected

    def holds(self, module: nn.Module) -> bool:
        for name in self.path:
            module = module._modules[name]
        own = module.__dict__
        if self.kind is not None and (
            (type(module) is not self.kind and class_of(module) is not self.kind)
            or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
            or "forward" in own
        ):  # fmt: skip
            return False
        for name, expected in self.reads:
            now = own[name] if name in own else getattr(module, name, ABSENT)
            if now is not expected and not _is_still(now, expected):
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


_GLOBAL_HOOKS = [  # private, dictionaries that torch fills in place
    getattr(nn_module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


class Conditions(NamedTuple):
    parts: tuple[Part, ...] = ()
    globals: tuple[Global, ...] = ()
    forward: types.FunctionType | None = None  # the class's
    spatial: tuple[int, ...] | None = None  # the only size that the module takes

    def hold(self, module: nn.Module, x: torch.Tensor) -> bool:
        if self.spatial is not None and x.shape[2:] != self.spatial:
            return False
        if self.forward is not None and module._drsn_class.forward is not self.forward:
            return False
        if self.parts and any(_GLOBAL_HOOKS):
            return False
        if torch.compiler.is_compiling() and not self._in_graphs():
            return False
        try:
            for part in self.parts:
                if not part.holds(module):
                    return False
        except KeyError:  # a child is gone: the module's own forward says so
            return False
        return not self.globals or all(_is_still(g.now(), g.expected) for g in self.globals)

    def _in_graphs(self) -> bool:
        """A graph may hold no pickling and no look into a Python module; there torch.compile guards the own forward."""
        return not self.globals and not any(type(expected) is Frozen for p in self.parts for _, expected in p.reads)
