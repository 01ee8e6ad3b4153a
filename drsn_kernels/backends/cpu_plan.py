"""How the `cpu` backend walks a batch that is pooled, gated and shrunk in one call."""

import math
from typing import NamedTuple

import torch

from ..planes import Geometry


class StandardPlan(NamedTuple):
    """How the forward pass with the standard gate walks the batch."""

    name: str
    block: int  # samples pooled, gated and shrunk together; 0: each stage over the whole batch
    why: str


# Forward in eval, cold, 16 MiB, stages against blocks of 128, 256, 512 KiB, 1 MiB: 64 channels 1.04, 0.76, 0.77, 0.76,
# 0.81 ms; 256 channels (512 KiB of weights) 1.17, 1.04, -, 1.11, 1.19; 512 channels (2 MiB) 1.55, 2.79, -, 2.36, 2.08.
_BLOCK_BYTES = 256 << 10
_WEIGHT_BYTES = 512 << 10


def standard_plan(geo: Geometry, dtype: torch.dtype, hidden: int, outputs: int, coupled: bool) -> StandardPlan:
    if coupled:
        return StandardPlan("stages", 0, "batch statistics need all of the batch pooled before any of it is shrunk")
    n, c, *spatial = geo[0]
    weights = (c + outputs) * hidden * (8 if dtype == torch.float64 else 4)
    if weights > _WEIGHT_BYTES:
        return StandardPlan(
            "stages", 0, f"{weights >> 10} KiB of weights, read for each block, leave x no room in the cache"
        )
    block = max(_BLOCK_BYTES // max(c * math.prod(spatial) * dtype.itemsize, 1), 1)
    if n < 4 * block:
        return StandardPlan("stages", 0, f"{n} samples are too few for the threads to share in blocks of {block}")
    return StandardPlan("blocks", block, f"blocks of {block} samples are shrunk while they are in the cache")
