"""`import drsn_kernels` is light, `info` always answers, and the backend choice is checked."""

import subprocess
import sys

import pytest
import torch
from processes import python
from repository import ROOT

import drsn_kernels as dk
from drsn_kernels import info
from drsn_kernels.__main__ import main

LAZY = {"data", "models", "noise", "train"}


def test_import_brings_no_triton_no_extras_and_no_gpu_and_the_subpackages_at_their_first_use():
    code = (
        "import sys, torch; before = set(sys.modules); import drsn_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'triton', 'numpy', 'scipy', 'matplotlib', 'tqdm', 'sklearn', 'onnx', 'timm'}))\n"
        "print(torch.cuda.is_initialized())\n"
        f"print([name for name in {sorted(LAZY)} if f'drsn_kernels.{{name}}' in sys.modules])\n"
        "print(drsn_kernels.train.Recipe.__name__, drsn_kernels.noise.add_noise.__name__)"
    )
    done = python(code, TRITON_INTERPRET="0")
    assert done.stdout.splitlines() == ["[]", "False", "[]", "Recipe add_noise"], done.stderr


def test_every_public_name_is_there():
    assert set(dk.__all__) <= set(dir(dk)) and LAZY < set(dk.__all__)
    for name in dk.__all__:
        assert getattr(dk, name) is not None
    assert dk.models.DRSN(1, 2).training and "simulate_bearing" in dir(dk.data)
    with pytest.raises(AttributeError, match="module 'drsn_kernels' has no attribute 'shrinks'"):
        dk.shrinks  # noqa: B018


def test_info_names_every_backend(capsys):
    report = info.collect()
    assert set(report["backends"]) == {"cpu", "torch", "triton"}
    info.show(report)
    out = capsys.readouterr().out
    assert torch.__version__ in out and "triton" in out


def test_info_answers_when_the_import_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "drsn_kernels", None)
    assert "does not import" in info.collect()["drsn_kernels"]


def test_the_backend_that_was_removed_is_refused_in_one_sentence():
    """And where the environment names it: test_reliability.py."""
    said = 'names "cuda", which is no longer a backend: on a GPU "triton" has the kernels'
    with pytest.raises(ValueError, match=f"use_backend {said}"):
        with dk.use_backend("cuda"):
            pass


@pytest.mark.slow
def test_command_line_without_a_command_and_with_a_wrong_folder(tmp_path, capsys):
    assert main(["demo", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "drsn_kernels"], capture_output=True, text=True)
    assert done.returncode == 2 and "info" in done.stderr


@pytest.mark.slow
def test_the_benchmark_is_a_command_of_the_repository(capsys):
    assert main(["bench", "--quick"]) == 2
    said = "error: bench is no command of the package; in the repository: python -m benchmarks\n"
    assert capsys.readouterr().err == said
    code = (
        "import runpy, sys, benchmarks.run, drsn_kernels; print(drsn_kernels.__file__)\n"  # not the tree beside it
        "sys.argv[1:] = ['--help']; runpy.run_module('benchmarks', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{dk.__file__}\nusage: python -m benchmarks "), done.stdout
