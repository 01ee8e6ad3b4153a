"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no read or write outside, in any layout.

Of the cases those of make test: 65 seconds behind a build of minutes. Beside other jobs all cases took 22 minutes with
the build, and these 13.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drsn_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def run(*command: str, **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=3000)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with libasan")
@pytest.mark.skipif(cpu._cpu is None, reason=f"no compiled CPU kernels: {cpu.MISSING}")
def test_kernels_are_clean_under_sanitizers(tmp_path):
    import pybind11

    unchecked = ";".join({"avx2", "avx512"} - {*cpu._cpu.available_isas()})
    build = str(tmp_path / "build")
    run("cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja", "-DDRSN_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++",
        f"-DDRSN_UNCHECKED={unchecked}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")  # fmt: skip
    run("cmake", "--build", build)
    extension = next(Path(build).glob("_cpu*.so"))
    libraries = [run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    names = "test_backends.py", "test_batch_norm_relu.py", "test_arena.py"
    files = [str(Path(__file__).with_name(name)) for name in names]
    chosen = "-k", "cpu- or extension or blocks", "-m", "not slow"
    out = run(sys.executable, "-P", "-m", "pytest", *files, *chosen, "-vv",
              DRSN_TEST_EXTENSION=str(extension), LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0",
              UBSAN_OPTIONS="halt_on_error=1", OMP_NUM_THREADS="2")  # fmt: skip
    assert "test_the_gated_step[cpu-portable" in out and "test_blocks_of_several_threads" in out
    assert "test_some_of_the_gradients[cpu-" in out
