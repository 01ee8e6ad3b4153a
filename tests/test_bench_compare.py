"""What is made of measured times: rows, the regression gate, the figures against their aims. The times are made up."""

import itertools
import json
from dataclasses import replace

import pytest
from repository import ROOT

from benchmarks import report
from benchmarks.cases import Case
from benchmarks.rows import ENVIRONMENT, read_json, write_json, write_markdown
from benchmarks.rows import row as row_of

ABOUT = {name: "" for name in ENVIRONMENT} | {"device": "a CPU", "threads": 2}
TRAIN = Case("shrink_train", "A", (128, 64, 1024))


def row(seconds, provider="cpu", floor=(1.0,), case=TRAIN, clock="wall", host=None, **about):
    seconds, floor = list(seconds), [f for f, _ in zip(itertools.cycle(floor), seconds, strict=False)]
    return row_of(
        case, provider, clock, seconds, host or seconds, floor, 5 * case.bytes, {}, {}, ABOUT | about
    )  # fmt: skip


def test_rows_come_back_from_json(tmp_path):
    rows = [row([1.5, 2.5]), row([1.0], "floor")]
    assert read_json(write_json(tmp_path / "a.json", rows, "a command")) == rows


def stored_in_format_1(path, one):
    """As version 0.1 wrote it: `warm_ms` and `graph_ms`, empty on a CPU, and no `clock`."""
    old = {name: value for name, value in one.items() if name != "clock"}
    path.write_text(json.dumps({"format": 1, "rows": [old]}), "utf-8")
    return path


def test_rows_of_a_cpu_in_format_1_are_compared(tmp_path):
    old = row(STEADY) | {"warm_ms": "", "graph_ms": ""}
    stored = read_json(stored_in_format_1(tmp_path / "a.json", old))
    assert stored[0]["clock"] == "wall" and stored[0]["seconds"] == STEADY
    assert verdict([row([1.5 * t for t in STEADY])], stored)[1] and not verdict([row(STEADY)], stored)[1]


def test_the_stored_run_of_a_cpu_is_still_compared():
    stored = read_json(ROOT / "docs" / "benchmarks" / "cpu" / "results.json")
    assert {one["clock"] for one in stored} == {"wall"} and not verdict(stored, stored)[1]
    assert verdict([one | {"ratio_to_floor": 3 * one["ratio_to_floor"]} for one in stored], stored)[1]


def test_rows_of_a_cuda_device_in_format_1_are_refused(tmp_path):
    """Their `seconds`, and the ratios from them, are host time where the call was bound by the host."""
    path = stored_in_format_1(tmp_path / "a.json", row(STEADY) | {"warm_ms": 1900.0, "graph_ms": 30.0})
    with pytest.raises(ValueError, match="format 1, whose times on a CUDA device are not GPU time"):
        read_json(path)


# ---- the gate ----

STEADY = [2.00, 2.02, 1.98, 2.01, 1.99] * 3


def verdict(now, before):
    lines, regression = report.verdict(report.compare(now, before))
    return lines, regression


def test_the_gate_catches_a_slowdown_and_names_it():
    slower = [1.5 * t for t in STEADY]
    lines, regression = verdict([row(slower)], [row(STEADY)])
    assert regression and len(lines) == 2
    assert lines[0].startswith("REGRESSION shrink_train-A-128x64x1024-fp32-both cpu: 3.000 of the floor, stored 2.000")


def test_a_busy_machine_is_no_regression():
    slower = [3 * t for t in STEADY]
    assert not verdict([row(slower, floor=[3.0])], [row(STEADY)])[1]


def test_spread_counts_and_what_is_not_ours_does_not():
    assert verdict([row([1.2 * t for t in STEADY])], [row(STEADY)])[1]
    wide = [1.0, 2.0, 2.4, 2.8, 4.0]
    assert not verdict([row(wide)], [row(STEADY)])[1]  # the same median, of rounds that differ by half
    slow_port = row([2 * t for t in STEADY], "port")
    assert not verdict([row(STEADY), slow_port], [row(STEADY), row(STEADY, "port")])[1]


def test_the_gate_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="nothing|no case and provider of ours in common"):
        report.compare([row(STEADY)], [row(STEADY, "port")])
    with pytest.raises(ValueError, match="made with device another CPU, this one with a CPU"):
        report.compare([row(STEADY)], [row(STEADY, device="another CPU")])
    with pytest.raises(ValueError, match="made with threads 1, this one with 2"):
        report.compare([row(STEADY)], [row(STEADY, threads=1)])
    with pytest.raises(ValueError, match="tolerance"):
        report.compare([row(STEADY)], [row(STEADY)], float("nan"))


