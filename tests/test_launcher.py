"""The launcher of csrc/launch, on a driver that launches nothing and writes down what it is given (driver_stub.cpp).

All of it runs in a process in which Triton compiles (launcher_child.py); every pass, and sanitizers, are slow.
What is compared are all fields of a launch: function, grid, block, shared memory, stream, attributes, and the bytes of
every parameter.
"""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from triton_child import child

import drsn_kernels as dk
from drsn_kernels.backends import gpu
from drsn_kernels.backends.gpu import native

CHILD = str(Path(__file__).with_name("launcher_child.py"))
compiled = pytest.mark.skipif(
    gpu.missing() is not None or native._launch is None or shutil.which("c++") is None or torch.cuda.is_available(),
    reason="needs Triton, the compiled launcher, a C++ compiler, and no driver",
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, triton_cache):
    """What the child finds, by its arguments."""

    @functools.cache
    def ask(*arguments: str) -> dict:
        folder = tmp_path_factory.mktemp("launcher")
        done = child(CHILD, *arguments, cwd=folder, cache=triton_cache, DRSN_LAUNCHER="1")
        assert done.returncode == 0, done.stderr[-8000:]
        return json.loads(done.stdout)

    return ask


@pytest.fixture
def found(asked) -> dict:
    return asked("--sample")


@pytest.fixture
def every_pass(asked) -> dict:
    return asked()


