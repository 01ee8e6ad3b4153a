"""Rows: one for each case and provider, with all that is needed to read it by itself; as JSON and CSV."""

import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import info
from .cases import Case
from .measure import quartiles, ratios

FORMAT = 1
ENVIRONMENT = ("machine", "device", "driver", "torch", "triton", "compiler", "commit", "threads", "date")
COLUMNS = (
    "case", "op", "group", "shape", "dtype", "channels_last", "mode", "provider", "median_ms", "iqr_ms",
    "ratio_to_floor", "ratio_iqr", "percent_of_floor", "gb_s", "launches", "host_us", "peak_bytes", "saved_bytes",
    "budget_bytes", "over_budget", "budget_saved_bytes", "warm_ms", "graph_ms", "rounds", *ENVIRONMENT,
)  # fmt: skip
"""Of a row in the CSV; a row in JSON has "seconds" too, the time of every round."""


def _output(*command: str, **options) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """Of the checkout that the package or the working directory lies in; an installed package does not know its own."""
    for folder in (Path(__file__).parent, Path.cwd()):
        top = _output("git", "rev-parse", "--show-toplevel", cwd=folder)
        if top and (Path(top) / "drsn_kernels" / "bench").is_dir():
            return _output("git", "describe", "--always", "--dirty", cwd=top) or "unknown"
    return "unknown"


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return _output(found, "--version").split("\n")[0] if found else "none"


def environment(device: str = "cpu") -> dict:
    """Machine, device, driver, versions and commit, stored with every row."""
    report = info.collect()
    cuda = device == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] if cuda else ""
    return {
        "machine": f"{report['cpu']}; {platform.platform()}",
        "device": torch.cuda.get_device_name() if cuda else report["cpu"],
        "driver": driver,
        "torch": str(torch.__version__),
        "triton": report["optional"]["triton"] or "",
        "compiler": f"{_compiler()}; cpu backend {report['backends']['cpu']}",
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def row(
    case: Case,
    provider: str,
    samples: dict[str, list[float]],
    floor: list[float],
    main: str,
    floor_bytes: int | None,
    counts: dict[str, int],
    budget: dict[str, int],
    about: dict,
) -> dict:
    """One row. samples: seconds by kind of time; main: the kind that is compared; floor: the floor's of that kind."""
    seconds = samples[main]
    low, high = quartiles(seconds)
    over_floor = ratios(seconds, floor)
    ratio_low, ratio_high = quartiles(over_floor)
    median, ratio = statistics.median(seconds), statistics.median(over_floor)
    moved = budget.get("bytes")

    def milliseconds(kind: str) -> float | str:
        return _rounded(statistics.median(samples[kind]) * 1e3) if samples.get(kind) else ""

    return {
        "case": case.id,
        "op": case.op,
        "group": case.group,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "channels_last": case.channels_last,
        "mode": case.mode,
        "provider": provider,
        "median_ms": _rounded(median * 1e3),
        "iqr_ms": _rounded((high - low) * 1e3),
        "ratio_to_floor": _rounded(ratio),
        "ratio_iqr": _rounded(ratio_high - ratio_low),
        "percent_of_floor": _rounded(100 / ratio),
        # what the floor moves, over this provider's time: the same bytes for all of a case
        "gb_s": _rounded(floor_bytes / median / 1e9) if floor_bytes else "",
        "launches": counts.get("launches", ""),
        "host_us": _rounded(statistics.median(samples.get("host", seconds)) * 1e6),
        "peak_bytes": counts.get("peak_bytes", ""),
        "saved_bytes": counts.get("saved_bytes", ""),
        "budget_bytes": "" if moved is None else moved,
        # the time over what the budget's bytes take at the speed of the floor
        "over_budget": _rounded(ratio * floor_bytes / moved) if moved and floor_bytes else "",
        "budget_saved_bytes": budget.get("saved", ""),
        "warm_ms": milliseconds("warm"),
        "graph_ms": milliseconds("graph"),
        "rounds": len(seconds),
        **about,
        "seconds": [_rounded(value) for value in seconds],
    }


def write_json(path: Path, rows: Iterable[dict], command: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"format": {FORMAT}, "command": {json.dumps(command)}, "rows": [\n{lines}\n]}}\n', "utf-8")
    return path


def read_json(path: Path) -> list[dict]:
    """The rows of a file that write_json wrote; ValueError, OSError where it is none."""
    try:
        stored = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not stored.get("rows"):
        raise ValueError(f"{path} is not a result of `python -m drsn_kernels bench` in format {FORMAT}, or has no rows")
    if missing := [name for name in (*COLUMNS, "seconds") if name not in stored["rows"][0]]:
        raise ValueError(f"{path}: its rows lack {', '.join(missing)}")
    return stored["rows"]


def write_csv(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for one in rows:
            writer.writerow(one | {"shape": "x".join(map(str, one["shape"]))})
    return path


def write_markdown(path: Path, rows: list[dict], figures: Iterable[object], command: str) -> Path:
    """The figures, and a table for people: a line for each case, milliseconds by provider, the floor first."""
    providers = list(dict.fromkeys(one["provider"] for one in rows))
    cases: dict[str, dict[str, dict]] = {}
    for one in rows:
        cases.setdefault(one["case"], {})[one["provider"]] = one
    about = [f"{name}: {rows[0][name]}" for name in ENVIRONMENT if rows[0][name] not in ("", "none")]
    lines = [f"`{command}`", "", *(f"- {part}" for part in about), "", "```", *map(str, figures), "```", ""]
    lines += ["Medians in milliseconds.", "", f"| case | {' | '.join(providers)} |"]
    lines.append("|---" * (len(providers) + 1) + "|")
    for case, found in cases.items():
        cells = (f"{found[name]['median_ms']:.3g}" if name in found else "" for name in providers)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
