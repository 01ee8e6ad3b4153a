"""What compute-sanitizer printed: its findings, and which of racecheck's are known and harmless.

racecheck watches shared memory. A race is known where it is a write after a write by one and the same instruction, in a
kernel and on a line of source that KNOWN_RACES lists with the reason; every other one is a finding.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownRace:
    """A place in drsn_kernels/backends/gpu. The line's text, not its number, which edits elsewhere would move."""

    kernel: str
    file: str
    text: str
    reason: str


# None: the first run's three were races in the last bit, and are mended (docs/inside/gpu.md).
KNOWN_RACES: tuple[KnownRace, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One record of the tool. where: the kernel with its line of source, as far as the record names them."""

    what: str
    where: str


@dataclass(frozen=True)
class Access:
    kind: str  # "Read" or "Write"
    kernel: str
    offset: str  # of the instruction in the kernel
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.kernel} in {self.file}:{self.line}" if self.file else f"{self.kernel}+{self.offset}"


_LINE = re.compile(r"(?<!=)={9}(?: +(.*))?$")  # the tool's prefix, also after pytest's dots on the same line
_PLACE = r"at (?P<kernel>[^+]+)\+(?P<offset>0x[0-9a-f]+)(?: in (?P<file>[^\s:]+):(?P<line>\d+))?"
_ACCESS = re.compile(rf"(?P<kind>Read|Write) access {_PLACE}")
_SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed")
_NO_FINDING = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY")


def _records(log: str) -> Iterator[list[str]]:
    """The tool's lines, without the prefix, in groups that an empty one ends."""
    record: list[str] = []
    for line in log.splitlines():
        if (found := _LINE.search(line)) is None:
            continue
        text = (found[1] or "").strip()
        starts = text.startswith(_NO_FINDING) or "Race reported" in text
        if record and (starts or not text):
            yield record
            record = []
        if text and not text.startswith(_NO_FINDING):
            record.append(text)
    if record:
        yield record


def _access(found: re.Match) -> Access:
    kernel = found["kernel"].split("(")[0].strip()  # demangled, it has its arguments' types
    return Access(found["kind"], kernel, found["offset"], Path(found["file"] or "").name, int(found["line"] or 0))


def known_race(accesses: Sequence[Access], sources: Path) -> KnownRace | None:
    """The entry that explains a race; None where there is none. sources: the folder of the kernels that ran."""
    first = accesses[0] if accesses else None
    if first is None or first.kind != "Write" or any(other != first for other in accesses) or not first.file:
        return None
    path = sources / first.file
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    text = lines[first.line - 1].strip() if 0 < first.line <= len(lines) else None
    key = (first.kernel, first.file, text)
    return next((race for race in KNOWN_RACES if (race.kernel, race.file, race.text) == key), None)


def race_findings(log: str, sources: Path) -> tuple[list[Finding], int]:
    """Of a racecheck run: the findings that are not known, and how many are.

    A log that is not of a whole run is a finding too, and so is one where the tool counts more than can be read here.
    """
    findings, known, races = [], 0, 0
    for record in _records(log):
        if "Race reported" not in record[0]:
            findings.append(_general(record))
            continue
        races += 1
        accesses = [_access(found) for found in _ACCESS.finditer(" ".join(record))]
        if known_race(accesses, sources) is not None:
            known += 1
        else:
            kinds = " and ".join(dict.fromkeys(access.kind.lower() for access in accesses))
            findings.append(Finding(f"race: {kinds or record[0]}", "; ".join(dict.fromkeys(map(str, accesses)))))
    displayed = _SUMMARY.findall(log)
    if not displayed:
        findings.append(Finding("racecheck printed no summary: it did not come to its end", ""))
    elif sum(map(int, displayed)) > races:
        findings.append(Finding(f"racecheck counts {sum(map(int, displayed))} hazards, {races} could be read", ""))
    return findings, known


def memory_findings(log: str) -> list[Finding]:
    """Of a memcheck run; a log without the tool's summary is one too."""
    findings = [_general(record) for record in _records(log)]
    if "ERROR SUMMARY" not in log:
        findings.append(Finding("memcheck printed no summary: it did not come to its end", ""))
    return findings


def _general(record: list[str]) -> Finding:
    place = re.search(_PLACE, " ".join(record[1:]))
    if place is None:
        return Finding(record[0], "")
    file = Path(place["file"] or "").name
    kernel = place["kernel"].split("(")[0].strip()
    return Finding(record[0], f"{kernel} in {file}:{place['line']}" if file else kernel)