@pytest.mark.slow
@compiled
def test_the_driver_is_given_what_triton_gives_it(every_pass):
    """Passes of one and of several launches; dtypes, None pointers, tensors at no multiple of 16 bytes."""
    passes = every_pass["same_to_the_driver"]
    for name, each in passes.items():
        assert each["taken"] and each["ours"] == each["tritons"], name
        assert all(len(line.split("parameters")[1].split()) > 10 for line in each["ours"]), name
    launches = {name: len(each["ours"]) for name, each in passes.items()}
    assert (launches["train 0"], launches["train 1"]) == (4, 4)
    assert (launches["eval 0"], launches["eval 1"]) == (1, 2)
    assert [launches[f"norm{kind} {i}"] for kind in ("", ", in pieces", ", channels_last") for i in (0, 1)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert launches["abs_mean 0"] == launches["soft_threshold 1"] == 1


@compiled
def test_dependent_launches_are_those_of_triton(found):
    """Attribute 6: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION. The first of a pass waits for everything."""
    for name in ("train 0", "train 1"):
        each = found["same_to_the_driver"][name]
        assert each["taken"] and each["ours"] == each["tritons"]
        first, *others = each["ours"]
        assert "attributes parameters" in first and len(others) == 3
        assert all("attributes 6=1 parameters" in line for line in others)


@pytest.mark.slow
@compiled
def test_launches_one_after_the_other_are_those_of_triton(every_pass):
    for each in every_pass["apart"].values():
        assert each["taken"] and len(each["ours"]) == 4 and each["ours"] == each["tritons"]
        assert all("attributes parameters" in line for line in each["ours"])


@compiled
def test_a_training_step_is_two_calls_of_the_extension(found):
    """Counts of one step of Shrinkage that is known already, on any machine: a change that adds to them shows here."""
    counts = found["counted"]["known"]
    assert (counts["extension"], counts["launches"]) == (2, 8)
    assert counts["triton"] == 0  # functions of Triton's
    assert counts["allocations"] == 6  # y and dx; kept and scratch; scratch and the parameters' gradients
    assert counts["python"] <= 70  # functions of ours, with the checks of arguments and of the gate


@compiled
def test_a_new_shape_is_launched_by_the_kernels_of_another(found):
    """A last batch, or recordings of any length: Triton launches nothing, which would bind every argument first."""
    counts = found["counted"]["new shape"]
    assert (counts["extension"], counts["launches"]) == (2, 8)


@compiled
def test_tritons_hooks_are_called_by_triton(found):
    """Before, while an enter hook, then an exit hook is set, and after."""
    hooks = found["hooks"]
    assert hooks == {"taken": [True, False, False, True], "seen": ["reduce_kernel"]}


@compiled
def test_a_thread_without_a_context_gets_that_of_the_device(found):
    assert found["contexts"] == {"taken": [True, True], "retained": 2, "device": 3}


@compiled
def test_launches_go_to_the_current_stream(found):
    assert found["streams"] == ["stream (nil)", "stream 0x77"]


@compiled
def test_other_alignment_is_another_sequence(found):
    assert found["classes"] == {"taken": [True, False, True, True], "sequences": 2}


@compiled
def test_an_error_names_kernel_and_error(found):
    errors = found["errors"]
    assert errors["second"] == "RuntimeError: launching hidden_kernel: CUDA_ERROR_INVALID_VALUE: invalid argument"
    assert errors["first"] == "RuntimeError: launching reduce_kernel: error 719"  # one that the driver has no name for
    assert errors["after"] is None
    assert errors["too few"] == "TypeError: this Sequence takes 4 tensors"
    assert errors["no tensor"].startswith("AttributeError: ")


@compiled
def test_a_sequence_that_never_launches_is_given_up(found):
    """Triton makes the launch that failed, and all that follow."""
    refused = {"reduce_kernel": "CUDA_ERROR_INVALID_VALUE: invalid argument"}
    assert found["first_failure"] == {"launched": 2, "refused": refused, "taken": False}


@compiled
def test_a_grid_of_no_programs_is_not_launched(found):
    (line,) = found["empty"]["lines"]
    assert " grid 5 1 1 " in line
    # nor has it proved that the Sequence launches: Triton takes over
    assert found["empty"]["first to launch"].startswith("NotLaunched: launching b: ")


REFUSED = {
    "one parameter more": "parameters of [64, 64, 32",
    "another size": "parameters of [64, 64, 32",
    "an array": "parameters of [64, 64, 32",
    "clusters": "num_ctas is 2",
    "cooperative": "launch_cooperative_grid is True",
    "scratch": "it asks for scratch memory (global_scratch_size)",
    "warps": "1024 threads would be launched, the PTX asks for 32",
    "launcher": "it is launched by builtin_function_or_method, not by Triton's CudaLauncher",
    "no PTX": "KeyError: 'ptx'",
    "no PTX entry": "AttributeError: ",
}


@compiled
@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_as_known_is_left_to_triton(found, change):
    reason, taken = found["refusals"][change]
    assert reason.startswith(REFUSED[change]) and not taken


@compiled
def test_what_the_extension_refuses(found):
    said = {name: found["refusals"][name] for name in ("shared", "threads", "patch", "base", "none", "parameters")}
    assert said == {
        "shared": "k may take at most 100 bytes of shared memory",
        "threads": "k takes at most 1024 threads",
        "patch": "k: an address of no parameter",
        "base": "k: an address of a tensor that is not given",
        "none": "k: an address of a tensor that is not given",
        "parameters": "k: at most 96 parameters of 8 bytes",
    }


@compiled
def test_threads_share_a_sequence(found):
    assert found["threads"] == {"lines": 800, "per thread": [200, 200, 200, 200]}


@compiled
def test_it_can_be_switched_off(found):
    off = found["off"]
    assert not off["taken"] and off["missing"] == "switched off (DRSN_LAUNCHER=0)"
    assert off["describe"] == "not available, launches go through Triton: switched off (DRSN_LAUNCHER=0)"
    assert off["on"] == "available: one call launches a whole pass"


# ---- without it ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted")
def test_without_the_extension_triton_launches(monkeypatch):
    monkeypatch.setattr(native, "_launch", None)
    monkeypatch.setattr(native, "_MISSING", "not built")
    x = torch.randn(2, 3, 40)
    with dk.use_backend("triton", strict=True):
        torch.testing.assert_close(dk.abs_mean(x), x.abs().mean(2))
        torch.testing.assert_close(dk.abs_mean(x), x.abs().mean(2))
    assert native.describe() == "not available, launches go through Triton: not built"


def test_info_says_who_launches():
    from drsn_kernels import info

    assert info.collect()["launcher"] == native.describe()


# ---- on a GPU --------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(native.missing() is not None, reason=f"no launcher: {native.missing()}")


@pytest.fixture
def native_launches(monkeypatch) -> list[bool]:
    """Of every pass that runs from here on, whether the extension launched it."""
    from drsn_kernels.backends.gpu import launch

    taken, call = [], native.Sequences.__call__

    def watched(it: native.Sequences, given: tuple) -> bool:
        taken.append(found := call(it, given))
        return found

    monkeypatch.setattr(native.Sequences, "__call__", watched)
    assert launch.target == 1
    return taken


def step_of(module, x, g) -> list[torch.Tensor]:
    """y and all gradients of a step whose running statistics start anew."""
    for buffer in module.buffers():
        buffer.zero_()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), g), *map(torch.clone, module.buffers())]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(8, 16, 128), (33, 20, 49), (128, 64, 1024), (4, 24, 7, 9)], ids=str)
