"""Who computes a call: the floor, the popular port, the best eager form, the compiler, and each backend of ours."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import backends
from .cases import Case


@dataclass(frozen=True)
class Provider:
    """A form of the step (floor, port, best, ours), and how it runs."""

    name: str
    form: str
    backend: str = "auto"
    compiled: bool = False
    threads: int | None = None

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        with backends.use_backend(self.backend, strict=self.backend != "auto"):
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                if self.threads is not None:
                    torch.set_num_threads(threads)

    def __str__(self) -> str:
        return self.name


FLOOR, PORT = Provider("floor", "floor"), Provider("port", "port")
_EAGER, _COMPILED = ("triton", "cpu", "torch"), ("ours", "triton", "cpu")
OURS = (*_EAGER, *(f"{name}-compiled" for name in _COMPILED))  # names that the gate watches
COMPILE = ("none", "best", "all")


def backends_for(device: str, dtype: torch.dtype) -> list[str]:
    """Our backends that have kernels for this device here, the preferred one first; "torch" is always the last.

    Triton on CPU tensors is its interpreter, where times mean nothing.
    """
    sample = torch.empty(0, dtype=dtype, device=device)
    able = [name for name, backend in backends.BACKENDS.items() if backend.unsupported(sample) is None]
    return [name for name in able if not (name == "triton" and device == "cpu")]


def providers(case: Case, device: str, compile: str) -> list[Provider]:
    """Those of a case, in the order of its rows. compile: "none", "best" (best-compiled only) or "all"."""
    names = backends_for(device, case.torch_dtype)
    if case.op == "scaling":
        return [
            Provider(name + label, form, backend, threads=threads)
            for name, form, backend in (("floor", "floor", "auto"), (names[0], "ours", names[0]))
            for label, threads in (("", 2), ("-1-thread", 1))
        ]
    found = [FLOOR, PORT, Provider("best", "best")]
    if compile != "none":
        found.append(Provider("best-compiled", "best", compiled=True))
    if compile == "all":
        found.append(Provider("port-compiled", "port", compiled=True))
    found += [Provider(name, "ours", name) for name in names]
    if compile == "all":
        # by default a compiled call is the reference, which the compiler fuses; a forced backend is opaque operators
        found.append(Provider("ours-compiled", "ours", compiled=True))
        found += [Provider(f"{name}-compiled", "ours", name, compiled=True) for name in names if name != "torch"]
    return found
