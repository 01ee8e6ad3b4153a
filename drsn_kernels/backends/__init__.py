"""Backends: who computes an eager call, and why.

A backend is a module with a `name`, `unsupported(x)` (None, or the reason in words) and three kernels:

    reduce(x, geo, planes)                           -> A (N, C), and int32 (2, words) of sign and nonzero, or None
    apply(x, geo, tau, residual, out, planes, rule)  -> y, and int32 (planes, words) of kept [and sign], or None
    grad(geo, dtype, g, kept, sign, ...)             -> dx and/or dtau, from the planes

and four for squeeze_excite: mean and scale forward, scale_sums and scale_grad backward.

geo is x's shape and dense strides (planes.geometry), computed once a call.
`torch` (pure PyTorch, any device) is the reference for all of them. A new backend joins by one line in BACKENDS and,
in the tests, by being listed there.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from . import cpu, eager, triton

log = logging.getLogger("drsn_kernels")

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "torch": eager}


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


@contextlib.contextmanager
def use_backend(name: str, strict: bool = False) -> Iterator[None]:
    """Run the operators on one backend inside the block: "torch", "cpu", "triton", or "auto".

    "auto" goes by device and dtype.

    A call that the backend cannot run falls back to "torch", and the logger ``drsn_kernels`` says so once; with
    ``strict=True`` it raises RuntimeError instead. The choice is the process's, not the thread's; a backward pass uses
    the backend of its forward pass. The environment variable DRSN_BACKEND sets it from the start.

    Raises:
        ValueError: unknown name, or "cuda", which was a backend up to 0.4.
    """
    before = choice.backend, choice.strict
    choice.backend, choice.strict = _checked(name, "use_backend"), strict
    try:
        yield
    finally:
        choice.backend, choice.strict = before


def fall_back(message: str) -> None:
    """Say once, through the logger, that a call takes a slower way; under strict raise."""
    if choice.strict:
        raise RuntimeError(f"strict: {message}")
    if message not in _said:
        _said.add(message)
        log.warning(message)


def _preferred(x: torch.Tensor) -> ModuleType:
    """By device; interpreted Triton runs on CPU tensors only where it is asked for."""
    return triton if x.is_cuda else cpu


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


def select(x: torch.Tensor) -> ModuleType:
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
