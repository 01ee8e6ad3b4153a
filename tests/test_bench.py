"""The benchmark suite itself: what it selects, refuses and writes. Nothing here judges a time."""

import csv
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from repository import ROOT

from benchmarks import run
from benchmarks.calls import FLOOR, PORT, Provider
from benchmarks.cases import MODES, OPERATORS, Case, select
from benchmarks.rows import COLUMNS, ENVIRONMENT, read_json
from benchmarks.run import Settings, main
from drsn_kernels.backends import cpu
from drsn_kernels.demo.timing import Call, interleaved

QUICK = ["--device", "cpu", "--quick", "--shapes", "F", "--ops", "shrink_train", "shrink_eval",
         "--rounds", "2", "--compile", "none"]  # fmt: skip
ABOUT = {name: "" for name in ENVIRONMENT}
ONCE = Settings(rounds=1, compile="none")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0)


# ---- what is timed ----


def test_quick_is_small_and_full_has_everything():
    quick, standard, full = (select("ABCDE", grid) for grid in ("quick", "standard", "full"))
    assert len(quick) <= 25 and len(quick) < len(standard) < len(full)
    assert {case.op for case in full} >= {*OPERATORS, "paper_network", "network_1d", "network_image"}
    assert {(case.mode, case.dtype, case.channels_last) for case in full if case.op == "unit"} >= set(
        itertools.product(MODES, ("fp32", "bf16"), (False, True))
    )
    assert {case.id for case in standard} <= {case.id for case in full}
    assert len({case.id for case in full}) == len(full)


def test_a_single_sample_is_not_trained_on():
    alone = [case for case in select("F", "full") if case.shape[0] == 1]
    assert alone and {case.op for case in alone} == {"abs_mean", "soft_threshold", "shrink_eval"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"letters": "AZ"}, "shapes takes letters of ABCDEFG, got Z"),
        ({"letters": ""}, "got none"),
        ({"grid": "all"}, "grid must be one of quick, standard, full, got 'all'"),
        ({"ops": ["relu"]}, "ops must be of abs_mean, .*, got relu"),
        ({"letters": "A", "grid": "quick", "ops": ["unit"]}, "nothing to time"),
    ],
)
def test_unknown_selections_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**{"letters": "A", "grid": "full"} | arguments)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPERATORS)
def test_every_provider_of_an_operator_passes_its_check_and_gets_a_row(op, mode):
    cases = [Case(op, "F", (4, 6, 40), mode)]
    if mode == "both":
        cases += [replace(cases[0], dtype="bf16"), Case(op, "F", (4, 6, 5, 8), mode, channels_last=True)]
    for case in cases:
        rows, refused = run.measure(case, ONCE, ABOUT)
        assert refused == {}
        assert {one["provider"] for one in rows} >= {"floor", "port", "best", "torch"}
        assert all(set(one) == {*COLUMNS, "seconds"} and one["clock"] == "wall" for one in rows)


@pytest.mark.slow
def test_a_network_is_stepped_beside_its_resnet():
    rows, refused = run.measure(Case("paper_network", "N", (4, 1, 64), "step"), ONCE, ABOUT)
    kept = {one["provider"]: one["saved_bytes"] for one in rows}
    assert refused == {} and kept["floor"] < kept["port"]
    assert all(one["gb_s"] == "" for one in rows)  # no floor in bytes


@pytest.mark.parametrize("name", ["cpu", "torch", "port"])
def test_peak_and_saved_bytes_are_whole(name):
    if name == "cpu" and cpu.MISSING:
        pytest.skip("no compiled CPU kernels")
    case = Case("shrink_train", "F", (2, 4, 1 << 16))  # 2 MiB: the cpu backend's outputs come from its arena
    rows, _ = run.measure(case, ONCE, ABOUT)
    one = next(r for r in rows if r["provider"] == name)
    assert one["peak_bytes"] >= 2 * case.bytes and 0 < one["saved_bytes"] < one["peak_bytes"]  # y and dx at least
    if name != "port":
        assert one["cost_saved_bytes"] == pytest.approx(one["saved_bytes"], rel=0.01)


def test_the_compiled_form_is_checked_like_the_others():
    case = Case("soft_threshold", "F", (2, 3, 16), "forward")
    rows, refused = run.measure(case, replace(ONCE, compile="best"), ABOUT)
    assert refused == {} and "best-compiled" in {one["provider"] for one in rows}


