"""Move a case off its ties, so that rounding decides no gradient and the check can be tight.

A gradient jumps where |x| == tau and where a hidden unit of the gate is 0: there two right results differ by a whole
term of a sum. The input and the parameters that are checked, and timed, have none nearby.
"""

import copy

import torch
from torch import nn

from .baselines import PortShrinkage

MARGIN = 1e-4  # no |x| is nearer to tau: a hundred times the rounding error of a float32 tau
REACH = 0.1  # a hidden unit is shifted by about so much, of a standard deviation of 1


def clear_hidden_units(port: nn.Module, x: torch.Tensor) -> None:
    """Shift the bias of each gate's batch normalisation to the middle of the widest gap near 0 in what it returns."""
    double = copy.deepcopy(port).to(x.device, torch.float64)
    hidden: dict[str, torch.Tensor] = {}
    gates = {name: one.fc for name, one in double.named_modules() if isinstance(one, PortShrinkage)}
    for name, gate in gates.items():
        if isinstance(gate[1], nn.BatchNorm1d):
            gate[1].register_forward_hook(lambda _, inputs, out, name=name: hidden.update({name: out.clone()}))
    with torch.no_grad():
        double(x.double())
        for name, h in hidden.items():
            bias = port.get_submodule(name).fc[1].bias
            bias -= _gap_near_zero(h).to(bias)


def _gap_near_zero(h: torch.Tensor) -> torch.Tensor:
    """(N, C) -> (C): the middle of the widest gap between samples with a middle within REACH, or of the nearest."""
    ordered = h.sort(0).values
    ordered = torch.cat([ordered[:1] - REACH, ordered, ordered[-1:] + REACH])
    middle, gap = (ordered[1:] + ordered[:-1]) / 2, ordered.diff(dim=0)
    best = torch.where(middle.abs() <= REACH, gap, -middle.abs()).argmax(0, keepdim=True)
    return middle.gather(0, best)[0]


def clear_thresholds(port: nn.Module, x: torch.Tensor) -> None:
    """Move, in place, what of x is within MARGIN of the float64 port's tau a little above it."""
    double, exact = copy.deepcopy(port).to(x.device, torch.float64), x.double()
    with torch.no_grad():
        if isinstance(double, PortShrinkage):
            average = exact.abs().flatten(2).mean(2)
            tau = average * double.fc(average)
        else:
            tau = double.tau
        tau = tau.view(*tau.shape, *[1] * (x.dim() - 2))
        near = (exact.abs() - tau).abs() < 1.5 * MARGIN
        x.copy_(torch.where(near, torch.copysign(tau + 2 * MARGIN, exact), exact))
