"""What a call launches, allocates and keeps: one profiled call, after the timing."""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from ..backends import cpu_memory
from .measure import Call


def saved_bytes(call: Call) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, the parameters' left out."""
    known = {p.untyped_storage().data_ptr() for p in call.parameters}
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call.once()
    return sum(sizes.values())


@contextlib.contextmanager
def _no_arena() -> Iterator[None]:
    """What the cpu backend allocates comes from torch's allocator too, which the profiler sees."""
    kept = cpu_memory._OUTPUT_BYTES, cpu_memory._INNER_BYTES
    cpu_memory._OUTPUT_BYTES = cpu_memory._INNER_BYTES = sys.maxsize
    try:
        yield
    finally:
        cpu_memory._OUTPUT_BYTES, cpu_memory._INNER_BYTES = kept


def launches_and_peak(call: Call, device: str) -> tuple[int, int]:
    """CUDA: kernels launched. CPU: aten operators the profiler saw, nested ones too; it does not see C++ kernels
    called by pointer. And the most bytes that were allocated at once by the call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports each start and stop otherwise
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with call.setting(), _no_arena():
        if call.before is not None:
            call.before()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with profile(activities=activities, profile_memory=device == "cpu") as record:
            outputs = call.run()
            if device == "cuda":
                torch.cuda.synchronize()
        del outputs
    if device == "cuda":
        kernels = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return len(kernels), torch.cuda.max_memory_allocated() - before
    level = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return sum(e.name.startswith("aten::") for e in record.events()), peak
