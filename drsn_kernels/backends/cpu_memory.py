"""Fresh tensors for the cpu backend, in memory that is kept when they are freed (csrc/cpu/arena.h)."""

import math
import os
import sys

import torch

from .cpu_extension import _cpu

# The numbers of the dtypes in the extension: DType in csrc/cpu/args.h, and of the planes' int32.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int32: 4}

# Sizes from which memory is kept: outputs, of rank 3 and more, and what lies between kernels, of rank 1 and 2: planes,
# sums, what is kept of a gate, gradients of its parameters. malloc may map blocks from 128 KiB on anew each time.
# Outputs of 1 MiB, (128, 16, 128) forward and backward, took 1.0 or 2.6 ms from one process to the next; kept, 1.0.
_OUTPUT_BYTES, _INNER_BYTES = 512 << 10, 128 << 10


def cache_limit() -> int:
    """Bytes of freed tensors to keep: DRSN_CACHE_MIB, or 512 MiB, at most a sixteenth of the memory."""
    given = os.environ.get("DRSN_CACHE_MIB")
    if given is not None:
        if not given.isdecimal():
            raise ValueError(f"the environment variable DRSN_CACHE_MIB takes a whole number of MiB, got {given!r}")
        return min(int(given) << 20, sys.maxsize)
    if _cpu is None:
        return 0
    return min(512 << 20, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16)


CACHE_BYTES = cache_limit()
if _cpu is not None:
    _cpu.set_cache_limit(CACHE_BYTES)


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    kept_from = _INNER_BYTES if len(shape) <= 2 else _OUTPUT_BYTES
    if kept_from <= math.prod(shape) * dtype.itemsize <= CACHE_BYTES:
        return torch.from_dlpack(_cpu.empty(DTYPES[dtype], shape, strides))
    # 0.8 us for its arguments; torch.empty takes 1.3 us, 2.1 us with a torch.Size
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def empty_cache() -> None:
    """Give the memory of freed outputs back to the system (the environment variable DRSN_CACHE_MIB limits it)."""
    _cpu.set_cache_limit(0)
    _cpu.set_cache_limit(CACHE_BYTES)
