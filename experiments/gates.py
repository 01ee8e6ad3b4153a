"""Three ways in which gates begin or learn that leave the operator as it is: ``--gate NAME``.

Beside them there is ``--gate-bias``, an option of the networks themselves.
"""

from collections.abc import Iterator

import torch
from torch import nn

from drsn_kernels.models import DRSN

GATES = {
    "zero": "weights of the last layer begin at 0",
    "warm-up": "bias of the last layer is raised from -4 to 0 in the first sixth of the steps, beside what it learns",
    "no-decay": "no weight decay on the weights",
}
WARM_UP_FROM, WARM_UP_SHARE = -4.0, 1 / 6  # tau begins near 0.018 A


def _gates(network: DRSN) -> Iterator[nn.Sequential]:
    return (unit.shrinkage.fc for stage in network.stages for unit in stage)


def zero_weights(network: DRSN) -> None:
    """Every gate then begins at the sigmoid of its last bias, for all samples and channels alike."""
    for gate in _gates(network):
        nn.init.zeros_(gate[-2].weight)


def without_decay(groups: list[dict], network: DRSN) -> list[dict]:
    """Those of models.parameter_groups, the gates' weights moved from the first, which decays, to the second."""
    decayed, rest = groups
    gates = {id(layer.weight) for gate in _gates(network) for layer in gate if isinstance(layer, nn.Linear)}
    moved = [p for p in decayed["params"] if id(p) in gates]
    kept = [p for p in decayed["params"] if id(p) not in gates]
    return [decayed | {"params": kept}, rest | {"params": rest["params"] + moved}]


class WarmUp:
    """Call it before each step: the biases of the last layers are raised by equal parts, until they have been by 4."""

    def __init__(self, network: DRSN, steps: int) -> None:
        self._biases = [gate[-2].bias for gate in _gates(network)]
        self._left = max(1, round(WARM_UP_SHARE * steps))
        self._part = -WARM_UP_FROM / self._left
        self._raise(WARM_UP_FROM)

    @torch.no_grad()
    def _raise(self, by: float) -> None:
        for bias in self._biases:
            bias += by

    def __call__(self) -> None:
        if self._left:
            self._left -= 1
            self._raise(self._part)
