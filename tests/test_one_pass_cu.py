"""csrc/cuda/one_pass.cu in the package: plans, in place of Triton's launch, compiled by nvcc, launched on a GPU.

What the kernels compute is in test_one_pass_cu_emulation.py.
"""

import copy
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import repository
import torch

import drsn_kernels as dk
from drsn_kernels import layout as layouts
from drsn_kernels.backends import gpu
from drsn_kernels.backends.step import GateShape, Step, Want

if gpu.missing() is not None:
    pytest.skip(gpu.missing(), allow_module_level=True)

import cuda_driver
import emulated

from drsn_kernels.backends.gpu import one_pass_cu, plans, sequence

F32, BF16 = torch.float32, torch.bfloat16


# ---- plans -----------------------------------------------------------------------------------------------------------

GATE = GateShape(64, 64, True, False, 1e-5, 0.1)


def step_of(shape, gate=GATE, dtype=F32, **options) -> Step:
    x = torch.empty(shape, device="meta")
    return Step(
        "shrink", layouts.layout_of(x), x.stride(), dtype, torch.device("cpu"), "channel", outputs=gate.outputs,
        gate=gate, **{"keep": True, "want": Want(True, True), **options},
    )  # fmt: skip


def test_plans_fit_the_device_and_are_pipelines():
    """Whole samples where three fit; clusters where they do not, or where there are few samples."""
    shapes = (512, 64, 256), (4096, 16, 128), (128, 64, 1024), (64, 128, 512), (8, 64, 512), (1, 16, 64)
    for dtype, size in ((F32, 4), (BF16, 2)):
        for n, c, length in shapes:
            gate = GateShape(c, c, True, False, 1e-5, 0.1)
            for prepare in (one_pass_cu.prepare_forward, one_pass_cu.prepare_backward):
                step = step_of((n, c, length), gate, dtype)
                plan = prepare(step, step.strides).plan
                assert plan.shared <= 227 << 10 and 2 <= plan.stages <= 3 and 64 <= plan.threads <= 512
                assert plan.programs % plan.cluster == 0 and 0 < plan.programs <= n * plan.cluster
                assert plan.stages * c // plan.cluster * length * size < plan.shared
    whole = step_of((512, 64, 256))
    plan = one_pass_cu.prepare_forward(whole, whole.strides).plan
    assert (plan.cluster, plan.stages, plan.threads, plan.programs) == (1, 3, 512, 132)
    few = one_pass_cu.prepare_forward(step_of((8, 64, 256)), whole.strides).plan
    assert (few.cluster, few.stages, few.threads, few.programs) == (4, 3, 128, 32)
    large = step_of((128, 64, 1024))
    assert one_pass_cu.prepare_forward(large, large.strides).plan.cluster == 4


