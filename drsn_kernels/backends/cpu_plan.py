"""How the cpu backend walks a batch that is pooled, gated and shrunk in one call, and what that call costs."""

from typing import NamedTuple

from . import cost
from .cost import map_bytes, plane_bytes, sums_bytes
from .step import Cost, Step


class BatchPlan(NamedTuple):
    """How the forward pass with the standard gate walks the batch."""

    name: str
    block: int  # samples pooled, gated and shrunk together; 0: each stage over the whole batch
    why: str


# Forward in eval, cold, 16 MiB, stages against blocks of 128, 256, 512 KiB, 1 MiB: 64 channels 1.04, 0.76, 0.77, 0.76,
# 0.81 ms; 256 channels (512 KiB of weights) 1.17, 1.04, -, 1.11, 1.19; 512 channels (2 MiB) 1.55, 2.79, -, 2.36, 2.08.
_BLOCK_BYTES = 256 << 10
_WEIGHT_BYTES = 512 << 10
_COUPLED = BatchPlan("stages", 0, "batch statistics need all of the batch pooled before any of it is shrunk")


def batch_plan(step: Step) -> BatchPlan:
    layout, gate = step.layout, step.gate
    if gate.batch_stats:
        return _COUPLED
    weights = (layout.c + gate.outputs) * gate.hidden * step.sums.itemsize
    if weights > _WEIGHT_BYTES:
        return BatchPlan(
            "stages", 0, f"{weights >> 10} KiB of weights, read for each block, leave x no room in the cache"
        )
    block = max(_BLOCK_BYTES // max(layout.c * layout.l * step.dtype.itemsize, 1), 1)
    if layout.n < 4 * block:
        return BatchPlan("stages", 0, f"{layout.n} samples are too few for the threads to share in blocks of {block}")
    return BatchPlan("blocks", block, f"blocks of {block} samples are shrunk while they are in the cache")


def gated_cost(step: Step) -> tuple[Cost, Cost]:
    """Forward and backward. A block of samples that has been pooled is shrunk from cache."""
    layout, gate, item = step.layout, step.gate, step.sums.itemsize
    full, planes = map_bytes(step), 3 * plane_bytes(layout)
    statistics = 2 * gate.hidden * item
    layers = (gate.hidden * (layout.c + 1) + gate.outputs * (gate.hidden + 1)) * item
    weights = layers + (2 * statistics if gate.norm else 0)  # gamma, beta, mean and var
    state = sums_bytes(step) + sums_bytes(step, gate.hidden) + sums_bytes(step, gate.outputs)  # A, u, alpha
    of_batch = statistics if gate.batch_stats else 0
    tau = sums_bytes(step, 1 if step.one_tau else None) if step.want.tau else 0
    reads = (1 if batch_plan(step).block else 2) + (step.residual is not None)
    forward = Cost(
        read=reads * full + weights,
        written=full + (planes if step.keep else 0) + state + tau + 2 * of_batch,
        kernels=("gated_forward",),
        saved=-(-planes // item) * item + state + (statistics if gate.norm else 0) if step.keep else 0,
    )
    if not step.keep:
        return forward, Cost()
    forward += cost.kept_statistics(step)
    passes = cost.grad(layout, step.dtype, "", dx=False, dtau=True)
    if step.want.x:
        passes += cost.grad(layout, step.dtype, "", dA=True)
    made = layers + (statistics if gate.norm else 0)  # gradients of the parameters
    return forward, Cost(passes.read + state + weights, passes.written + made, ("gated_backward",))
