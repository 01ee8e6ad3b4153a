"""csrc/cuda/one_pass.cu: emulated against float64 under several schedules; that what is done wrong in it is noticed.

Compiled by nvcc where there is one, launched where there is a GPU. How the emulation works is said in emulation/.
"""

import copy
import ctypes
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
import torch

import drsn_kernels as dk
from drsn_kernels import layout as layouts
from drsn_kernels.backends import gpu
from drsn_kernels.backends.eager import eager
from drsn_kernels.backends.step import GateShape, Step, Want
from drsn_kernels.gates import standard_gate

if gpu.missing() is not None:
    pytest.skip(gpu.missing(), allow_module_level=True)

import cuda_driver
import emulated

from drsn_kernels.backends.gpu import one_pass_cu, plans, sequence

F32, BF16 = torch.float32, torch.bfloat16
SCHEDULES = range(4)


class Case(NamedTuple):
    shape: tuple[int, int, int] = (5, 8, 64)  # N, C, L
    hidden: int = 8
    kind: str = "norm"
    one: bool = False  # one alpha a sample
    average: str | None = "channel"
    residual: bool = True
    tau: bool = True  # returned, and its gradient given
    dtype: torch.dtype = F32
    cluster: int = 1
    stages: int = 3
    clusters: int = 2  # of the grid

    def __str__(self) -> str:
        changed = (f"{name}={v}" for name, v in self._asdict().items() if v != self._field_defaults[name])
        return ",".join(changed).replace(" ", "").replace("torch.", "") or "plain"


@pytest.fixture
def emulation() -> emulated.Emulation:
    if emulated.missing() is not None:
        pytest.skip(emulated.missing())
    found = emulated.emulation()
    found.schedule, found.mutation = 0, ""
    return found


class Problem:
    """A case's tensors and launches, and what they give in float64."""

    def __init__(self, case: Case):
        torch.manual_seed(1)
        n, c, _ = case.shape
        self.case = case
        gate = oracle.standard_gate(c, case.hidden, 1 if case.one else c, case.kind).eval()
        x, residual, self.g = (oracle.varied(case.shape, case.dtype) for _ in range(3))
        self.x, self.residual = x, residual if case.residual else None
        self.parts, self.layout = standard_gate(gate, x), layouts.layout_of(x)
        self.step = Step(
            "shrink", self.layout, x.stride(), x.dtype, x.device, case.average, outputs=len(self.parts.w2),
            gate=GateShape.of(self.parts), residual=None if self.residual is None else residual.stride(), keep=True,
            want=Want(True, True, case.tau),
        )  # fmt: skip
        tau_shape = n, 1 if self.step.one_tau else c
        self.tau_grad = torch.randn(tau_shape) if case.tau else None

        gate, leaf = oracle.cast_gate(gate, torch.float64), x.double().requires_grad_()
        pooled = oracle.abs_mean(leaf)
        alpha = gate(pooled)
        tau = alpha * {"channel": pooled, "sample": pooled.mean(1, keepdim=True), None: 1.0}[case.average]
        by_channel = tau.expand(n, c)
        y = oracle.soft_threshold(leaf, by_channel)
        g, tau_grad = self.g.double(), torch.zeros(tau_shape).double() if self.tau_grad is None else self.tau_grad
        dx, dtau = torch.autograd.grad([y, tau], [leaf, by_channel], [g, tau_grad.double()])
        state = torch.cat([gate[0](pooled).flatten(), alpha.flatten()])
        y = y if self.residual is None else y + residual.double()
        forward = {"y": y, "pooled": pooled, "state": state, "tau": tau}
        self.forward = {name: t.detach() for name, t in forward.items()}
        self.backward = {"dx": dx, "dtau": dtau}

    def planned(self, launch: one_pass_cu.Launch, **changed: int) -> plans.OnePassCuPlan:
        """The launch's plan, on a device that holds few blocks."""
        return dataclasses.replace(launch.plan, programs=self.case.cluster * self.case.clusters, **changed)

    def prepare(self, prepare, strides) -> one_pass_cu.Launch:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plans, "CU_CLUSTERS", (self.case.cluster,))
            patch.setattr(plans, "CU_STAGES", self.case.stages)
            launch = prepare(self.step, strides)
        assert not isinstance(launch, str), launch
        assert launch.plan.stages == self.case.stages
        return launch

    def run_forward(self, emulation, keep: bool = True, **changed: int) -> dict[str, torch.Tensor]:
        """y, and what is kept: pooled, state, tau, planes. changed: of the plan."""
        launch = self.prepare(one_pass_cu.prepare_forward, self.x.stride())
        out = {name: torch.full_like(t, torch.nan, dtype=F32) for name, t in self.forward.items()}
        out["y"] = out["y"].to(self.case.dtype)
        out["planes"] = torch.full((3, self.layout.words), 0x55555555, dtype=torch.int32)
        if not keep:
            out = {"y": out["y"]}
        elif not self.case.tau:
            del out["tau"]
        p = self.parts
        arguments = launch.arguments(
            x=self.x, residual=self.residual, w1=p.w1, b1=p.b1, mean=p.mean, var=p.var, gamma=p.gamma, beta=p.beta,
            w2=p.w2, b2=p.b2, **out,
        )  # fmt: skip
        emulation.run(launch.kernel, self.planned(launch, **changed), arguments)
        return out

    def run_backward(self, emulation, kept: dict[str, torch.Tensor], **changed: int) -> dict[str, torch.Tensor]:
        launch = self.prepare(one_pass_cu.prepare_backward, self.g.stride())
        out = {"dx": torch.full_like(self.g, torch.nan), "dtau": torch.full_like(kept["pooled"], torch.nan)}
        p = self.parts
        arguments = launch.arguments(
            g=self.g, planes=kept["planes"], tau_grad=self.tau_grad, pooled=kept["pooled"], state=kept["state"],
            w1=p.w1, mean=p.mean, var=p.var, gamma=p.gamma, beta=p.beta, w2=p.w2, **out,
        )  # fmt: skip
        emulation.run(launch.kernel, self.planned(launch, **changed), arguments)
        return out

    def check_forward(self, found: dict[str, torch.Tensor]) -> None:
        for name in found.keys() - {"planes"}:
            close(found[name], self.forward[name])
        if "planes" in found:
            tau = found["tau"] if "tau" in found else self.forward["tau"].float()
            wanted = eager.map(self.x, self.layout, tau, keep=3)[1]
            assert torch.equal(found["planes"], wanted.bits)

    def check_backward(self, found: dict[str, torch.Tensor]) -> None:
        close(found["dx"], self.backward["dx"])
        close(found["dtau"], self.backward["dtau"])


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 2**-8 if found.dtype == BF16 else 1e-5
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=1e-5)


