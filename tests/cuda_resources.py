"""What nvcc makes of the CUDA kernels: registers, stack and shared memory, read from compiled code. No GPU is needed.

    python tests/cuda_resources.py --table docs/cuda_resources.md

compiles csrc/cuda for each GPU (some minutes) and writes the table. cuobjdump is the CUDA toolkit's or the Triton
wheel's.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "90a", "100")

HEAD = """# What the CUDA kernels become

What the compiler says, not what was measured: compiled by {nvcc}. Made by
`python tests/cuda_resources.py --table docs/cuda_resources.md`; `tests/test_cuda_resources.py` asserts that nothing
spills, and a ceiling of registers for each kernel.

Where the GPUs differ, a cell holds the values for sm_80 / sm_90 / sm_90a / sm_100.

* *registers*, *stack*: a thread's; stack, in bytes, is what is spilled or indexed at run time.
* *shared*: bytes that a block has from the start. What a launch asks for in addition is not in the code: the plans in
  `drsn_kernels/backends/cuda_plans.py` decide it.
* What the blocks of a cluster say to each other is left out on sm_80, which has none.

| kernel | registers | stack | shared |
|---|---|---|---|
"""


@dataclass(frozen=True, order=True)
class Resources:
    registers: int
    stack: int  # bytes
    shared: int  # bytes


def cuobjdump() -> str | None:
    """Of the CUDA toolkit, or of the Triton wheel; None where there is neither."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def missing() -> str | None:
    """Why compiled code cannot be read here."""
    if cuobjdump() is None:
        return "no cuobjdump: neither the CUDA toolkit's on PATH nor the Triton wheel's"
    return None if shutil.which("c++filt") else "no c++filt, of binutils"


def short(name: str) -> str:
    """A demangled kernel's name with its template arguments, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\bdrsn::|^void ", "", name)
    return name[: name.index("(")] if "(" in name else name


def read(compiled: Path, architecture: str = "") -> dict[str, dict[str, Resources]]:
    """Of each kernel by name, by architecture, in an object or library; or in a cubin, which does not say for which."""
    tool = cuobjdump()
    assert tool is not None
    dump = subprocess.run([tool, "-res-usage", str(compiled)], capture_output=True, text=True, check=True).stdout
    dump = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, Resources]] = {}
    kernel = ""
    for line in dump.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (.*):$", line):
            kernel = short(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            if int(architecture.rstrip("af")) >= 90:
                shared -= 1024  # the system's
            found.setdefault(architecture, {})[kernel] = Resources(registers, stack, shared)
    return found


def compile_for(architecture: str, folder: Path) -> dict[str, Resources]:
    """All kernels of csrc/cuda, compiled for one architecture as the build compiles them."""
    found: dict[str, Resources] = {}
    for source in SOURCES:
        cubin = folder / f"{source.stem}-{architecture}.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", str(source), "-o", str(cubin)]
        subprocess.run(command, check=True)
        found |= read(cubin, architecture)[architecture]
    return found


def table(results: dict[str, dict[str, Resources]]) -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    lines = [HEAD.format(nvcc="nvcc " + re.search(r"release ([\d.]+)", version)[1])]
    for kernel in sorted(set().union(*results.values())):
        on = [results[architecture][kernel] for architecture in ARCHITECTURES]
        cells = ([one.registers for one in on], [one.stack for one in on], [one.shared for one in on])
        texts = (str(c[0]) if len(set(c)) == 1 else " / ".join(map(str, c)) for c in cells)
        lines.append(f"| `{kernel}` | {' | '.join(texts)} |\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE", required=True, help="write the table as Markdown")
    options = parser.parse_args()
    if reason := missing():
        parser.exit(1, f"{reason}\n")
    with tempfile.TemporaryDirectory() as folder:
        results = {architecture: compile_for(architecture, Path(folder)) for architecture in ARCHITECTURES}
    options.table.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
