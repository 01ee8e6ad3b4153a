"""The one-pass step of csrc/cuda/one_pass.cu as a launch that a plan names: "one_pass_cu", in place of one_pass.py's.

Installed with DRSN_ONE_PASS_CU=1, the compiled kernels lie in one_pass.fatbin in the package, and the compiled launcher
(native.py) loads and launches them where plans.ONE_PASS_CU says so, which is off. The grid is no larger than the blocks
that the device holds together (cuOccupancyMaxActiveClusters), for blocks are persistent and a second wave would start
late.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ...layout import Layout, is_dense
from ..step import Cost, Step, Strides
from . import native, one_pass
from .launch import multiprocessors
from .plans import Planned, cdiv, power_of_two, up_to

FATBIN = Path(__file__).resolve().parents[2] / "one_pass.fatbin"
FORWARD = ("x", "y", "residual", "planes", "pooled", "state", "tau", "w1", "b1", "mean", "var", "gamma", "beta", "w2",
           "b2")  # fmt: skip
BACKWARD = ("g", "dx", "planes", "dz", "dv", "tau_grad", "pooled", "state", "w1", "mean", "var", "gamma", "beta", "w2")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_AVERAGES = (None, "sample", "channel")  # enum Average


# ---- plan ------------------------------------------------------------------------------------------------------------

# Samples that a block has on chip: one that is worked on, one that its result leaves, one that is loaded. Fewer than
# two is no pipeline.
STAGES = 3
# A word of 32 elements is a thread's at a time; 512 threads are 16,384 elements, 64 KiB of float32.
THREADS = (64, 512)
THREADS_PER_SM = 1024  # in the 64 registers that the kernels are compiled for
CLUSTERS = (1, 2, 4, 8)
# A sample that fits one block is shared by more where there are few, while each has so many elements at least.
PART = 4096
# Shared memory of compute capability 9.0 and 10.0, of a block and of a multiprocessor; each block takes 1 KiB more.
BLOCK_BYTES = 227 << 10
SM_BYTES = 228 << 10


@dataclass(frozen=True)
class OnePassCuPlan:
    """One launch of persistent blocks, each with a cluster's share of one sample after another."""

    cluster: int  # blocks that share a sample, each with as many of its channels
    stages: int
    shared: int  # bytes
    threads: int
    programs: int  # blocks


