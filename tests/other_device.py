"""A device that is not there: it finds the tests that make a tensor on the CPU whatever their variant's device is.

Such a test passes on a machine without a GPU, and on one with a GPU it fails or hands a kernel a wild pointer. "cpu:0"
stands for the GPU: torch takes it everywhere and computes on the CPU. Inside `OtherDevice`, a function that would raise
on a GPU because its tensors lie on two devices raises here, and every tensor says where it would lie.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

from drsn_kernels import backends

NAME = "cpu:0"
_HERE = torch.device(NAME)
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_DEVICE = torch.Tensor.device.__get__
_READS = {torch.Tensor.numpy, torch.Tensor.__array__}
# What torch allows between devices: copies, indices on the CPU, and the steps of Module.to.
_BETWEEN = {torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.set_, *_MOVES}
_BETWEEN |= {torch._has_compatible_shallow_copy_type, torch.Tensor.data.__set__}

_on_cpu: dict[int, StorageWeakRef] = {}  # storages on the CPU, by address; a weak reference keeps the address taken


def _storage(t: torch.Tensor) -> int | None:
    if t.layout is not torch.strided or t.is_nested or t.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return None
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return None


def is_on_cpu(t: torch.Tensor) -> bool:
    return _storage(t) in _on_cpu


def _put_on_cpu(result: object) -> None:
    for t in tree_leaves(result):
        if isinstance(t, torch.Tensor) and (key := _storage(t)) is not None:
            _on_cpu[key] = StorageWeakRef(t.untyped_storage())


class OnCpu(TorchFunctionMode):
    """What is made while tests are collected lies on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _device_constructors():
            _put_on_cpu(result)
        return result


class OtherDevice(TorchFunctionMode):
    """The other device is the default one; tensors that lie elsewhere are not mixed with its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func == _DEVICE:
            device = func(*args)
            return _HERE if device.type == "cpu" and not is_on_cpu(given[0]) else device
        on_cpu = [t for t in given if is_on_cpu(t)]
        if func in _READS:
            assert len(on_cpu) == len(given), "numpy reads a tensor that is not on the CPU"
        elif on_cpu and func not in _BETWEEN and any(t.dim() for t in on_cpu):
            assert len(on_cpu) == len(given), f"{resolve_name(func) or func} mixes tensors of the CPU and of {NAME}"
        device = kwargs.get("device")
        if func in _MOVES:
            return self._move(func, args, kwargs)
        made_on_cpu = device is not None and torch.device(device) == torch.device("cpu")
        generator = kwargs.get("generator")
        assert generator is None or getattr(generator, "is_on_cpu", True) == made_on_cpu, "its generator is elsewhere"
        result = func(*args, **kwargs)
        follows = device is None and on_cpu and len(on_cpu) == len(given) and func not in _device_constructors()
        if made_on_cpu or follows:
            _put_on_cpu(result)
        return result

    @staticmethod
    def _move(func, args, kwargs) -> torch.Tensor:
        """A copy between devices has memory of its own, which torch, on one device, would not give it."""
        named = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.device | str)]
        named += [torch.device("cpu") if is_on_cpu(a) else _HERE for a in args[1:] if isinstance(a, torch.Tensor)]
        target = torch.device("cpu") if func is torch.Tensor.cpu else torch.device(named[0]) if named else None
        before, result = args[0], func(*args, **kwargs)
        to_cpu = is_on_cpu(before) if target is None else target == torch.device("cpu")
        if result is before and to_cpu != is_on_cpu(before):
            result = result.clone()
        if to_cpu:
            _put_on_cpu(result)
        return result


class _Generator(torch.Generator):
    """Knows whether it was made for the other device."""

    def __new__(cls, device: str | torch.device = "cpu"):
        made = super().__new__(cls, device)
        made.is_on_cpu = torch.device(device) != _HERE
        return made


@contextlib.contextmanager
def use() -> Iterator[None]:
    """Everything inside runs on the other device, and no operator of ours is given a tensor of the CPU."""
    select, from_numpy = backends.select, torch.from_numpy

    def checked_select(x):
        assert not is_on_cpu(x), "an operator is given a tensor of the CPU"
        return select(x)

    def marked_from_numpy(array):
        _put_on_cpu(result := from_numpy(array))
        return result

    with pytest.MonkeyPatch.context() as patch, OtherDevice():
        patch.setattr(backends, "select", checked_select)
        patch.setattr(torch, "from_numpy", marked_from_numpy)
        patch.setattr(torch, "Generator", _Generator)
        yield
    for key in [key for key, storage in _on_cpu.items() if storage.expired()]:
        del _on_cpu[key]
