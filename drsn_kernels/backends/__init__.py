"""Backends: who computes an eager call, and why.

A backend is a class (step.py says of what) and a line in BACKENDS; in the tests, a line in KERNELS of conftest.py.
`torch` (eager.py, pure PyTorch, any device) is the reference for all of them.
"""

import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._contextlib import _DecoratorContextManager  # private; of torch.no_grad and its kind

from . import cpu, gpu  # noqa: F401  gpu: whether there is a GPU backend, without importing Triton
from .eager import eager
from .gpu.backend import Gpu
from .step import Backend

log = logging.getLogger("drsn_kernels")

_F = TypeVar("_F", bound=Callable[..., Any])

BACKENDS: dict[str, Backend] = {"cpu": cpu.Cpu(), "triton": Gpu(), "torch": eager}


def _checked(name: str, source: str) -> str:
    if name == "cuda":
        raise ValueError(f'{source} names "cuda", which is no longer a backend: on a GPU "triton" has the kernels')
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


class _Choice:
    """One choice for the process, not one a thread: autograd runs backward passes in threads of its own."""

    backend: str = _checked(os.environ.get("DRSN_BACKEND", "auto"), "the environment variable DRSN_BACKEND")
    strict: bool = False


choice = _Choice()
_said: set[str] = set()


class use_backend(_DecoratorContextManager):
    """Run the operators on one backend.

    As ``torch.set_grad_enabled``: a statement, which holds from its call on, a context manager, or a decorator of
    functions and generators::

        dk.use_backend("torch")              # from here on
        with dk.use_backend("cpu"):          # in the block; then as before
            y = model(x)
        @dk.use_backend("cpu", strict=True)  # in each call
        def step(x): ...

    Args:
        name: "torch", "cpu", "triton", or "auto", which goes by device and dtype.
        strict: a call that the backend cannot run raises RuntimeError. Otherwise it falls back to "torch", and the
            logger ``drsn_kernels`` says so once.
        save: what "torch" keeps for a backward pass: "time" keeps x, "memory" the bit planes of the other backends, a
            tenth of the bytes at three times the time. The others keep planes anyway.

    The choice is the process's, not the thread's; a backward pass uses the backend of its forward pass. The environment
    variable DRSN_BACKEND sets it from the start.

    Raises:
        ValueError: unknown name, or "cuda", which was a backend; unknown save. Nothing is changed then.
    """

    def __init__(self, name: str, strict: bool = False, save: str = "time") -> None:
        if save not in ("time", "memory"):
            raise ValueError(f"save must be 'time' or 'memory', got {save!r}")
        self.wanted = _checked(name, "use_backend"), strict, save
        self.before = choice.backend, choice.strict, eager.saves
        self._set(*self.wanted)

    @staticmethod
    def _set(name: str, strict: bool, save: str) -> None:
        choice.backend, choice.strict, eager.saves = name, strict, save

    def __enter__(self) -> None:
        self._set(*self.wanted)  # once more, for a second block

    def __exit__(self, *error: object) -> None:
        self._set(*self.before)

    def __call__(self, function: _F) -> _F:
        self._set(*self.before)  # in the function's calls only
        if inspect.isclass(function) or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            kind = "a class" if inspect.isclass(function) else "an async function"
            raise TypeError(f"use_backend decorates functions and generators, got {kind}: use `with` inside it")
        return super().__call__(function)

    def clone(self) -> "use_backend":
        """Of a decorator, for each call: what it finds is then what it restores."""
        return type(self)(*self.wanted)


def fall_back(message: str) -> None:
    """Say once, through the logger, that a call takes a slower way; under strict raise."""
    if choice.strict:
        raise RuntimeError(f"strict: {message}")
    if message not in _said:
        _said.add(message)
        log.warning(message)


def _preferred(x: torch.Tensor) -> Backend:
    """By device; interpreted Triton runs on CPU tensors only where it is asked for."""
    return BACKENDS["triton" if x.is_cuda else "cpu"]


def why(x: torch.Tensor) -> tuple[str, bool]:
    """In words, why select(x) takes the backend it takes, and whether that is a fallback from one with kernels."""
    if choice.backend == "auto":
        reason = _preferred(x).unsupported(x)
        if reason is None:
            return f"the default for {x.device.type} tensors", False
        return reason, x.is_cuda or x.is_cpu
    reason = BACKENDS[choice.backend].unsupported(x)
    if reason is None:
        return "use_backend or DRSN_BACKEND asks for it", False
    return f"{choice.backend} was asked for, but {reason}", True


def select(x: torch.Tensor) -> Backend:
    """The backend for an eager call on x."""
    if choice.backend == "auto":
        backend = _preferred(x)
        reason = backend.unsupported(x)
        if reason is None:
            return backend
        # on devices without kernels, and without Triton, pure PyTorch is the expected way
        if choice.strict or x.is_cuda or (x.is_cpu and cpu.MISSING):
            fall_back(f"running in pure PyTorch: {reason}")
        return eager
    backend = BACKENDS[choice.backend]
    reason = backend.unsupported(x)
    if reason is None:
        return backend
    fall_back(f"the {choice.backend} backend cannot run this call, using torch: {reason}")
    return eager
