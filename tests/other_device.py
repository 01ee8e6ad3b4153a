"""A device that is not there: it finds the tests that make a tensor on the CPU whatever their variant's device is.

Such a test passes on a machine without a GPU, and on one with a GPU it fails or hands a kernel a wild pointer. "cpu:0"
stands for the GPU: torch takes it everywhere and computes on the CPU. Inside `OtherDevice`, a function that would raise
on a GPU because its tensors lie on two devices raises here, and every tensor says where it would lie.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

from drsn_kernels.backends import cpu
from drsn_kernels.ops import dispatch

NAME = "cpu:0"
_HERE = torch.device(NAME)
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_DEVICE = torch.Tensor.device.__get__
_READS = {torch.Tensor.numpy, torch.Tensor.__array__}
# What torch allows between devices: copies, and indices on the CPU.
_BETWEEN = {torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.set_, *_MOVES}

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
        if func in _device_constructors() or func is torch.from_numpy:
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
        generator = kwargs.get("generator")
        made_on_cpu = device is not None and torch.device(device) == torch.device("cpu")
        assert generator is None or getattr(generator, "is_on_cpu", True) == made_on_cpu, "a generator of another device"
        result = func(*args, **kwargs)
        if made_on_cpu or func is torch.from_numpy or (on_cpu and len(on_cpu) == len(given) and device is None):
            if func not in _device_constructors() or device is not None:
                _put_on_cpu(result)
        return result

    @staticmethod
    def _move(func, args, kwargs) -> torch.Tensor:
        devices = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.device | str)]
        devices += [a.device if is_on_cpu(a) else _HERE for a in args[1:] if isinstance(a, torch.Tensor)]
        before, result = args[0], func(*args, **kwargs)
        target = torch.device("cpu") if func is torch.Tensor.cpu else torch.device(devices[0]) if devices else None
        if target is None or target.type != "cpu":  # a change of dtype alone
            if is_on_cpu(before):
                _put_on_cpu(result)
            return result
        to_cpu = target.index is None
        if to_cpu == is_on_cpu(before):
            if to_cpu:
                _put_on_cpu(result)
            return result
        result = result.clone() if result is before else result  # a copy between devices has memory of its own
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
    not_eager, generator, device = dispatch.not_eager, torch.Generator, cpu._CPU

    def checked(*tensors):
        assert not any(t is not None and is_on_cpu(t) for t in tensors), "an operator is given a tensor of the CPU"
        return not_eager(*tensors)

    dispatch.not_eager, torch.Generator, cpu._CPU = checked, _Generator, _HERE
    try:
        with OtherDevice():
            yield
    finally:
        dispatch.not_eager, torch.Generator, cpu._CPU = not_eager, generator, device
        for key in [key for key, storage in _on_cpu.items() if storage.expired()]:
            del _on_cpu[key]
