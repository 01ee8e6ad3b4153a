"""That the oracle's tolerances refuse what is wrong by more than rounding."""

import pytest
import torch
from oracle import AVERAGES, check_step, shrink, standard_gate, varied
from torch.func import functional_call

NAMES = {"plain": ("0", "2"), "norm": ("0", "1", "3"), "batch norm": ("0", "1", "3")}
WRONG = [
    (kind, f"{layer}.{part}")
    for kind, layers in NAMES.items()
    for layer in layers
    for part in ("weight", "bias")
    if (kind, layer, part) != ("batch norm", "0", "bias")  # exactly 0, whatever its factor
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind, name", WRONG, ids=lambda value: value)
def test_a_gradient_that_is_wrong_by_a_thousandth_is_refused(kind, name, average):
    torch.manual_seed(0)
    x, gate = varied((6, 5, 40)), standard_gate(5, 7, 5, kind)

    def step(factor):
        def ours(x, gate, average, residual):
            p = dict(gate.named_parameters())[name]
            scaled = {name: p + (factor - 1) * (p - p.detach())}  # the same value, the gradient times the factor
            return shrink(x, lambda pooled: functional_call(gate, scaled, pooled), average, residual)

        check_step(ours, x, None, gate, average, torch.randn(x.shape), units=128)

    step(1.0)
    with pytest.raises(AssertionError, match=f"d{name}"):
        step(1.001)
