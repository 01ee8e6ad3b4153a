"""benchmarks/gpu_suite.py: what it says without a GPU, how it runs and reports steps (fake ones and tiny ones here)."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT

from benchmarks import gpu_bench, installed
from benchmarks import gpu_report as report
from benchmarks import gpu_suite as suite
from benchmarks.report import compare, missing, verdict
from benchmarks.rows import FORMAT, read_json

MACHINE = {"device": "a GPU", "driver": "1.2", "commit": "abc"}
CASE = "abs_mean-C-128x16x128-fp32-forward"


def python(name: str, code: str, share: float = 1, **options):
    return suite.Step(name, (sys.executable, "-c", code), share, **options)


def ends_in(seconds: float) -> float:
    return time.monotonic() + seconds


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        "error: there is no CUDA device, which all of this needs; without one: make test"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_pytest_without_a_gpu_where_one_is_required(tmp_path):
    """Nothing is collected, let alone skipped and called a success."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-m", "gpu", "--require-gpu"]
    done = subprocess.run([*command, "-c", str(ROOT / "pyproject.toml")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --require-gpu: there is no CUDA device" and "collected" not in done.stdout


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "soon"], ["--only", "gradients"]])
def test_arguments_that_are_wrong(options, capsys):
    with pytest.raises(SystemExit) as raised:
        suite.main(["--out", "nowhere", *options])
    assert raised.value.code == 2 and options[1] in capsys.readouterr().err


# ---- steps and their time --------------------------------------------------------------------------------------------