# ---- results ---------------------------------------------------------------------------------------------------------

CASES = [
    Case(),
    Case(dtype=BF16),
    Case(shape=(1, 8, 64)),
    Case(shape=(2, 8, 64), clusters=1),  # as many samples as are loaded at first
    Case(shape=(7, 8, 64), clusters=3),  # a ragged last turn
    Case(shape=(9, 4, 128), stages=2),
    Case(shape=(9, 4, 128), stages=2, dtype=BF16, average="sample"),
    # rows of a part of a word, of one lane's words, of more than a warp's
    Case(shape=(3, 4, 20)),
    Case(shape=(3, 12, 36), hidden=4),
    Case(shape=(3, 4, 100), hidden=12, kind="plain"),
    Case(shape=(3, 4, 40), dtype=BF16, hidden=36),
    Case(shape=(3, 8, 264), dtype=BF16),
    Case(shape=(3, 4, 1056), residual=False),
    Case(shape=(3, 4, 2080), dtype=BF16, clusters=1, residual=False),
    Case(shape=(3, 132, 32), hidden=20, tau=False),  # more rows than threads
    Case(shape=(2, 16, 1024), hidden=16, clusters=1, residual=False),  # 512 threads
    # every form of the threshold, with and without clusters
    Case(average="sample"),
    Case(average=None, kind="plain"),
    Case(one=True),
    Case(one=True, average="sample", dtype=BF16),
    Case(one=True, average=None, tau=False),
    Case(shape=(5, 8, 64), cluster=2),
    Case(shape=(5, 16, 64), cluster=4, average="sample"),
    Case(shape=(5, 16, 64), cluster=4, one=True, dtype=BF16),
    Case(shape=(4, 32, 36), cluster=8, average=None, clusters=1, residual=False),
    Case(shape=(5, 16, 64), cluster=2, one=True, average="sample", stages=2),
    Case(shape=(5, 16, 64), cluster=4, one=True, average=None, kind="plain"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_that_of_float64(emulation, case):
    check(emulation, case, SCHEDULES)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "norm"])
