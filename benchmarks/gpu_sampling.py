"""A pytest plugin for gpu_suite.py: the tests that tell most first, until the time is up, each result written at once.

    pytest -p gpu_sampling --suite-results FILE [--suite-seed N] [--suite-earlier FILE]

Order: what failed in the earlier run, then the functions with few cases, then all other cases as the seed draws them.
No test starts after the moment in the environment's GPU_SUITE_END (seconds since the epoch). So what has run is all of
the first kinds and a random sample of the common cases; what has not is counted by its absence.

FILE holds a line of JSON for each test, and one with the number of tests collected. The order depends on names and the
seed alone, so that all workers of pytest-xdist agree on it.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

RARE = 8  # a function with at most so many cases is never sampled
END = "GPU_SUITE_END"


def end() -> float:
    return float(os.environ.get(END, "inf"))


def device_is_lost() -> bool:
    """Whether a kernel ended in an error after which every CUDA call of this process fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# ---- order -----------------------------------------------------------------------------------------------------------


def ordered(names: Iterable[str], seed: int, failed: Iterable[str] = ()) -> list[str]:
    """Test ids in the order in which they run."""
    names, failed = list(names), set(failed)
    cases = Counter(name.partition("[")[0] for name in names)

    def key(name: str) -> tuple[int, bytes]:
        kind = 0 if name in failed else 1 if cases[name.partition("[")[0]] <= RARE else 2
        return kind, hashlib.sha256(f"{seed} {name}".encode()).digest()

    return sorted(names, key=key)


def read(path: Path) -> tuple[list[dict], int]:
    """What a run wrote: its results, one for each test, and how many tests were collected. Half a line is left out."""
    results: dict[str, dict] = {}
    collected = 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:  # the run was ended while it wrote
            continue
        if "collected" in found:
            collected = found["collected"]
        elif results.get(found["test"], {}).get("outcome") != "failed":
            results[found["test"]] = found
    return list(results.values()), collected


# ---- why a test failed -----------------------------------------------------------------------------------------------


def normalised(message: str) -> str:
    """Its first line, numbers and addresses replaced: the same for all tests that fail in the same way."""
    first = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return re.sub(r"0x[0-9a-fA-F]+|\d+(\.\d+)?(e[+-]?\d+)?", "N", first)[:160]


def cause(raised: pytest.ExceptionInfo) -> dict[str, str]:
    """Type, first line and the innermost frame of ours, of the test's where none of ours is among them."""
    package = getattr(sys.modules.get("drsn_kernels"), "__file__", None)
    folder = Path(package).resolve().parent if package else None
    frames = [(Path(str(entry.path)).resolve(), entry) for entry in raised.traceback]
    ours = [frame for frame in frames if folder in frame[0].parents]
    place = ""
    if frames:
        path, entry = (ours or frames)[-1]
        name = path.relative_to(folder.parent) if ours else path.name
        place = f"{name}:{entry.lineno + 1} in {entry.name}"
    return {"type": raised.type.__name__, "message": normalised(str(raised.value)), "where": place}


# ---- the plugin ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu_suite")
    group.addoption("--suite-results", type=Path, required=True, metavar="FILE", help="a line of JSON for each test")
    group.addoption("--suite-seed", type=int, default=0, metavar="N", help="of the order of the common tests")
    group.addoption("--suite-earlier", type=Path, metavar="FILE", help="results of an earlier run: its failures first")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Sampling(config), "gpu_suite sampling")


class Sampling:
    def __init__(self, config: pytest.Config) -> None:
        self.options = config.option
        self.worker = hasattr(config, "workerinput")
        self.failed = False
        if not self.worker:
            self.options.suite_results.write_text("")

    def _write(self, line: dict) -> None:
        with open(self.options.suite_results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)  # after `-m` and `-k`
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        earlier = read(self.options.suite_earlier)[0] if self.options.suite_earlier else []
        failed = [one["test"] for one in earlier if one["outcome"] == "failed"]
        names = ordered((item.nodeid for item in items), self.options.suite_seed, failed)
        place = {name: number for number, name in enumerate(names)}
        items.sort(key=lambda item: place[item.nodeid])
        if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
            self._write({"collected": len(items)})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        return True if time.time() > end() else None  # True: done, and nothing to report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo):
        report = yield
        if report.failed:
            self.failed = True
            report.user_properties.append(("cause", cause(call.excinfo)))
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.worker:
            last = report.longreprtext.strip().splitlines()[-1]
            found = {"type": "collection error", "message": normalised(last), "where": report.nodeid}
            self._write({"test": report.nodeid, "outcome": "failed", "seconds": 0, "cause": found})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker or (report.outcome == "passed" and report.when != "call"):
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:  # without a cause: the worker's process ended
            crash = {"type": "crash", "message": "the process ended while the test ran", "where": ""}
            line["cause"] = dict(report.user_properties).get("cause", crash)
        self._write(line)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """A process that has lost its device makes room for another, instead of failing all tests that are left."""
        if self.failed and device_is_lost():
            if self.worker:
                os._exit(1)  # pytest-xdist starts a new worker; this test is failed already
            pytest.exit("a kernel's error has made the device unusable in this process", returncode=1)
        self.failed = False
