"""plans.DEPENDENT: launches that may begin before the one before them has ended (programmatic dependent launch).

What they must not do is to touch memory before they have waited. That the driver is asked for it: test_launcher.py.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
from oracle import gate_of
from triton_child import child

import drsn_kernels as dk
from drsn_kernels.backends import gpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason="no Triton, or too old")
SCRIPT = Path(__file__).resolve().parent / "lowered_dependent.py"


def every_kernel() -> set[str]:
    """All that is decorated by launch.kernel, by module and name."""
    folder = Path(gpu.__file__).parent
    modules = [importlib.import_module(f"{gpu.__name__}.{path.stem}") for path in folder.glob("*.py")]
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "pointers") and hasattr(value, "fn") and value.fn.__module__ == module.__name__
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory, triton_cache) -> dict:
    done = child(str(SCRIPT), cwd=tmp_path_factory.mktemp("dependent"), cache=triton_cache)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_waits_before_it_touches_memory(found):
    """In PTX and in the machine code, once, and then the next launch may come."""
    launches = found["cuda:90"]
    assert {one["kernel"] for one in launches} == every_kernel()
    for one in launches:
        assert one["waits"] == [1, 1] and one["pdl"] and one["next"] == 1 and one["stack"] == 0, one["kernel"]
        if not one["early"]:
            assert one["before"] == one["sass"] == [], one["kernel"]


@pytest.mark.slow
def test_behind_the_gate_the_feature_map_is_loaded_before_the_wait(found):
    """And nothing else: not what launches in front of it have made, and nothing is stored."""
    early = [one for one in found["cuda:90"] if one["early"]]
    assert {one["kernel"] for one in early} == {"stream.map_kernel", "stream.grad_kernel"}
    for one in early:
        from_before = [["ld", "x"]] if one["kernel"] == "stream.map_kernel" else [["ld", "g"], ["ld", "planes"]]
        assert one["before"] == from_before and one["sass"] == ["LDG"], one["kernel"]


@pytest.mark.slow
def test_older_gpus_take_their_launches_one_after_the_other(found):
    for one in found["cuda:80"]:
        assert not one["pdl"] and one["waits"] == [0, 0] and one["next"] == 0


@pytest.mark.skipif(gpu.missing() is None and not gpu.interpreting(), reason="needs the interpreter")
def test_the_interpreter_takes_no_notice():
    from drsn_kernels.backends.gpu import plans

    x, gate = torch.randn(4, 8, 40), gate_of(8, "norm")
    with dk.use_backend("triton", strict=True):
        wanted = dk.shrink(x, gate)
        with plans.using(DEPENDENT=True):
            assert torch.equal(dk.shrink(x, gate), wanted)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def step_of(shape, channels_last: bool, dtype):
    """A function that makes one step of a shrinkage and of a normalisation, from inputs made anew, and its results."""
    gate, norm = gate_of(shape[1], "batch norm").cuda(), dk.BatchNormReLU(shape[1]).cuda()
    source, g = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape, device="cuda").to(dtype)
    if channels_last:
        source, g = (t.contiguous(memory_format=torch.channels_last) for t in (source, g))
    parameters = [*gate.parameters(), *norm.parameters()]

    def step() -> list[torch.Tensor]:
        for buffer in (*gate.buffers(), *norm.buffers()):
            buffer.zero_()
        x = (source * 2).requires_grad_()  # written by the launch right before
        y = dk.shrink(norm(x), gate, residual=x)
        return [y.detach(), *torch.autograd.grad(y, (x, *parameters), g)]

    return step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((128, 16, 128), False), ((33, 80, 60), False), ((128, 64, 1024), False), ((64, 64, 28, 28), True)],
)
def test_the_same_bits_as_one_after_the_other(shape, channels_last, dtype):
    """A hundred times, eagerly and as a CUDA graph: a launch that read too early would find another step's numbers."""
    from drsn_kernels.backends.gpu import plans

    with dk.use_backend("triton", strict=True):
        step = step_of(shape, channels_last, dtype)
        wanted = step()
        with plans.using(DEPENDENT=True):
            for _ in range(100):
                assert all(torch.equal(a, b) for a, b in zip(step(), wanted, strict=True))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            for _ in range(100):
                [t.zero_() for t in captured]
                graph.replay()
                assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
