"""The CUDA kernels as nvcc compiles them, without a GPU: nothing spills, registers stay below what is written down.

make test looks at the module that is installed; the slow tests compile for every architecture.
"""

import importlib.util
import re
import shutil
from pathlib import Path

import cuda_resources
import pytest
from cuda_resources import ARCHITECTURES, Resources

TABLE = cuda_resources.ROOT / "docs" / "cuda_resources.md"

# Registers a thread that a kernel may have, by its name: with 128, two blocks of 256 threads are on a multiprocessor.
CEILINGS = dict.fromkeys(
    ["apply_kernel", "grad_kernel", "reduce_kernel", "gate_forward_kernel", "gate_backward_kernel",
     "one_pass_forward_kernel", "one_pass_backward_kernel", "training_forward_kernel", "training_backward_kernel"],
    128,
) | {"sum_parts_kernel": 64}  # fmt: skip
SPILLS: dict[str, int] = {}  # bytes of stack that a kernel may have, by its name with its template arguments

pytestmark = pytest.mark.skipif(cuda_resources.missing() is not None, reason=str(cuda_resources.missing()))


def check(kernels: dict[str, Resources], ceilings: dict[str, int] = CEILINGS) -> None:
    names = {kernel: kernel.partition("<")[0] for kernel in kernels}
    assert set(names.values()) == set(ceilings)  # a new kernel gets a ceiling
    over = {kernel: r for kernel, r in kernels.items() if r.registers > ceilings[names[kernel]]}
    spilled = {kernel: r for kernel, r in kernels.items() if r.stack > SPILLS.get(kernel, 0)}
    assert not over and not spilled


def documented() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", TABLE.read_text(encoding="utf-8"), re.M))


def test_the_installed_kernels_do_not_spill_and_are_documented():
    spec = importlib.util.find_spec("drsn_kernels._cuda")
    if spec is None:
        pytest.skip("drsn_kernels._cuda is not installed: python -m drsn_kernels info says why")
    by_architecture = cuda_resources.read(Path(spec.origin))
    assert by_architecture
    for kernels in by_architecture.values():
        check(kernels)
        assert set(kernels) == documented()  # or make it anew: see cuda_resources.py


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_on_any_architecture(architecture, tmp_path):
    kernels = cuda_resources.compile_for(architecture, tmp_path)
    check(kernels)
    assert set(kernels) == documented()


SPILLING = """
namespace drsn { namespace {
template <class T, int V> __global__ void keeps(T* p, int at) {
  T held[V] = {};
  for (int i = 0; i < V; ++i) held[at * i % V] += p[i];
  for (int i = 0; i < V; ++i) p[i] = held[i];
}
} }
template __global__ void drsn::keeps<float, 64>(float*, int);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_stack_is_read_from_compiled_code(tmp_path, monkeypatch):
    source = tmp_path / "keeps.cu"
    source.write_text(SPILLING)
    monkeypatch.setattr(cuda_resources, "SOURCES", [source])
    ((kernel, found),) = cuda_resources.compile_for("90", tmp_path).items()
    assert kernel == "keeps<float, 64>" and found.stack == 64 * 4 and found.registers > 0
    check({kernel: Resources(found.registers, 0, 0)}, {"keeps": found.registers})
    for worse in (found, Resources(found.registers + 1, 0, 0)):
        with pytest.raises(AssertionError, match="keeps<float, 64>"):
            check({kernel: worse}, {"keeps": found.registers})
