"""The package that is measured and tested: the installed one, or the source tree's Python where none is installed."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python_path(*first: Path) -> str:
    """PYTHONPATH with these folders in front and without the source tree, which the tests refuse."""
    rest = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([*map(str, first), *(entry for entry in rest if Path(entry).resolve() != ROOT)])


def ensure_installed() -> None:
    """Where no drsn_kernels is installed, build the tree's without compiled kernels, for this process and its children.

    It lies in a temporary folder, which goes with this process. setup.py's build_py needs setuptools, and no network.
    Importing `benchmarks` has taken the source tree out of sys.path, so what is found here is not that.
    """
    found = importlib.util.find_spec("drsn_kernels")
    if found is not None and found.origin and Path(found.origin).with_name("_build.py").is_file():
        return
    site = Path(tempfile.mkdtemp(prefix="drsn_kernels-"))
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(site)],
        cwd=ROOT, env={**os.environ, "DRSN_NATIVE": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: drsn_kernels is not installed, and building it failed:\n{done.stdout}{done.stderr}")
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = python_path(site)
