"""What is made of rows: the figures that the project aims at, and the regression gate.

The gate compares ratios to the floor of the same run, now and stored, so that a busy machine does not decide. A row of
ours is a regression where its ratio exceeds the stored one by more than the tolerance and three standard errors of the
two medians. One that the stored run has and this one has not fails as well: a backend that does not load, or a row that
was refused, is no pass. Providers that are not ours are not judged.
"""

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from drsn_kernels.demo.speed import PAPER_RATIO
from drsn_kernels.demo.timing import ratio

from .calls import OURS
from .cases import DTYPES, LARGE

HOST_AIMS = {  # of an eager call on a GPU, microseconds until it returns
    ("abs_mean", "forward"): 7,
    ("soft_threshold", "forward"): 8,
    ("shrink_eval", "forward"): 14,
    ("shrink_train", "both"): 75,
}

TOLERANCE = 0.15  # of the gate


# ---- figures ---------------------------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


@dataclass(frozen=True)
class Figure:
    """A figure, the value it should reach, and in which direction. aim None: there is none."""

    name: str
    value: float | None
    aim: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.value is None or self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        aim = "" if self.aim is None else f"  aim: at {'least' if self.at_least else 'most'} {self.aim:g}"
        said = {True: ", reached", False: ", NOT reached", None: ""}[self.reached]
        note = f"  ({self.note})" if self.note and self.value is not None else ""
        return f"{value:>13s}  {self.name}{note}{aim}{said}"


class Table:
    """Rows by case and provider. `ours` is the backend that is chosen by itself."""

    def __init__(self, rows: Sequence[dict]) -> None:
        self.cases: dict[str, dict[str, dict]] = {}
        for one in rows:
            self.cases.setdefault(one["case"], {})[one["provider"]] = one
        present = {one["provider"] for one in rows}
        self.ours = next((name for name in ("triton", "cpu", "torch") if name in present), None)

    def gains(self, other: str, want: Callable[[dict], bool], over: str | None = None) -> dict[str, float]:
        """By case: the time of `other` over the time of ours, or of `over`."""
        over = over or self.ours
        return {
            case: ratio(rows[other]["seconds"], rows[over]["seconds"])
            for case, rows in self.cases.items()
            if other in rows and over in rows and want(rows[other])
        }


def _is(op: str, mode: str, groups: str = "ABDE") -> Callable[[dict], bool]:
    """fp32 in contiguous order: what the aims are about."""
    return lambda one: (
        (one["op"], one["mode"], one["dtype"], one["channels_last"]) == (op, mode, "fp32", False)
        and one["group"] in groups
    )


def size_of(one: dict) -> int:
    return math.prod(one["shape"]) * DTYPES[one["dtype"]].itemsize


def _mean(values: dict[str, float]) -> float | None:
    return geometric_mean(list(values.values()))


def _bf16(table: Table) -> dict[str, float]:
    """fp32 over bf16 of ours at equal element count, where fp32 is LARGE; two cases, so medians and not rounds."""
    found = {}
    for case, rows in table.cases.items():
        other = table.cases.get(case.replace("-fp32-", "-bf16-"), {})
        if "-fp32-" in case and table.ours in rows and table.ours in other and size_of(rows[table.ours]) >= LARGE:
            if rows[table.ours]["op"] in ("shrink_train", "shrink_eval"):
                found[case] = rows[table.ours]["median_ms"] / other[table.ours]["median_ms"]
    return found


def figures(rows: Sequence[dict]) -> list[Figure]:
    """The aims, in their order; what a run has not measured has the value None."""
    table = Table(rows)
    paper = table.gains(table.ours, lambda one: one["op"] == "paper_network", "floor") if table.ours else {}
    port = table.gains("port", lambda one: one["op"] == "paper_network", "floor")
    resnet = table.gains("resnet-fused", lambda one: one["op"] == "paper_network", table.ours) if table.ours else {}
    norm = table.gains("best", _is("norm_relu", "both"))
    step, evaluated = _is("shrink_train", "both"), _is("shrink_eval", "forward", "ABCDEG")
    over_clone = {case: 1 / gain for case, gain in
                  table.gains("floor", lambda one: evaluated(one) and size_of(one) >= LARGE).items()}  # fmt: skip
    over_best = table.gains("best", lambda one: one["group"] != "F")  # degenerate shapes are there to be right
    worst = min(over_best, key=over_best.get, default=None)
    bf16 = _bf16(table)
    found = [
        Figure("paper network, training step, DRSN-CW over PyTorch's ResNet", _mean(paper), 1, False,
               f"popular port {_mean(port) or math.nan:.2f}, the paper {PAPER_RATIO}"),
        Figure("paper network, the same over a ResNet with our normalisation",
               _mean({case: 1 / gain for case, gain in resnet.items()})),
        Figure("BatchNorm and ReLU, training, over eager PyTorch, A B D E, geometric mean", _mean(norm), 1.6),
        Figure("BatchNorm and ReLU, worst", min(norm.values(), default=None), 1, True,
               min(norm, key=norm.get, default="")),
        Figure("Shrinkage, training, over the eager port, A B D E, geometric mean",
               _mean(table.gains("port", step)), 10),
        Figure("the same over torch.compile of the best form", _mean(table.gains("best-compiled", step)), 1.2),
        Figure("launch-bound shapes C, training, over the eager port",
               _mean(table.gains("port", _is("shrink_train", "both", "C"))), 5),
        Figure("forward in eval over clone, 16 MiB and more, geometric mean", _mean(over_clone), 1.5, False),
        Figure("the same, worst", max(over_clone.values(), default=None), 2, False),
        Figure("over the best eager form, worst of all cases", over_best.get(worst), 1, True, worst or ""),
        Figure("bf16 over fp32 at equal element count, 16 MiB and more, geometric mean", _mean(bf16), 1.5),
    ]  # fmt: skip
    found += _scaling(table) + _host(table)
    groups = sorted({one["group"] for one in rows} & set("ABCDEFG"))
    for other, label in (("port", "the eager port"), ("best-compiled", "torch.compile of the best form")):
        for group in groups:
            gain = _mean(table.gains(other, _is("shrink_train", "both", group)))
            if gain is not None:
                found.append(Figure(f"Shrinkage, training, over {label}, {group}", gain))
    return found


