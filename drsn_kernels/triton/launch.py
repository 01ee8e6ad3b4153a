"""Launching: the device, its multiprocessors, and what a plan turns into as kernel arguments."""

import functools
from typing import Any

import torch
import triton.language as tl

from ..planes import Geometry
from .plans import TilePlan, tiles
from .walk import Walk, walk

SMS_ASSUMED = 132  # planned for where there is no GPU to ask: the interpreter, a compilation ahead of time


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return SMS_ASSUMED
    return torch.cuda.get_device_properties(device).multi_processor_count


class Tiled:
    """A launch over tiles, ready but for its pointers: grid, walk, plan, and the arguments every kernel takes."""

    def __init__(self, on: Walk, plan: TilePlan, dtype: torch.dtype):
        self.walk, self.plan = on, plan
        self.grid = (plan.programs, 1, 1)
        self.length = on.p if on.channels_last else on.q  # L
        self.sizes = (on.n, on.p, on.q // on.align, plan.splits, plan.piece, on.units, on.p_sizes, on.q_sizes)
        self.constants: dict[str, Any] = {
            "R": plan.rows, "B": plan.columns, "LOOP": plan.loop, "UNIT_BITS": on.unit_bits, "ALIGN": on.align,
            "CHANNELS_LAST": on.channels_last, "WIDE": on.wide,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32, "num_warps": plan.warps,
        }  # fmt: skip


@functools.lru_cache(maxsize=4096)
def tiled(geo: Geometry, strides: tuple, dtype: torch.dtype, device: torch.device, split: bool) -> Tiled:
    """The launch for operands of these strides; kept, because working it out takes tens of microseconds."""
    on = walk(geo, *strides)
    return Tiled(on, tiles(on, dtype.itemsize, multiprocessors(device), split), dtype)


def on_device(device: torch.device, run, *args, **kwargs):
    """run(...) with `device` current: Triton takes the current device's stream. 3 us, so only where it is not yet."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return run(*args, **kwargs)
    with torch.cuda.device(device):
        return run(*args, **kwargs)


# Integers that no kernel is specialised on: Triton would compile anew for 1 and for multiples of 16.
SIZES = ["N", "P", "QA", "splits", "length", "UNITS", "p_sizes", "q_sizes"]


def units_of(planes: torch.Tensor, unit_bits: int) -> torch.Tensor:
    """A bit plane seen as its units: 32-bit words, or bytes and half words for rows of at most 8 and 16 elements."""
    return planes if unit_bits == 32 else planes.view(torch.int8 if unit_bits == 8 else torch.int16)
