"""Triton's own CUDA driver and ours on a libcuda.so.1 that does nothing (driver_stub.cpp): every launch on a GPU, up to
the driver, without one. Tensors are CPU memory; results are what it held.

Only where TRITON_INTERPRET is not 1, and before Triton looks for a driver: in a process of its own.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build() -> Path:
    """The folder with the stub, compiled where it is not there; git ignores build/."""
    import triton

    source = HERE / "driver_stub.cpp"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    told = hashlib.sha256(source.read_bytes() + str(headers).encode()).hexdigest()[:16]
    folder = HERE.parent / "build" / f"driver-stub-{told}"
    if not (folder / "libcuda.so.1").exists():
        own = folder / str(os.getpid())  # other processes may compile it as well
        own.mkdir(parents=True)
        command = ["c++", "-std=c++17", "-O1", "-g", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(source), "-o", str(own / "libcuda.so.1")], check=True)
        shutil.copyfile(own / "libcuda.so.1", folder / f"libcuda.so.{os.getpid()}")
        (folder / f"libcuda.so.{os.getpid()}").replace(folder / "libcuda.so")  # by this name programs are linked to it
        (own / "libcuda.so.1").replace(folder / "libcuda.so.1")
        own.rmdir()
    return folder


class Stub:
    """The library, and Triton's view of it."""

    def __init__(self) -> None:
        folder = build()
        self.library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self.library.stub_log.restype = ctypes.c_char_p
        self.library.stub_launches.restype = ctypes.c_long
        self.library.stub_context.argtypes = [ctypes.c_void_p]
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    def sizes(self, function: int, sizes: list[int]) -> None:
        """The bytes of a function's parameters, so that launches of it are recorded with their values."""
        array = (ctypes.c_size_t * len(sizes))(*sizes)
        self.library.stub_sizes(ctypes.c_void_p(function), array, len(sizes))

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """A line for each launch inside: function, grid, block, shared memory, stream, attributes, parameters."""
        lines: list[str] = []
        self.library.stub_log()
        self.library.stub_record(1)
        try:
            yield lines
        finally:
            self.library.stub_record(0)
            lines += self.library.stub_log().decode().splitlines()


@contextlib.contextmanager
def stub_driver(capability: int = 90) -> Iterator[Stub]:
    """Inside, the triton backend takes CPU tensors, compiles for this GPU and launches on the stub."""
    stub = Stub()
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime import driver

    class Driver:
        lowers_only = True  # the backend then takes CPU tensors
        launcher_cls = CudaLauncher
        stream = 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return self.stream

    before, ours = driver._active, Driver()
    driver.set_active(ours)
    ours.utils = CudaUtils()
    stub.driver = ours
    try:
        yield stub
    finally:
        driver._active = before


def passes(call) -> list[tuple]:
    """The launch.Pass objects that the call runs, each with its tensors."""
    from drsn_kernels.backends.gpu import launch

    seen, run = [], launch.Pass._run

    def watched(self: launch.Pass, given: tuple) -> None:
        seen.append((self, given))
        run(self, given)

    launch.Pass._run = watched
    try:
        call()
    finally:
        launch.Pass._run = run
    return seen
