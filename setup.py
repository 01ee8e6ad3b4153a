"""Builds drsn_kernels._cpu with CMake and ninja; everything else about the package is in pyproject.toml.

The build needs neither torch nor a GPU. Without a C++ compiler, with DRSN_NATIVE=0, or where the build fails, the
package installs as pure Python and `python -m drsn_kernels info` gives the reason recorded here.

    DRSN_NATIVE=auto   build the C++ kernels if a compiler is found (default)
    DRSN_NATIVE=0      pure Python
    DRSN_NATIVE=1      a failing build is an error (wheels, CI)
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("DRSN_NATIVE", "auto")
if NATIVE not in ("auto", "0", "1"):
    sys.exit(f"DRSN_NATIVE must be auto, 0 or 1, got {NATIVE!r}")


def missing() -> str | None:
    """Why the C++ kernels cannot or should not be built, in one line."""
    if NATIVE == "0":
        return "built with DRSN_NATIVE=0; reinstall without it"
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only so far, this is {sys.platform}"
    compilers = (os.environ.get("CXX", "").split() or ["c++"])[:1] + ["g++", "clang++"]
    if not any(shutil.which(c) for c in compilers):
        return "no C++ compiler was found at build time; install g++ or clang++ (C++17) and reinstall drsn_kernels"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        reason = missing()
        if reason is None:
            try:
                self.run_cmake(target)
            except (subprocess.CalledProcessError, OSError, ImportError) as error:
                if NATIVE == "1":
                    raise
                reason = f"building the C++ kernels failed ({error}); reinstall with DRSN_NATIVE=1 to see the log"
        elif NATIVE == "1":
            sys.exit(f"DRSN_NATIVE=1, but {reason}")
        if reason is not None:
            print(f"drsn_kernels: installing as pure Python: {reason}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "_build.py").write_text(
            f'"""Written by setup.py: why there are no compiled CPU kernels (None: there are)."""\n\nMISSING = {reason!r}\n'
        )

    def run_cmake(self, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={build / 'install'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        scripts = sysconfig.get_path("scripts")  # cmake and ninja from the build environment come first
        env = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)
        subprocess.run(["cmake", "--install", str(build)], check=True, env=env)
        built = next((build / "install" / "drsn_kernels").glob("_cpu*"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)


setup(ext_modules=[Extension("drsn_kernels._cpu", sources=[], optional=False)], cmdclass={"build_ext": CMakeBuild})
