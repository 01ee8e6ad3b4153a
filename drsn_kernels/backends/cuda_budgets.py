"""What calls of the `cuda` backend move, launch and allocate (traffic.py), and their plans in words (explain.py)."""

import torch

from .. import traffic
from ..planes import order
from ..reference import accumulate_dtype
from ..traffic import Budget, Plan, StandardCall
from . import cuda_plans
from .cuda_plans import Device, StandardPlan


def _added_up(geo, dtype, parts: int) -> Budget:
    """Partial sums in one more launch, which are then of no more use."""
    if parts == 1:
        return Budget()
    size = traffic.sums_bytes(geo, dtype)
    return Budget(parts * size, size, ("sum_parts",), parts * size)


def reduce(geo, dtype, planes, device: Device) -> Budget:
    parts = cuda_plans.row_parts(geo, device)
    return traffic.reduce(geo, dtype, planes, "reduce", parts) + _added_up(geo, dtype, parts)


def apply(geo, dtype, tau, residual, planes) -> Budget:
    size = tau[0] * tau[1] * accumulate_dtype(dtype).itemsize
    return traffic.apply(geo, dtype, size, residual, planes, "apply")


def grad(geo, dtype, masked, pooled, dx, dtau, device: Device) -> Budget:
    parts = cuda_plans.row_parts(geo, device) if dtau else 1
    return traffic.grad(geo, dtype, masked, pooled, dx, dtau, "grad", parts) + _added_up(geo, dtype, parts)


def squeeze_excite(geo, dtype, s, residual, pooled, device: Device) -> tuple[Budget, Budget, Budget, Budget]:
    """mean, scale, scale_sums and scale_grad."""
    factors, sums = traffic.sums_bytes(geo, dtype, s[1]), traffic.sums_bytes(geo, dtype)
    parts = cuda_plans.row_parts(geo, device)
    added = Budget(written=(parts - 1) * sums) + _added_up(geo, dtype, parts)
    return (
        traffic.reduce(geo, dtype, False, "reduce") + added,
        traffic.apply(geo, dtype, factors, residual, 0, "apply"),
        traffic.products(geo, dtype, "reduce") + added,
        traffic.apply(geo, dtype, factors + pooled * sums, False, 0, "apply"),
    )


# ---- the standard gate ----


def _plan(call: StandardCall, strides, device: Device) -> StandardPlan:
    whole = cuda_plans.is_one_run(call.geometry, *strides)
    return cuda_plans.standard(call.geometry, call.dtype, call.hidden, call.outputs, call.coupled, whole, device)


def _again(call: StandardCall, plan: StandardPlan) -> int:
    """Bytes of x, or g, that a launch of the training plan reads a second time because they are not on chip."""
    if plan.kind != 2:
        return 0
    items = call.geometry[0][0] * plan.parts
    return call.full * max(items - plan.held * plan.blocks, 0) // items


def standard(call: StandardCall, device: Device) -> tuple[Budget, Budget]:
    """Forward and backward. What the blocks of one launch hand each other through L2 is workspace, and no traffic."""
    size = accumulate_dtype(call.dtype).itemsize
    plan = _plan(call, call.strides, device)
    about = call.geometry, size, call.hidden, call.outputs
    statistics = call.statistics if call.coupled else 0
    weights = call.first_layer + call.second_layer + call.norm_read
    gate = call.sums(call.hidden) + call.sums(call.outputs) + statistics
    kept = (call.sums() + gate) if call.keep or plan.kind != 1 else 0  # written; one pass needs none of it
    made = kept + statistics + (call.tau if call.want_tau else 0)
    forward = Budget(
        workspace=cuda_plans.workspace(*about, call.want_tau, plan)[0] + (0 if call.keep else call.sums() + gate),
        saved=call.saved,
    )
    if plan.kind:
        name = "one_pass_forward" if plan.kind == 1 else "training_forward"
        planes = 3 * call.plane if call.keep else 0
        read = (1 + call.residual) * call.full + _again(call, plan) + weights
        forward += Budget(read, call.full + planes + made, (name,))
    else:
        n = call.geometry[0][0]
        first = reduce(call.geometry, call.dtype, call.keep, device)
        last = apply(call.geometry, call.dtype, (n, call.tau // size // n), call.residual, int(call.keep))
        middle = Budget(call.sums() + weights, gate + statistics + call.tau, ("gate_forward",))
        launched = first + middle + last
        forward += Budget(launched.read, launched.written, launched.kernels)
    return forward, _backward(call, device, about, weights + call.sums() + gate) if call.keep else Budget()


def _backward(call: StandardCall, device: Device, about: tuple, gate_read: int) -> Budget:
    geo, dtype = call.geometry, call.dtype
    strides = (geo[1],) if call.want_dx else ((0,) * len(geo[1]),)  # without dx no plan on chip
    plan = _plan(call, strides, device)
    used = Budget(workspace=cuda_plans.workspace(*about, False, plan)[1])
    gate = Budget(gate_read, call.parameter_grads, ("gate_backward",))
    if not plan.kind:
        total = grad(geo, dtype, True, False, False, True, device) + gate
        if call.want_dx:
            total += grad(geo, dtype, True, True, True, False, device)
        return Budget(total.read, total.written, total.kernels) + used
    moved = Budget(call.full + _again(call, plan) + 3 * call.plane, call.full)
    if plan.kind == 2:
        return moved + Budget(gate_read, call.parameter_grads, ("training_backward",)) + used
    deltas = call.sums(call.hidden) + call.sums(call.outputs)  # of z and v, from one launch to the next
    return moved + Budget(gate_read, deltas, ("one_pass_backward",)) + gate + Budget(read=deltas) + used


# ---- plans in words ----


def plan(op, geo, strides, dtype, gate, device: Device) -> Plan:
    if isinstance(gate, StandardCall):
        taken = _plan(gate, gate.strides, device)
        return Plan(taken.name, taken.why, taken.not_taken, 64, (taken,))
    parts = cuda_plans.row_parts(geo, device)
    why = f"{parts} blocks share a row" if parts > 1 else "a row, or several, to a block"
    not_taken, row = (), order(geo).length * dtype.itemsize
    if dtype == torch.float64 or row % 16:
        not_taken = (("16-byte accesses", "float64" if dtype == torch.float64 else f"rows of {row} bytes"),)
    elif not cuda_plans.is_one_run(geo, *strides):
        not_taken = (("16-byte accesses", "an operand is not dense"),)
    if gate is not None:
        not_taken += (("gate fused", gate),)
    return Plan("passes over x", why, not_taken)
