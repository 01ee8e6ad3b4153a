"""Compiling launches for a GPU that is not there.

Inside `lowering("cuda:90")` the launchers of this package take CPU tensors: every launch is specialised and compiled as
it would be on that GPU, by the same code of Triton and with the same options, and recorded; nothing runs, so results
are uninitialised memory. `python -m drsn_kernels warmup --target` fills Triton's cache this way.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ... import checked
from . import interpreting


class Target(NamedTuple):
    """A GPU, as far as a compiler asks. Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability"; AMD CDNA3 ISA guide for gfx942."""

    backend: str
    arch: Any
    warp_size: int
    shared_program: int  # bytes of shared memory: the most one program (CTA) may take


TARGETS = {
    "cuda:80": Target("cuda", 80, 32, 163 << 10),
    "cuda:90": Target("cuda", 90, 32, 227 << 10),
    "cuda:100": Target("cuda", 100, 32, 227 << 10),
    "hip:gfx942": Target("hip", "gfx942", 64, 64 << 10),
}
_REGISTERS = 65536  # of a multiprocessor, the same for compute capability 8.0, 9.0 and 10.0
# JITFunction keeps what it has compiled by device number: one number a target, and none that a real device has.
_FIRST_DEVICE = 1 << 20


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    target: str
    arguments: dict[str, Any] = field(repr=False, compare=False)  # by name, constexprs too; tensors are left out
    compiled: Any = field(repr=False, compare=False)  # triton.compiler.CompiledKernel

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class _Utils:
    """The part of a driver that asks the device and loads code onto it."""

    def __init__(self, target: Target):
        self._target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._target.shared_program,
            "max_num_regs": _REGISTERS,
            "warpSize": self._target.warp_size,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads


class _Driver:
    """A Triton driver whose device does not exist. The backend takes CPU tensors where `lowers_only` is set."""

    lowers_only = True

    def __init__(self, name: str):
        from triton.backends.compiler import GPUTarget

        target = TARGETS[name]
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        self._device = _FIRST_DEVICE + list(TARGETS).index(name)
        self.name = name
        self.launches: list[Launch] = []
        self.utils = _Utils(target)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def launcher_cls(self, src, metadata):
        # A compiled kernel keeps its launcher for good, so the driver is looked up at each launch.
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
            from triton.runtime import driver

            driver.active._record(src, metadata, (x, y, z), values)

        return launch

    def _record(self, src, metadata, grid: tuple[int, int, int], values: tuple) -> None:
        kernels = src.fn.device_caches[self._device][0].values()
        compiled = next(kernel for kernel in kernels if kernel.hash == metadata.hash)
        named = zip(src.fn.arg_names, values, strict=True)
        arguments = {name: value for name, value in named if not hasattr(value, "data_ptr")}
        self.launches.append(Launch(metadata.name, grid, metadata.num_warps, self.name, arguments, compiled))


@contextlib.contextmanager
def lowering(target: str) -> Iterator[list[Launch]]:
    """Inside the block, Triton compiles every launch on CPU tensors for `target`, runs none, and records it.

    Yields the list that each launch is appended to. Results hold uninitialised memory. The block is the process's, not
    the thread's, as Triton's driver is. What was compiled stays with Triton, in memory and in its disk cache.

    Args:
        target: "cuda:80", "cuda:90", "cuda:100" or "hip:gfx942".

    Raises:
        ValueError: unknown target. RuntimeError: TRITON_INTERPRET=1, where nothing is compiled.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 makes Triton interpret kernels instead of compiling them; unset it")
    from triton.runtime import driver

    from . import launch

    ours = _Driver(target)
    before = driver._active, launch.target
    driver.set_active(ours)
    launch.target = 2 + list(TARGETS).index(target)  # a launch keeps its compiled kernels by this number
    checked.calls.clear()  # calls on CPU tensors came to another backend before, and will again
    try:
        yield ours.launches
    finally:
        checked.calls.clear()
        launch.target = before[1]
        driver._active = before[0]  # reset_active() looks for a GPU, and raises where there is none
