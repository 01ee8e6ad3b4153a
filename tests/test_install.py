"""Wheel, sdist and the pure-Python install, each into a clean environment of its own, and used there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = str(ROOT / "constraints.txt")
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")

USE = """
import torch, drsn_kernels as dk
x = torch.randn(4, 8, 100, requires_grad=True)
dk.Shrinkage(8)(x).backward(torch.randn(4, 8, 100))
assert x.grad.isfinite().all()
from drsn_kernels import info
backends = info.collect()["backends"]
print(backends["cpu"])
print("CUDA:", backends["cuda"])
"""


def environment(**env: str) -> dict[str, str]:
    """What the caller of the tests asks of his own installation does not count here."""
    return {**os.environ, "DRSN_NATIVE": "auto", "DRSN_CUDA": "0", **env}


def run(*command: str, **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment(**env), timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A virtual environment with torch and nothing of ours."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, "torch", "numpy")
    return python


def install(python: str, what: str, **env: str) -> str:
    run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", what, **env)
    return run(python, "-c", USE)


def test_wheel(clean, tmp_path):
    run(clean, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT), DRSN_NATIVE="1")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("drsn_kernels/_cpu") for name in names) and "drsn_kernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    cpu, cuda = install(clean, str(wheel)).split("CUDA:")
    assert "available" in cpu and "not available" not in cpu
    assert "not available" in cuda and "DRSN_CUDA=0" in cuda


def test_sdist(clean, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT))
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert "not available" not in install(clean, str(sdist), DRSN_NATIVE="1").split("CUDA:")[0]


def test_pure_python_by_choice(clean):
    out = install(clean, str(ROOT), DRSN_NATIVE="0")
    assert "not available" in out and "DRSN_NATIVE=0" in out


def test_pure_python_without_a_compiler(clean, tmp_path):
    bin_folder = tmp_path / "bin"  # a PATH with python and nothing else
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(clean)
    run(clean, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", str(ROOT), PATH=str(bin_folder), CXX="")
    out = run(clean, "-c", USE, PATH=str(bin_folder))
    assert "not available" in out and "install g++ or clang++" in out


def test_a_failing_build_still_installs(clean):
    out = install(clean, str(ROOT), CMAKE_ARGS="-DCMAKE_CXX_COMPILER=/bin/false")
    assert "not available" in out and "failed" in out


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_left_out(clean):
    cpu, cuda = install(clean, str(ROOT), DRSN_CUDA="auto").split("CUDA:")
    assert "not available" not in cpu
    assert "no GPU was found at install time; reinstall drsn_kernels with DRSN_CUDA=1" in cuda


@needs_nvcc
def test_a_failing_cuda_build_leaves_the_rest(clean, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(ROOT, broken, ignore=shutil.ignore_patterns(".*", "build", "*-out"))
    for source in (broken / "csrc" / "cuda").glob("*.cu"):
        source.write_text("#error this does not compile\n")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    pretended = bin_folder / "nvidia-smi"
    pretended.write_text("#!/bin/sh\necho 9.0\n")
    pretended.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    cpu, cuda = install(clean, str(broken), DRSN_CUDA="auto", PATH=path).split("CUDA:")
    assert "not available" not in cpu
    assert "building the CUDA kernels failed" in cuda and "reinstall with DRSN_CUDA=1 to see the log" in cuda


def test_cuda_without_nvcc_is_refused_in_one_sentence(clean, tmp_path):
    """No nvcc on PATH, and the compiler is: what is asked for cannot be built."""
    for name in ("g++", "c++"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    command = [clean, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    env = environment(DRSN_CUDA="1", PATH=str(tmp_path), CUDACXX="", CUDA_HOME="", CXX="")
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env, timeout=900)
    assert done.returncode != 0
    assert "DRSN_CUDA=1, but no nvcc was found at install time; put the nvcc of" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.whl"))


def test_demo_runs_from_the_pure_install_and_names_the_extra(clean, tmp_path):
    install(clean, str(ROOT), DRSN_NATIVE="0")
    done = subprocess.run([clean, "-m", "drsn_kernels", "demo", "--quick", "--out", str(tmp_path)],
                          capture_output=True, text=True, cwd="/")  # fmt: skip
    assert done.returncode == 1 and "drsn_kernels[demo]" in done.stderr  # matplotlib is not there