@pytest.mark.parametrize("average", oracle.AVERAGES)
@pytest.mark.parametrize("one", [False, True], ids=["an alpha a channel", "one alpha"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_step_under_many_schedules(emulation, dtype, one, average, kind, cluster):
    for length in (24, 200):
        for residual, tau, stages in ((True, True, 3), (False, False, 2)):
            shape = (7, 16, length)
            check(emulation, Case(shape, 12, kind, one, average, residual, tau, dtype, cluster, stages), range(8))


def check(emulation, case: Case, schedules) -> None:
    problem, runs = Problem(case), []
    for emulation.schedule in schedules:
        kept = problem.run_forward(emulation)
        problem.check_forward(kept)
        back = problem.run_backward(emulation, kept)
        problem.check_backward(back)
        runs.append(kept | back)
    for run in runs[1:]:  # the same bits, whatever came first
        assert all(torch.equal(run[name], runs[0][name]) for name in run)
    problem.check_forward(problem.run_forward(emulation, keep=False))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_that_are_no_numbers_or_no_magnitudes(emulation, dtype):
    """As the eager form has them: y, and the planes bit for bit."""
    problem = Problem(Case(shape=(4, 8, 64), dtype=dtype, residual=False, average=None))
    special = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 3e38, -3e38])
    problem.x[0, :, : len(special)] = special.to(dtype)  # tau is NaN there, or 0 to 1
    problem.x[1, 3, : len(special)] = special.to(dtype)
    problem.x[2, 5] = 0.0
    problem.x[3, 1, 5:7] = torch.tensor([3e38, -0.0]).to(dtype)
    found = problem.run_forward(emulation)
    y, planes = eager.map(problem.x, problem.layout, found["tau"], keep=3)
    assert found["tau"].isnan().any() and not found["tau"][3].isnan().any()
    assert torch.equal(found["planes"], planes.bits)
    torch.testing.assert_close(found["y"], y, rtol=0, atol=0, equal_nan=True)


# ---- what is done wrong is noticed -----------------------------------------------------------------------------------

# With one alpha or an average of all channels there is more to synchronise, with clusters something else.
MUTATED = [
    Case(shape=(9, 8, 64), average="sample"),
    Case(shape=(9, 16, 64), cluster=4, average="sample"),
    Case(shape=(7, 8, 256), one=True, dtype=BF16, clusters=1),
]


def notices(run, emulation, mutation: str = "", schedules=range(8)) -> bool:
    """Whether the kernel fails under one of the schedules: by the emulation, or by its results."""
    emulation.mutation = mutation
    for emulation.schedule in schedules:
        try:
            run()
        except (emulated.Wrong, AssertionError):
            return True
    return False


def runs_of(problem: Problem, emulation) -> list:
    """Forward, and backward from what a right forward pass keeps."""
    kept = problem.run_forward(emulated.emulation())
    return [
        lambda: problem.check_forward(problem.run_forward(emulation)),
        lambda: problem.check_backward(problem.run_backward(emulation, kept)),
    ]


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
def test_each_synchronisation_is_needed(emulation, direction):
    """Left out, done by one thread only, of the wrong parity or bytes: somewhere among the cases it is noticed."""
    missed: dict[str, int] = {}
    for case in MUTATED:
        run = runs_of(Problem(case), emulation)[direction]
        run()
        for mutation in emulation.mutations():
            missed[mutation] = missed.get(mutation, 1) & (not notices(run, emulation, mutation))
        emulation.mutation, emulation.schedule = "", 0
    kinds = {mutation.split(" @")[0] for mutation in missed}
    assert kinds == {
        "one more arrival at barrier_init", "without fence_barrier_init", "without barrier_expect",
        "16 bytes fewer at barrier_expect", "16 bytes more at barrier_expect", "without load_bulk",
        "16 bytes fewer at load_bulk", "without barrier_wait", "barrier_wait by thread 0 only",
        "the other parity at barrier_wait", "without wait_stores_read", "without commit_stores", "without fence_async",
        "fence_async by thread 0 only", "without the first __syncthreads", "without a later __syncthreads",
        "without the first cluster.sync", "without a later cluster.sync",
    }  # fmt: skip
    assert [mutation for mutation, everywhere in missed.items() if everywhere] == []


