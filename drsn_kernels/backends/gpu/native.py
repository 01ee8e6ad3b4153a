"""Launching by csrc/launch: all kernels of a pass by one call, in place of one of Triton's launchers for each.

Triton compiles and loads a kernel when it launches it for the first time. Kernels that are there are described to the
extension as a Sequence: functions, grids, parameters. Every kernel's parameters are compared with those of its PTX,
so where another Triton hands over others, or a kernel asks for what this does not know of, launching stays with Triton.
It does as well

* without the extension, with DRSN_LAUNCHER=0 in the environment, and where `enabled` is False;
* where there is no CUDA driver, under the interpreter, and while lowering.py compiles for another GPU;
* while one of Triton's launch hooks is set, as profilers do: the extension calls none.
"""

import functools
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any, NamedTuple

import torch

from ..._extras import unbuilt

try:
    from ... import _launch

    _MISSING: str | None = None
except ImportError as error:
    _launch = None
    _MISSING = unbuilt("_launch", error)


def _asked() -> bool:
    given = os.environ.get("DRSN_LAUNCHER", "1")
    if given not in ("0", "1"):
        raise ValueError(f"the environment variable DRSN_LAUNCHER takes 0 or 1, got {given!r}")
    return given == "1"


enabled = _asked()  # False: launches go through Triton
_learning = threading.Lock()
refused: dict[str, str] = {}  # why kernels that were launched in this process are left to Triton, by their names


class Piece(NamedTuple):
    """Part of one of a pass's tensors: seen in this dtype, from this element on."""

    base: str
    start: int
    dtype: torch.dtype

    @property
    def offset(self) -> int:
        """In bytes."""
        return self.start * self.dtype.itemsize


Source = str | Piece  # where a kernel's pointer is taken from: a tensor of the call by its name, or a piece of one


class Refused(Exception):
    """Why a kernel is left to Triton."""


def missing() -> str | None:
    """Why nothing is launched by the extension in this process; None where it launches what it can."""
    if _MISSING is not None:
        return _MISSING
    if not enabled:
        return "switched off (DRSN_LAUNCHER=0)"
    return _launch.missing() or None


def describe() -> str:
    """One line for `python -m drsn_kernels info`."""
    reason = missing()
    if reason is not None:
        return f"not available, launches go through Triton: {reason}"
    kept = "".join(f"; {names} by Triton: {why}" for names, why in refused.items())
    return f"available: one call launches a whole pass{kept}"


