"""tuned.DEPENDENT: launches that begin before the one before them has ended (programmatic dependent launch).

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
# begin a pass, or are all of it
FIRST = {
    "stream.reduce_kernel", "one_pass.forward_kernel", "one_pass.backward_kernel", "norm.moments_kernel",
    "norm_grad.sums_kernel",
}  # fmt: skip
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
    """In PTX and in the machine code, once, unless it is the first of a pass; then the next launch may come, unless it
    is all of a pass."""
    launches = found["cuda:90"]
    assert {one["kernel"] for one in launches} == every_kernel()
    assert {one["kernel"] for one in launches if one["pdl"]} == every_kernel() - FIRST
    for one in launches:
        waits, lets = one["dependent"] % 2, one["dependent"] > 1
        lets = lets and not one["beside"]  # it lets nothing begin before it has ended
        assert one["waits"] == [waits, waits] and one["pdl"] == waits and one["next"] == lets, one["kernel"]
        assert one["stack"] == 0, one["kernel"]
        if waits and not one["early"] and not one["beside"]:
            assert one["before"] == one["sass"] == [], one["kernel"]


@pytest.mark.slow
def test_what_a_program_reads_is_waited_for_once(found):
    """All loads come in front of sums in which threads meet. Ragged rows, one pass of several samples, and map wait
    twice at most. A gate's kernels: test_triton_gate.py. One pass backward has no registers for it.
    """
    for one in found["cuda:90"]:
        twice = one["kernel"].startswith(("one_pass", "stream.map")) or one["group"] == 1
        if one["kernel"].startswith(("stream.", "one_pass.forward", "norm.", "norm_grad.")):
            assert one["loads"] <= 1 + twice, one


@pytest.mark.slow
def test_behind_the_gate_the_feature_map_is_loaded_before_the_wait(found):
    """And nothing else: not what launches in front of it have made, and nothing is stored."""
    early = [one for one in found["cuda:90"] if one["early"]]
    assert {one["kernel"] for one in early} == {"stream.map_kernel"}
    assert {(one["group"], one["channels_last"]) for one in early} >= {(4, False), (8, False), (1, False), (8, True)}
    for one in early:
        assert one["before"] == [["ld", "x"]] and one["sass"] == ["LDG"], one["kernel"]


@pytest.mark.slow
def test_the_feature_maps_gradient_is_made_beside_the_parameters(found):
    """The launch behind theirs, where its programs are of few warps: of all it loads only dA comes behind its look at
    the counter, and not past the L1; it waits when it has stored. Who makes dA counts when all threads have stored.
    """
    beside = [one for one in found["cuda:90"] if one["beside"]]
    assert {one["kernel"] for one in beside} == {"stream.grad_kernel"}
    assert {(one["group"], one["channels_last"]) for one in beside} == {(4, False), (8, False)}
    for one in beside:
        assert one["before"] == [["ld", "counter"], ["ld", "dA"], ["ld", "g"], ["ld", "planes"], ["st", "dx"]], one
        assert one["behind the counter"] == [["ld", "dA"], ["st", "dx"]] and one["past L1"] > 0, one
    counting = [one["counts"] for one in found["cuda:90"] if one["kernel"] == "linear_grad.linear_grad_kernel"]
    assert all(order in ([], ["store", "barrier", "count"]) for order in counting) and any(counting), counting


@pytest.mark.slow
def test_older_gpus_take_their_launches_one_after_the_other(found):
    """And map loads x as what nothing reads after it, not past the L1."""
    for one in found["cuda:80"]:
        assert not one["pdl"] and one["waits"] == [0, 0] and one["next"] == 0
    (map_kernel,) = [one for one in found["cuda:80"] if one["kernel"] == "stream.map_kernel"]
    assert map_kernel["early"] and map_kernel["past L1"] == 0
    assert any(one["past L1"] for one in found["cuda:90"] if one["kernel"] == "stream.map_kernel" and one["early"])


@pytest.mark.skipif(gpu.missing() is None and not gpu.interpreting(), reason="needs the interpreter")
def test_the_interpreter_takes_no_notice():
    from drsn_kernels.backends.gpu import tuned

    x, gate = torch.randn(4, 8, 40), gate_of(8, "norm")
    with dk.use_backend("triton", strict=True):
        found = dk.shrink(x, gate)
        with tuned.using(DEPENDENT=False):
            assert torch.equal(dk.shrink(x, gate), found)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_left(monkeypatch):
    """Every allocation is filled with NaN: what is read before it is written shows, though the same addresses held the
    right numbers a step ago."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def step_of(shape, channels_last: bool, dtype):
    """A function that makes one step of a shrinkage and of a normalisation, and the shrinkage in eval, and their
    results, from x and g."""
    gate, norm = gate_of(shape[1], "batch norm").cuda(), dk.BatchNormReLU(shape[1]).cuda()
    parameters = [*gate.parameters(), *norm.parameters()]

    def step(source: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        for buffer in (*gate.buffers(), *norm.buffers()):
            buffer.zero_()
        x = (source * 2).requires_grad_()  # written by the launch right before
        y = dk.shrink(norm(x), gate, residual=x)
        gradients = torch.autograd.grad(y, (x, *parameters), g)
        with torch.no_grad():
            evaluated = dk.shrink(x, gate.eval())
        gate.train()
        return [y.detach(), *gradients, evaluated]

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        made = [torch.randn(shape, device="cuda").to(dtype) for _ in range(2)]
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in made) if channels_last else tuple(made)

    return step, [inputs() for _ in range(3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside another stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((128, 16, 128), False), ((33, 80, 60), False), ((128, 64, 1024), False), ((64, 64, 28, 28), True),
        ((33, 160, 60), False), ((200, 512, 20), False), ((4200, 8, 8), False),
    ],  # fmt: skip
)
def test_the_same_bits_as_one_after_the_other(shape, channels_last, dtype, busy, nothing_is_left):
    """Many times, eagerly and as a CUDA graph, with inputs that take turns: who read too early would find NaN, or
    another step's numbers."""
    from drsn_kernels.backends.gpu import tuned

    beside, other = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with dk.use_backend("triton", strict=True):
        step, inputs = step_of(shape, channels_last, dtype)
        with tuned.using(DEPENDENT=False):
            wanted = [step(*given) for given in inputs]
        with tuned.using(DEPENDENT=True):
            step(*inputs[0])
            x, g = (torch.empty_like(t) for t in inputs[0])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step(x, g)
            for number in range(60):
                given, want = inputs[number % 3], wanted[number % 3]
                if busy:  # takes multiprocessors away, so that programs of two launches come in another order
                    with torch.cuda.stream(beside):
                        other @ other
                assert all(torch.equal(a, b) for a, b in zip(step(*given), want, strict=True)), number
                x.copy_(given[0]), g.copy_(given[1])
                [t.fill_(float("nan")) for t in captured]
                graph.replay()
                assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True)), number