REFUSED = {
    "BatchNorm in training": step_of((4, 64, 64), GATE._replace(batch_stats=True)),
    "torch.float16": step_of((4, 64, 64), dtype=torch.float16),
    "do not lie densely": step_of((4, 64, 64))._replace(strides=(8192, 128, 2)),
    "rows of 16 elements": step_of((4, 64, 16)),
    "rows of 49 elements": step_of((4, 64, 49)),
    "rows of 20 elements": step_of((4, 64, 20), dtype=BF16),
    "62 channels and 64 hidden units": step_of((4, 62, 64)),
    "the weights do not fit": step_of((4, 64, 1 << 16)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_taken_is_said(reason, monkeypatch):
    monkeypatch.setattr(plans, "ONE_PASS_CU", True)
    step = REFUSED[reason]
    assert reason in one_pass_cu.prepare_forward(step, step.layout.strides)
    found = sequence.plan(step)
    assert found.name in ("one pass", "several launches")
    assert any(name == "one_pass_cu" and reason in why for name, why in found.not_taken)


def test_channels_last_is_not_taken():
    x = torch.empty(2, 64, 8, 8).to(memory_format=torch.channels_last)
    step = step_of((2, 64, 8, 8))._replace(layout=layouts.layout_of(x), strides=x.stride())
    assert "channels_last" in one_pass_cu.prepare_forward(step, x.stride())


# ---- in place of Triton's --------------------------------------------------------------------------------------------


def step_by(gate, x, residual, g) -> list[torch.Tensor]:
    """y, tau and all gradients of a call on the triton backend."""
    gate, x = copy.deepcopy(gate), x.detach().clone().requires_grad_()
    with dk.use_backend("triton", strict=True):
        y, tau = dk.shrink(x, gate, residual=residual, return_tau=True)
        torch.autograd.backward([y, tau], [g, torch.ones_like(tau)])
    return [y.detach(), tau.detach(), x.grad, *(p.grad for p in gate.parameters())]


def check_in_place(launcher, x, gate) -> None:
    residual, g = torch.randn_like(x), torch.randn_like(x)
    wanted = step_by(gate, x, residual, g)
    kernels = []

    def watched(launch):
        kernels.append(launch.kernel)
        return launcher(launch)

    sequence.prepare_forward.cache_clear(), sequence.prepare_backward.cache_clear()
    with cuda_driver.launching(watched):
        found = step_by(gate, x, residual, g)
    sequence.prepare_forward.cache_clear(), sequence.prepare_backward.cache_clear()
    dtype = str(x.dtype).removeprefix("torch.")
    assert kernels == [f"one_pass_forward_{dtype}", f"one_pass_backward_{dtype}"]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == BF16 else 1e-4, atol=1e-5)


interpreted = pytest.mark.skipif(not gpu.interpreting(), reason="needs Triton's interpreter (no CUDA device)")


@interpreted
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_it_takes_the_place_of_tritons_launch(emulation, kind, dtype):
    check_in_place(emulation.launcher, oracle.varied((5, 8, 64), dtype), oracle.gate_of(8, kind).eval())


@interpreted
def test_a_tensor_off_16_bytes_is_tritons(emulation):
    def launcher(launch):
        raise AssertionError("launched on a tensor that it cannot copy")

    x = oracle.varied((5 * 8 * 64 + 1,))[1:].view(5, 8, 64)
    assert x.data_ptr() % 16
    gate = oracle.gate_of(8, "norm").eval()
    with cuda_driver.launching(launcher), dk.use_backend("triton", strict=True), torch.no_grad():
        dk.shrink(x, gate)


@interpreted
def test_without_the_launcher_it_is_an_error(monkeypatch):
    x, gate = torch.randn(5, 8, 64), oracle.gate_of(8, "norm").eval()
    monkeypatch.setattr(plans, "ONE_PASS_CU", True)
    with dk.use_backend("triton", strict=True), torch.no_grad():
        with pytest.raises(RuntimeError, match="one_pass_forward_float32 is planned, but nothing here launches"):
            dk.shrink(x, gate)
    step = step_of((5, 8, 64), GateShape(8, 8, True, False, 1e-5, 0.1))
    plan = sequence.plan(step)
    assert plan.name == "one_pass_cu"
    assert plan.forward.kernels[0] == "one_pass_forward_float32"
    assert plan.backward.kernels == ("one_pass_backward_float32", "linear_grad_kernel")
    assert str(plan.launches[0]).startswith("one_pass_forward_float32: 5 programs of 2 warps; cluster 1, stages 3")


def test_a_pointer_of_another_name_is_refused():
    step = step_of((5, 64, 64))
    launch = one_pass_cu.prepare_forward(step, step.strides)
    with pytest.raises(TypeError, match="one_pass_forward_float32 takes x, y, .*, not g"):
        launch.arguments(x=torch.empty(1), g=torch.empty(1))


# ---- compiled --------------------------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["90a", pytest.param("100a", marks=pytest.mark.slow)])
def test_nvcc_spills_nothing(architecture, tmp_path):
    """And two blocks of 512 threads have the registers of a multiprocessor."""
    command = ["nvcc", "-std=c++17", "-O3", "-Werror=all-warnings", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin"]
    source = str(emulated.KERNELS / "one_pass.cu")
    done = subprocess.run([*command, source, "-o", str(tmp_path / "cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    assert sorted(kernels) == [f"one_pass_{d}_{t}" for d in ("backward", "forward") for t in ("bfloat16", "float32")]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert frames == [("0", "0", "0")] * 4
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == 4 and max(registers) <= 64


@needs_nvcc
def test_an_older_gpu_is_refused_by_the_compiler(tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-E", "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, str(emulated.KERNELS / "one_pass.cu")], capture_output=True, text=True)
    assert done.returncode != 0 and "need compute capability 9.0" in done.stderr


NVCC = {
    "found": ("#!/bin/sh\nfor last; do :; done\necho compiled > $last\n", ""),
    "absent": (None, "No such file or directory: 'nvcc'"),
    "cannot be started": ("#!/nowhere\n", "nvcc: [Errno 2]"),
    "fails": ("#!/bin/sh\necho a warning\necho 'x.cu(1): error: no'\necho 'error: 2'\nexit 1\n",
              "nvcc: x.cu(1): error: no\n"),
    "says nothing": ("#!/bin/sh\nexit 3\n", "nvcc: status 3\n"),
    "hangs": ("#!/bin/sh\n/bin/sleep 60\n", "nvcc: not done after 0.5 seconds\n"),
}  # fmt: skip
INSTALLING = """
import pathlib, runpy, setuptools, sys
setuptools.setup = lambda **given: None
compile_cuda = runpy.run_path(sys.argv[1])["compile_cuda"]
compile_cuda.__globals__["NVCC_SECONDS"] = float(sys.argv[3])
compile_cuda(pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("asked", ["0", "1"])
@pytest.mark.parametrize("nvcc", NVCC)
def test_an_installation_is_never_stopped_by_nvcc(nvcc, asked, tmp_path):
    pytest.importorskip("setuptools")
    script, said = NVCC[nvcc]
    if script is not None:
        (tmp_path / "nvcc").write_text(script)
        (tmp_path / "nvcc").chmod(0o755)
    target = tmp_path / "one_pass.fatbin"
    target.write_text("of an earlier build")
    command = [sys.executable, "-c", INSTALLING, str(repository.ROOT / "setup.py"), str(tmp_path),
               "0.5" if nvcc == "hangs" else "30"]  # fmt: skip
    env = {**os.environ, "PATH": str(tmp_path), "DRSN_NATIVE": "0", "DRSN_ONE_PASS_CU": asked}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    assert target.exists() == (asked == "1" and nvcc == "found")
    assert (said in done.stderr) if asked == "1" and said else done.stderr == ""


FAKE = r"""
#include <cuda.h>
#include <string.h>
static int grid[3], shape[6];
static unsigned char parameter[256];
CUresult cuModuleLoadData(CUmodule* m, const void* image) { *m = (CUmodule)image; return *(const char*)image != 'f'; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
  *f = (CUfunction)m;
  return strcmp(name, "one_pass_forward_float32");
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) {
  shape[5] = value;
  return a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) { *n = 3; return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void** extra) {
  if (c->numAttrs != 1 || c->attrs->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION || extra) return 1;
  if (c->gridDimY * c->gridDimZ * c->blockDimY * c->blockDimZ != 1 || c->hStream) return 2;
  shape[0] = c->gridDimX, shape[1] = c->blockDimX, shape[2] = c->sharedMemBytes;
  shape[3] = c->attrs->value.clusterDim.x;
  shape[4] = c->attrs->value.clusterDim.y * c->attrs->value.clusterDim.z;
  memcpy(parameter, parameters[0], 15 * 8 + 32);
  return 0;
}
const int* seen(void) { return shape; }
const unsigned char* given(void) { return parameter; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_loader_calls_the_driver_as_its_header_says(tmp_path):
    """A driver that does nothing, compiled against the cuda.h of Triton's wheel."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    (tmp_path / "fake.c").write_text(FAKE)
    fake = tmp_path / "fake.so"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{include}", str(tmp_path / "fake.c"), "-o", str(fake)], check=True)
    (tmp_path / "fatbin").write_bytes(b"f")
    step = step_of((8, 64, 256))
    launch = one_pass_cu.prepare_forward(step, step.strides)
    arguments = launch.arguments(x=torch.empty(4))
    cuda_driver.Driver(tmp_path / "fatbin", str(fake)).launcher(launch)(arguments)
    library = ctypes.CDLL(str(fake))
    library.seen.restype, library.given.restype = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_ubyte)
    plan = launch.plan
    assert library.seen()[:6] == [3 * plan.cluster, plan.threads, plan.shared, plan.cluster, 1, plan.shared]
    assert bytes(library.given()[: len(arguments)]) == arguments and len(arguments) == 15 * 8 + 32


@pytest.mark.gpu
@pytest.mark.skipif(not one_pass_cu.FATBIN.exists(), reason="not compiled at installation")
@pytest.mark.parametrize("shape", [(5, 8, 64), (512, 64, 256), (8, 64, 512), (300, 64, 1024), (4097, 16, 128)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_on_a_gpu(shape, dtype):
    with torch.device("cuda"):
        gate = oracle.gate_of(shape[1], "norm").eval()
        check_in_place(cuda_driver.driver().launcher, oracle.varied(shape, dtype), gate)
