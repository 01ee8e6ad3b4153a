"""benchmarks/gpu_suite.py: what it says without a GPU, and how it runs and reports steps (fake ones here)."""

import contextlib
import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from drsn_kernels.bench import compare, record

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"device": "a GPU", "driver": "1.2", "commit": "abc"}


@pytest.fixture(scope="module")
def suite():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import gpu_suite  # takes ROOT out of sys.path again
    finally:
        sys.path[:] = [entry for entry in sys.path if entry != str(ROOT)]
    return gpu_suite


def python(suite, name: str, code: str, seconds: float = 60, **options):
    return suite.Step(name, (sys.executable, "-c", code), seconds, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        "error: there is no CUDA device, which all of this needs; without one: make test"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_pytest_without_a_gpu_where_one_is_required(tmp_path):
    """Nothing is collected, let alone skipped and called a success."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-m", "gpu", "--require-gpu"]
    done = subprocess.run([*command, "-c", str(ROOT / "pyproject.toml")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --require-gpu: there is no CUDA device" and "collected" not in done.stdout


def test_a_step_that_fails_does_not_stop_the_others(suite, tmp_path):
    chosen = [
        python(suite, "good", "print('all is ``` well')"),
        python(suite, "bad", "import sys; print('to stderr', file=sys.stderr); sys.exit(3)"),
        suite.Step("no such program", ("/nonexistent/program",), 60),
        python(suite, "not here", "raise SystemExit(1)", absent="the tool is not present"),
        python(suite, "told", "import os; print(os.environ['TOLD'], os.getcwd())", env={"TOLD": "x1"}, cwd=tmp_path),
    ]
    assert suite.run_all(chosen, tmp_path, MACHINE, ["Nothing was compared."]) == 1
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
    for row in ("| device | a GPU |", "| good | passed | 0 |", "| bad | failed | 3 |", "``````text\nall is ``` well"):
        assert row in markdown


def test_all_passed(suite, tmp_path):
    chosen = [python(suite, "good", "pass"), python(suite, "not here", "", absent="compute-sanitizer is not present")]
    assert suite.run_all(chosen, tmp_path, MACHINE) == 0
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert "passed" in (tmp_path / "report.md").read_text().splitlines()[0]


def test_a_step_that_takes_too_long_ends_with_its_children(suite, tmp_path):
    """The step's child holds a lock, which only its end gives back."""
    held = tmp_path / "held"
    child = f"import fcntl, time; file = open({str(held)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    child += "print('holding', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    chosen = [python(suite, "slow", parent, seconds=5), python(suite, "next", "pass")]
    assert suite.run_all(chosen, tmp_path, MACHINE) == 1
    slow, after = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert (slow["state"], slow["exit_code"], slow["tail"]) == ("timed out", None, "holding")
    assert after["state"] == "passed"
    with open(held, "w") as file:
        for _ in range(100):  # a killed process is gone soon, not at once
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
    pytest.fail("the step's child is still running")


def test_a_run_that_is_cut_short_does_not_report_success(suite, tmp_path, monkeypatch):
    def interrupted(step, logs, run=suite.run):
        if step.name == "second":
            raise KeyboardInterrupt
        return run(step, logs)

    monkeypatch.setattr(suite, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.run_all([python(suite, "first", "pass"), python(suite, "second", "pass")], tmp_path, MACHINE)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False and [s["state"] for s in report["steps"]] == ["passed", "not reached"]


def test_the_steps(suite, tmp_path):
    by_name = {step.name: step for step in suite.steps(tmp_path, False, tmp_path / "stored.json")}
    assert list(by_name) == ["tests", "gradients", "memcheck", "racecheck", "synccheck", "bench", "launches"]
    assert all("--require-gpu" in by_name[name].command for name in ("tests", "gradients", *suite.SANITIZERS))
    assert by_name["bench"].command[-2:] == ("--compare", str(tmp_path / "stored.json"))
    assert by_name["bench"].cwd != suite.ROOT
    quick = {step.name: step for step in suite.steps(tmp_path, True, None)}
    assert "--quick" in quick["bench"].command and "--compare" not in quick["bench"].command
    assert all(quick[tool].absent == "left out by --quick" for tool in suite.SANITIZERS)


def test_sanitizers_that_are_not_there(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite.shutil, "which", lambda name, path: None)
    found = [step for step in suite.steps(tmp_path, False, None) if step.name in suite.SANITIZERS]
    assert [step.absent for step in found] == ["compute-sanitizer is not present"] * 3


def test_the_selections_of_the_steps_name_tests_that_exist(suite):
    """`pytest -k` with nothing to run would be a failing step on a GPU, and a name that moved would go unseen here."""
    source = (ROOT / "tests" / "test_gpu.py").read_text()
    assert "def test_a_small_step(" in source and source.count("def test_gradients_of_") >= 2


@pytest.mark.parametrize("module, step", [("drsn_kernels", "bench"), ("benchmarks", "launches")])
def test_the_commands_of_the_steps_exist(suite, tmp_path, module, step):
    command = {s.name: s for s in suite.steps(tmp_path, True, tmp_path / "stored.json")}[step].command
    if module == "benchmarks":
        assert (ROOT / "benchmarks" / f"{command[2].split('.')[1]}.py").is_file()
        return
    usage = subprocess.run([*command[:4], "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert usage.returncode == 0, usage.stderr
    assert all(option in usage.stdout for option in command if option.startswith("--"))


def test_a_stored_run_has_the_name_of_its_gpu(suite):
    path = suite.stored_run("NVIDIA H100 80GB HBM3")
    assert path == ROOT / "docs" / "benchmarks" / "nvidia-h100-80gb-hbm3" / "results.json"


def test_the_stored_run_of_the_h200_is_one_the_gate_compares_with(suite):
    """In the present format, GPU time throughout; nothing has changed against itself, and a slower row is found."""
    path = suite.stored_run("NVIDIA H200")
    assert json.loads(path.read_text("utf-8"))["format"] == record.FORMAT
    stored = record.read_json(path)
    assert {one["device"] for one in stored} == {"NVIDIA H200"} and {one["clock"] for one in stored} == {"graph"}
    assert compare.missing(stored, stored) == []
    lines, regression = compare.report(compare.compare(stored, stored))
    assert not regression and lines == ["82 rows compared, 0 regressions; geometric mean x1.000 of the stored"]
    slower = [one | {"ratio_to_floor": 1.2 * one["ratio_to_floor"]} for one in stored]
    assert compare.report(compare.compare(slower, stored))[1]


@pytest.mark.parametrize("quick, options", [(False, []), (True, ["--quick", "--only", "bench"])])
def test_the_command_with_a_gpu(suite, tmp_path, monkeypatch, capsys, quick, options):
    """main on a GPU that is only claimed: what would run, what it is compared with, and the notice where there is
    nothing to compare with."""
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU of nobody's")
    monkeypatch.setattr(suite, "describe_machine", lambda: MACHINE)
    monkeypatch.setattr(suite, "run", lambda step, logs: ran.append(step) or suite.Result(step.name, "", "passed", 0))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert suite.main(["--out", str(tmp_path), *options]) == 0
    assert len(ran) == (1 if quick else 7) and "--compare" not in [part for step in ran for part in step.command]
    notice = capsys.readouterr().out.splitlines()[0]
    assert notice.startswith("::notice::Nothing was compared") and "a-gpu-of-nobody-s/results.json" in notice
    stored = tmp_path / "stored.json"
    stored.write_text("{}")
    ran.clear()
    assert suite.main(["--out", str(tmp_path), "--baseline", str(stored), *options]) == 0
    assert [step.command[-1] for step in ran if step.name == "bench"] == [str(stored)]
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path), "--baseline", str(tmp_path / "none.json")])
    assert "--baseline must be a file" in capsys.readouterr().err
