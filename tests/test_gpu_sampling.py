"""benchmarks/gpu_sampling.py: which GPU tests run first, until when, and what is written about them."""

import json
import os
import subprocess
import sys
import time

import pytest
from repository import ROOT

from benchmarks import gpu_sampling as sampling
from benchmarks import gpu_suite as suite

TESTS = """
import os, sys
from types import SimpleNamespace
import pytest

@pytest.mark.parametrize("i", range(20))
def test_common(i):
    pass

def test_in_the_package():
    import torch
    import drsn_kernels as dk
    dk.shrink(torch.ones(2, 3, 4), lambda pooled: None)

@pytest.fixture
def broken():
    raise OSError("no such thing 17")

def test_whose_fixture_fails(broken):
    pass

def test_skipped():
    pytest.skip("not here")

@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="it would end pytest")
def test_that_ends_its_process():
    os._exit(3)

@pytest.mark.parametrize("i", range(2))
def test_that_loses_the_device(i):
    if "LOSE" in os.environ:
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
        sys.modules["torch"] = SimpleNamespace(cuda=cuda)
        assert not "an illegal memory access"
"""


@pytest.fixture
def run(tmp_path):
    """The command of the step "tests", on TESTS: what it wrote, and its exit code."""
    (tmp_path / "test_of_all_kinds.py").write_text(TESTS)

    def run(jobs: int, *options: str, seconds: float = 600, **env: str) -> tuple[dict[str, dict], int, int]:
        step = suite.pytest_step("tests", tmp_path, 3, [str(tmp_path / "test_of_all_kinds.py"), *options], jobs)
        env = {**os.environ, **step.env, sampling.END: str(time.time() + seconds), **env}
        done = subprocess.run(step.command, cwd=step.cwd, env=env, capture_output=True, text=True)
        results, collected = sampling.read(tmp_path / "tests.jsonl")
        assert collected, done.stdout + done.stderr
        return {one["test"].split("::")[-1]: one for one in results}, collected, done.returncode

    return run


def names(functions: int, cases: int) -> list[str]:
    return [f"tests/test_a.py::test_{f}[{c}]" for f in range(functions) for c in range(cases)]


def test_rare_tests_come_first_and_common_ones_in_an_order_by_the_seed():
    common, rare = names(2, 9), [f"tests/test_b.py::test_rare[{c}]" for c in range(8)] + ["tests/test_b.py::test_one"]
    order = sampling.ordered([*common, *rare], seed=1)
    assert set(order[: len(rare)]) == set(rare) and sorted(order) == sorted([*common, *rare])
    assert order[len(rare) :] not in (common, sorted(common))
    assert order == sampling.ordered([*rare, *reversed(common)], seed=1) != sampling.ordered([*common, *rare], seed=2)


def test_what_failed_before_comes_first():
    failed = [names(3, 50)[77], names(3, 50)[140], "tests/test_gone.py::test_that_is_no_more"]
    order = sampling.ordered(names(3, 50), 5, failed)
    assert set(order[:2]) == set(failed[:2]) and len(order) == 150


def test_the_order_is_the_same_in_every_process():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu_sampling as s; "
        f"print('\\n'.join(s.ordered({names(3, 20)!r}, 7)))"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.split() == sampling.ordered(names(3, 20), 7), done.stderr


def test_messages_that_differ_in_numbers_are_one():
    said = ["\n  at 0x7f2a: 12 of 1.5e-3 differ\nmore", "at 0xdead: 7 of 2 differ"]
    assert {sampling.normalised(message) for message in said} == {"at N: N of N differ"}
    assert sampling.normalised("") == ""


def check_outcomes(results: dict[str, dict]) -> None:
    assert sum(name.startswith("test_common") and one["outcome"] == "passed" for name, one in results.items()) == 20
    fixture = results["test_whose_fixture_fails"]["cause"]
    assert (fixture["type"], fixture["message"]) == ("OSError", "no such thing N")
    assert fixture["where"].startswith("test_of_all_kinds.py:")
    assert results["test_skipped"]["outcome"] == "skipped"


@pytest.mark.slow
def test_a_run(run, tmp_path):
    results, collected, code = run(1)
    assert collected == len(results) == 26 and code == 1
    check_outcomes(results)
    package = results["test_in_the_package"]["cause"]
    assert package["where"].startswith("drsn_kernels/") and package["type"] and package["message"]
    assert all(name.startswith("test_common") for name in list(results)[-20:])
    # the next run begins with its failures, and past the end of its time begins nothing
    (tmp_path / "tests.jsonl").replace(tmp_path / "tests.earlier.jsonl")
    results, _, code = run(1, "-k", "not skipped")
    assert set(list(results)[:2]) == {"test_in_the_package", "test_whose_fixture_fails"}
    results, collected, code = run(1, seconds=-1)
    assert (results, collected) == ({}, 26)


@pytest.mark.slow
def test_a_run_of_several_processes(run):
    """One of them ends in a test, which is a failure by itself; the others' results are all there."""
    pytest.importorskip("xdist")
    results, collected, code = run(2, "-k", "not package")
    assert collected == len(results) == 25 and code == 1
    check_outcomes(results)
    assert results["test_that_ends_its_process"]["cause"]["type"] == "crash"


@pytest.mark.slow
def test_a_run_of_the_tests_themselves(tmp_path):
    """The step's command on a test of tests/, under its conftest.py, in two processes where pytest-xdist is there."""
    selection = [str(ROOT / "tests" / "test_oracle.py"), "-k", "plain and channel"]
    step = suite.pytest_step("tests", tmp_path, 3, selection, 2 if suite.has_xdist() else 1)
    env = {**os.environ, **step.env}
    done = subprocess.run(step.command, cwd=step.cwd, env=env, capture_output=True, text=True)
    results, collected = sampling.read(tmp_path / "tests.jsonl")
    assert done.returncode == 0 and len(results) == collected > 1, done.stdout + done.stderr
    assert {one["outcome"] for one in results} == {"passed"}
    assert all(one["test"].startswith("tests/test_oracle.py::") for one in results)


@pytest.mark.slow
def test_a_process_that_loses_its_device_is_replaced(run):
    """Both tests fail by their own cause, and no other test does; without pytest-xdist the run ends."""
    results, _, code = run(1, "-k", "loses_the_device or common", LOSE="1")
    lost = [name for name, one in results.items() if one["outcome"] == "failed"]
    assert len(lost) == len(results) == 1 and code == 1
    pytest.importorskip("xdist")
    results, _, code = run(2, "-k", "loses_the_device or common", LOSE="1")
    failed = {name: one["cause"]["type"] for name, one in results.items() if one["outcome"] == "failed"}
    assert failed == {f"test_that_loses_the_device[{i}]": "AssertionError" for i in range(2)}
    assert len(results) == 22 and code == 1


def test_a_file_that_does_not_import_is_a_failure_and_stops_no_other(run, tmp_path):
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_not_there\n")
    step = [str(tmp_path / "test_broken.py"), "-k", "common or broken"]
    results = tmp_path / "tests.jsonl"
    found, collected, code = run(1, *step)
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    errors = [one for one in lines if one.get("cause", {}).get("type") == "collection error"]
    assert len(errors) == 1 and "a_module_that_is_not_there" in errors[0]["cause"]["message"]
    assert sum(one.get("outcome") == "passed" for one in lines) == 20 and code == 1
