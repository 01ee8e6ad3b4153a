"""The one-pass step of csrc/cuda/one_pass.cu as a launch that a plan names: "one_pass_cu", in place of one_pass.py's.

Where nvcc was found at installation, the compiled kernels lie in one_pass.fatbin beside the package. Nothing here loads
them: `launcher` is who does, and it is nobody's yet, so plans.ONE_PASS_CU is off. A launcher is called with a `Launch`
once and returns what is called with its arguments each time. It makes the grid no larger than the blocks that the
device holds together (cuOccupancyMaxActiveClusters), for blocks are persistent and a second wave would start late.
"""

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from ...layout import is_dense
from ..step import Cost, Step, Strides
from . import one_pass, plans
from .launch import multiprocessors
from .plans import OnePassCuPlan, Planned

FATBIN = Path(__file__).resolve().parents[2] / "one_pass.fatbin"
FORWARD = ("x", "y", "residual", "planes", "pooled", "state", "tau", "w1", "b1", "mean", "var", "gamma", "beta", "w2",
           "b2")  # fmt: skip
BACKWARD = ("g", "dx", "planes", "dz", "dv", "tau_grad", "pooled", "state", "w1", "mean", "var", "gamma", "beta", "w2")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_AVERAGES = (None, "sample", "channel")  # enum Average

launcher: Callable[["Launch"], Callable[[bytes], None]] | None = None


class Launch:
    """A launch but for its pointers. Calling it with them, by name, launches; one that is left out is null."""

    def __init__(self, kernel: str, pointers: tuple[str, ...], step: Step, plan: OnePassCuPlan, cost_of: Cost):
        hidden, outputs, *_ = step.gate
        n, c, length = step.layout.n, step.layout.c, step.layout.l
        self.kernel, self.plan = f"{kernel}_{_DTYPES[step.dtype]}", plan
        self.cost = dataclasses.replace(cost_of, kernels=(self.kernel,))
        self.values = {"WIDE": True}
        sizes = n, c, hidden, length, outputs, _AVERAGES.index(step.average), plan.stages
        self._names, self._sizes = pointers, struct.pack("<7if", *sizes, step.gate.eps)
        self._pointers = struct.Struct(f"<{len(pointers)}Q")
        self._run: Callable[[bytes], None] | None = None

    def arguments(self, **pointers: torch.Tensor | None) -> bytes:
        """The kernel's one parameter, ForwardArguments or BackwardArguments."""
        if unknown := pointers.keys() - set(self._names):
            raise TypeError(f"{self.kernel} takes {', '.join(self._names)}, not {', '.join(unknown)}")
        given = (pointers.get(name) for name in self._names)
        return self._pointers.pack(*(0 if t is None else t.data_ptr() for t in given)) + self._sizes

    def __call__(self, **pointers: torch.Tensor | None) -> None:
        if self._run is None:
            if launcher is None:
                raise RuntimeError(
                    f"plans.ONE_PASS_CU is set and {self.kernel} is planned, but nothing here launches compiled CUDA "
                    "C++ kernels; set it to False"
                )
            self._run = launcher(self)
        self._run(self.arguments(**pointers))

    def describe(self) -> Planned:
        return Planned(self.kernel, self.plan.programs, self.plan.threads // 32, self.plan)


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
    return plans.one_pass_cu(
        step.layout, hidden, outputs, step.dtype.itemsize, multiprocessors(step.device), backward=backward, extra=extra
    )
