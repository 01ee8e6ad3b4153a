"""Which constants follow from the rows of a sweep.

Of each choice the value that is fastest by the geometric mean over the cases that have all of its alternatives. The
tree's value stays where none is more than WORTH times as fast: a smaller gain is taken for noise. A case in which all
values make the same launches says nothing about them, and is left out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WORTH = 1.01


@dataclass(frozen=True)
class Derived:
    """Values of one choice, in the order of `names`."""

    names: tuple[str, ...]
    present: tuple
    best: tuple  # the present ones, where nothing else is worth it
    slower: dict[tuple, float]  # of each value: its time over the present one's, geometric mean
    ratios: dict[str, float]  # by case: the present value's time over that of the best
    dropped: tuple[tuple, ...]  # values without a row in some case, where they were wrong or could not be timed

    def __str__(self) -> str:
        pairs = zip(self.names, self.best, strict=True)
        return "\n".join(f"{name} = {value!r}  # {self._why}" for name, value in pairs)

    @property
    def _why(self) -> str:
        over = f"geometric mean of {len(self.ratios)} rows"
        if self.best == self.present:
            others = ", ".join(
                f"{_shown(value)} takes {ratio:.3f}" for value, ratio in self.slower.items() if value != self.present
            )
            return f"stays: {others or 'nothing else'} of its time, {over}" + self._left_out
        by_gain = sorted(self.ratios, key=self.ratios.get)
        most, least = by_gain[-1], by_gain[0]
        gain = 1 / self.slower[self.best]
        return (
            f"was {_shown(self.present)}: {gain:.3f} times as fast, {over}; most {self.ratios[most]:.2f} at {most}, "
            f"least {self.ratios[least]:.2f} at {least}" + self._left_out
        )

    @property
    def _left_out(self) -> str:
        return f"; left out, not timed everywhere: {', '.join(map(_shown, self.dropped))}" if self.dropped else ""


def _shown(value: tuple) -> str:
    return str(value[0]) if len(value) == 1 else f"({', '.join(map(str, value))})"


def derived(rows: Iterable[dict], names: Sequence[str]) -> Derived | None:
    """Of the constants `names`, which are chosen together; None where no case has launches that differ by them."""
    present: tuple | None = None
    times: dict[str, dict[tuple, float]] = {}
    launches: dict[str, set[str]] = {}  # by case: the rows whose launches are not those of an earlier one
    planned: dict[str, dict[str, Any]] = {}
    rows = [one for one in rows if set(names) <= one.get("constants", {}).keys()]
    for one in rows:
        if one["provider"] == "as planned":
            planned[one["case"]] = one["constants"]
            present = tuple(one["constants"][name] for name in names)
    for one in rows:
        now = planned.get(one["case"])
        others = now is not None and all(now[name] == v for name, v in one["constants"].items() if name not in names)
        if others:
            launches.setdefault(one["case"], set()).add(one["same_as"] or one["provider"])
            times.setdefault(one["case"], {})[tuple(one["constants"][name] for name in names)] = one["median_ms"]
    values = list(dict.fromkeys(value for found in times.values() for value in found))
    # a case without all values stays: what was refused there is left out everywhere
    times = {case: found for case, found in times.items() if len(launches[case]) > 1 or len(found) < len(values)}
    if len(values) < 2 or not times:
        return None
    everywhere = [value for value in values if all(value in found for found in times.values())]
    slower = {
        value: math.exp(sum(math.log(found[value] / found[present]) for found in times.values()) / len(times))
        for value in everywhere
    }
    best = min(slower, key=slower.get)
    if slower[best] * WORTH > 1:
        best = present
    ratios = {case: found[present] / found[best] for case, found in times.items()}
    return Derived(tuple(names), present, best, slower, ratios, tuple(v for v in values if v not in everywhere))


def lines(rows: Iterable[dict], choices: Iterable[Sequence[str]]) -> list[str]:
    """To paste into tuned.py."""
    rows = [one | {"constants": _hashable(one.get("constants", {}))} for one in rows]
    found = (derived(rows, names) for names in dict.fromkeys(map(tuple, choices)))
    return [str(one) for one in found if one is not None]


def _hashable(constants: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where there were pairs."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in constants.items()}