def _scaling(table: Table) -> list[Figure]:
    """Speed-up by the second thread, ours and clone's own, for each size."""
    found = []
    for case, rows in table.cases.items():
        if table.ours in rows and rows[table.ours]["op"] == "scaling":
            one = rows[table.ours]
            both = {name: _gain(rows, name) for name in (table.ours, "floor")}
            if None not in both.values():
                aim = 1.7 if size_of(one) < LARGE else both["floor"]
                name = f"1 to 2 threads, {size_of(one) / 2**20:.0f} MiB"
                found.append(Figure(name, both[table.ours], round(aim, 2), True, f"clone {both['floor']:.2f}; {case}"))
    return found


def _host(table: Table) -> list[Figure]:
    """What the host pays for an eager call of ours on a GPU: by step, the median over the launch-bound shapes C."""
    ours = [rows[table.ours] for rows in table.cases.values() if table.ours in rows]
    if all(one["clock"] == "wall" for one in ours):
        return []
    found = []
    for (op, mode), aim in HOST_AIMS.items():
        times = [one["host_us"] for one in ours if _is(op, mode, "C")(one)]
        name = f"host time of {op}, {mode}, C, us"
        found.append(Figure(name, statistics.median(times) if times else None, aim, False))
    return found


def _gain(rows: dict[str, dict], name: str) -> float | None:
    alone = rows.get(f"{name}-1-thread")
    return ratio(alone["seconds"], rows[name]["seconds"]) if alone and name in rows else None


# ---- the regression gate ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Ratio to the floor of one case and provider, stored and now."""

    case: str
    provider: str
    before: float
    now: float
    limit: float

    @property
    def regression(self) -> bool:
        return self.now > self.limit

    def __str__(self) -> str:
        return (f"{self.case} {self.provider}: {self.now:.3f} of the floor, stored {self.before:.3f} "
                f"(x{self.now / self.before:.2f}, limit {self.limit:.3f})")  # fmt: skip


def _standard_error(row: dict) -> float:
    """Of the median of the ratios, from their quartiles: 1.25 sigma / sqrt(n), sigma = IQR / 1.35."""
    return 0.93 * row["ratio_iqr"] / math.sqrt(row["rounds"])


def check_same_device(rows: Sequence[dict], stored: Sequence[dict]) -> None:
    """Raises ValueError where the two are of different devices: their ratios say nothing about each other."""
    for name in ("device", "threads"):
        now, before = rows[0][name], stored[0][name]
        if now != before and (name == "device" or not rows[0]["driver"]):
            raise ValueError(f"the stored run was made with {name} {before}, this one with {now}: record a run here")


def check_cases(cases: Collection[str], stored: Sequence[dict]) -> None:
    """Raises ValueError where the stored run has no row of ours for any of the cases that are to be run."""
    if not any(row["case"] in cases and row["provider"] in OURS for row in stored):
        raise ValueError(f"the stored run has no row of ours for any of the {len(cases)} cases selected")


def missing(rows: Sequence[dict], stored: Sequence[dict], uncompiled: Collection[str] = ()) -> list[str]:
    """A line for each stored row of ours whose case is in this run without it. `uncompiled`: cases that this run does
    not compile because it was told so, or is smaller; their stored compiled rows are not missing."""
    cases = {row["case"] for row in rows}
    now = {(row["case"], row["provider"]) for row in rows}
    return [
        f"MISSING {case} {provider}: in the stored run, not in this one"
        for case, provider in dict.fromkeys((row["case"], row["provider"]) for row in stored)
        if case in cases and provider in OURS and (case, provider) not in now
        and not (provider.endswith("-compiled") and case in uncompiled)
    ]  # fmt: skip


def compare(rows: Sequence[dict], stored: Sequence[dict], tolerance: float = TOLERANCE) -> list[Change]:
    """The rows of ours that both runs have.

    Raises:
        ValueError: a tolerance below 0, different devices, or nothing in common.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    check_same_device(rows, stored)
    before = {(row["case"], row["provider"]): row for row in stored}
    changes = []
    for row in rows:
        old = before.get((row["case"], row["provider"]))
        if row["provider"] in OURS and old is not None:
            noise = 3 * math.hypot(_standard_error(row), _standard_error(old))
            limit = old["ratio_to_floor"] * (1 + tolerance) + noise
            changes.append(Change(row["case"], row["provider"], old["ratio_to_floor"], row["ratio_to_floor"], limit))
    if not changes:
        raise ValueError("the stored run has no case and provider of ours in common with this one")
    return changes


def verdict(changes: Sequence[Change]) -> tuple[list[str], bool]:
    """One line for each regression and one for all; and whether there is a regression."""
    worse = [change for change in changes if change.regression]
    mean = geometric_mean([change.now / change.before for change in changes])
    lines = [f"REGRESSION {change}" for change in worse]
    lines.append(f"{len(changes)} rows compared, {len(worse)} regressions; geometric mean x{mean:.3f} of the stored")
    return lines, bool(worse)
