"""Interleaved timing: every candidate runs once a round, so that a busy neighbour hits all of them.

Medians are taken over the rounds, and ratios round by round. benchmarks/ and experiments/ time with the same code.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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


def wall_time(call: Call) -> dict[str, float]:
    """{"time": seconds until the call returns}."""
    with call.setting():
        if call.before is not None:
            call.before()
        start = time.perf_counter()
        call.run()
        return {"time": time.perf_counter() - start}


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    clock: Callable[[Call], dict[str, float]] = wall_time,
    warmup: int = 3,
    seconds: float = 0.0,
) -> dict[str, dict[str, list[float]]]:
    """Samples by call and kind of time: `rounds` of each, and of short calls for `seconds`, up to 10 times as many.

    The order is drawn anew each round: a call finds in the cache what the one before left there, and in a fixed order
    that made the same kernel 0.7 or 1.2 times as fast as its neighbour.
    """
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
