"""Launches csrc/cuda/one_pass.cu on a GPU through the CUDA driver, by ctypes: a launcher for tests.

One that production can use is owed: ctypes takes some 10 us a call. As one_pass_cu wants it of every launcher, the grid
is no larger than what the device holds together.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from drsn_kernels.backends.gpu import one_pass_cu, plans

# cuda.h: CUfunction_attribute and CUlaunchAttributeID
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CLUSTER_DIMENSION = 4


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    class Value(ctypes.Union):
        _fields_ = [("cluster", ctypes.c_uint * 3), ("pad", ctypes.c_char * 64)]

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", Value)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class Driver:
    """The kernels of one fatbin, loaded into the current context."""

    def __init__(self, fatbin: Path, library: str = "libcuda.so.1"):
        self._cuda, self._module = ctypes.CDLL(library), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), fatbin.read_bytes())

    def _call(self, name: str, *arguments) -> None:
        if error := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name} returned {error}")

    def launcher(self, launch: one_pass_cu.Launch):
        plan, function = launch.plan, ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, launch.kernel.encode())
        self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, ctypes.c_int(plan.shared))
        cluster = Attribute(CLUSTER_DIMENSION)
        cluster.value.cluster[:] = plan.cluster, 1, 1
        config = Config((plan.programs, 1, 1), (plan.threads, 1, 1), plan.shared, None, ctypes.pointer(cluster), 1)
        together = ctypes.c_int()
        self._call("cuOccupancyMaxActiveClusters", ctypes.byref(together), function, ctypes.byref(config))
        config.grid[0] = min(plan.programs, together.value * plan.cluster)

        def run(arguments: bytes) -> None:
            config.stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else None
            held = ctypes.create_string_buffer(arguments, len(arguments))
            parameters = (ctypes.c_void_p * 1)(ctypes.addressof(held))
            self._call("cuLaunchKernelEx", ctypes.byref(config), function, parameters, None)

        return run


@contextlib.contextmanager
def launching(launcher) -> Iterator[None]:
    """Inside, plans name one_pass_cu where it takes the step, and this launches it."""
    before = one_pass_cu.launcher, plans.ONE_PASS_CU
    one_pass_cu.launcher, plans.ONE_PASS_CU = launcher, True
    try:
        yield
    finally:
        one_pass_cu.launcher, plans.ONE_PASS_CU = before


@functools.cache
def driver() -> Driver:
    """Of the fatbin that was compiled at installation."""
    torch.cuda.init()
    torch.empty(0, device="cuda")  # makes the context current
    return Driver(one_pass_cu.FATBIN)
