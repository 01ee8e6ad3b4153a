"""Interleaved timing: every candidate runs once a round, so that a busy neighbour hits all of them.

Medians are taken over the rounds, and ratios round by round. A clock says how one call is timed: on the CPU by what
passes until it returns, on CUDA devices by what the device needs, and host time apart.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

FLUSH_BYTES = 256 << 20  # several times any L2
SLEEP = 1_000_000  # cycles of torch.cuda._sleep by which its speed is measured
TRIES = 6  # each with twice the head start of the one before


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
