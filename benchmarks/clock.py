"""How one call is timed, and what it launches, allocates and keeps.

On the CPU its time is what passes until it returns; on CUDA devices what the device needs, and host time apart. Many
calls are timed in turn by drsn_kernels.demo.timing.
"""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from drsn_kernels.backends import cpu_memory
from drsn_kernels.demo.timing import Call, saved_bytes, wall_time

FLUSH_BYTES = 256 << 20  # several times any L2
SLEEP = 1_000_000  # cycles of torch.cuda._sleep by which its speed is measured
TRIES = 6  # each with twice the head start of the one before


class WallClock:
    """Seconds until the call returns."""

    main = "time"

    def __call__(self, call: Call) -> dict[str, float]:
        return wall_time(call)

    def way(self, call: Call) -> str:
        return "wall"

    def replay(self, call: Call) -> None:
        return None

    def slowed(self, call: Call, factor: float) -> Call:
        """The same call made `factor` times as long by waiting: a deliberate regression, to try the gate with."""

        def run():
            start = time.perf_counter()
            result = call.run()
            end = start + factor * (time.perf_counter() - start)
            while time.perf_counter() < end:
                pass
            return result

        return replace(call, run=run)


class CudaClock:
    """Seconds of the device, "gpu", with the L2 cache overwritten before; and of the host, "host".

    GPU time is the replay of a CUDA graph; of a call that cannot be captured, or has something untimed before it, the
    call itself. Either runs behind a head start: the device sleeps until the host has launched all of it, so that no
    time of the host is between the two events. Host time is what passes until the call returns, on an idle device.
    """

    main = "gpu"

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.replays: dict[Call, Call | None] = {}
        start, stop = _events()
        torch.cuda._sleep(SLEEP)  # loads the kernel, and is the head start of the second
        start.record()
        torch.cuda._sleep(SLEEP)
        stop.record()
        stop.synchronize()
        self.cycles_per_second = SLEEP / (start.elapsed_time(stop) * 1e-3)

    def __call__(self, call: Call) -> dict[str, float]:
        host = self._host(call)
        replay = self.replay(call)
        gpu = self._gpu(call, host) if replay is None else self._gpu(replay, self._host(replay))
        return {"gpu": gpu, "host": host}

    def graph(self, call: Call) -> dict[str, float]:
        """GPU time alone, of a call that there is a graph of."""
        replay = self.replay(call)
        return {"gpu": self._gpu(replay, self._host(replay))}

    def way(self, call: Call) -> str:
        """How GPU time is taken: "graph" or "events"."""
        return "events" if self.replay(call) is None else "graph"

    def replay(self, call: Call) -> Call | None:
        """The call as the replay of its CUDA graph, with what the replay writes; None where there is no graph of it."""
        if call not in self.replays:
            self.replays[call] = None if call.before is not None else _captured(call)
        return self.replays[call]

    def slowed(self, call: Call, factor: float) -> Call:
        """The same call made `factor` times as long by the device's sleep: a deliberate regression."""
        seconds = statistics.median(self(call)["gpu"] for _ in range(5))
        cycles = int((factor - 1) * seconds * self.cycles_per_second)

        def run():
            result = call.run()
            torch.cuda._sleep(cycles)
            return result

        return replace(call, run=run)

    def _host(self, call: Call) -> float:
        with call.setting():
            if call.before is not None:
                call.before()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call.run()
            return time.perf_counter() - begin

    def _gpu(self, call: Call, host: float) -> float:
        """Seconds between two events around the call, both recorded before the device wakes in front of the first.

        Raises:
            RuntimeError: the device woke first each time, so that the events would hold host time.
        """
        head_start = host
        for _ in range(TRIES):
            head_start *= 2
            start, stop = _events()
            with call.setting():
                if call.before is not None:
                    call.before()
                self.flush.zero_()
                torch.cuda._sleep(int(head_start * self.cycles_per_second))
                start.record()
                call.run()
                stop.record()
                asleep = not start.query()
            stop.synchronize()
            if asleep:
                return start.elapsed_time(stop) * 1e-3
        raise RuntimeError(
            f"no GPU time: a call that returns in {host:.2g} s on an idle device did not within a head start of "
            f"{head_start:.2g} s, so it waits for the device or fills its queue"
        )


def _events() -> tuple["torch.cuda.Event", "torch.cuda.Event"]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _captured(call: Call) -> Call | None:
    """The call as the replay of a CUDA graph; None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with call.setting():
        with torch.cuda.stream(side):
            call.run()
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                outputs = call.run()
        except RuntimeError:
            torch.cuda.synchronize()
            return None

    def run():
        graph.replay()
        return outputs

    return Call(run)


def clock_for(device: str) -> WallClock | CudaClock:
    return CudaClock() if device == "cuda" else WallClock()


# ---- what a call launches, allocates and keeps: one profiled call, after the timing --------------------------------


def counts(call: Call, device: str) -> dict[str, int]:
    """{"launches", "peak_bytes", "saved_bytes"} of one call."""
    saved = saved_bytes(call)
    launches, peak = _launches_and_peak(call, device)
    return {"launches": launches, "peak_bytes": peak, "saved_bytes": saved}


@contextlib.contextmanager
def _no_arena() -> Iterator[None]:
    """What the cpu backend allocates comes from torch's allocator too, which the profiler sees."""
    kept = cpu_memory._OUTPUT_BYTES, cpu_memory._INNER_BYTES
    cpu_memory._OUTPUT_BYTES = cpu_memory._INNER_BYTES = sys.maxsize
    try:
        yield
    finally:
        cpu_memory._OUTPUT_BYTES, cpu_memory._INNER_BYTES = kept


def _launches_and_peak(call: Call, device: str) -> tuple[int, int]:
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
