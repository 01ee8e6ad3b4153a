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

from drsn_kernels import info
from drsn_kernels.demo.timing import quartiles, ratios

from .cases import Case
from .installed import ROOT

FORMAT = 2
ENVIRONMENT = ("machine", "device", "driver", "torch", "triton", "compiler", "commit", "threads", "date")
COLUMNS = (
    "case", "op", "group", "shape", "dtype", "channels_last", "mode", "provider", "clock", "median_ms", "iqr_ms",
    "ratio_to_floor", "ratio_iqr", "percent_of_floor", "gb_s", "launches", "host_us", "peak_bytes", "saved_bytes",
    "cost_bytes", "over_cost", "cost_saved_bytes", "rounds", *ENVIRONMENT,
)  # fmt: skip
"""Of a row in the CSV; a row in JSON has "seconds" too, the time of every round."""
# In runs that were stored before.
RENAMED = {"budget_bytes": "cost_bytes", "over_budget": "over_cost", "budget_saved_bytes": "cost_saved_bytes"}


def _output(*command: str, **options) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """Of the checkout that this file lies in."""
    if _output("git", "rev-parse", "--show-toplevel", cwd=ROOT) != str(ROOT):
        return "unknown"
    return _output("git", "describe", "--always", "--dirty", cwd=ROOT) or "unknown"


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
    clock: str,
    seconds: list[float],
    host: list[float],
    floor: list[float],
    floor_bytes: int | None,
    counts: dict[str, int],
    cost: dict[str, int],
    about: dict,
) -> dict:
    """One row.

    clock: how `seconds` was taken: "graph" or "events" (GPU time) or "wall". seconds, host: of each round, the time
    that is compared and the time until the call returned, if it was taken. floor: `seconds` of the floor.
    """
    low, high = quartiles(seconds)
    over_floor = ratios(seconds, floor)
    ratio_low, ratio_high = quartiles(over_floor)
    median, ratio = statistics.median(seconds), statistics.median(over_floor)
    moved = cost.get("bytes")
    return {
        "case": case.id,
        "op": case.op,
        "group": case.group,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "channels_last": case.channels_last,
        "mode": case.mode,
        "provider": provider,
        "clock": clock,
        "median_ms": _rounded(median * 1e3),
        "iqr_ms": _rounded((high - low) * 1e3),
        "ratio_to_floor": _rounded(ratio),
        "ratio_iqr": _rounded(ratio_high - ratio_low),
        "percent_of_floor": _rounded(100 / ratio),
        # what the floor moves, over this provider's time: the same bytes for all of a case
        "gb_s": _rounded(floor_bytes / median / 1e9) if floor_bytes else "",
        "launches": counts.get("launches", ""),
        "host_us": _rounded(statistics.median(host) * 1e6) if host else "",
        "peak_bytes": counts.get("peak_bytes", ""),
        "saved_bytes": counts.get("saved_bytes", ""),
        "cost_bytes": "" if moved is None else moved,
        # the time over what the plan's bytes take at the speed of the floor
        "over_cost": _rounded(ratio * floor_bytes / moved) if moved and floor_bytes else "",
        "cost_saved_bytes": cost.get("saved", ""),
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
    """The rows of a file that write_json wrote; ValueError, OSError where it is none.

    Of format 1 only a CPU's rows are taken: on a CUDA device `seconds` held host time where a call was bound by it.
    """
    try:
        stored = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") not in (1, FORMAT) or not stored.get("rows"):
        raise ValueError(f"{path} is not a result of `python -m benchmarks` in format {FORMAT}, or has no rows")
    rows = [{RENAMED.get(name, name): value for name, value in one.items()} for one in stored["rows"]]
    if stored["format"] == 1:
        if any(one.get("warm_ms", "") != "" for one in rows):
            raise ValueError(f"{path} is of format 1, whose times on a CUDA device are not GPU time: record a run anew")
        rows = [one | {"clock": "wall"} for one in rows]
    if missing := [name for name in (*COLUMNS, "seconds") if name not in rows[0]]:
        raise ValueError(f"{path}: its rows lack {', '.join(missing)}")
    return rows


def write_csv(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for one in rows:
            writer.writerow(one | {"shape": "x".join(map(str, one["shape"]))})
    return path


def write_markdown(path: Path, rows: list[dict], figures: Iterable[object], command: str) -> Path:
    """The figures, and tables for people: a line for each case, times by provider, the floor first."""
    about = [f"{name}: {rows[0][name]}" for name in ENVIRONMENT if rows[0][name] not in ("", "none")]
    if others := {one["commit"]: one["case"] for one in reversed(rows) if one["commit"] != rows[0]["commit"]}:
        about += [f"commit {commit}: the cases from {case} on" for commit, case in others.items()]
    lines = [f"`{command}`", "", *(f"- {part}" for part in about), "", "```", *map(str, figures), "```"]
    if all(one["clock"] == "wall" for one in rows):
        lines += table("Medians in milliseconds.", rows, "median_ms")
    else:
        lines += table("GPU time, medians in milliseconds.", rows, "median_ms")
        lines += table("Host time until the call returns, medians in microseconds.", rows, "host_us")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def table(title: str, rows: list[dict], column: str) -> list[str]:
    providers = list(dict.fromkeys(one["provider"] for one in rows))
    cases: dict[str, dict[str, dict]] = {}
    for one in rows:
        cases.setdefault(one["case"], {})[one["provider"]] = one
    lines = ["", title, "", f"| case | {' | '.join(providers)} |", "|---" * (len(providers) + 1) + "|"]
    for case, found in cases.items():
        cells = (_cell(found[name][column]) if name in found else "" for name in providers)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _cell(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
