"""Loads the compiled extension `drsn_kernels._cpu` of the cpu backend, or says why there is none."""

import ctypes
import os

import torch

from .._extras import unbuilt

try:
    from .. import _cpu

    MISSING: str | None = None
except ImportError as error:  # the source tree, a pure-Python install, or an extension that does not load here
    _cpu = None
    MISSING = unbuilt("_cpu", error)


def torch_parallel_for() -> int:
    """Address of torch_parallel_for in libtorch_cpu, in its stable C ABI since torch 2.10; 0 where it is absent."""
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


if _cpu is not None:
    _cpu.set_parallel_for(torch_parallel_for())