@pytest.mark.parametrize("mutation, says", [
    ("without barrier_wait", "reads what a bulk load fills, without having seen its barrier complete"),
    ("the other parity at barrier_wait", "without having seen its barrier complete|deadlock"),
    ("16 bytes fewer at barrier_expect", "completes its phase before its copies have landed|deadlock"),
    ("16 bytes more at barrier_expect", "deadlock: threads wait, .* at barrier_wait"),
    ("without wait_stores_read", "a bulk load into what a bulk store may still read"),
    ("without fence_async", "a bulk store of what a thread has written without fence.proxy.async"),
    ("fence_async by thread 0 only", "a bulk store of what a thread has written without fence.proxy.async"),
    ("without commit_stores", "a bulk load into what a bulk store may still read"),
    ("without fence_barrier_init", "whose initialisation was not fenced"),
])  # fmt: skip
def test_what_is_said_of_it_under_every_schedule(emulation, mutation, says):
    run, _ = runs_of(Problem(MUTATED[0]), emulation)
    run()
    (emulation.mutation, *_) = [name for name in emulation.mutations() if name.startswith(mutation + " @")]
    for emulation.schedule in range(8):
        with pytest.raises(emulated.Wrong, match=says):
            run()


CHANGES = {
    "one buffer of averages": {"a = a == averages ? averages + s.c : averages": "a = averages"},
    "one buffer of dtau": {"d = d == sums ? sums + s.c : sums": "d = sums"},
    "a parity that stays": {"current = 0, parity ^= 1": "current = 0"},
    "the stage in use is filled": {"current ? current - 1 : count - 1": "current"},
    "stored before all have written": {"    fence_async();\n    __syncthreads();": "    fence_async();"},
    "fenced after the barrier": {"fence_async();\n    __syncthreads();": "__syncthreads();\n    fence_async();"},
}


@pytest.mark.slow  # each is compiled
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_kernel_is_noticed(change):
    if emulated.missing() is not None:
        pytest.skip(emulated.missing())
    changed = emulated.Emulation(CHANGES[change])
    found = [notices(run, changed) for case in MUTATED for run in runs_of(Problem(case), changed)]
    assert any(found), found


@pytest.mark.parametrize("case", MUTATED, ids=str)
def test_shared_memory_is_what_the_plan_says(emulation, case):
    """16 bytes less, and the kernels write past the end; with what is planned they do not, in any test here."""
    problem = Problem(case)
    kept = problem.run_forward(emulation)
    less = problem.prepare(one_pass_cu.prepare_forward, problem.x.stride()).plan.shared - 16
    if case.average == "sample":  # else the last words, the average of all channels, are not written
        with pytest.raises(emulated.Wrong, match="past the end"):
            problem.run_forward(emulation, shared=less)
    less = problem.prepare(one_pass_cu.prepare_backward, problem.x.stride()).plan.shared - 16
    with pytest.raises(emulated.Wrong, match="past the end"):
        problem.run_backward(emulation, kept, shared=less)


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
def test_nobody_launches_it_yet(monkeypatch):
    x, gate = torch.randn(5, 8, 64), oracle.gate_of(8, "norm").eval()
    monkeypatch.setattr(plans, "ONE_PASS_CU", True)
    with dk.use_backend("triton", strict=True), torch.no_grad():
        with pytest.raises(RuntimeError, match="one_pass_forward_float32 is planned, but nothing here launches"):
            dk.shrink(x, gate)
    step = step_of((5, 8, 64), GateShape(8, 8, True, False, 1e-5, 0.1))
    plan = sequence.plan(step)
    assert plan.name == "one_pass_cu"
    assert plan.forward.kernels[0] == "one_pass_forward_float32"
    assert plan.backward.kernels == ("one_pass_backward_float32", "hidden_grad_kernel")
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
@pytest.mark.skipif(not one_pass_cu.FATBIN.exists(), reason="no nvcc at installation")
@pytest.mark.parametrize("shape", [(5, 8, 64), (512, 64, 256), (8, 64, 512), (300, 64, 1024), (4097, 16, 128)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_on_a_gpu(shape, dtype):
    with torch.device("cuda"):
        gate = oracle.gate_of(shape[1], "norm").eval()
        check_in_place(cuda_driver.driver().launcher, oracle.varied(shape, dtype), gate)