class Sequences:
    """Those of one pass, one for each set of pointers that are None and that lie at multiples of 16 bytes."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self._names, self._device = names, device.index or 0
        self._known: dict[tuple, Any] = {}  # by kind; None: refused
        self._run: tuple[Callable, ...] = ()
        self._stream = self._runtime = None  # Triton's: what gives the current stream, and where its hooks are

    def __call__(self, given: tuple[torch.Tensor | None, ...]) -> bool:
        """Launch with tensors of these names on the current stream of the device, which is the current one.

        False, and nothing is launched, where there is no Sequence for them.
        """
        if not self._run or not enabled:
            return False
        enter, leave = self._runtime.launch_enter_hook, self._runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a chain of functions, or one, or None
            return False
        stream = self._stream(self._device)
        for run in self._run:
            try:
                if run(stream, given):
                    return True
            except _launch.NotLaunched as error:  # its first launch ever: Triton's, then, as for what is refused
                with _learning:
                    self._run = tuple(other for other in self._run if other is not run)
                name, _, why = str(error).removeprefix("launching ").partition(": ")
                refused[name] = why
                return False
        return False

    def learn(self, given: tuple[torch.Tensor | None, ...], launched: list[tuple[Any, Any, dict[str, Source]]]) -> None:
        """Take over what launches these, in order.

        launched: a launch, the kernel that Triton compiled for it, where its pointers are taken from.
        """
        if missing() is not None:
            return
        kind = self._kind(given, launched)
        if kind in self._known:
            return
        self._known[kind] = None
        try:
            self._stream, self._runtime = _of_triton()
            kernels = [of_triton(kernel, launch.grid[0], launch.values, functools.partial(self._place, sources))
                       for launch, kernel, sources in launched]  # fmt: skip
            sequence = _launch.Sequence(self._device, kernels, list(kind))
        except Exception as error:  # whatever another Triton or driver has changed: launching stays with Triton
            names = ", ".join(dict.fromkeys(launch.name for launch, *_ in launched))
            refused[names] = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            return
        # the compiled kernels keep their functions loaded
        self._known[kind] = sequence, [kernel for _, kernel, _ in launched]
        with _learning:  # another thread may have learnt another kind
            self._run += (sequence.run,)

    def _kind(self, given: tuple[torch.Tensor | None, ...], launched: list) -> tuple:
        """Of each tensor: None, whether it lies at a multiple of 16 bytes, or "any" where no kernel was told."""
        told = set()
        for launch, _, sources in launched:
            told.update(_base(sources[name]) for name in launch.told_alignment if sources.get(name) is not None)
        return tuple(
            None if t is None else t.data_ptr() % 16 == 0 if name in told else "any"
            for name, t in zip(self._names, given, strict=True)
        )

    def _place(self, sources: dict[str, Source], pointer: str) -> tuple[int, int]:
        """Number of the tensor that a pointer is taken from, and bytes into it."""
        source = sources[pointer]
        return self._names.index(_base(source)), 0 if isinstance(source, str) else source.offset


def _base(source: Source) -> str:
    return source if isinstance(source, str) else source.base


def _of_triton() -> tuple[Callable[[int], int], Any]:
    from triton import knobs
    from triton.runtime import driver

    return driver.active.get_current_stream, knobs.runtime


# ---- a kernel that Triton compiled -----------------------------------------------------------------------------------

_FORMATS = {  # of struct: in the first bytes of 8
    "i1": "b7x", "i8": "b7x", "i16": "h6x", "i32": "i4x", "i64": "q", "u1": "B7x", "u8": "B7x", "u16": "H6x",
    "u32": "I4x", "u64": "Q", "fp32": "f4x", "f32": "f4x", "fp64": "d",
}  # fmt: skip
_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)\b[^,\[]*(\[)?")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_SCRATCH = ("global_scratch_size", "profile_scratch_size")  # a pointer each at the end, null where none is asked for


class Form(NamedTuple):
    """What is the same of all launches of a kernel. Each of its parameters takes 8 bytes."""

    threads: int
    dependent: bool
    parameters: struct.Struct  # the numbers in their places, and 0 in those of pointers
    numbers: tuple[tuple[str, tuple[int, ...]], ...]  # by name and, in tuples, place
    pointers: tuple[tuple[int, str], ...]  # number of the parameter, name


def of_triton(kernel: Any, grid: int, values: dict[str, Any], place: Callable[[str], tuple[int, int]]) -> tuple:
    """A launch of kernel as _launch.Sequence takes it. values: of its integers and floats, by name.

    Raises Refused where it is no launch that this knows how to make.
    """
    form, meta = _form(kernel), kernel.metadata
    block = form.parameters.pack(*(functools.reduce(getitem, at, values[name]) for name, at in form.numbers))
    patches = [(parameter, *place(name)) for parameter, name in form.pointers]
    return meta.name, kernel.function, grid, form.threads, meta.shared, form.dependent, block, patches


@functools.lru_cache(maxsize=4096)
def _form(kernel: Any) -> Form:
    from triton.backends.nvidia.driver import CudaLauncher

    meta, ptx = kernel.metadata, kernel.asm["ptx"]
    if not isinstance(kernel.run, CudaLauncher):
        raise Refused(f"it is launched by {type(kernel.run).__name__}, not by Triton's CudaLauncher")
    for name, usual in (("num_ctas", 1), ("launch_cooperative_grid", False)):
        if getattr(meta, name, usual) != usual:
            raise Refused(f"{name} is {getattr(meta, name)}")
    formats, bits, numbers, pointers = [], [], [], []
    for name, at, kind in _parameters(kernel.src.signature):
        if kind[0] == "*":
            pointers.append((len(formats), name))
            formats.append("8x")
            bits.append(64)
        elif kind in _FORMATS:
            numbers.append((name, at))
            formats.append(_FORMATS[kind])
            bits.append(8 if kind[1:] == "1" else int(re.sub(r"\D", "", kind)))
        else:
            raise Refused(f"{name} is of the type {kind}")
    for name in _SCRATCH:
        if hasattr(meta, name):
            if getattr(meta, name):
                raise Refused(f"it asks for scratch memory ({name})")
            formats.append("8x")
            bits.append(64)
    found = [(int(size), array) for size, array in _PARAMETER.findall(_ENTRY.search(ptx).group(1))]
    if found != [(size, "") for size in bits]:
        raise Refused(f"parameters of {bits} bits would be handed over, the PTX has {[size for size, _ in found]}")
    threads = meta.num_warps * meta.target.warp_size
    if (said := _THREADS.search(ptx)) and int(said.group(1)) != threads:
        raise Refused(f"{threads} threads would be launched, the PTX asks for {said.group(1)}")
    dependent = bool(getattr(meta, "launch_pdl", False))
    return Form(threads, dependent, struct.Struct("<" + "".join(formats)), tuple(numbers), tuple(pointers))


def _parameters(signature: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, place in tuples and type of every parameter; constexprs, None among them, are none."""

    def flat(name: str, at: tuple[int, ...], kind: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
        if isinstance(kind, tuple):
            for i, member in enumerate(kind):
                yield from flat(name, (*at, i), member)
        elif kind != "constexpr":
            yield name, at, kind

    for name, kind in signature.items():
        yield from flat(name, (), kind)
