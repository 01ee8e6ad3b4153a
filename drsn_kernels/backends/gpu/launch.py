"""Launching: what a launch needs besides its pointers, worked out once and kept.

A training step of a small network is bound by the host. Triton's own launch binds and specialises every argument
anew, 8 to 17 us more than calling the compiled kernel (benchmarks/launcher.py). Calling it is right as long as all that
Triton would specialise on is the same, so a `Prepared` launch is kept for each layout, dtype and device (its integers
follow from them), and within it a compiled kernel for each set of pointers given and aligned. A `Pass` is several of
them in order, which after its first call native.py launches by one call.
"""

import copy
import functools
import inspect
import math
import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..step import Cost
from . import interpreting, native, tuned
from .native import Piece, Source
from .plans import OnePassPlan, Planned, TilePlan, cdiv, group, up_to
from .walk import Walk

# A sum across lanes must leave the same bits in each of them, for all of them store it (docs/inside/gpu.md).
# Contracted, the first step is fma(a, b, the other lane's product): it rounds one product and not the other.
_NO_CONTRACTION = {"enable_fp_fusion": False}

SMS_ASSUMED = 132  # planned for where there is no GPU to ask: the interpreter, a compilation ahead of time
target = 1  # what compiled kernels are kept for; another number while lowering.py compiles for another GPU


def kernel(pointers: int, aligned: tuple[str, ...] = ()) -> Callable:
    """triton.jit for a kernel that takes `pointers` pointers, then numbers and tuples of them, then constexprs.

    It is specialised on which pointers are None and on which of `aligned` are multiples of 16 bytes, and on no number:
    Triton would compile anew for 1 and for multiples of 16. Five of its constexprs are known at a launch only: PTX;
    PRECISION and HELD, which are "ieee" and 0 without it; DEPENDENT, for await_previous, which a kernel calls once; and
    GROUP, which is 1 where one of `aligned` is not.
    """

    def decorate(fn):
        parameters = inspect.signature(fn).parameters
        names = [name for name, parameter in parameters.items() if parameter.annotation is not tl.constexpr]
        compiled = triton.jit(
            fn,
            do_not_specialize=names[pointers:],
            do_not_specialize_on_alignment=[name for name in names[:pointers] if name not in aligned],
        )
        compiled.pointers = tuple(names[:pointers])
        compiled.values = (*names[pointers:], *(name for name in parameters if name not in names))
        compiled.numbers = len(names) - pointers  # so many of the values are no constexprs
        compiled.aligned = tuple(names.index(name) for name in aligned)
        return compiled

    return decorate


@triton.jit
def await_previous(DEPENDENT: tl.constexpr):
    """Where launches of a pass overlap: wait for the end of the one before, and let the one behind begin.

    DEPENDENT is odd where there is one before it: this launch begins while that one still runs. Half of it is how many
    programs it may have to let the one behind begin before it has ended: as soon as all of them have come by here.

    Before it nothing may be written, and only that be read which launches in front of the one before have written: each
    of them waits before it lets the next one begin, so they have ended. (await_counted is the exception.) The first of
    a pass begins when everything in front of it has ended. Where the gate stands between, map reads its tile of x
    before tau is there (EARLY), past the L1, which may hold older lines.
    """
    if DEPENDENT % 2 == 1:
        tl.extra.cuda.gdc_wait()
    if DEPENDENT > 1:
        if tl.num_programs(0) <= DEPENDENT // 2:
            tl.extra.cuda.gdc_launch_dependents()


# A launch may need but a part of what the one before it makes. Then programs that make that part count themselves in,
# and it begins beside the others (linear_grad.py and grad). It does not wait for ever: all programs of the one before
# are under way when it begins, or have ended, for each lets it begin by await_previous or by its end.