def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    chosen = [
        python("good", "print('all is ``` well')"),
        python("bad", "import sys; print('to stderr', file=sys.stderr); sys.exit(3)"),
        suite.Step("no such program", ("/nonexistent/program",), 1),
        python("not here", "raise SystemExit(1)", absent="the tool is not present"),
        python("told", "import os; print(os.environ['TOLD'], os.getcwd())", env={"TOLD": "x1"}, cwd=tmp_path),
    ]
    assert suite.run_all(chosen, tmp_path, ends_in(300), MACHINE, notes=["Nothing was compared."]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["environment"] == MACHINE and report["passed"] is False
    steps = {step["name"]: step for step in report["steps"]}
    assert list(steps) == [step.name for step in chosen]
    assert (steps["good"]["state"], steps["good"]["exit_code"]) == ("passed", 0)
    assert (steps["bad"]["state"], steps["bad"]["exit_code"], steps["bad"]["tail"]) == ("failed", 3, "to stderr")
    assert steps["no such program"]["state"] == "failed" and "No such file" in steps["no such program"]["tail"]
    assert (steps["not here"]["state"], steps["not here"]["exit_code"]) == ("the tool is not present", None)
    assert steps["told"]["tail"] == f"x1 {tmp_path}"
    assert (tmp_path / "logs" / "good.log").read_text() == "all is ``` well\n"
    markdown = (tmp_path / "report.md").read_text()
    assert "failed" in markdown.splitlines()[0] and "Nothing was compared." in markdown
    for row in ("device a GPU; driver 1.2", "| bad | 1 | failed: to stderr |", "| good | passed |", "| bad | failed |"):
        assert row in markdown


def test_all_passed(tmp_path):
    chosen = [python("good", "pass"), python("not here", "", absent="compute-sanitizer is not present")]
    assert suite.run_all(chosen, tmp_path, ends_in(60), MACHINE) == 0
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert "passed" in (tmp_path / "report.md").read_text().splitlines()[0]


def test_shares_of_the_time():
    """What is absent takes none, and what a step leaves over goes to the later ones."""
    one, two, absent = (python(name, "", share) for name, share in (("one", 30), ("two", 10), ("absent", 60)))
    absent = python("absent", "", 60, absent="not here")
    assert suite.allotted([one, absent, two], 80) == 60
    assert suite.allotted([two], 80 - 5) == 75
    assert suite.allotted([one, two], -1) == 0


def test_a_step_knows_when_to_end(tmp_path):
    before = time.time()
    result = suite.run(python("step", f"import os; print(os.environ[{suite.END!r}])"), tmp_path, 50)
    assert result.state == "passed" and result.limit == 50
    assert before + 40 <= float(result.tail) <= time.time() + 40  # a fifth before the end


def test_a_step_that_takes_too_long_ends_with_its_children(tmp_path, monkeypatch):
    """The step's child holds a lock, which only its end gives back. Its time is over once it does."""
    held, log = tmp_path / "held", tmp_path / "slow.log"

    class Process(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            while timeout and self.poll() is None and not log.read_text():
                time.sleep(0.01)
            return super().wait(timeout and 0.01)

    child = f"import fcntl, time; file = open({str(held)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    child += "print('holding', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(subprocess, "Popen", Process)
    slow = suite.run(python("slow", parent), tmp_path, 600)
    assert (slow.state, slow.exit_code, slow.tail) == ("timed out", None, "holding")
    with open(held, "w") as file:
        for _ in range(3000):  # a killed process is gone soon, not at once
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
    pytest.fail("the step's child is still running")


def test_a_step_without_time_is_no_success(tmp_path):
    assert suite.run_all([python("late", "pass")], tmp_path, ends_in(-1), MACHINE) == 1
    (late,) = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert late["state"] in ("timed out", "not reached")


def test_a_run_that_is_cut_short_does_not_report_success(tmp_path, monkeypatch):
    def interrupted(step, logs, seconds, run=suite.run):
        if step.name == "second":
            raise KeyboardInterrupt
        return run(step, logs, seconds)

    monkeypatch.setattr(suite, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chosen = [python("first", "pass"), python("second", "pass")]
        suite.run_all(chosen, tmp_path, ends_in(60), MACHINE)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False and [s["state"] for s in report["steps"]] == ["passed", "not reached"]


def test_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(suite.shutil, "which", lambda name, path: f"/cuda/bin/{name}")
    monkeypatch.setattr(suite, "cores", lambda: 16)
    monkeypatch.setattr(suite, "has_xdist", lambda: True)
    by_name = {step.name: step for step in suite.steps(tmp_path, False, 17, 15)}
    assert list(by_name) == list(suite.SHARES) == ["compile", "tests", "memcheck", "racecheck", "bench", "sweep"]
    for name in ("tests", *suite.SANITIZERS):
        command = by_name[name].command
        assert "--require-gpu" in command and by_name[name].cwd == tmp_path
        assert command[command.index("--suite-seed") + 1] == "17"
        assert ("-n" in command) == (name == "tests")
    assert by_name["memcheck"].command[:3] == ("/cuda/bin/compute-sanitizer", "--tool", "memcheck")
    assert "--error-exitcode" not in by_name["racecheck"].command  # known races are no failure
    quick = {step.name: step for step in suite.steps(tmp_path, True, 17, 3)}
    assert all(quick[tool].absent == "left out by --quick" for tool in suite.SANITIZERS)
    assert (by_name["sweep"].absent, quick["sweep"].absent) == ("", "left out below 15 minutes")
    (named,) = suite.steps(tmp_path, False, 17, 3, ["sweep"])
    assert (named.name, named.absent) == ("sweep", "")
    monkeypatch.setattr(suite.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(suite, "has_xdist", lambda: False)
    bare = {step.name: step for step in suite.steps(tmp_path, False, 17, 15)}
    assert all(bare[tool].absent == "compute-sanitizer is not present" for tool in suite.SANITIZERS)
    assert "-n" not in bare["tests"].command and "no:xdist" in bare["tests"].command


def test_what_a_sweep_refused_is_in_the_report(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "refused.json").write_text(json.dumps({"map-A-4x4x4": {"TILE=64": "y differs"}}))
    result = suite.Result("sweep", "", "failed", 1, 3.0, 5.0, tail="out of time")
    log = "compiled in 3 s\nmap-A-4x4x4: 7 rows\n  TILE=64 WRONG: y differs\n"
    found, _ = report.examined(result, log, tmp_path, None)
    assert (found.state, found.done) == ("failed", "1 units")
    assert [(cause.what, cause.where) for cause in found.causes] == [("TILE=64: y differs", "map-A-4x4x4")]


def test_the_selections_of_the_steps_name_tests_that_exist():
    """`pytest -k` with nothing to run would be a failing step on a GPU, and a name that moved would go unseen here."""
    assert "def test_a_small_step(" in Path(suite.SMALL_STEPS[0]).read_text() and "small_step" in suite.SMALL_STEPS


def test_a_stored_run_has_the_name_of_its_gpu():
    path = suite.stored_run("NVIDIA H100 80GB HBM3")
    assert path == ROOT / "docs" / "benchmarks" / "nvidia-h100-80gb-hbm3" / "results.json"


def test_the_stored_run_of_the_h200_is_one_the_gate_compares_with():
    """In the present format, GPU time throughout; nothing has changed against itself, and a slower row is found."""
    path = suite.stored_run("NVIDIA H200")
    assert json.loads(path.read_text("utf-8"))["format"] == FORMAT
    stored = read_json(path)
    assert {one["device"] for one in stored} == {"NVIDIA H200"}
    assert {one["clock"] for one in stored} == {"graph"}
    assert missing(stored, stored) == []
    lines, regression = verdict(compare(stored, stored))
    assert not regression and lines == ["71 rows compared, 0 regressions; geometric mean x1.000 of the stored"]
    slower = [one | {"ratio_to_floor": 1.2 * one["ratio_to_floor"]} for one in stored]
    assert verdict(compare(slower, stored))[1]


@pytest.mark.parametrize("options, ran", [([], 5), (["--quick", "--only", "tests", "memcheck"], 1)])
def test_the_command_with_a_gpu(tmp_path, monkeypatch, capsys, options, ran):
    """main on a GPU that is only claimed: what would run and for how long, and the notice where nothing is compared."""
    limits = {}

    def run(step, logs, seconds):
        (logs / f"{step.name}.log").write_text("")
        limits[step.name] = seconds
        return suite.Result(step.name, "", "passed", 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU of nobody's")
    monkeypatch.setattr(suite, "describe_machine", lambda: MACHINE)
    monkeypatch.setattr(suite, "_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    out = ["--out", str(tmp_path)]
    assert suite.main([*out, "--seed", "5", *options]) == 1  # no test ran and no row was written: no success
    assert len(limits) == ran
    minutes = 60 * (3 if "--quick" in options else 8)
    first = next(iter(limits))
    shares = sum(share for name, share in suite.SHARES.items() if name != "sweep")  # which takes more minutes
    share = suite.SHARES[first] / (suite.SHARES[first] if options else shares)
    assert minutes * share / 2 < limits[first] <= minutes * share  # of which a little has passed
    notice, said = capsys.readouterr().out.splitlines()[:2]
    assert notice.startswith("::notice::Nothing was compared") and "a-gpu-of-nobody-s/results.json" in notice
    assert said.startswith(f"seed 5, {minutes // 60} minutes")
    steps = {step["name"]: step["state"] for step in json.loads((tmp_path / "report.json").read_text())["steps"]}
    assert steps["tests"] == "failed" and steps["memcheck"] == ("left out by --quick" if options else "failed")
    with pytest.raises(SystemExit):
        suite.main([*out, "--baseline", str(tmp_path / "none.json")])
    assert "--baseline must be a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "drsn_kernels").is_dir(), reason="the package's sources have been taken away")
def test_a_source_tree_without_an_installed_package(monkeypatch, tmp_path):
    pytest.importorskip("setuptools")
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installed.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "site"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    installed.ensure_installed()
    assert os.environ["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "site"), str(tmp_path)])
    code = "import drsn_kernels, drsn_kernels._build as b; print(drsn_kernels.__file__, b.MISSING)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith(str(tmp_path / "site" / "drsn_kernels")) and "DRSN_NATIVE=0" in done.stdout


# ---- the benchmark, on the CPU ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_bench(tmp_path_factory):
    """The commands of the steps "compile" and "bench", on one small case."""
    out = tmp_path_factory.mktemp("bench")
    small = ["--device", "cpu", "--cases", CASE, "--compile", "none", "--rounds", "2"]
    for what in (["compile", "--jobs", "1"], ["time", "--out", str(out)]):
        command = [sys.executable, "-m", "benchmarks.gpu_bench", *what, *small]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and f"{CASE} " in done.stdout, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_benchmark_and_its_comparison(tiny_bench, tmp_path):
    found = report.benchmark(tiny_bench, None)
    assert found.cases == 1 and not found.regressions and not found.causes and not found.compared

    def written(file: Path, **changes) -> Path:
        """The results with another ratio, without the spread that two rounds on a busy machine have."""
        results = json.loads((tiny_bench / "results.json").read_text())
        results["rows"] = [row | {"ratio_iqr": 0.0} | changes for row in results["rows"]]
        file.write_text(json.dumps(results))
        return file

    written(tmp_path / "results.json", ratio_to_floor=2.0)
    stored = tmp_path / "stored.json"
    for before, regressions in ((2.0, 0), (1.9, 0), (1.5, 1)):  # the tolerance is 15 %
        now = report.benchmark(tmp_path, written(stored, ratio_to_floor=before))
        assert len(now.regressions) == regressions
        assert f"1 rows compared, {regressions} regressions" in now.compared and "stored.json" in now.compared
    result = report.Result("bench", "gpu_bench", "passed", 0)
    (tmp_path / "bench").mkdir()
    (tmp_path / "results.json").replace(tmp_path / "bench" / "results.json")
    found, bench = report.examined(result, "", tmp_path, stored)
    assert found.state == "failed" and found.done == "1 cases, 1 regressions" and not found.causes
    assert bench.regressions[0].startswith("REGRESSION") and bench.regressions[0] in report.page({}, [found], bench, [])
    written(stored, device="another")
    found, bench = report.examined(result, "", tmp_path, stored)
    assert found.state == "passed" and bench.compared.startswith("nothing was compared: the stored run was made with")


@pytest.mark.slow
def test_a_benchmark_that_is_cut_short(monkeypatch, tmp_path, tiny_bench):
    """The rows of what was done are there; a case that raises or is refused is a cause, and does not end the run."""
    rows = json.loads((tiny_bench / "results.json").read_text())["rows"]
    cases = gpu_bench.plan()[:4]
    asked = []

    def measure(case, *rest):
        asked.append(case)
        if case is cases[1]:
            raise RuntimeError("of case 1\nand more")
        monkeypatch.setenv(suite.END, "0" if case is cases[2] else "inf")
        return [row | {"case": case.id} for row in rows], {"port": "off by 0.25"} if case is cases[0] else {}

    monkeypatch.setattr(gpu_bench, "measure", measure)
    options = SimpleNamespace(device="cpu", rounds=1, out=tmp_path, compile="none")
    assert gpu_bench.time_cases(cases, options) == 1 and asked == cases[:3]
    found = report.benchmark(tmp_path, None)
    assert found.cases == 2
    assert [(cause.what, cause.example) for cause in found.causes] == [
        ("port: off by N", cases[0].id), ("all: raised RuntimeError: of case N", cases[1].id)
    ]  # fmt: skip


def test_the_plan():
    """The headline cases first, each once, and of the providers of ours only the preferred one."""
    cases = gpu_bench.plan()
    assert len(cases) == len(set(cases)) > 100
    assert cases[0].id == "shrink_train-G-512x64x256-fp32-both"
    assert {case.group for case in cases[:40]} >= set("ABCDEGN")
    names = [provider.name for provider in gpu_bench.wanted(cases[0], "cpu")]
    assert names[:4] == ["floor", "port", "best", "best-compiled"] and len(names) == 5


# ---- the report ------------------------------------------------------------------------------------------------------


def line_of(test: str, outcome: str, **cause) -> str:
    return json.dumps({"test": test, "outcome": outcome, "seconds": 0.1} | ({"cause": cause} if cause else {})) + "\n"


def test_failures_are_grouped_by_cause(tmp_path):
    same = {"type": "RuntimeError", "message": "N is not N", "where": "drsn_kernels/ops.py:7 in shrink"}
    results = tmp_path / "tests.jsonl"
    results.write_text(
        json.dumps({"collected": 9}) + "\n"
        + line_of("a[1]", "failed", **same) + line_of("b", "passed")
        + line_of("c", "failed", **(same | {"where": "elsewhere"}))
        + line_of("a[2]", "failed", **same) + line_of("d", "skipped") + line_of("a[2]", "passed") + '{"test": "half a l'
    )  # fmt: skip
    result = report.Result("tests", "pytest", "timed out", None, 5, 5)
    found, _ = report.examined(result, "", tmp_path, None)
    assert found.state == "timed out" and found.done == "1 passed, 3 failed, 1 skipped, 4 of 9 not reached"
    assert [(c.what, c.where, c.count, c.example) for c in found.causes] == [
        ("RuntimeError: N is not N", "drsn_kernels/ops.py:7 in shrink", 2, "a[1]"),
        ("RuntimeError: N is not N", "elsewhere", 1, "c"),
    ]


def test_a_compilation_that_takes_longer_is_no_failure(tmp_path):
    """The benchmark compiles what is missing, and shows what does not compile."""
    log = f"{CASE} triton: RuntimeError: no\n{CASE} 12.5 s\n{CASE} 0.5 s\n"
    for state, code, expected in (("timed out", None, "cut short"), ("failed", 1, "failed"), ("passed", 0, "passed")):
        found, _ = report.examined(report.Result("compile", "", state, code), log, tmp_path, None)
        assert found.state == expected and found.done == "2 cases" and found.is_bad == (expected == "failed")


@pytest.mark.parametrize("line, state", [(0, "failed"), (1, "passed")])
def test_a_sanitizer_fails_by_what_it_finds(tmp_path, monkeypatch, line, state):
    """Its tests passed both times; a race on a line that is known does not fail it, one on another line does."""
    place = "Write access at k+0x10 in k.py:" + str(line + 1)
    log = f"========= Error: Race reported between {place}\n=========     and {place} [8 hazards]\n"
    log += "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    (tmp_path / "backends" / "gpu").mkdir(parents=True)
    (tmp_path / "backends" / "gpu" / "k.py").write_text("first\n    second\n")
    (tmp_path / "racecheck.jsonl").write_text('{"collected": 1}\n' + line_of("a", "passed"))
    sanitizer = report.sanitizer
    monkeypatch.setattr(sanitizer, "KNOWN_RACES", (sanitizer.KnownRace("k", "k.py", "second", "it is so"),))
    monkeypatch.setattr(report.dk, "__file__", str(tmp_path / "__init__.py"))
    found, _ = report.examined(report.Result("racecheck", "", "passed", 0), log, tmp_path, None)
    assert (found.state, found.done) == (state, f"1 passed, {line} known races")
    assert [cause.where for cause in found.causes] == ["k in k.py:1"][line:]
    missing, _ = report.examined(report.Result("racecheck", "", "failed", 1), "Device not supported", tmp_path, None)
    assert not missing.is_bad and "does not support" in missing.state


def test_no_test_at_all_is_no_success(tmp_path):
    found, _ = report.examined(report.Result("tests", "pytest", "passed", 0), "", tmp_path, None)
    assert found.state == "failed" and found.done == "no test ran"


def test_the_report_is_a_page():
    """However much went wrong; what is left out is said to be in report.json."""
    causes = tuple(report.Cause("tests", f"Error{i}: " + "long | " * 99, "x.py:1 in f", i, "t") for i in range(99))
    results = [report.Result(name, "c", "failed", 1, 1, 2, "did", causes) for name in ("tests", "memcheck", "bench")]
    results += [report.Result(name, "c", "passed") for name in ("compile", "racecheck")]
    bench = report.Benchmark(("figure",) * 99, ("REGRESSION row",) * 99, "99 rows compared", (), 99)
    lines = report.page(MACHINE, results, bench, ["a note", "another"]).splitlines()
    assert len(lines) <= 70 and sum("more: report.json" in text for text in lines) == 3
    assert lines.index("## Failed, by cause") < lines.index("## Figures and aims") < lines.index("## Steps")
    rows = [text for text in lines if text.startswith("| tests | ")]
    assert all(text.replace("\\|", "").count("|") == 6 and len(text) < 400 for text in rows[:-1])
