"""What a run of gpu_suite.py found, step by step, and the report of one page."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import drsn_kernels as dk

from . import gpu_sampling, sanitizer
from .calls import OURS
from .report import compare, missing, verdict
from .report import figures as figures_of
from .rows import read_json

SHOWN = {"causes": 12, "regressions": 8, "figures": 14}  # lines of the report; report.json has all
WIDTH = 150  # characters of a cell


@dataclass(frozen=True)
class Cause:
    """One way in which a step failed, however often."""

    step: str
    what: str
    where: str = ""
    count: int = 1
    example: str = ""


@dataclass(frozen=True)
class Result:
    """What became of a step. done: what it did, in a line; limit: the seconds that it had."""

    name: str
    command: str
    state: str  # "passed", "failed", "timed out", "cut short", "not reached", or why nothing was run
    exit_code: int | None = None
    seconds: float = 0.0
    limit: float = 0.0
    done: str = ""
    causes: tuple[Cause, ...] = ()
    tail: str = ""

    @property
    def is_bad(self) -> bool:
        return self.state in ("failed", "timed out", "not reached")


@dataclass(frozen=True)
class Benchmark:
    figures: tuple[str, ...] = ()
    regressions: tuple[str, ...] = ()
    compared: str = ""
    causes: tuple[Cause, ...] = ()
    cases: int = 0


# ---- what a step found -----------------------------------------------------------------------------------------------


def grouped(found: Iterable[Cause]) -> list[Cause]:
    """The same causes as one, in the order in which they came."""
    groups: dict[tuple, list[Cause]] = {}
    for one in found:
        groups.setdefault((one.step, one.what, one.where), []).append(one)
    return [replace(same[0], count=sum(one.count for one in same)) for same in groups.values()]


def tests(step: str, results: Path) -> tuple[str, list[Cause], bool]:
    """Of a run under gpu_sampling: what it did, its failures, and whether any test ran."""
    found, collected = gpu_sampling.read(results)
    counts = Counter(one["outcome"] for one in found)
    parts = [f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if counts[name]]
    left = collected - sum(1 for one in found if one.get("cause", {}).get("type") != "collection error")
    parts += [f"{left} of {collected} not reached"] if left > 0 else []
    causes = [
        Cause(step, f"{one['cause']['type']}: {one['cause']['message']}", one["cause"]["where"], 1, one["test"])
        for one in found
        if one["outcome"] == "failed"
    ]
    return ", ".join(parts) or "no test ran", causes, bool(counts["passed"] or counts["failed"])


def benchmark(folder: Path, baseline: Path | None) -> Benchmark:
    """Of a run of gpu_bench, whole or cut short: its figures, and the comparison with the stored run."""
    refused = json.loads(path.read_text("utf-8")) if (path := folder / "refused.json").is_file() else {}
    causes = tuple(
        Cause("bench", f"{name}: {gpu_sampling.normalised(why)}", "", 1, case)
        for case, wrong in refused.items()
        for name, why in wrong.items()
    )
    if not (folder / "results.json").is_file():
        return Benchmark(causes=causes)
    rows = read_json(folder / "results.json")
    figures = tuple(str(figure) for figure in figures_of(rows) if figure.value is not None)
    regressions, compared = _compared(rows, baseline) if baseline else ((), "")
    return Benchmark(figures, regressions, compared, causes, len({row["case"] for row in rows}))


def _compared(rows: list[dict], baseline: Path) -> tuple[tuple[str, ...], str]:
    """Lines for what regressed or is missing, and one for all. Stored providers that no run here times do not count."""
    timed = {row["provider"] for row in rows if row["provider"] in OURS}
    try:
        stored = [row for row in read_json(baseline) if row["provider"] in timed]
        if not stored:
            raise ValueError(f"{baseline.name} has no row of {', '.join(sorted(timed)) or 'ours'}")
        changes = compare(rows, stored)
    except ValueError as error:
        return (), f"nothing was compared: {error}"
    lines, _ = verdict(changes)
    return (*lines[:-1], *missing(rows, stored)), f"{lines[-1]} ({baseline.name})"


def examined(result: Result, log: str, out: Path, baseline: Path | None) -> tuple[Result, Benchmark | None]:
    """The result with what the step's files say; what they find makes a step fail that did not by itself."""
    causes: list[Cause] = []
    done, bench, ran = "", None, True
    if result.name in ("tests", "memcheck", "racecheck"):
        done, causes, ran = tests(result.name, out / f"{result.name}.jsonl")
    if result.name == "memcheck":
        causes += [Cause(result.name, one.what, one.where) for one in sanitizer.memory_findings(log)]
    if result.name == "racecheck":
        findings, known = sanitizer.race_findings(log, Path(dk.__file__).parent / "backends" / "gpu")
        causes += [Cause(result.name, one.what, one.where) for one in findings]
        done += f", {known} known races"
    if result.name == "bench":
        bench = benchmark(out / "bench", baseline)
        causes += bench.causes
        done = f"{bench.cases} cases, {len(bench.regressions)} regressions"
        ran = bench.cases > 0
    if result.name == "sweep":
        done = f"{len(re.findall(r': [0-9]+ rows$', log, re.M))} units"
        refused = out / "sweep" / "refused.json"
        for unit, wrong in (json.loads(refused.read_text("utf-8")) if refused.is_file() else {}).items():
            causes += [Cause(result.name, f"{name}: {why}", unit) for name, why in wrong.items()]
    if result.name == "compile":
        done = f"{len(re.findall(r' [0-9.]+ s$', log, re.M))} cases"
        if result.state == "timed out":  # in a long case; what it has compiled is in the caches
            return replace(result, state="cut short", done=done), None
    if result.name in ("memcheck", "racecheck") and "Device not supported" in log:
        return replace(result, state="compute-sanitizer does not support this device"), None
    state = result.state
    if state == "passed" and (causes or not ran or (bench and bench.regressions)):
        state = "failed"
    causes = grouped(causes)
    if not causes and state in ("failed", "timed out") and not (bench and bench.regressions):
        last = (result.tail.splitlines() or [""])[-1]
        causes = [Cause(result.name, f"{state}: {last}" if last else state)]
    return replace(result, state=state, done=done, causes=tuple(causes)), bench


