"""The CUDA kernels of csrc/cuda, compiled against tests/emulation: on CPU tensors, one fiber for each thread."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from drsn_kernels.backends import cuda
from drsn_kernels.backends.cuda_plans import Device

ROOT = Path(__file__).resolve().parent.parent
MULTIPROCESSORS = 4
SHARED = 227 << 10


def unavailable() -> str | None:
    if shutil.which("g++") is None:
        return "emulating the CUDA kernels needs g++"
    return None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


def build(sanitize: bool = False) -> Path:
    """The extension, compiled anew where a source has changed; kept in build/, which git ignores."""
    import pybind11

    sources = sorted(p for folder in ("csrc", "tests/emulation") for p in (ROOT / folder).rglob("*") if p.is_file())
    told = hashlib.sha256(sys.version.encode() + bytes(sanitize))
    for path in (*sources, ROOT / "CMakeLists.txt"):
        told.update(path.read_bytes())
    folder = ROOT / "build" / f"emulation-{told.hexdigest()[:16]}"
    scripts = Path(sys.executable).parent
    tools = {name: str(scripts / name) if (scripts / name).exists() else name for name in ("cmake", "ninja")}
    if not any(folder.glob("_cuda_emulated*.so")):
        _run(tools["cmake"], "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DDRSN_CUDA_EMULATION=ON",
             f"-DDRSN_SANITIZE={'ON' if sanitize else 'OFF'}", f"-DPython_EXECUTABLE={sys.executable}",
             f"-DCMAKE_MAKE_PROGRAM={shutil.which(tools['ninja'])}", "-DCMAKE_CXX_COMPILER=g++",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")  # fmt: skip
        _run(tools["cmake"], "--build", str(folder), "--target", "_cuda_emulated")
    return next(folder.glob("_cuda_emulated*.so"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    extension.set_device(90, MULTIPROCESSORS, SHARED, SHARED + 1024)
    return extension


@functools.cache
def module() -> ModuleType:
    return load(Path(os.environ["DRSN_EMULATED"]) if "DRSN_EMULATED" in os.environ else build())


@contextlib.contextmanager
def in_place() -> Iterator[ModuleType]:
    """The backend `cuda` on CPU tensors, by the emulation."""
    extension = module()
    before = cuda._cuda, cuda.EMULATED
    cuda._cuda, cuda.EMULATED = extension, Device(*extension.device_properties(-1))
    try:
        yield extension
    finally:
        cuda._cuda, cuda.EMULATED = before
