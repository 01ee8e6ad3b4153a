"""What a whole operator call may move, launch, allocate and keep: the kernels' budgets (traffic.py), added up.

Each function returns two budgets, forward and backward, for a call with these sizes. The backward one is empty where
nothing is kept. The modules of a gate that is not fused are the user's: their operations are not in it, nor is the add
of the gate's gradient of A to the direct one.
"""

import dataclasses
from math import prod

import torch

from . import traffic
from .backends import BACKENDS
from .gates import StandardGate
from .planes import Geometry
from .reference import SOFT, Rule, accumulate_dtype, threshold, threshold_grad
from .traffic import Budget, StandardCall, like

Strides = tuple[int, ...]


def abs_mean(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str,
    channels_last: bool = False,
    grad: bool = True,
    strides: Strides | None = None,
    device: torch.device | None = None,
) -> tuple[Budget, Budget]:
    """`drsn_kernels.abs_mean` of x (N, C, *spatial).

    Args:
        backend: "cpu", "triton" or "torch".
        channels_last: x's dense order; or its `strides`.
        grad: x requires a gradient.
        device: whose multiprocessors Triton plans for; by default the current GPU, without one an H100.

    Raises:
        ValueError: unknown backend, or fewer than three dimensions.
    """
    on = _On(shape, dtype, backend, channels_last, strides, device)
    forward = on.reduce(grad)
    if not grad:
        return forward, Budget()
    kept = dataclasses.replace(forward, saved=2 * on.plane)
    return kept, on.grad(masked=False, pooled=True, dx=True, dtau=False)


def soft_threshold(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str,
    tau: tuple[int, int] | None = None,
    channels_last: bool = False,
    grad: bool = True,
    input_grad: bool = True,
    tau_grad: bool = True,
    rule: Rule = SOFT,
    strides: Strides | None = None,
    device: torch.device | None = None,
) -> tuple[Budget, Budget]:
    """`drsn_kernels.soft_threshold` of x (N, C, *spatial) with tau of shape `tau`, (N, C) by default.

    input_grad, tau_grad: which of the two require a gradient, where `grad` is set; rule: of the threshold, which
    changes what pure PyTorch does. The rest as in `abs_mean`.
    """
    on = _On(shape, dtype, backend, channels_last, strides, device)
    n, c = on.geometry[0][:2]
    tau = (n, c) if tau is None else tau
    if not grad or not (input_grad or tau_grad):
        return on.apply(tau, False, 0, rule), Budget()
    forward = dataclasses.replace(on.apply(tau, False, 2, rule), saved=2 * on.plane)
    backward = on.grad(masked=True, pooled=False, dx=input_grad, dtau=tau_grad, rule=rule)
    if tau_grad and tau != (n, c):
        backward += traffic.traced(lambda t: t.sum_to_size(tau), like(n, c, dtype=on.sums))
        backward += Budget(workspace=traffic.sums_bytes(on.geometry, dtype))
    return forward, backward