# ---- the report ------------------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    text = text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
    return text.replace("|", "\\|").replace("\n", " ")


def _some(lines: Sequence[str], kind: str) -> list[str]:
    most = SHOWN[kind]
    more = [f"and {len(lines) - most} more: report.json"] if len(lines) > most else []
    return [*lines[:most], *more]


def page(environment: dict, results: Sequence[Result], bench: Benchmark, notes: Sequence[str]) -> str:
    """Markdown: what failed, the figures, what regressed, the steps."""
    causes = [cause for result in results for cause in result.causes]
    verdict = "failed" if any(result.is_bad for result in results) else "passed"
    lines = [f"# What needs a GPU: {verdict}", ""]
    lines += ["; ".join(f"{key} {value}" for key, value in environment.items() if value not in ("", "none")), ""]
    lines += [f"{note}\n" for note in notes]
    if causes:
        rows = [f"| {c.step} | {c.count} | {_cell(c.what)} | {_cell(c.where)} | {_cell(c.example)} |" for c in causes]
        lines += ["## Failed, by cause", "", "| step | times | what | where | first seen in |", "|---|---|---|---|---|"]
        lines += [*_some(rows, "causes"), ""]
    if bench.figures:
        lines += ["## Figures and aims", "", "```", *_some(bench.figures, "figures"), "```", ""]
    if bench.regressions or bench.compared:
        lines += ["## Against the stored run", "", "```", *_some(bench.regressions, "regressions"), bench.compared]
        lines += ["```", ""]
    lines += ["## Steps", "", "| step | result | seconds | of | what it did |", "|---|---|---|---|---|"]
    lines += [f"| {r.name} | {r.state} | {r.seconds:.0f} | {r.limit:.0f} | {_cell(r.done)} |" for r in results]
    return "\n".join(lines) + "\n"


def write(out: Path, environment: dict, results: Sequence[Result], bench: Benchmark, notes: Sequence[str]) -> None:
    """FOLDER/report.md and report.json."""
    passed = not any(result.is_bad for result in results)
    report = {"passed": passed, "environment": environment, "notes": list(notes), "benchmark": asdict(bench),
              "steps": [asdict(result) for result in results]}  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(page(environment, results, bench, notes), encoding="utf-8")
