"""The runs stored under docs/benchmarks, and ratios of their rows, for the pages (pages.py)."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from .cases import LARGE
from .installed import ROOT
from .report import Table, size_of
from .rows import read_json

RUNS = ROOT / "docs" / "benchmarks"
# Commits whose kernels are no longer those of the tree: their runs are listed, and give no figure of today's.
REPLACED = {"6d60fe5": "the kernels of wide gates since replaced"}
SHORT = {"cpu": "CPU, 2 cores, AVX-512", "cpu-norms": "CPU, 2 cores, AVX2"}
NORMS = "cpu-norms"  # the CPU run of batch normalisation, and of the networks that it is fused in

# ---- the runs --------------------------------------------------------------------------------------------------------


@cache
def run(name: str) -> list[dict]:
    return read_json(RUNS / name / "results.json")


@cache
def table(name: str) -> Table:
    return Table(run(name))


def names() -> list[str]:
    """All runs, the CPU's first."""
    found = sorted(path.parent.name for path in RUNS.glob("*/results.json"))
    return sorted(found, key=lambda name: name != "cpu")


def holds(name: str) -> str:
    """How many cases a run has, and how many of them are of another commit than the first: a run that ended before the
    last case leaves the rest as they were."""
    commits = Counter(next(iter(rows.values()))["commit"] for rows in table(name).cases.values())
    said = f"{sum(commits.values())} cases"
    others = [f"{count} of commit {commit}" for commit, count in commits.items() if commit != run(name)[0]["commit"]]
    return ", ".join([said, *others])


def gpus() -> list[str]:
    return [name for name in names() if run(name)[0]["clock"] != "wall"]


def current() -> list[str]:
    """The runs that speak for this tree."""
    return [name for name in names() if run(name)[0]["commit"] not in REPLACED]


def short(name: str) -> str:
    """NVIDIA H100 80GB HBM3 -> H100."""
    return SHORT.get(name) or run(name)[0]["device"].split()[1]


# ---- ratios ----------------------------------------------------------------------------------------------------------


def _of(op: str, mode: str, dtype: str) -> Callable[[dict], bool]:
    return lambda one: (one["op"], one["mode"], one["dtype"]) == (op, mode, dtype)


TRAIN, TRAIN16 = _of("shrink_train", "both", "fp32"), _of("shrink_train", "both", "bf16")
NORM = _of("norm_relu", "both", "fp32")
EVAL, EVAL16 = _of("shrink_eval", "forward", "fp32"), _of("shrink_eval", "forward", "bf16")


def number(value: float) -> str:
    """Two digits, three of what lies between 1 and 3."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def mean(values: Iterable[float]) -> str:
    """The geometric mean, and from the least to the greatest; nothing for nothing."""
    if not (values := list(values)):
        return ""
    found = number(statistics.geometric_mean(values))
    return f"{found} ({_short(min(values))} to {_short(max(values))})" if len(values) > 1 else found


def _short(value: float) -> str:
    """Two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def gains(name: str, other: str, want: Callable[[dict], bool]) -> dict[str, float]:
    return table(name).gains(other, want)


def over_resnet(name: str, provider: str, op: str = "paper_network", resnet: str = "floor") -> float | None:
    """A training step over that of the ResNet: PyTorch's, or "resnet-fused", one with our normalisation."""
    found = table(name).gains(resnet, lambda one: one["op"] == op, provider)
    return 1 / found.popitem()[1] if found else None


def over_floor(name: str, want: Callable[[dict], bool]) -> dict[str, float]:
    return {case: 1 / gain for case, gain in gains(name, "floor", want).items()}


def large(want: Callable[[dict], bool]) -> Callable[[dict], bool]:
    return lambda one: want(one) and size_of(one) >= LARGE


def host(name: str, provider: str, want: Callable[[dict], bool] = TRAIN) -> float | None:
    """Median microseconds until an eager call returns."""
    times = [rows[provider]["host_us"] for rows in table(name).cases.values()
             if provider in rows and want(rows[provider])]  # fmt: skip
    return statistics.median(times) if times else None


def kept(name: str, provider: str) -> float:
    """Bytes an element that are kept for the backward pass, the median over float32 training steps."""
    return statistics.median(
        rows[provider]["saved_bytes"] / math.prod(rows[provider]["shape"])
        for rows in table(name).cases.values()
        if provider in rows and TRAIN(rows[provider])
    )


def rows_of(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines)]
