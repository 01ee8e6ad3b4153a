"""Launching: what a launch needs besides its pointers, worked out once and kept.

A training step of a small network is bound by the host. Triton's own launch binds and specialises every argument
anew, 8 to 17 us more than calling the compiled kernel (benchmarks/launches.py). Calling it is right as long as all that
Triton would specialise on is the same, so a `Prepared` launch is kept for each layout, dtype and device (its integers
follow from them), and within it a compiled kernel for each set of pointers given and aligned.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..step import Cost
from . import interpreting
from .plans import OnePassPlan, Planned, TilePlan, group
from .walk import Walk

# A sum across lanes must leave the same bits in each of them, for all of them store it (docs/triton.md, "racecheck").
# Contracted, the first step is fma(a, b, the other lane's product): it rounds one product and not the other.
_NO_CONTRACTION = {"enable_fp_fusion": False}

SMS_ASSUMED = 132  # planned for where there is no GPU to ask: the interpreter, a compilation ahead of time
target = 1  # what compiled kernels are kept for; another number while lowering.py compiles for another GPU


def kernel(pointers: int, aligned: tuple[str, ...] = ()) -> Callable:
    """triton.jit for a kernel that takes `pointers` pointers, then integers, then constexprs.

    It is specialised on which pointers are None and on which of `aligned` are multiples of 16 bytes, and on no integer:
    Triton would compile anew for 1 and for multiples of 16. Three of its constexprs are known at a launch only: PTX,
    PRECISION, which is "ieee" without it, and GROUP, which is 1 where one of `aligned` is not.
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
        compiled.aligned = tuple(names.index(name) for name in aligned)
        return compiled

    return decorate


def takes_ptx() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU."""
    return not interpreting() and triton.runtime.driver.active.get_current_target().backend == "cuda"


class Prepared:
    """A launch but for its pointers. Calling it with them, by name, launches; one that is left out is None."""

    def __init__(
        self, fn: Any, device: torch.device, programs: int, values: dict[str, Any], plan: Any, cost: Cost, *,
        warps: int, registers: int | None = None, stages: int | None = None,
    ):  # fmt: skip
        """values: of all integers and constexprs that fn takes; plan: what they were worked out from (plans.py);
        stages: of a loop of products, the steps whose loads are under way together."""
        self.fn, self.grid, self.plan, self.cost = fn, (programs, 1, 1), plan, cost
        self.device_index = device.index if device.type == "cuda" else None
        self.values = {name: values[name] for name in fn.values}
        self.options = {"num_warps": warps, "maxnreg": registers, "num_stages": stages, **_NO_CONTRACTION}
        self.compiled: dict[int, tuple[Callable, tuple]] = {}

    def __call__(self, **pointers: torch.Tensor | None) -> None:
        # Triton takes the current device's stream; the context costs 3 us, so only where it is another device
        if self.device_index is not None and self.device_index != torch.cuda.current_device():
            with torch.cuda.device(self.device_index):
                return self._launch(pointers)
        return self._launch(pointers)

    def _launch(self, named: dict[str, torch.Tensor | None]) -> None:
        pointers = tuple(map(named.get, self.fn.pointers))
        key = target
        for p in pointers:
            key += key + (p is None)
        for i in self.fn.aligned:
            p = pointers[i]
            key += key + (p is not None and p.data_ptr() % 16 == 0)
        found = self.compiled.get(key)
        if found is None:
            self._first(key, named, pointers)
        else:
            run, tail = found
            run(*pointers, *tail)

    def _first(self, key: int, named: dict[str, torch.Tensor | None], pointers: tuple) -> None:
        if unknown := named.keys() - set(self.fn.pointers):
            raise TypeError(f"{self.fn.__name__} takes {', '.join(self.fn.pointers)}, not {', '.join(unknown)}")
        options = {name: value for name, value in self.options.items() if value is not None}
        known_now = {"PTX": takes_ptx()}
        if not known_now["PTX"]:
            options.pop("maxnreg", None)
            known_now["PRECISION"] = "ieee"
        if any(pointers[i] is not None and pointers[i].data_ptr() % 16 for i in self.fn.aligned):
            # a word of two elements would straddle two; the tile stays that of aligned tensors, and may spill
            known_now["GROUP"] = 1
        tail = tuple(known_now.get(name, value) for name, value in self.values.items())
        compiled = self.fn[self.grid](*pointers, *tail, **options)
        if compiled is not None:  # None: interpreted
            self.compiled[key] = compiled[self.grid], tail

    def describe(self) -> Planned:
        warps, code = self.options["num_warps"], (*self.values.items(), *self.options.items())
        return Planned(self.fn.__name__, self.grid[0], warps, self.plan, self.cost, code)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return SMS_ASSUMED
    return torch.cuda.get_device_properties(device).multi_processor_count


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


def bytes_of(planes: torch.Tensor | None) -> torch.Tensor | None:
    """Bit planes as kernels take them."""
    return None if planes is None else planes.view(torch.int8)
