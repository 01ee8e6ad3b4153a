"""Builds drsn_kernels._cpu and drsn_kernels._cuda with CMake and ninja; everything else is in pyproject.toml.

The build needs neither torch nor a GPU. What is not asked for, cannot be built or fails is left out: without both, the
package installs as pure Python. `python -m drsn_kernels info` gives the reasons recorded here.

    DRSN_NATIVE=auto   build the C++ kernels if a compiler is found (default)
    DRSN_NATIVE=0      pure Python
    DRSN_NATIVE=1      a failing build is an error (wheels, CI)

    DRSN_CUDA=auto     build the CUDA kernels if nvcc and a GPU are found (default), for this GPU
    DRSN_CUDA=0        no CUDA kernels
    DRSN_CUDA=1        build them with or without a GPU; no nvcc or a failing build is an error
    DRSN_CUDA_ARCHITECTURES   for which GPUs, as CMake's CUDA_ARCHITECTURES: "80-real;90-real;100" is the default where
                              there is no GPU: machine code for each, and PTX for those that come later
"""

import glob
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
WHAT = {"_cpu": "C++ kernels", "_cuda": "CUDA kernels"}
VARIABLES = {"_cpu": "DRSN_NATIVE", "_cuda": "DRSN_CUDA"}
ASKED = {module: os.environ.get(variable, "auto") for module, variable in VARIABLES.items()}
for module, value in ASKED.items():
    if value not in ("auto", "0", "1"):
        sys.exit(f"{VARIABLES[module]} must be auto, 0 or 1, got {value!r}")

DEFAULT_ARCHITECTURES = (80, 90, 100)


def missing() -> str | None:
    """Why the C++ kernels cannot or should not be built, in one line."""
    if ASKED["_cpu"] == "0":
        return "installed with DRSN_NATIVE=0; reinstall drsn_kernels without it"
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only so far, this is {sys.platform}"
    compilers = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler was found at install time; install g++ or clang++ (C++17) and reinstall drsn_kernels"
    return None


def nvcc() -> str | None:
    given = os.environ.get("CUDACXX", ""), "nvcc", os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")
    return next((path for path in map(shutil.which, given) if path), None)


def said(*command: str) -> str:
    """What a command prints; nothing where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def visible_gpus() -> set[int] | None:
    """Compute capabilities of this machine's GPUs times ten, as far as they are known; None: there is no GPU."""
    found = re.findall(r"^(\d+)\.(\d)$", said("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"), re.M)
    if not found and not glob.glob("/dev/nvidia[0-9]*"):  # containers may have the device and not the command
        return None
    return {int(major) * 10 + int(minor) for major, minor in found}


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot or should not be built, in one line."""
    if ASKED["_cuda"] == "0":
        return "installed with DRSN_CUDA=0; reinstall drsn_kernels without it"
    if (reason := missing()) is not None:
        return reason
    if nvcc() is None:
        return "no nvcc was found at install time; put the nvcc of CUDA 12 or later on PATH and reinstall drsn_kernels"
    gpus = visible_gpus()
    if gpus and max(gpus) < min(DEFAULT_ARCHITECTURES):
        return f"the GPU has compute capability {max(gpus) / 10}, the CUDA kernels need {DEFAULT_ARCHITECTURES[0] / 10}"
    if ASKED["_cuda"] == "auto" and gpus is None:
        return "no GPU was found at install time; reinstall drsn_kernels with DRSN_CUDA=1 to build them all the same"
    return None


def architectures() -> str:
    """CMake's list: what is given, else this machine's GPUs, else one of each generation that nvcc knows."""
    if given := os.environ.get("DRSN_CUDA_ARCHITECTURES"):
        return given
    if gpus := visible_gpus():
        *others, last = sorted(gpu for gpu in gpus if gpu >= min(DEFAULT_ARCHITECTURES))
        return ";".join([*(f"{gpu}-real" for gpu in others), str(last)])  # with PTX: an image may move to a newer GPU
    known = set(map(int, re.findall(r"compute_(\d+)", said(nvcc(), "--list-gpu-arch"))))
    *others, last = [gpu for gpu in DEFAULT_ARCHITECTURES if gpu in known] or DEFAULT_ARCHITECTURES
    return ";".join([*(f"{gpu}-real" for gpu in others), str(last)])


REASONS = {"_cpu": missing(), "_cuda": cuda_missing()}  # None: it is built
for module, reason in REASONS.items():
    if reason is not None and ASKED[module] == "1":
        sys.exit(f"{VARIABLES[module]}=1, but {reason}")


def record(package: Path) -> None:
    """Leave the reasons for `info` in drsn_kernels/_build.py."""
    package.mkdir(parents=True, exist_ok=True)
    for module, reason in REASONS.items():
        if reason is not None:
            for stale in package.glob(f"{module}.*"):  # of an earlier build in the same folder
                stale.unlink()
    text = '"""Written by setup.py: why there are no compiled kernels for the CPU, for CUDA (None: there are)."""\n\n'
    text += f"MISSING = {REASONS['_cpu']!r}\nCUDA_MISSING = {REASONS['_cuda']!r}\n"
    (package / "_build.py").write_text(text, encoding="utf-8")
    for module, reason in REASONS.items():
        if reason is not None:
            print(f"drsn_kernels: installing without the {WHAT[module]}: {reason}", file=sys.stderr)


class RecordedBuild(build_py):
    def run(self) -> None:
        super().run()
        if not self.distribution.has_ext_modules():
            record((ROOT if self.editable_mode else Path(self.build_lib)) / "drsn_kernels")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.run_cmake(module, target)
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if ASKED[module] == "1":
                raise
            cause = f"{' '.join(error.cmd[:2])}: status {error.returncode}" if hasattr(error, "cmd") else str(error)
            again = f"reinstall with {VARIABLES[module]}=1 to see the log"
            REASONS[module] = f"building the {WHAT[module]} failed ({cause}); {again}"
        record(target.parent)

    def run_cmake(self, module: str, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / f"cmake{module}"
        shutil.rmtree(build, ignore_errors=True)  # its cache names the ninja of an earlier, deleted build environment
        build.mkdir(parents=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if module == "_cuda":
            configure += ["-DDRSN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
            configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures()}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        scripts = sysconfig.get_path("scripts")  # cmake and ninja beside this Python, without build isolation
        env = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
        for command in (configure, ["cmake", "--build", str(build), "--target", module]):
            subprocess.run(command, check=True, env=env)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(build.glob(f"{module}.*")), target)


# Without an extension the wheel is a pure one (py3-none-any).
setup(
    ext_modules=[
        Extension(f"drsn_kernels.{module}", sources=[], optional=True)
        for module, reason in REASONS.items()
        if reason is None
    ],
    cmdclass={"build_ext": CMakeBuild, "build_py": RecordedBuild},
)