def test_what_this_run_lacks_is_missing():
    other = replace(TRAIN, dtype="bf16")
    stored = [row(STEADY, name) for name in ("cpu", "torch", "cpu-compiled", "port")] + [row(STEADY, case=other)]
    now = [row(STEADY, "torch")]
    said = [f"MISSING {TRAIN.id} {name}: in the stored run, not in this one" for name in ("cpu", "cpu-compiled")]
    assert report.missing(now, stored) == said
    assert report.missing(now, stored, {TRAIN.id}) == said[:1]  # a run that was told not to compile
    assert report.missing(stored, now) == []


def test_a_stored_run_of_other_cases_is_refused():
    report.check_cases({TRAIN.id}, [row(STEADY)])
    for stored in ([row(STEADY, "port")], [row(STEADY, case=replace(TRAIN, dtype="bf16"))]):
        with pytest.raises(ValueError, match="no row of ours for any of the 1 cases selected"):
            report.check_cases({TRAIN.id}, stored)


# ---- the figures ----


def test_figures_against_their_aims():
    small = (128, 16, 128)
    train, evaluated = TRAIN, Case("shrink_eval", "A", TRAIN.shape, "forward")
    rows = [
        row([1.0], "floor", case=train), row([1.0], case=train), row([12.0], "port", case=train),
        row([1.1], "best-compiled", case=train), row([2.0], "best", case=train),
        row([0.5], case=replace(train, dtype="bf16")),
        row([1.0], "floor", case=evaluated), row([1.75], case=evaluated), row([1.5], "best", case=evaluated),
        row([4.0], "port", case=Case("shrink_train", "C", small)), row([1.0], case=Case("shrink_train", "C", small)),
        row([1.0], "floor", case=Case("paper_network", "N", (128, 1, 2048), "step")),
        row([1.1], case=Case("paper_network", "N", (128, 1, 2048), "step")),
        row([0.8], "resnet-fused", case=Case("paper_network", "N", (128, 1, 2048), "step")),
        row([3.0], "best", case=replace(train, op="norm_relu")), row([1.0], case=replace(train, op="norm_relu")),
    ]  # fmt: skip
    scaling = Case("scaling", "T", (64, 64, 64), "forward")
    rows += [row([t], name, case=scaling) for name, t in
             (("floor", 1.0), ("floor-1-thread", 1.5), ("cpu", 1.0), ("cpu-1-thread", 1.8))]  # fmt: skip
    found = [(figure.value, figure.reached) for figure in report.figures(rows)]
    assert found[:11] == [
        (pytest.approx(1.1), False),
        (pytest.approx(1.1 / 0.8), None),
        (pytest.approx(3), True),
        (pytest.approx(3), True),
        (pytest.approx(12), True),
        (pytest.approx(1.1), False),
        (pytest.approx(4), False),
        (pytest.approx(1.75), False),
        (pytest.approx(1.75), True),
        (pytest.approx(1.5 / 1.75), False),
        (pytest.approx(2), True),
    ]
    text = [str(figure) for figure in report.figures(rows)]
    assert "aim: at least 1.7, reached" in text[11] and "clone 1.50" in text[11]
    assert any(line.endswith("over the eager port, A") for line in text)


def test_what_was_not_measured_is_said():
    assert all(figure.value is None and figure.reached is None for figure in report.figures([row([1.0], "floor")])[:8])


def test_host_time_on_a_gpu_has_aims_of_its_own():
    small = Case("shrink_train", "C", (128, 16, 128))
    evaluated = Case("shrink_eval", "C", small.shape, "forward")
    rows = [row([3e-5], "triton", case=small, clock="graph", host=[6e-5]),
            row([6e-6], "triton", case=evaluated, clock="graph", host=[2e-5])]  # fmt: skip
    found = {figure.name: figure for figure in report.figures(rows) if figure.name.startswith("host time")}
    assert len(found) == len(report.HOST_AIMS)
    trained, inferred, pooled = (found[f"host time of {step}, C, us"] for step in
                                 ("shrink_train, both", "shrink_eval, forward", "abs_mean, forward"))  # fmt: skip
    assert (trained.value, trained.reached, inferred.value, inferred.reached) == (60, True, 20, False)
    assert pooled.value is None
    on_a_cpu = report.figures([row([1.0], case=small)])
    assert not any(figure.name.startswith("host time") for figure in on_a_cpu)


def test_the_page_of_a_gpu_tells_gpu_time_and_host_time_apart(tmp_path):
    rows = [row([3e-5], "triton", clock="graph", host=[9e-4])]
    page = write_markdown(tmp_path / "a.md", rows, [], "a command").read_text("utf-8")
    gpu, host = page.split("Host time until the call returns, medians in microseconds.")
    assert "GPU time, medians in milliseconds." in gpu and f"| {TRAIN.id} | 0.03 |" in gpu
    assert f"| {TRAIN.id} | 900 |" in host
