"""User code passes mypy --strict and pyright, and the file of calls that they check runs."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import drsn_kernels as dk

CALLS = Path(__file__).parent / "typed_calls.py"
# Of torch, what no call's types come from: the others take 3 times as long.
NOT_FOLLOWED = "_decomp _dynamo _export _functorch _higher_order_ops _inductor _prims _refs _subclasses ao distributed \
export fx jit onnx profiler quantization testing utils.data".split()


def wrong_calls(folder: Path) -> Path:
    """A checker that sees nothing but Any finds nothing wrong here."""
    file = folder / "wrong_calls.py"
    file.write_text(
        "import torch\nimport drsn_kernels as dk\nx = torch.ones(1, 2, 3)\n"
        "dk.soft_threshold(x, '0.5')\ndk.shrink(x, torch.sigmoid, return_tau=True).sum()\n"
        "dk.Shrinkage(2)(x).nothing()\ndk.use_backend(1)\ndk.train.Recipe(epoch=1)\n"
    )
    return file


@pytest.fixture
def mypy(request, tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    config = tmp_path / "mypy.ini"
    modules = ",".join(f"torch.{name}.*" for name in NOT_FOLLOWED)
    config.write_text(f"[mypy]\nstrict = True\n[mypy-{modules}]\nfollow_imports = skip\n")
    cache = request.config.cache.mkdir("mypy")
    return sys.executable, "-P", "-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache)


@pytest.fixture
def pyright():
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    command = sys.executable, "-P", "-m", "pyright"
    if subprocess.run([*command, "--version"], capture_output=True).returncode:
        pytest.skip("pyright does not start: at its first use it downloads itself")
    return *command, "--pythonpath", sys.executable


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_user_calls(request, checker, tmp_path):
    """It looks into the drsn_kernels that the tests run on, never at the source tree."""
    command = *request.getfixturevalue(checker), str(CALLS), str(wrong_calls(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = {(file, int(line)) for file, line in re.findall(r"(\w+)\.py:(\d+)(?::\d+)?:? (?:- )?error", done.stdout)}
    assert found == {("wrong_calls", line) for line in (4, 5, 6, 7, 8)}, done.stdout + done.stderr


def test_the_calls_run():
    before = dk.backends.choice.backend, dk.backends.choice.strict
    try:
        runpy.run_path(str(CALLS))
    finally:
        dk.use_backend(*before)
