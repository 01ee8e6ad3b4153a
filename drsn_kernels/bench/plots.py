"""Bars by shape against the floor. Drawn without pyplot: no display is needed and no global state is touched."""

from collections.abc import Sequence
from pathlib import Path

from .._extras import require


def bars(rows: Sequence[dict], out: Path) -> list[Path]:
    """One PNG for each operator, mode and dtype: percent of the floor's speed, a bar for each provider and shape."""
    figures: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for one in rows:
        if one["provider"].startswith("floor") or one["op"] == "scaling":
            continue
        label = f"{one['group']} {'x'.join(map(str, one['shape']))}" + (" cl" if one["channels_last"] else "")
        shapes = figures.setdefault((one["op"], one["mode"], one["dtype"]), {})
        shapes.setdefault(label, {})[one["provider"]] = one["percent_of_floor"]
    about = rows[0]["device"] + ("" if rows[0]["clock"] == "wall" else ", GPU time")
    return [_draw(out / f"{'-'.join(key)}.png", key, shapes, about) for key, shapes in figures.items()]


def _draw(path: Path, key: tuple[str, str, str], shapes: dict[str, dict[str, float]], about: str) -> Path:
    names = list(dict.fromkeys(name for by_provider in shapes.values() for name in by_provider))
    width = 0.8 / len(names)
    size = (max(5, 0.55 * len(shapes) + 2), 4)
    figure = require("matplotlib.figure", "demo").Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(shapes))]
        axes.bar(places, [values.get(name, 0) for values in shapes.values()], width, label=name)
    axes.axhline(100, color="0.4", linestyle=":")
    axes.set(title=f"{', '.join(key)}: speed against the floor\n{about}", ylabel="% of the floor's speed")
    axes.set_xticks(range(len(shapes)), list(shapes), rotation=60, ha="right", fontsize=7)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    return path
