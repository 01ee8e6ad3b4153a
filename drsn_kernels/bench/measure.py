"""Interleaved timing: every candidate runs once a round, so that a busy neighbour hits all of them.

Medians are taken over the rounds, and ratios round by round. A clock says how one call is timed; there is one for the
CPU and one for CUDA devices.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

FLUSH_BYTES = 256 << 20  # several times any L2
HEAD_START = 1_000_000  # cycles that the device waits, so that launches do not wait for the host


@dataclass(frozen=True)
class Call:
    """What is timed, what runs untimed before it each time, their context (backend, threads), and the parameters."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    setting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    parameters: tuple[torch.Tensor, ...] = ()

    def once(self) -> object:
        with self.setting():
            if self.before is not None:
                self.before()
            return self.run()


class WallClock:
    """Seconds until the call returns."""

    main = "time"

    def __call__(self, call: Call) -> dict[str, float]:
        with call.setting():
            if call.before is not None:
                call.before()
            start = time.perf_counter()
            call.run()
            return {"time": time.perf_counter() - start}


class CudaClock:
    """Seconds by CUDA events: "cold" (L2 overwritten before), "warm", "graph" (a CUDA graph's replay, cold).

    "host" is the time until the call returns. A call with something untimed before it has no graph.
    """

    main = "cold"

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.graphs: dict[Call, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, call: Call) -> dict[str, float]:
        with call.setting():
            cold, host = self._events(call.run, call.before, flush=True)
            warm, _ = self._events(call.run, call.before, flush=False)
            times = {"cold": cold, "warm": warm, "host": host}
            if call not in self.graphs:
                self.graphs[call] = None if call.before is not None else _captured(call.run)
            graph = self.graphs[call]
            if graph is not None:
                times["graph"], _ = self._events(graph.replay, None, flush=True)
        return times

    def _events(self, run: Callable, before: Callable | None, flush: bool) -> tuple[float, float]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before is not None:
            before()
        if flush:
            self.flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3, host


def _captured(run: Callable) -> "torch.cuda.CUDAGraph | None":
    """The call as a CUDA graph; None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def clock_for(device: str) -> WallClock | CudaClock:
    return CudaClock() if device == "cuda" else WallClock()


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    clock: Callable[[Call], dict[str, float]] | None = None,
    warmup: int = 3,
    seconds: float = 0.0,
) -> dict[str, dict[str, list[float]]]:
    """Samples by call and kind of time: `rounds` of each, and of short calls for `seconds`, up to 10 times as many.

    The order is drawn anew each round: a call finds in the cache what the one before left there, and in a fixed order
    that made the same kernel 0.7 or 1.2 times as fast as its neighbour.
    """
    clock = clock or WallClock()
    for _ in range(warmup):
        for call in calls.values():
            clock(call)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    shuffled = random.Random(0)  # not the user's generator
    begin = time.perf_counter()
    done = 0
    while done < rounds or (done < 10 * rounds and time.perf_counter() - begin < seconds):
        for name in shuffled.sample(list(calls), len(calls)):
            for kind, value in clock(calls[name]).items():
                samples[name].setdefault(kind, []).append(value)
        done += 1
    return samples


def slowed(call: Call, factor: float) -> Call:
    """The same call made `factor` times as long by waiting: a deliberate regression, to try the gate with."""

    def run():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return result

    return replace(call, run=run)


def ratios(a: list[float], b: list[float]) -> list[float]:
    """a / b round by round: what both share of a noisy machine falls out."""
    return [x / y for x, y in zip(a, b, strict=True)]


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the round-by-round ratios a / b."""
    return statistics.median(ratios(a, b))


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def geometric_mean(values: list[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None
