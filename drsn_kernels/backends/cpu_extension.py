"""Loads the compiled extension `drsn_kernels._cpu` of the cpu backend, or says why there is none."""

import ctypes
import os

import torch

try:
    from .. import _cpu

    MISSING: str | None = None
except ImportError as error:  # pure-Python install, or an extension that does not load here
    _cpu = None
    try:
        from .._build import MISSING
    except ImportError:
        MISSING = None
    if MISSING is None:
        if os.path.exists(os.path.join(os.path.dirname(__file__), "..", "..", "setup.py")):
            MISSING = (
                "this is the source tree, where nothing is compiled; run from another folder, or `pip install -e .`"
            )
    if MISSING is None:
        MISSING = f"the compiled extension drsn_kernels._cpu does not load ({error}); install with `pip install .`"


def torch_parallel_for() -> int:
    """Address of torch_parallel_for in libtorch_cpu, in its stable C ABI since torch 2.10; 0 where it is absent."""
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


if _cpu is not None:
    _cpu.set_parallel_for(torch_parallel_for())
