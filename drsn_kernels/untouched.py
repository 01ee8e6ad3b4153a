"""Run a model to look at it, and leave no trace."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def untouched(modules: Iterable[nn.Module] = (), arguments: Any = ()) -> Iterator[None]:
    """Whatever runs inside, afterwards these are as before: every module's mode, buffers and parameters' ``.grad``, the
    content and ``.grad`` of the tensors in `arguments` (in dicts, lists and tuples at any depth), and torch's random
    number generators.

    Buffers are the same tensors with the same content and version, so a graph that was recorded before can still go
    backward. Inside, every ``.grad`` is None. Parameters' values are not kept: do not step an optimizer inside.
    """
    tensors = list(_tensors(arguments))
    every = list({id(m): m for root in modules for m in root.modules()}.values())
    modes = [(module, module.training) for module in every]
    found = ((m, name, b) for m in every for name, b in m._buffers.items() if b is not None)
    registered = [(m, name, b) for m, name, b in found if not nn.parameter.is_lazy(b)]  # which have no content yet
    buffers = {id(b): b for *_, b in registered}
    kept = buffers | {id(t): t for t in tensors}
    contents = [(t, None if t.is_inference() else t._version, t.detach().clone()) for t in kept.values()]
    parameters = [p for m in every for p in m._parameters.values() if p is not None]
    grads = [(t, t.grad) for t in {id(t): t for t in (*parameters, *tensors) if t.is_leaf}.values()]
    for t, _ in grads:
        t.grad = None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with contextlib.ExitStack() as versions:
        for t, version, _ in contents:
            if version is not None:
                versions.enter_context(torch.autograd._unsafe_preserve_version_counter(t))
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer in registered:
                module._buffers[name] = buffer
            for t, version, content in contents:
                # batch_norm writes running statistics without a new version
                written = id(t) in buffers or version is None or t._version != version
                if written and not _expanded(t):
                    # outside of it, torch lets nobody write to a tensor that was made in inference mode
                    with torch.inference_mode() if t.is_inference() else torch.no_grad():
                        t.copy_(content)
            for t, grad in grads:
                t.grad = grad


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _expanded(t: torch.Tensor) -> bool:
    """Elements share memory: nothing writes to such a tensor."""
    return any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))
