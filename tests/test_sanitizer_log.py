"""benchmarks/sanitizer.py: logs of compute-sanitizer, with pytest's own output between."""

from pathlib import Path

import pytest
import repository  # noqa: F401 - benchmarks/

import drsn_kernels as dk
from benchmarks import sanitizer

KERNELS = Path(dk.__file__).parent / "backends" / "gpu"


def number(race) -> int:
    """Of the known race's line in the kernels that are installed."""
    lines = [text.strip() for text in (KERNELS / race.file).read_text().splitlines()]
    return lines.index(race.text) + 1


def report(first: str, *others: str, hazards: int = 96) -> str:
    """An analysis record, as the tool prints it."""
    lines = [f"========= Error: Race reported between {first}"]
    lines += [f"=========     and {other} [{hazards} hazards]" for other in others]
    return "\n".join([*lines, "========= "])


def log(*records: str, displayed: int | None = None) -> str:
    count = len(records) if displayed is None else displayed
    said = f"{count} hazard{'' if count == 1 else 's'} displayed ({count} errors, 0 warnings)"
    head = "========= COMPUTE-SANITIZER\ncollected 18 items\n\n...."
    return head + "\n....".join(records) + f"\n{'=' * 30} 18 passed {'=' * 30}\n========= RACECHECK SUMMARY: {said}\n"


def write(kernel: str, offset: str, file: str, line: int, arguments: str = "") -> str:
    return f"Write access at {kernel}{arguments}+{offset} in {file}:{line}"


@pytest.fixture
def race(monkeypatch):
    """A line of a kernel, for these tests only, as the one place that is known."""
    source = (KERNELS / "gate.py").read_text()
    text = next(line.strip() for line in source.splitlines() if "tl.sum(" in line)
    known = sanitizer.KnownRace("hidden_kernel", "gate.py", text, "an example")
    monkeypatch.setattr(sanitizer, "KNOWN_RACES", (known,))
    return known


def test_the_known_places_are_in_the_kernels():
    """A line that was edited or moved to another kernel is no longer known, and should not be listed."""
    for race in sanitizer.KNOWN_RACES:
        assert race.reason and race.text in [line.strip() for line in (KERNELS / race.file).read_text().splitlines()]


def test_known_races_are_no_findings(race):
    records = [report(*[write(race.kernel, "0x2a10", race.file, number(race), a)] * 2) for a in ("", "(float *, int)")]
    assert sanitizer.race_findings(log(*records), KERNELS) == ([], len(records))
    assert sanitizer.race_findings(log(), KERNELS) == ([], 0)


def test_every_other_race_is_a_finding(race):
    line = number(race)
    known = write(race.kernel, "0x10", race.file, line)
    others = {
        "another line": [write(race.kernel, "0x10", race.file, line + 1)] * 2,
        "another kernel": [write("grad_kernel", "0x10", race.file, line)] * 2,
        "another file": [write(race.kernel, "0x10", "standard.py", line)] * 2,
        "another instruction of the line": [known, write(race.kernel, "0x20", race.file, line)],
        "a read": [known, known.replace("Write", "Read")],
        "a third access": [known, known, f"Read access at {race.kernel}+0x30 in {race.file}:{line + 4}"],
        "no line": [f"Write access at {race.kernel}+0x10"] * 2,
        "a line beyond the file": [write(race.kernel, "0x10", race.file, 10**6)] * 2,
    }
    for what, accesses in others.items():
        findings, count = sanitizer.race_findings(log(report(known, known), report(*accesses)), KERNELS)
        assert (len(findings), count) == (1, 1), what
        assert findings[0].what.startswith("race: write"), what
    findings, _ = sanitizer.race_findings(log(report(*others["a read"])), KERNELS)
    assert findings == [sanitizer.Finding("race: write and read", f"{race.kernel} in {race.file}:{line}")]


def test_a_log_that_is_not_whole_or_not_understood_is_a_finding(race):
    known = report(*[write(race.kernel, "0x10", race.file, number(race))] * 2)
    for text in (log(known).rpartition("========= RACECHECK")[0], ""):
        assert "no summary" in sanitizer.race_findings(text, KERNELS)[0][-1].what
    assert "counts 2 hazards, 1 could" in sanitizer.race_findings(log(known, displayed=2), KERNELS)[0][-1].what
    odd = "========= Error: Race reported between Write access at 0x68 in somewhere\n========= "
    assert len(sanitizer.race_findings(log(odd), KERNELS)[0]) == 1
    failed = "========= Error: Target application terminated before first instrumented API call\n========= "
    assert sanitizer.race_findings(log(failed, displayed=0), KERNELS)[0][0].what.startswith("Error: Target application")


MEMCHECK = """========= COMPUTE-SANITIZER
..========= Invalid __global__ read of size 4 bytes
=========     at hidden_kernel+0x560 in gate.py:110
=========     by thread (32,0,0) in block (0,0,0)
=========     Access at 0x7f0000000800 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x16a3] in launcher.so
=========
========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) due to "invalid argument" on CUDA API call to cuMemcpy.
=========     Saved host backtrace up to driver entry point at error
=========
========= ERROR SUMMARY: 2 errors
"""


def test_memcheck():
    first, second = sanitizer.memory_findings(MEMCHECK)
    assert first == sanitizer.Finding("Invalid __global__ read of size 4 bytes", "hidden_kernel in gate.py:110")
    assert second.what.startswith("Program hit CUDA_ERROR_INVALID_VALUE") and not second.where
    assert sanitizer.memory_findings("========= COMPUTE-SANITIZER\n....\n========= ERROR SUMMARY: 0 errors\n") == []
    assert "no summary" in sanitizer.memory_findings("========= COMPUTE-SANITIZER\n")[0].what
