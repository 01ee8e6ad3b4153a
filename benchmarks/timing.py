"""Interleaved timing: every candidate runs once a round, medians over the rounds, ratios round by round."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from drsn_kernels import info


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call. One after another in every round, so that a busy neighbour hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for step in range(warmup + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if step >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the round-by-round ratios a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def commit() -> str:
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True,
                             cwd=Path(__file__).parent)  # fmt: skip
        return run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict:
    """Machine, versions and commit, stored with every result."""
    report = info.collect()
    return {
        "cpu": report["cpu"], "gpu": report["gpu"], "system": report["system"], "torch": report["torch"],
        "backend": report["backends"]["cpu"], "python": platform.python_version(), "commit": commit(),
        "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(),
    }  # fmt: skip


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
