"""Inside torch.compile: which calls stay opaque (ops/library.py), and which are decomposed for the compiler to fuse.

Decomposed, a call is the reference: inductor fuses it with its neighbours, and keeps x or what it chooses to. Opaque,
it is a kernel of ours that keeps bit planes, beside the reads and writes of its neighbours. Which is faster is a
question of size, so the rule is a size for each kind of device, from recorded times; docs/plans.md has the rows.
"""

from typing import NamedTuple

import torch


class Rule(NamedTuple):
    opaque_from: int | None  # bytes of x; None: never
    why: str


RULES = {
    "cpu": Rule(None, "opaque took 1.2 to 1.6 times as long from 1 to 24 MiB, and 0.76 on one shape of 19 MiB"),
    "cuda": Rule(None, "opaque was not timed; compiled, a unit took 0.64 and 0.75 of our eager one's time on an H200"),
}
_OTHERS = Rule(None, "no kernels for this device")


def rule(device: torch.device) -> Rule:
    return RULES.get(device.type, _OTHERS)


def opaque(x: torch.Tensor) -> bool:
    """Whether a compiled call on x stays opaque where no backend is forced."""
    least = rule(x.device).opaque_from
    return least is not None and x.numel() * x.element_size() >= least
