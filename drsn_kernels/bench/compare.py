"""The regression gate: ratios to the floor of the same run, now and stored, so that a busy machine does not decide.

A row of ours is a regression where its ratio exceeds the stored one by more than the tolerance and three standard
errors of the two medians. One that the stored run has and this one has not fails as well: a backend that does not load,
or a row that was refused, is no pass. Providers that are not ours are not judged.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .measure import geometric_mean
from .providers import OURS

TOLERANCE = 0.15


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


def report(changes: Sequence[Change]) -> tuple[list[str], bool]:
    """One line for each regression and one for all; and whether there is a regression."""
    worse = [change for change in changes if change.regression]
    mean = geometric_mean([change.now / change.before for change in changes])
    lines = [f"REGRESSION {change}" for change in worse]
    lines.append(f"{len(changes)} rows compared, {len(worse)} regressions; geometric mean x{mean:.3f} of the stored")
    return lines, bool(worse)
