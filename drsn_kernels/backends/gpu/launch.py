"""Launching: what a call of a kernel needs besides its pointers, worked out once and kept.

A training step of a small network is bound by the host. Triton's own launch binds and specialises every argument
anew, 8 to 17 us more than calling the compiled kernel (benchmarks/launches.py). Calling it is right as long as all that
Triton would specialise on is the same, so a `Prepared` call is kept for each geometry, layout, dtype and device (its
integers follow from them), and within it a compiled kernel for each set of pointers given and aligned.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..backends.triton import interpreting
from ..planes import Geometry, words
from .plans import TilePlan, tiles
from .walk import Walk, walk

# A sum across lanes must leave the same bits in each of them, for all of them store it (docs/triton.md, "racecheck").
# Contracted, the first step is fma(a, b, the other lane's product): it rounds one product and not the other.
_NO_CONTRACTION = {"enable_fp_fusion": False}

SMS_ASSUMED = 132  # planned for where there is no GPU to ask: the interpreter, a compilation ahead of time
target = 1  # what compiled kernels are kept for; another number while lowering.py compiles for another GPU


def kernel(pointers: int, aligned: tuple[str, ...] = ()) -> Callable:
    """triton.jit for a kernel that takes `pointers` pointers, then integers, then constexprs.

    It is specialised on which pointers are None and on which of `aligned` are multiples of 16 bytes, and on no integer:
    Triton would compile anew for 1 and for multiples of 16.
    """

    def decorate(fn):
        parameters = inspect.signature(fn).parameters
        names = [name for name, parameter in parameters.items() if parameter.annotation is not tl.constexpr]
        compiled = triton.jit(
            fn,
            do_not_specialize=names[pointers:],
            do_not_specialize_on_alignment=[name for name in names[:pointers] if name not in aligned],
        )
        compiled.aligned = tuple(names.index(name) for name in aligned)
        compiled.constexprs = tuple(name for name in parameters if name not in names)
        return compiled

    return decorate


class Prepared:
    """A launch but for its pointers."""

    def __init__(self, fn: Any, programs: int, integers: tuple, constants: dict[str, Any], plan: Any = None):
        """plan: what programs and constants were worked out from (plans.py)."""
        self.plan = plan
        self.fn, self.grid, self.integers = fn, (programs, 1, 1), integers
        self.constants = constants | _NO_CONTRACTION
        self.tail = tuple(constants[name] for name in fn.constexprs)
        self.compiled: dict[int, Callable] = {}

    def __call__(self, device: torch.device, *pointers: torch.Tensor | None) -> None:
        # Triton takes the current device's stream; the context costs 3 us, so only where it is another device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(pointers)
        return self._launch(pointers)

    def _launch(self, pointers: tuple[torch.Tensor | None, ...]) -> None:
        key = target
        for p in pointers:
            key = 2 * key + (p is None)
        for i in self.fn.aligned:
            p = pointers[i]
            key = 2 * key + (p is not None and p.data_ptr() % 16 == 0)
        run = self.compiled.get(key)
        if run is not None:
            run(*pointers, *self.integers, *self.tail)
            return
        constants = self.constants
        if (
            "maxnreg" in constants
            and not interpreting()
            and triton.runtime.driver.active.get_current_target().backend != "cuda"
        ):
            constants = {name: value for name, value in constants.items() if name != "maxnreg"}
        compiled = self.fn[self.grid](*pointers, *self.integers, **constants)
        if compiled is not None:  # None: interpreted
            self.compiled[key] = compiled[self.grid]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return SMS_ASSUMED
    return torch.cuda.get_device_properties(device).multi_processor_count


class Tiled:
    """The walk and plan of a launch over tiles, and the arguments that all such kernels take."""

    def __init__(self, on: Walk, plan: TilePlan, geo: Geometry, dtype: torch.dtype):
        self.walk, self.plan = on, plan
        self.length = on.p if on.channels_last else on.q  # L
        self.sizes = (
            plane_units(geo, on), self.length, on.n, on.p, on.q // on.align, plan.splits, plan.piece, on.units,
            on.p_sizes, on.q_sizes, *(strides for strides, _ in on.operands),
        )  # fmt: skip
        self.constants: dict[str, Any] = {
            "R": plan.rows, "B": plan.columns, "LOOP": plan.loop, "num_warps": plan.warps, **common(on, dtype),
        }  # fmt: skip

    def prepare(self, fn: Any, integers: tuple = (), **constants: Any) -> Prepared:
        """`integers` come after the sizes."""
        return Prepared(fn, self.plan.programs, self.sizes + integers, self.constants | constants, self.plan)


def common(on: Walk, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "UNIT_BITS": on.unit_bits, "ALIGN": on.align, "CHANNELS_LAST": on.channels_last, "WIDE": on.wide,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def tiled(geo: Geometry, strides: tuple, dtype: torch.dtype, device: torch.device, split: bool) -> Tiled:
    on = walk(geo, *strides)
    return Tiled(on, tiles(on, dtype.itemsize, multiprocessors(device), split), geo, dtype)


def plane_units(geo: Geometry, on: Walk) -> int:
    """Units in a plane: how far one plane is from the next."""
    return words(geo) * 32 // on.unit_bits


def units_of(planes: torch.Tensor | None, unit_bits: int) -> torch.Tensor | None:
    """Bit planes seen as their units: 32-bit words, or bytes and half words for rows of at most 8 and 16 elements."""
    if planes is None or unit_bits == 32:
        return planes
    return planes.view(torch.int8 if unit_bits == 8 else torch.int16)