def plan_of(
    layout: Layout, hidden: int, outputs: int, itemsize: int, sms: int, *, backward: bool, extra: bool
) -> OnePassCuPlan | str:
    """The plan of csrc/cuda/one_pass.cu on dense tensors, or why it does not take them.

    extra: a second operand comes with each sample: the residual, or (backward) a gradient of tau (N, C).
    """
    n, c, length = layout.n, layout.c, layout.l
    words = cdiv(length, 32)
    if layout.channels_last:
        return "channels_last: one_pass.cu takes rows along L"
    if length <= 16 or length * itemsize % 16:
        return f"rows of {length} elements: one_pass.cu takes more than 16, in a multiple of 16 bytes"
    if c % 4 or hidden % 4:
        return f"{c} channels and {hidden} hidden units: one_pass.cu takes multiples of 4"
    found = None
    for cluster in CLUSTERS:
        rows = c // cluster
        if c % cluster or rows * words % 4:
            continue
        if backward:
            stage, kept = _backward_bytes(rows, c, hidden, length, outputs, itemsize, extra)
        else:
            stage, kept = _forward_bytes(rows, c, hidden, length, outputs, itemsize, extra)
        stage = up_to(stage, 128)
        stages = min((BLOCK_BYTES - kept) // stage, STAGES)
        idle = found is not None and n * found[0] < sms and rows * length >= PART
        if stages >= 2 and (found is None or found[1] < STAGES or idle):
            found = cluster, stages, kept + stages * stage, rows * words
    if found is None:
        return f"two samples of {c * length * itemsize} bytes and the weights do not fit the shared memory of a cluster"
    cluster, stages, shared, words = found
    threads = min(max(power_of_two(words), THREADS[0]), THREADS[1])
    together = sms * min(SM_BYTES // (shared + 1024), THREADS_PER_SM // threads)
    programs = min(n, together // cluster) * cluster
    return OnePassCuPlan(cluster, stages, shared, threads, programs)


def _floats(*counts: int) -> int:
    return sum(up_to(4 * count, 16) for count in counts)


# Bytes of a stage, and of what stays in shared memory, the barriers included; in the order of the kernels.


def _forward_bytes(rows: int, c: int, h: int, length: int, outputs: int, itemsize: int, residual: bool):
    own = 1 if outputs == 1 else rows
    kept = _floats(h * c, own * h, h, own, h, h, h, h, h, 2 * c, own, 1)
    return rows * length * itemsize * (1 + residual), 128 + kept


def _backward_bytes(rows: int, c: int, h: int, length: int, outputs: int, itemsize: int, grad: bool):
    vectors = h + c + (0 if outputs == 1 else c) + (c if grad else 0)
    kept = _floats(h * outputs, rows * h, h, h, h, h, 2 * c, outputs, h, rows, 2)
    return rows * (length * itemsize + 12 * cdiv(length, 32)) + 4 * vectors, 128 + kept


# ---- launch ----------------------------------------------------------------------------------------------------------

# For tests, in the place of the compiled one: called with a Launch once, returns what takes its arguments each time.
launcher: Callable[["Launch"], Callable[[bytes], None]] | None = None


class Loaded(NamedTuple):
    """A kernel on the device, and the pointers that it was launched with; the others are null."""

    function: int
    blocks: int  # that the device holds together
    given: tuple[str, ...]


class Launch:
    """A launch but for its pointers. Calling it with them, by name, launches; one that is left out is null."""

    def __init__(self, kernel: str, pointers: tuple[str, ...], step: Step, plan: OnePassCuPlan, cost_of: Cost):
        hidden, outputs, *_ = step.gate
        n, c, length = step.layout.n, step.layout.c, step.layout.l
        self.kernel = self.name = f"{kernel}_{_DTYPES[step.dtype]}"
        self.plan, self.pointers, self.told_alignment, self._device = plan, pointers, (), step.device
        self.cost = replace(cost_of, kernels=(self.kernel,))
        self.values = {"WIDE": True}
        sizes = n, c, hidden, length, outputs, _AVERAGES.index(step.average), plan.stages
        self._sizes = struct.pack("<7if", *sizes, step.gate.eps)
        self._packed = struct.Struct(f"<{len(pointers)}Q")
        self._run: Callable[[bytes], None] | None = None
        self._alone, self._function = native.Sequences(pointers, step.device), None

    def arguments(self, **pointers: torch.Tensor | None) -> bytes:
        """The kernel's one parameter, ForwardArguments or BackwardArguments."""
        if unknown := pointers.keys() - set(self.pointers):
            raise TypeError(f"{self.kernel} takes {', '.join(self.pointers)}, not {', '.join(unknown)}")
        given = (pointers.get(name) for name in self.pointers)
        return self._packed.pack(*(0 if t is None else t.data_ptr() for t in given)) + self._sizes

    def _launch(self, named: dict[str, torch.Tensor | None]) -> Loaded | None:
        """Launch on the current device. For native.Sequences: the kernel; None by `launcher`."""
        if launcher is not None:
            self._run = self._run or launcher(self)
            return self._run(self.arguments(**named))
        given = tuple(map(named.get, self.pointers))
        loaded = Loaded(*self._loaded(), tuple(n for n, t in zip(self.pointers, given, strict=True) if t is not None))
        if not self._alone(given):
            self._alone.learn(given, [(self, loaded, {name: name for name in self.pointers})])
            if not self._alone(given):
                raise self._nobody(native.refused.get(self.kernel, "a launch hook of Triton's is set"))
        return loaded

    def _loaded(self) -> tuple[int, int]:
        if self._function is None:
            if reason := native.missing():
                raise self._nobody(reason)
            if not FATBIN.exists():
                raise self._nobody("it was not compiled at installation; reinstall with DRSN_ONE_PASS_CU=1")
            plan, device = self.plan, self._device.index or 0
            self._function = native.load(device, FATBIN, self.kernel, plan.threads, plan.shared, plan.cluster)
        return self._function

    def _nobody(self, reason: str) -> RuntimeError:
        return RuntimeError(
            f"plans.ONE_PASS_CU is set and {self.kernel} is planned, but nothing here launches it: {reason}"
        )

    def described(self, kernel: Loaded, place: Callable[[str], tuple[int, int]]) -> tuple:
        """For native.Sequences: one parameter, the pointers and then the sizes."""
        patches = [(8 * i, *place(name)) for i, name in enumerate(self.pointers) if name in kernel.given]
        block, plan = bytes(self._packed.size) + self._sizes, self.plan
        programs = min(plan.programs, kernel.blocks)
        return self.kernel, kernel.function, programs, plan.threads, plan.shared, plan.cluster, block, [0], patches

    def describe(self) -> Planned:
        return Planned(self.kernel, self.plan.programs, self.plan.threads // 32, self.plan, self.cost, (self._sizes,))


def prepare_forward(step: Step, y: Strides) -> Launch | str:
    """The launch on tensors at multiples of 16 bytes, or why it does not take them. y: strides of it."""
    plan = _plan(step, (step.strides, y, step.residual or y), backward=False, extra=step.residual is not None)
    if isinstance(plan, str):
        return plan
    return Launch("one_pass_forward", FORWARD, step, plan, one_pass.forward_cost(step))


def prepare_backward(step: Step, g: Strides) -> Launch | str:
    plan = _plan(step, (g,), backward=True, extra=step.want.tau and not step.one_tau)
    if isinstance(plan, str):
        return plan
    return Launch("one_pass_backward", BACKWARD, step, plan, one_pass.backward_cost(step))


def _plan(step: Step, strides: tuple[Strides, ...], *, backward: bool, extra: bool) -> OnePassCuPlan | str:
    if step.gate.batch_stats:
        return "BatchNorm in training couples the batch"
    if step.dtype not in _DTYPES:
        return f"x is {step.dtype}, one_pass.cu takes float32 and bfloat16"
    if not all(is_dense(step.layout, own) for own in strides):
        return "x, y, the residual or their gradients do not lie densely"
    if step.device.type == "cuda" and torch.cuda.get_device_capability(step.device)[0] not in (9, 10):
        return "one_pass.cu is compiled for compute capability 9.0 and 10.0"
    hidden, outputs, *_ = step.gate
    return plan_of(
        step.layout, hidden, outputs, step.dtype.itemsize, multiprocessors(step.device), backward=backward, extra=extra
    )
