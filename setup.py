"""Builds drsn_kernels._cpu and ._launch with CMake and ninja; everything else is in pyproject.toml.

_cpu is the CPU kernels, _launch launches the GPU's (csrc/launch). The build needs neither torch nor a GPU. Where the
extensions are not asked for, cannot be built or fail, the package installs as pure Python, and Triton launches.
`python -m drsn_kernels info` gives the reason recorded here. An index shows README.md with the links of the repository.

    DRSN_NATIVE=auto   build the C++ kernels if a compiler is found (default)
    DRSN_NATIVE=0      pure Python
    DRSN_NATIVE=1      a failing build is an error (wheels, CI)
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ASKED = os.environ.get("DRSN_NATIVE", "auto")
if ASKED not in ("auto", "0", "1"):
    sys.exit(f"DRSN_NATIVE must be auto, 0 or 1, got {ASKED!r}")


def missing() -> str | None:
    """Why the C++ kernels cannot or should not be built, in one line."""
    if ASKED == "0":
        return "installed with DRSN_NATIVE=0; reinstall drsn_kernels without it"
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only so far, this is {sys.platform}"
    compilers = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler was found at install time; install g++ or clang++ (C++17) and reinstall drsn_kernels"
    return None


def addresses() -> dict[str, str]:
    """The links that an index shows; of the repository, once CITATION.cff has its address as repository-code."""
    found = {"Paper": "https://doi.org/10.1109/TII.2019.2943898"}
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    if address := re.search(r'^repository-code: "?([^"\s]+?)/?"?$', citation, flags=re.M):
        found["Repository"] = address[1]
        for name, page in (("Documentation", "docs"), ("Changelog", "CHANGELOG.md")):
            found[name] = f"{address[1]}/blob/main/{page}"
    return found


def readme() -> str:
    """README.md for an index, where no file lies beside it: links into the repository by its address, or as text."""
    text, repository = (ROOT / "README.md").read_text(encoding="utf-8"), addresses().get("Repository")

    def link(match: re.Match) -> str:
        image, words, path = match.groups()
        if not (ROOT / path.partition("#")[0]).exists():
            return match[0]  # another site, a heading, or code
        if repository is None:
            return "" if image else words
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/main/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


REASON = missing()  # None: it is built
if REASON is not None and ASKED == "1":
    sys.exit(f"DRSN_NATIVE=1, but {REASON}")


def record(package: Path, reason: str | None) -> None:
    """Leave the reason for `info` in drsn_kernels/_build.py."""
    package.mkdir(parents=True, exist_ok=True)
    text = '"""Written by setup.py: why there are no compiled kernels for the CPU (None: there are)."""\n\n'
    (package / "_build.py").write_text(f"{text}MISSING = {reason!r}\n", encoding="utf-8")
    if reason is not None:
        remove(package, "_cpu")
        print(f"drsn_kernels: installing without the C++ kernels: {reason}", file=sys.stderr)


def remove(package: Path, extension: str) -> None:
    """Of an earlier build in the same folder."""
    for stale in package.glob(f"{extension}.*"):
        stale.unlink()


class RecordedBuild(build_py):
    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "drsn_kernels"
        if not self.distribution.has_ext_modules():
            record(package, REASON)
            remove(package, "_launch")


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.cmake = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(self.cmake, ignore_errors=True)  # its cache names the ninja of an earlier, deleted environment
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target, reason = Path(self.get_ext_fullpath(ext.name)).resolve(), None
        name = ext.name.rpartition(".")[2]
        try:
            self.run_cmake(name, target)
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if ASKED == "1":
                raise
            cause = f"{' '.join(error.cmd[:2])}: status {error.returncode}" if hasattr(error, "cmd") else str(error)
            reason = f"building the C++ kernels failed ({cause}); reinstall with DRSN_NATIVE=1 to see the log"
        if name == "_cpu":
            record(target.parent, reason)
        elif reason is not None:
            remove(target.parent, name)
            print(f"drsn_kernels: installing without the launcher of the GPU kernels: {reason}", file=sys.stderr)

    def run_cmake(self, name: str, target: Path) -> None:
        import pybind11

        configure = [
            "cmake", "-S", str(ROOT), "-B", str(self.cmake), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        scripts = sysconfig.get_path("scripts")  # cmake and ninja beside this Python, without build isolation
        env = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
        self.cmake.mkdir(parents=True, exist_ok=True)
        for command in (configure, ["cmake", "--build", str(self.cmake), "--target", name]):
            subprocess.run(command, check=True, env=env)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(self.cmake.glob(f"{name}.*")), target)


# Without the extensions the wheel is a pure one (py3-none-any).
EXTENSIONS = [Extension(f"drsn_kernels.{name}", sources=[], optional=True) for name in ("_cpu", "_launch")]
setup(
    ext_modules=EXTENSIONS if REASON is None else [],
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=addresses(),
    cmdclass={"build_ext": CMakeBuild, "build_py": RecordedBuild},
)