def test_threads_are_measured_beside_the_floors_own():
    rows, refused = run.measure(Case("scaling", "T", (4, 6, 40), "forward"), ONCE, ABOUT)
    names = {one["provider"] for one in rows}
    assert refused == {} and {"floor", "floor-1-thread"} < names and len(names) == 4


# ---- the check ----


def test_a_refused_row_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(run, "objection", lambda judge, call, clock: "y differs")
    assert main(QUICK) == 1
    out = capsys.readouterr().out
    assert "WRONG: y differs" in out and "rows refused" in out


# ---- timing ----


def test_calls_take_turns_in_a_new_order_each_round_and_what_is_untimed_stays_out():
    order = []
    calls = {
        "a": Call(lambda: order.append("a")),
        "b": Call(lambda: order.append("b"), lambda: order.append("before b")),
    }

    def clock(call):
        if call.before:
            call.before()
        call.run()
        return {"time": len(order)}

    samples = interleaved(calls, rounds=20, clock=clock, warmup=1)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    turns = [["a", "before b", "b"], ["before b", "b", "a"]]
    assert len(rounds) == 21 and all(turn in turns for turn in rounds) and all(turn in rounds for turn in turns)
    # each sample is of its own call: the clock's reading is where the call stands in the order
    for name in calls:
        assert [order[at - 1] for at in samples[name]["time"]] == [name] * 20


# ---- files ----


def test_the_command_writes_json_csv_and_plots(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "summary" in out and "not measured  paper network" in out and "aim: at most 1" in out
    rows = read_json(tmp_path / "results.json")
    assert {one["op"] for one in rows} == {"shrink_train", "shrink_eval"}
    for one in rows:
        assert one["rounds"] == len(one["seconds"]) == 2
        assert one["torch"] == torch.__version__ and one["device"] and one["compiler"] and one["commit"]
        assert one["launches"] > 0 and one["peak_bytes"] > 0
    port, best = (next(r for r in rows if r["provider"] == name and r["mode"] == "both") for name in ("port", "best"))
    assert port["saved_bytes"] > best["saved_bytes"] > 0
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS and len(table) == len(rows) and table[0]["shape"] == "16x4x2048x1"
    assert (tmp_path / "shrink_train-both-fp32.png").stat().st_size > 1000
    command = json.loads((tmp_path / "results.json").read_text("utf-8"))["command"]
    assert command.startswith("python -m benchmarks ")
    page = (tmp_path / "results.md").read_text("utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| shrink_")]
    assert command in page and f"torch: {torch.__version__}" in page and "aim: at most 1" in page
    assert [line.split("|")[1].strip() for line in lines] == list(dict.fromkeys(one["case"] for one in rows))
    assert len({line.count("|") for line in lines}) == 1


def test_without_matplotlib_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    assert "no plots" in (out := capsys.readouterr().out) and "pip install matplotlib" in out
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("text, message", [("no", "is not JSON"), ("{}", "is not a result"),
                                           ('{"format": 1, "rows": [{"case": 1}]}', "lack op, ")])  # fmt: skip
