"""The gate's own launches as passes, without the step around them."""

import torch

from drsn_kernels.backends.gpu import gate_passes
from drsn_kernels.backends.gpu.launch import Pass, Room
from drsn_kernels.backends.step import Step
from drsn_kernels.gates import StandardGate

OF_GATE = ("w1", "b1", "gamma", "beta", "w2", "b2", "mean", "var", "batches")


def _run(wired, step: Step, room: Room, parts: StandardGate, **tensors: torch.Tensor | None) -> None:
    scratch = room.new(parts.w1)
    if scratch is not None:
        scratch.fill_(float("nan"))  # what is not written shows
    given = tensors | {"scratch": scratch} | dict(zip(OF_GATE, parts, strict=False))
    Pass(tuple(given), wired, step.device)(tuple(given.values()))


def forward(step: Step, parts: StandardGate, partial, pooled, state, tau) -> None:
    """Fills state, tau and, from several parts, pooled."""
    room = Room("scratch", step.sums)
    wired = gate_passes.prepare_gate(step, len(partial)).wired(step, room, "partial", "pooled", "state", "tau")
    _run(wired, step, room, parts, partial=partial, pooled=pooled, state=state, tau=tau)


def backward(step: Step, parts: StandardGate, pooled, state, dtau, tau_grad, want_dA: bool = True):
    """dA or None, and the gradients of w1, b1, gamma, beta, w2, b2."""
    room, gate = Room("scratch", step.sums), gate_passes.prepare_gate_grad(step, len(dtau), want_dA)
    dz, dv = (room.take(step.layout.n * size) for size in (step.gate.outputs, step.gate.hidden))
    wired, _, after = gate.wired(step, room, "dtau", dz, dv, "pooled", "state")
    dA = torch.full_like(pooled, float("nan")) if want_dA else None
    own = {"dA": "dA" if want_dA else None}
    wired = [(launch, sources | own if launch is gate.linear else sources) for launch, sources in [*wired, *after]]
    grads = gate.new(parts.w1)
    if parts.batch_stats:
        parts = parts._replace(mean=None, var=None)
    _run(wired, step, room, parts, dtau=dtau, tau_grad=tau_grad, pooled=pooled, state=state, dA=dA, grads=grads)
    return dA, gate.views(step, grads)
