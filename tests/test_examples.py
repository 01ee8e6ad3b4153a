"""Every file in examples/ runs: the scripts as a user starts them, the cells of the notebook one after another."""

import json
import re
import runpy
import sys

import pytest
from repository import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = json.loads((EXAMPLES / "thresholds.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script; what it printed."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_no_example_is_left_out():
    here = {"test_drop_in", "test_convert_model", "test_own_data", "test_the_notebook_runs"}
    assert here <= set(globals())
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "drop_in.py", "convert_model.py", "own_data.py", "thresholds.ipynb",
    }  # fmt: skip


def number(text, before):
    return float(re.search(f"{before} ([-+.e\\d]+)", text)[1])


def test_drop_in(run):
    printed = run("drop_in.py")
    assert "All keys matched" in printed and "thresholds of module 3: (32, 32)" in printed
    assert number(printed, "of the gradient") < 0.02 * number(printed, "e-.. of")
    assert number(printed, "in eval mode") < 1e-6


def test_convert_model(run):
    printed = run("convert_model.py")
    assert "converted" in printed and "1.denoise, 2.denoise" in printed
    assert number(printed, "of the outputs") < 1e-5 and "the same to the bit: True" in printed


@pytest.mark.slow
def test_own_data(run, tmp_path):
    for package in ("numpy", "matplotlib", "scipy"):
        pytest.importorskip(package)
    printed = run("own_data.py", "--quick", "--out", tmp_path)
    assert printed.count("\n$ drsn ") == 2 and "of 6 new recordings are given their class" in printed
    assert (tmp_path / "run" / "checkpoint.pt").exists() and (tmp_path / "predictions.csv").exists()
    assert "drsn train --resume --out " in run("own_data.py", "--quick", "--out", tmp_path)  # what is there is kept


def test_the_notebook_runs(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names, drawn = {}, 0
    for cell in CELLS:
        exec(compile("".join(cell["source"]), f"thresholds.ipynb, {cell['id']}", "exec"), names)
        drawn += len(names["plt"].get_fignums())  # each cell's figures are shown below it
        names["plt"].close("all")
    assert drawn == 3 and "epoch 4: loss" in (printed := capsys.readouterr().out)
    assert number(printed, "test data with noise") > 80
    first = names["means"]["stages.0.0.shrinkage"]  # what the text says of it
    assert first == sorted(first, reverse=True) and first[0] > 2 * first[-1]


def test_the_notebook_is_one_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