def shrink(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str,
    hidden: int | None = None,
    outputs: int | None = None,
    norm: bool = True,
    training: bool = True,
    average: str | None = "channel",
    residual: bool = False,
    return_tau: bool = False,
    channels_last: bool = False,
    fused: bool | None = None,
    grad: bool = True,
    input_grad: bool = True,
    rule: Rule = SOFT,
    strides: Strides | None = None,
    residual_strides: Strides | None = None,
    device: torch.device | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> tuple[Budget, Budget]:
    """`drsn_kernels.shrink` of x (N, C, *spatial).

    Args:
        hidden, outputs: widths of the standard gate; C and, as in `Shrinkage`, C or for average="sample" 1.
        norm, training: the standard gate has a BatchNorm1d; it is in training, so takes its statistics from the batch.
        fused: the backend computes the gate. By default where it can; False for a gate that is called.
        grad: something requires a gradient; input_grad: x does.
        rule: of the threshold; but for SOFT, the gate is called.
        eps, momentum: of the norm; they change no byte, only which prepared launches are looked at.

    The rest as in `abs_mean`.
    """
    on = _On(shape, dtype, backend, channels_last, strides, device)
    c = on.geometry[0][1]
    hidden = c if hidden is None else hidden
    outputs = (1 if average == "sample" else c) if outputs is None else outputs
    if fused is None:
        fused = rule == SOFT and on.fuses(hidden, outputs)
    if fused:
        dense = on.geometry[1]
        return traffic.standard(on.backend, StandardCall(
            on.geometry, (on.strides, dense, residual_strides or dense), dtype, on.device, hidden, outputs, average,
            norm, norm and training, eps, momentum, residual, grad, return_tau, input_grad,
        ))  # fmt: skip
    return on.any_gate(outputs, average, residual, return_tau, grad, input_grad, rule)


def squeeze_excite(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str,
    outputs: int | None = None,
    residual: bool = False,
    channels_last: bool = False,
    grad: bool = True,
    input_grad: bool = True,
    gate_grad: bool = True,
    strides: Strides | None = None,
    device: torch.device | None = None,
) -> tuple[Budget, Budget]:
    """`drsn_kernels.squeeze_excite` of x (N, C, *spatial): x itself is kept for the gradient of the gate's factors.

    Args:
        outputs: factors that the gate returns for a sample, C or 1; C by default.
        input_grad, gate_grad: which of x and the factors require a gradient, where `grad` is set.

    The rest as in `abs_mean`.
    """
    on = _On(shape, dtype, backend, channels_last, strides, device)
    n, c = on.geometry[0][:2]
    s = (n, c if outputs is None else outputs)
    input_grad, gate_grad = grad and input_grad, grad and gate_grad
    mean, scale, sums, dx = on.backend.squeeze_excite_budgets(
        on.geometry, on.strides, dtype, on.device, s, residual, gate_grad
    )
    # A and ds go to the gate and its gradient: what it keeps of them is the gate's
    pooled, backward = Budget(workspace=traffic.sums_bytes(on.geometry, dtype)), Budget()
    forward = mean + scale + pooled
    if gate_grad:
        forward += Budget(saved=traffic.map_bytes(on.geometry, dtype))
        backward += sums + pooled
        if s[1] != c:
            backward += traffic.traced(lambda t: t.sum(1, keepdim=True), like(n, c, dtype=on.sums), inner=True)
    if input_grad:
        forward += Budget(saved=traffic.sums_bytes(on.geometry, dtype, s[1]))
        backward += dx
    return forward, backward


class _On:
    """A call's x and backend."""

    def __init__(self, shape, dtype, backend, channels_last, strides, device):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if len(shape) < 2:
            raise ValueError(f"shape must be (N, C, *spatial), got {tuple(shape)}")
        self.backend, self.dtype, self.sums = BACKENDS[backend], dtype, accumulate_dtype(dtype)
        self.strides = strides or _dense(shape, channels_last)
        self.geometry: Geometry = traffic.geometry_of(shape, self.strides)
        if device is None:
            gpu = backend == "triton" and torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.device = device

    @property
    def plane(self) -> int:
        return traffic.plane_bytes(self.geometry)

    def reduce(self, planes: bool) -> Budget:
        return self.backend.reduce_budget(self.geometry, self.strides, self.dtype, self.device, planes)

    def apply(self, tau: tuple[int, int], residual: bool, planes: int, rule: Rule) -> Budget:
        args = self.geometry, self.strides, self.dtype, self.device
        return self.backend.apply_budget(*args, tau, residual, planes, rule)

    def grad(self, *, masked: bool, pooled: bool, dx: bool, dtau: bool, rule: Rule = SOFT) -> Budget:
        """For a g that lies as x does."""
        args = self.geometry, self.geometry[1], self.dtype, self.device
        return self.backend.grad_budget(*args, masked, pooled, dx, dtau, rule)

    def fuses(self, hidden: int, outputs: int) -> bool:
        if not hasattr(self.backend, "standard_budgets"):
            return False
        c = self.geometry[0][1]
        w1, w2 = like(hidden, c, dtype=self.sums), like(outputs, hidden, dtype=self.sums)
        parts = StandardGate(w1, None, None, None, w2, None, None, None, None, 0.0, 0.0, False)
        x = torch.empty_strided(self.geometry[0], self.strides, dtype=self.dtype, device="meta")
        return self.backend.standard_unsupported(x, parts) is None

    def any_gate(self, outputs, average, residual, return_tau, grad, input_grad, rule) -> tuple[Budget, Budget]:
        n, c = self.geometry[0][:2]
        alpha, pooled = like(n, outputs, dtype=self.sums), like(n, c, dtype=self.sums)
        columns = c if average == "channel" else outputs
        small = traffic.sums_bytes(self.geometry, self.dtype)
        tau = traffic.traced(threshold, alpha, pooled, average, inner=not return_tau)
        if return_tau and average is None:
            tau = traffic.traced(torch.clone, alpha)
        planes = 0 if not grad else 1 if input_grad else 2
        forward = self.reduce(planes == 1) + tau + self.apply((n, columns), residual, planes, rule)
        if not grad:
            return forward + Budget(workspace=small), Budget()
        saved = 3 - (planes == 2)
        forward += Budget(saved=saved * self.plane + small + traffic.sums_bytes(self.geometry, self.dtype, outputs))
        dtau = like(n, c, dtype=self.sums)
        backward = self.grad(masked=True, pooled=False, dx=False, dtau=True, rule=rule) + Budget(workspace=small)
        backward += traffic.traced(threshold_grad, dtau, None, alpha, pooled, average, True, input_grad, inner=True)
        if input_grad:
            backward += self.grad(masked=True, pooled=True, dx=True, dtau=False, rule=rule)
        return forward, backward


def _dense(shape: tuple[int, ...], channels_last: bool) -> Strides:
    n, c, *spatial = shape
    order = [*range(2, len(shape)), 1] if channels_last else list(range(1, len(shape)))
    sizes = [shape[d] for d in order]
    strides = {d: prod(sizes[i + 1 :]) for i, d in enumerate(order)}
    return (prod(shape[1:]), *(strides[d] for d in range(1, len(shape))))