def test_the_same_bits_as_through_triton(shape, training, dtype, native_launches, monkeypatch):
    with torch.device("cuda"):
        module = dk.Shrinkage(shape[1]).train(training)
        x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    with dk.use_backend("triton", strict=True):
        monkeypatch.setattr(native, "enabled", False)
        wanted = step_of(module, x, g)
        monkeypatch.setattr(native, "enabled", True)
        step_of(module, x, g)  # through Triton, and learnt
        native_launches.clear()
        found = step_of(module, x, g)
    assert native_launches and all(native_launches), native.refused
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.gpu
@on_gpu
def test_operators_on_another_stream_and_in_a_graph(native_launches):
    with torch.device("cuda"):
        x, tau = torch.randn(8, 16, 1000), torch.rand(8, 16)
    with dk.use_backend("triton", strict=True):
        wanted = dk.soft_threshold(x, tau), dk.abs_mean(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what is launched on another stream would come before x is doubled
            x *= 2
            found = dk.soft_threshold(x, 2 * tau), dk.abs_mean(x)
        torch.cuda.synchronize()
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, 2 * b)
        graph, twice = torch.cuda.CUDAGraph(), 2 * tau
        with torch.cuda.graph(graph):
            captured = dk.soft_threshold(x, twice), dk.abs_mean(x)
        x *= 0.5
        twice *= 0.5
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert all(native_launches[-4:])


@pytest.mark.gpu
@on_gpu
def test_threads_of_several_streams():
    import threading

    with torch.device("cuda"):
        module, x, g = dk.Shrinkage(16).eval(), torch.randn(8, 16, 500), torch.randn(8, 16, 500)
    with dk.use_backend("triton", strict=True):
        step_of(module, x, g)
        wanted = step_of(module, x, g)[:2]  # launched natively, as in the threads
        found: dict[int, list] = {}

        def work(number: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    own = x.detach().clone().requires_grad_()
                    y = module(own)
                    found[number] = [y.detach(), *torch.autograd.grad(y, own, g)]
                torch.cuda.current_stream().synchronize()

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
    assert len(found) == 4
    for own in found.values():
        assert all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True))
    assert not native.refused


@pytest.mark.gpu
@on_gpu
def test_a_failing_launch_is_an_error_with_its_name():
    from drsn_kernels import _launch
    from drsn_kernels.backends.gpu import native, stream
    from drsn_kernels.layout import layout_of

    x = torch.randn(8, 16, 128, device="cuda")
    launch = stream.prepare_reduce(layout_of(x), x.stride(), None, x.dtype, x.device, "magnitude", False)
    given = (x, None, torch.empty(8, 16, device="cuda"), None)
    kernel = launch._launch(dict(zip(launch.pointers, given, strict=True)))
    name, function, _, *others = native.of_triton(
        kernel, 1, launch.values, lambda pointer: (launch.pointers.index(pointer), 0)
    )
    too_large = _launch.Sequence(x.device.index, [(name, function, 2**32 - 1, *others)], [True, None, "any", None])
    with pytest.raises(_launch.NotLaunched, match="launching reduce_kernel: CUDA_ERROR_INVALID_VALUE"):
        too_large.run(torch.cuda.current_stream().cuda_stream, given)
    torch.cuda.synchronize()


# ---- under sanitizers ------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.slow
def test_it_is_clean_under_sanitizers(tmp_path):
    import pybind11

    build = tmp_path / "build"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DDRSN_SANITIZE=ON",
                 "-DCMAKE_CXX_COMPILER=g++", f"-DPython_EXECUTABLE={sys.executable}",
                 f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(build), "--target", "_launch"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-8000:]
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    done = child(
        CHILD, cwd=tmp_path, cache=tmp_path, DRSN_LAUNCHER="1", DRSN_TEST_LAUNCHER=str(next(build.glob("_launch*.so"))),
        LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="halt_on_error=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    assert json.loads(done.stdout)["threads"]["lines"] == 800