def test_a_file_that_is_no_result_is_refused_before_anything_runs(tmp_path, capsys, text, message):
    path = tmp_path / "a.json"
    path.write_text(text, "utf-8")
    assert main([*QUICK, "--compare", str(path)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and str(path) in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--tolerance", "-1"], "tolerance must be at least 0, got -1"),
        (["--shapes", "XY"], "got XY"),
        (["--shapes", ""], "got none"),
        (["--out", f"{__file__}/inside"], "out must be a folder that can be written, got "),
        (["--slow-down", "cuda=2"], "no case here has a provider 'cuda'"),
        (["--compare", "/nowhere/at/all.json"], "/nowhere/at/all.json"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message, capsys):
    assert main([*QUICK, *arguments]) == 1
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error(capsys):
    assert main([*QUICK, "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["cpu", "cpu=fast", "cpu=0.5", "=2", "cpu=nan", "cpu=inf"])
def test_slow_down_takes_a_provider_and_a_factor(text, capsys):
    with pytest.raises(SystemExit):
        main([*QUICK, "--slow-down", text])
    assert "PROVIDER=FACTOR" in capsys.readouterr().err


# ---- the gate, in the command ----


def test_the_command_exits_with_one_on_a_regression(tmp_path, capsys, monkeypatch):
    speed = {"torch": 4.0}
    monkeypatch.setattr(
        run, "interleaved", lambda calls, *_, **__: {name: {"time": [speed.get(name, 1.0)] * 3} for name in calls}
    )
    one = [*QUICK, "--ops", "shrink_eval"]
    assert main([*one, "--out", str(tmp_path)]) == 0
    again = [*one, "--compare", str(tmp_path / "results.json")]
    assert main(again) == 0
    assert ", 0 regressions; geometric mean x1.000" in capsys.readouterr().out
    speed["torch"] = 6.0
    assert main(again) == 1
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("REGRESSION")]
    assert "torch: 6.000 of the floor, stored 4.000 (x1.50" in line
    assert main([*again, "--tolerance", "0.6"]) == 0


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "interleaved", lambda calls, *_, **__: {name: {"time": [1.0] * 3} for name in calls})
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    return tmp_path / "results.json"


def test_a_provider_that_is_gone_fails_the_gate(stored, capsys, monkeypatch):
    monkeypatch.setattr(run, "providers_of", lambda case, settings: [FLOOR, PORT, Provider("other", "ours", "torch")])
    assert main([*QUICK, "--compare", str(stored)]) == 1
    assert "MISSING shrink_train-F-16x4x2048x1-fp32-both torch: " in capsys.readouterr().out


def test_a_stored_run_without_a_case_of_this_one_is_refused_before_anything_runs(stored, capsys):
    capsys.readouterr()
    assert main(["--device", "cpu", "--quick", "--shapes", "C", "--compare", str(stored)]) == 1
    captured = capsys.readouterr()
    assert "no row of ours for any of the" in captured.err and captured.out == ""


@pytest.mark.parametrize("stop, status", [(KeyboardInterrupt(), 130), (RuntimeError("out of luck"), 1)])
def test_what_was_measured_before_a_stop_is_written(tmp_path, capsys, monkeypatch, stop, status):
    right, done = run.measure, []

    def stopped(case, *rest):
        if done:
            raise stop
        done.append(case)
        return right(case, *rest)

    monkeypatch.setattr(run, "measure", stopped)
    assert main([*QUICK, "--out", str(tmp_path)]) == status
    assert {one["case"] for one in read_json(tmp_path / "results.json")} == {done[0].id}
    assert "stopped after 1 of 2 cases" in capsys.readouterr().out


# ---- pytest --benchmark ----


def pytest_run(*arguments):
    command = [str(Path(sys.executable).with_name("pytest")), "-p", "no:cacheprovider", *arguments]
    # with these set pytest prints an error twice
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_pytest_benchmark_runs_a_test_for_each_case_and_provider(tmp_path):
    path = tmp_path / "b.json"
    done = pytest_run("--benchmark", "--benchmark-shapes", "F", "--benchmark-compile", "none", "--benchmark-rounds",
                      "2", "-k", "shrink_eval and (floor or torch)", f"--benchmark-json={path}")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads(path.read_text("utf-8"))["benchmarks"]
    assert [b["param"] for b in stored] == [f"shrink_eval-F-16x4x2048x1-fp32-forward-{p}" for p in ("floor", "torch")]
    for one in stored:
        assert one["group"] == "shrink_eval-F-16x4x2048x1-fp32-forward" and one["stats"]["rounds"] >= 2
        assert one["stats"]["median"] * 1e3 == pytest.approx(one["extra_info"]["median_ms"], rel=1e-3)
        assert one["extra_info"]["commit"]


@pytest.mark.slow
def test_pytest_alone_collects_no_benchmark_and_the_flag_nothing_else():
    done = pytest_run("--collect-only", "benchmarks", "benchmarks/bench_operators.py")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "test_speed" not in done.stdout
    assert "pytest --benchmark" in done.stdout
    done = pytest_run("--benchmark", "--collect-only")
    assert done.returncode == 0 and "tests/" not in done.stdout
    assert "paper_network-N-128x1x2048-fp32-step-port" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("option, value, status, message", [
    ("shapes", "Z", pytest.ExitCode.INTERRUPTED, "shapes takes letters of ABCDEFG, got Z"),
    ("rounds", "0", pytest.ExitCode.USAGE_ERROR, "--benchmark-rounds must be at least 1, got 0"),
])  # fmt: skip
def test_pytest_benchmark_names_what_is_wrong(option, value, status, message):
    done = pytest_run("--benchmark", f"--benchmark-{option}", value)
    assert done.returncode == status and (done.stdout + done.stderr).count(message) == 1
