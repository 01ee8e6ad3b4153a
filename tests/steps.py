"""Steps (drsn_kernels.backends.step) from sizes, and what backends plan for them: no tensor is needed."""

import torch

from drsn_kernels.backends import BACKENDS
from drsn_kernels.backends.step import Cost, GateShape, Norm, Step, Want
from drsn_kernels.gates import StandardGate
from drsn_kernels.layout import dense, is_dense
from drsn_kernels.reference import SOFT, Rule, accumulate_dtype

F32 = torch.float32


def features(shape: tuple[int, ...], channels_last: bool = False) -> torch.Tensor:
    """Without memory."""
    x = torch.empty(shape, device="meta")
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def _step(op: str, shape, dtype, channels_last, strides, device, **what) -> Step:
    dense_strides = features(shape, channels_last).stride()
    layout = dense(tuple(shape), dense_strides)
    strides = dense_strides if strides is None else strides
    assert strides == dense_strides or not is_dense(layout, strides)
    return Step(op, layout, strides, dtype, device or torch.device("cpu"), **what)


def abs_mean(shape, dtype=F32, *, channels_last=False, grad=True, strides=None, device=None) -> Step:
    return _step("abs_mean", shape, dtype, channels_last, strides, device, keep=grad)


def soft_threshold(
    shape, dtype=F32, *, tau: tuple[int, int] | None = None, channels_last=False, grad=True, input_grad=True,
    tau_grad=True, rule: Rule = SOFT, strides=None, device=None,
) -> Step:  # fmt: skip
    want = Want(x=input_grad, threshold=tau_grad)
    columns = shape[1] if tau is None else tau[1]
    keep = grad and (input_grad or tau_grad)
    return _step("soft_threshold", shape, dtype, channels_last, strides, device, rule=rule, outputs=columns, keep=keep,
                 want=want)  # fmt: skip


def shrink(
    shape, dtype=F32, *, hidden: int | None = None, outputs: int | None = None, norm=True, training=True,
    average="channel", residual=False, return_tau=False, channels_last=False, fused=True, grad=True, input_grad=True,
    rule: Rule = SOFT, strides=None, residual_strides=None, device=None, eps=1e-5, momentum=0.1,
) -> Step:  # fmt: skip
    """hidden, outputs: of the gate; C and, as in `Shrinkage`, C or for average="sample" 1. fused: by the backend."""
    hidden = shape[1] if hidden is None else hidden
    outputs = (1 if average == "sample" else shape[1]) if outputs is None else outputs
    gate = GateShape(hidden, outputs, norm, norm and training, eps, momentum) if fused and rule == SOFT else None
    added = residual_strides or (features(shape, channels_last).stride() if residual else None)
    return _step("shrink", shape, dtype, channels_last, strides, device, average=average, rule=rule, outputs=outputs,
                 gate=gate, residual=added, keep=grad, want=Want(x=input_grad, tau=return_tau))  # fmt: skip


def squeeze_excite(
    shape, dtype=F32, *, outputs: int | None = None, residual=False, channels_last=False, grad=True, input_grad=True,
    gate_grad=True, strides=None, device=None,
) -> Step:  # fmt: skip
    added = features(shape, channels_last).stride() if residual else None
    outputs = shape[1] if outputs is None else outputs
    return _step("squeeze_excite", shape, dtype, channels_last, strides, device, outputs=outputs, residual=added,
                 keep=grad and (input_grad or gate_grad), want=Want(x=input_grad, threshold=gate_grad))  # fmt: skip


def batch_norm_relu(
    shape, dtype=F32, *, slope=0.0, training=True, channels_last=False, grad=True, input_grad=True, parameter_grad=True,
    strides=None, device=None, eps=1e-5,
) -> Step:  # fmt: skip
    want = Want(x=input_grad, threshold=parameter_grad)
    return _step("batch_norm_relu", shape, dtype, channels_last, strides, device, norm=Norm(slope, training, eps),
                 keep=grad and (input_grad or parameter_grad), want=want)  # fmt: skip


def fuses(backend: str, step: Step) -> bool:
    """Whether the backend computes a gate of these sizes itself."""
    if not BACKENDS[backend].fuses_gates or step.gate is None:
        return False
    gate, c, dtype = step.gate, step.layout.c, accumulate_dtype(step.dtype)
    w1, w2 = (torch.empty(size, dtype=dtype, device="meta") for size in ((gate.hidden, c), (gate.outputs, gate.hidden)))
    parts = StandardGate(w1, None, None, None, w2, None, None, None, None, gate.eps, gate.momentum, gate.batch_stats)
    x = torch.empty_strided(step.layout.shape, step.strides, dtype=step.dtype, device="meta")
    return BACKENDS[backend].gate_unsupported(x, parts) is None


def cost(step: Step, backend: str) -> tuple[Cost, Cost]:
    """Forward and backward; a gate that the backend would call is called."""
    if step.gate is not None and not fuses(backend, step):
        step = step._replace(gate=None)
    plan = BACKENDS[backend].plan(step)
    return plan.forward, plan.backward
