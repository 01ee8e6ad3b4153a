"""Wheel, sdist and the pure-Python install, each into a clean environment of its own, and used there."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = str(ROOT / "constraints.txt")
pytestmark = pytest.mark.slow

USE = """
import torch, drsn_kernels as dk
x = torch.randn(4, 8, 100, requires_grad=True)
dk.Shrinkage(8)(x).backward(torch.randn(4, 8, 100))
assert x.grad.isfinite().all()
from drsn_kernels import info
print(info.collect()["backends"]["cpu"])
"""


def environment(**env: str) -> dict[str, str]:
    """What the caller of the tests asks of his own installation does not count here."""
    return {**os.environ, "DRSN_NATIVE": "auto", **env}


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


def test_an_index_gets_a_page_without_broken_links(clean, tmp_path):
    run(clean, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT), DRSN_NATIVE="0")
    (wheel,) = map(zipfile.ZipFile, tmp_path.glob("*-none-any.whl"))  # pure Python
    (metadata,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    head, _, page = wheel.read(metadata).decode().partition("\n\n")
    assert "Project-URL: Paper, https://doi.org/" in head and "Description-Content-Type: text/markdown" in head
    assert "Classifier: Typing :: Typed" in head and page.startswith("# drsn_kernels")
    relative = [link for link in re.findall(r"\]\(([^)\s]+)\)", page) if (ROOT / link.partition("#")[0]).exists()]
    assert relative == [] and page.count("](http") >= 1


# What the tests that read files of the repository are in.
READING = ("test_docs", "test_workflows", "test_imports", "test_import", "test_command_line", "test_examples",
           "test_bench_compare")  # fmt: skip


def test_sdist_and_the_wheel_made_of_it(clean, tmp_path):
    """Compiled as it comes, not optimised; a wheel of the tree itself is what the tests run on."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT))
    (sdist,) = tmp_path.glob("*.tar.gz")
    tarfile.open(sdist).extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)  # none without git
    missing = {name for name in tracked.stdout.splitlines() if not (unpacked / name).exists()}
    assert missing <= {".gitignore"}
    tests = [str(unpacked / "tests" / f"{name}.py") for name in READING]
    run(sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests)

    run(clean, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(sdist), DRSN_NATIVE="1",
        CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug")  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("_cpu", "_launch", "py.typed"):
        assert any(name.startswith(f"drsn_kernels/{part}") for name in names), part
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    cpu = install(clean, str(wheel))
    assert "available" in cpu and "not available" not in cpu
    script = Path(clean).with_name("drsn")
    assert run(str(script), "--version").startswith("drsn_kernels ") and "--json" in run(str(script), "info", "--help")


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


def test_demo_runs_from_the_pure_install_and_names_the_extra(clean, tmp_path):
    install(clean, str(ROOT), DRSN_NATIVE="0")
    done = subprocess.run([clean, "-m", "drsn_kernels", "demo", "--quick", "--out", str(tmp_path)],
                          capture_output=True, text=True, cwd="/")  # fmt: skip
    assert done.returncode == 1 and "pip install matplotlib" in done.stderr  # matplotlib is not there