@triton.jit
def count_in(counter, DEPENDENT: tl.constexpr):
    """What this program has stored is there for who comes after await_counted."""
    if counter is not None and DEPENDENT > 0:
        tl.debug_barrier()  # all threads have stored
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def await_counted(counter, count, DEPENDENT: tl.constexpr):
    """In the place of await_previous: wait until so many programs of the launch before have counted themselves in.

    In front of it only that may be read which launches in front of the one before have written, past the L1. Behind it
    that may be written which the launch before neither reads nor writes. end_with_previous comes at the end.
    """
    if counter is not None and DEPENDENT > 0:
        tl.inline_asm_elementwise(
            """{
                .reg .pred %missing;
                again:
                ld.acquire.gpu.global.b32 $0, [$1];
                setp.lt.s32 %missing, $0, $2;
                @%missing nanosleep.u32 100;
                @%missing bra again;
            }""",
            "=&r,l,r", [counter.to(tl.int64), count], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def end_with_previous(counter, DEPENDENT: tl.constexpr):
    """The end of a launch that has awaited a part of the one before: it ends no earlier, so that who waits for this one
    has waited for both.

    One program waits. Others would stay on their multiprocessors, and keep those away that have not begun.
    """
    if counter is not None and DEPENDENT > 0:
        if tl.program_id(0) == 0:
            tl.extra.cuda.gdc_wait()


def capability() -> int:
    """Of the NVIDIA GPU that kernels are compiled for, 90 for 9.0; 0 for another GPU and where they are interpreted."""
    if interpreting():
        return 0
    compiled_for = triton.runtime.driver.active.get_current_target()
    return compiled_for.arch if compiled_for.backend == "cuda" else 0


# Kernels by all that Triton compiles for: a new shape finds those of another one, and is not bound by Triton first.
_compiled: dict[tuple, Any] = {}


def _widths(numbers: tuple) -> tuple:
    """Of integers and floats, all that Triton looks at: whether they need 64 bits."""
    return tuple(
        _widths(number) if type(number) is tuple else type(number) is int and not -(2**31) <= number < 2**31
        for number in numbers
    )


class Prepared:
    """A launch but for its pointers. Calling it with them, by name, launches; one that is left out is None."""

    def __init__(
        self, fn: Any, device: torch.device, programs: int, values: dict[str, Any], plan: Any, cost: Cost, *,
        warps: int, registers: int | None = None, stages: int | None = None, spread: bool = False,
    ):  # fmt: skip
        """values: of all integers and constexprs that fn takes but DEPENDENT; plan: what they were worked out from
        (plans.py); stages: of a loop of products, the steps whose loads are under way together; spread: its programs
        are few and want a multiprocessor each."""
        self.fn, self.name, self.pointers, self.grid = fn, fn.__name__, fn.pointers, (programs, 1, 1)
        self.device, self.plan, self.cost, self.spread = device, plan, cost, spread
        values = values | {"DEPENDENT": 0}
        self.values = {name: values[name] for name in fn.values}
        self.told_alignment = tuple(fn.pointers[i] for i in fn.aligned)
        self.options = {"num_warps": warps, "maxnreg": registers, "num_stages": stages, **_NO_CONTRACTION}
        self.compiled: dict[int, tuple[Any, Callable, tuple]] = {}

    @functools.cached_property
    def _alone(self) -> "Pass":
        return Pass(self.pointers, [(self, {name: name for name in self.pointers})], self.device)

    def __call__(self, **pointers: torch.Tensor | None) -> None:
        if not pointers.keys() <= self._alone.takes:
            unknown = ", ".join(pointers.keys() - self._alone.takes)
            raise TypeError(f"{self.name} takes {', '.join(self.pointers)}, not {unknown}")
        self._alone(tuple(map(pointers.get, self.fn.pointers)))

    def _launch(self, named: dict[str, torch.Tensor | None]) -> Any:
        """Launch through Triton, on the current device; the compiled kernel, or None where it is interpreted."""
        pointers = tuple(map(named.get, self.fn.pointers))
        key = self._key(pointers)
        found = self._found(key, pointers)
        if found is None:
            return self._first(key, pointers)
        kernel, run, tail = found
        run(*pointers, *tail)
        return kernel

    def known(self, named: dict[str, torch.Tensor | None]) -> Any:
        """The compiled kernel for these pointers, if there is one."""
        pointers = tuple(map(named.get, self.fn.pointers))
        found = self._found(self._key(pointers), pointers)
        return None if found is None else found[0]

    def _key(self, pointers: tuple) -> int:
        """For which target, which pointers are None and which aligned."""
        key = target
        for p in pointers:
            key += key + (p is None)
        for i in self.fn.aligned:
            p = pointers[i]
            key += key + (p is not None and p.data_ptr() % 16 == 0)
        return key

    def _found(self, key: int, pointers: tuple) -> tuple[Any, Callable, tuple] | None:
        """The compiled kernel, what launches it, and all that it takes behind the pointers."""
        found = self.compiled.get(key)
        if found is None and _compiled:
            tail, options = self._specialised(pointers)
            kernel = _compiled.get(self._like(key, pointers, tail, options))
            if kernel is not None:
                found = self.compiled[key] = kernel, kernel[self.grid], tail
        return found

    def _first(self, key: int, pointers: tuple) -> Any:
        tail, options = self._specialised(pointers)
        kernel = self.fn[self.grid](*pointers, *tail, **options)
        if kernel is not None:  # None: interpreted
            _compiled[self._like(key, pointers, tail, options)] = kernel
        return kernel

    def _specialised(self, pointers: tuple) -> tuple[tuple, dict[str, Any]]:
        """Values and options, with what is known at a launch only."""
        options = {name: value for name, value in self.options.items() if value is not None}
        compiled_for = capability()
        known_now = {"PTX": compiled_for > 0}
        if not known_now["PTX"]:
            options.pop("maxnreg", None)
            known_now["PRECISION"], known_now["HELD"] = "ieee", 0
        if self.values["DEPENDENT"] and compiled_for >= 90:
            options["launch_pdl"] = self.values["DEPENDENT"] % 2 == 1
        else:
            known_now["DEPENDENT"] = 0
        if any(pointers[i] is not None and pointers[i].data_ptr() % 16 for i in self.fn.aligned):
            # a word of two elements would straddle two; the tile stays that of aligned tensors, and may spill
            known_now["GROUP"] = 1
        return tuple(known_now.get(name, value) for name, value in self.values.items()), options

    def _like(self, key: int, pointers: tuple, tail: tuple, options: dict[str, Any]) -> tuple:
        """All that Triton compiles for. The function's number is its own for good: its kernels keep it."""
        numbers, constants = tail[: self.fn.numbers], tail[self.fn.numbers :]
        return (
            id(self.fn), key, self.device, tuple(None if p is None else p.dtype for p in pointers), _widths(numbers),
            constants, (*map(type, constants),), (*options.items(),),
        )  # fmt: skip

    def placed(self, follows: bool, ahead: "Prepared | None") -> "Prepared":
        """The same launch in a pass: behind another one, in front of `ahead`."""
        if not tuned.DEPENDENT or not (follows or ahead):
            return self
        # behind the last one nothing begins early; it says so all the same: no other kernel for where it is not last
        most = multiprocessors(self.device) // 2 if ahead is not None and ahead.spread else tuned.LETTING
        other = copy.copy(self)
        other.values, other.compiled = self.values | {"DEPENDENT": follows + 2 * most}, {}
        return other

    def describe(self) -> Planned:
        warps, code = self.options["num_warps"], (*self.values.items(), *self.options.items())
        return Planned(self.name, self.grid[0], warps, self.plan, self.cost, code)


Wired = list[tuple[Prepared, dict[str, Source | None]]]  # launches, each with where its pointers are taken from


class Pass:
    """Launches in order, called with the tensors that all of their pointers are taken from: arguments, workspaces.

    Between launches nothing comes back to the host: native.Sequences makes them by one call where it can.
    """

    def __init__(self, names: tuple[str, ...], launches: Wired, device: torch.device):
        """names: of the tensors, as the call has them."""
        for launch, sources in launches:
            if unknown := sources.keys() - set(launch.pointers):
                raise TypeError(f"{launch.name} takes {', '.join(launch.pointers)}, not {', '.join(unknown)}")
        behind = [launch for launch, _ in launches[1:]]
        self.launches = [
            (launch.placed(k > 0, ahead), sources)
            for k, ((launch, sources), ahead) in enumerate(zip(launches, [*behind, None], strict=True))
        ]
        self.names, self.takes = names, frozenset(names)
        self._device_index = device.index if device.type == "cuda" else None
        self._native = native.Sequences(names, device)

    @property
    def prepared(self) -> tuple[Prepared, ...]:
        return tuple(launch for launch, _ in self.launches)

    def __call__(self, given: tuple[torch.Tensor | None, ...]) -> None:
        # launches go to the current device's stream; the context costs 3 us, so only where it is another device
        if self._device_index is not None and self._device_index != torch.cuda.current_device():
            with torch.cuda.device(self._device_index):
                return self._run(given)
        return self._run(given)

    def _run(self, given: tuple[torch.Tensor | None, ...]) -> None:
        if target == 1 and self._native(given):
            return
        named: dict[Source, torch.Tensor | None] = dict(zip(self.names, given, strict=True))  # and pieces of them
        pointers = [
            {name: _taken(pointer, named) for name, pointer in sources.items()} for _, sources in self.launches
        ]
        if target == 1 and native.missing() is None:
            known = [launch.known(own) for (launch, _), own in zip(self.launches, pointers, strict=True)]
            if self._learn(given, known) and self._native(given):
                return
        kernels = [launch._launch(own) for (launch, _), own in zip(self.launches, pointers, strict=True)]
        if target == 1:
            self._learn(given, kernels)

    def _learn(self, given: tuple[torch.Tensor | None, ...], kernels: list[Any]) -> bool:
        """Whether the kernels of all launches are known, for which native then has a Sequence if it can."""
        if None in kernels:
            return False
        launched = [(launch, kernel, own) for (launch, own), kernel in zip(self.launches, kernels, strict=True)]
        self._native.learn(given, launched)
        return True


def _taken(source: Source | None, named: dict[Source, torch.Tensor | None]) -> torch.Tensor | None:
    """The tensor for a kernel's pointer, for Triton, which goes by its dtype: bit planes are bytes."""
    if source is None:
        return None
    if isinstance(source, Piece) and source not in named:
        base = named[source.base]
        named[source] = (base if base.dtype == source.dtype else base.view(source.dtype))[source.start :]
    found = named[source]
    return found.view(torch.int8) if source == "planes" and found is not None else found


def same(*names: str) -> dict[str, Source]:
    """Pointers that are tensors of the pass, by the same names."""
    return {name: name for name in names}


class Room:
    """Lays out one allocation of elements of a dtype: pieces from multiples of 16 bytes on, as kernels were told."""

    def __init__(self, base: str, dtype: torch.dtype):
        """base: what the pass calls the tensor."""
        self.base, self.dtype, self.elements = base, dtype, 0

    def take(self, elements: int) -> Piece:
        start = up_to(self.elements, 16 // self.dtype.itemsize)
        self.elements = start + elements
        return Piece(self.base, start, self.dtype)

    def take_as(self, dtype: torch.dtype, elements: int) -> Piece:
        start = self.take(cdiv(elements * dtype.itemsize, self.dtype.itemsize)).offset
        return Piece(self.base, start // dtype.itemsize, dtype)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def new(self, like: torch.Tensor) -> torch.Tensor | None:
        """The allocation, for the dtype and on the device of a tensor; None where nothing was laid out."""
        return like.new_empty(self.elements) if self.elements else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return SMS_ASSUMED
    return torch.cuda.get_device_properties(device).multi_processor_count


def moving(factor: float | None) -> dict[str, float]:
    """The batch's part in the running statistics, if there are any, as two numbers that float32 holds. At run time:
    a schedule of it compiles nothing."""
    by = 0.0 if factor is None else factor
    (near,) = struct.unpack("f", struct.pack("f", by))
    return {"factor": near, "rest": by - near}


def tile_values(on: Walk, plan: TilePlan | OnePassPlan, dtype: torch.dtype, operands: str) -> dict[str, Any]:
    """What every kernel takes that walks a tensor. `operands`: a letter for each of the walk's, as in xs and X_UNIT."""
    values = {
        "plane_bytes": on.plane_bytes, "L": on.length, "scale": 1 / on.length if on.length else math.inf,
        "N": on.n, "P": on.p, "QA": on.q // on.align, "row_bytes": on.row_bytes, "row_sizes": on.row_sizes,
        "q_sizes": on.q_sizes, "B": plan.columns, "LOOP": plan.loop,
        "ALIGN": on.align, "CHANNELS_LAST": on.channels_last, "WIDE": on.wide,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32, "GROUP": group(on, dtype.itemsize), "PTX": None,
    }  # fmt: skip
    for letter, operand in zip(operands, on.operands, strict=True):
        values |= {f"{letter}s": operand.strides, f"{letter.upper()}_UNIT": operand.unit}
    return values
