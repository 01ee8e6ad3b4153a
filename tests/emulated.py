"""csrc/cuda/one_pass.cu on CPU tensors: compiled against tests/emulation, one fiber for each CUDA thread."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from drsn_kernels.backends.gpu import one_pass_cu

ROOT = Path(__file__).resolve().parent.parent
KERNELS, EMULATION = ROOT / "csrc" / "cuda", ROOT / "tests" / "emulation"


class Wrong(RuntimeError):
    """What the emulation has to say about a kernel."""


def missing() -> str | None:
    return None if shutil.which("g++") else "emulating CUDA kernels needs g++"


def build(sources: dict[str, str]) -> Path:
    """The library of these kernels, files by name, compiled where it is not there; git ignores build/."""
    told = hashlib.sha256(repr(sources).encode())
    for path in sorted(EMULATION.iterdir()):
        told.update(path.read_bytes())
    folder = ROOT / "build" / f"emulation-{told.hexdigest()[:16]}"
    built = folder / "one_pass.so"
    if not built.exists():
        own = folder / str(os.getpid())  # other processes may compile it as well
        own.mkdir(parents=True)
        for name, text in sources.items():
            (own / name).write_text(text)
        flags = "-std=c++17 -O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE -fPIC -shared".split()
        where = [f"-I{own}", f"-I{EMULATION}", str(EMULATION / "one_pass.cpp"), "-o", str(own / built.name)]
        done = subprocess.run(["g++", *flags, *where], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-8000:]
        (own / built.name).replace(built)
        shutil.rmtree(own)
    return built


class Emulation:
    """The kernels, compiled; `replace` makes others of their source, each old text by the new one."""

    def __init__(self, replace: dict[str, str] | None = None):
        sources = {path.name: path.read_text() for path in sorted(KERNELS.iterdir())}
        for old, new in (replace or {}).items():
            assert sum(text.count(old) for text in sources.values()) == 1, old
            sources = {name: text.replace(old, new) for name, text in sources.items()}
        self._library = ctypes.CDLL(str(build(sources)))
        self._library.launch.restype = self._library.mutations.restype = ctypes.c_char_p
        self.schedule, self.mutation = 0, ""

    def run(self, kernel: str, plan: one_pass_cu.OnePassCuPlan, arguments: bytes) -> None:
        """Raises Wrong where the emulation finds something wrong."""
        shape = map(ctypes.c_uint, (plan.programs, plan.threads, plan.cluster, plan.shared))
        error = self._library.launch(kernel.encode(), arguments, *shape, self.schedule, self.mutation.encode())
        if error is not None:
            raise Wrong(error.decode())

    def mutations(self) -> list[str]:
        """What can be done wrong in the kernel that ran last: values of `mutation`."""
        return self._library.mutations().decode().splitlines()

    def launcher(self, launch: one_pass_cu.Launch):
        return functools.partial(self.run, launch.kernel, launch.plan)


@functools.cache
def emulation() -> Emulation:
    return Emulation()
