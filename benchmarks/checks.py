"""No row without its check: what a call returns, against the popular port in float64.

A gradient jumps where |x| == tau and where a hidden unit of the gate is 0: there two right results differ by a whole
term of a sum. So a case is moved off its ties first, and rounding decides no gradient: the input and the parameters
that are checked, and timed, have none nearby.
"""

import copy
import math

import torch
from torch import nn

from drsn_kernels.demo.port import PortShrinkage
from drsn_kernels.demo.timing import Call

from .cases import Case

# An error is fine up to four times the port's own in that dtype, plus this. A whole network amplifies a rounding error.
FLOOR = {"fp32": 1e-5, "bf16": 1e-2}  # in bf16 about three roundings
CANCELS = 1e-4  # more for gradients: behind a batch normalisation most of a sum cancels
NETWORK_FLOOR = {"loss": 1e-4, "gradients": 2e-2}
NO_GRADIENT = 1e-4  # of all parameters' together: a bias in front of a batch normalisation has only rounding

MARGIN = 1e-4  # no |x| is nearer to tau: a hundred times the rounding error of a float32 tau
REACH = 0.1  # a hidden unit is shifted by about so much, of a standard deviation of 1


# ---- the check -------------------------------------------------------------------------------------------------------


def parts(case: Case, outputs: tuple[torch.Tensor, ...]) -> dict[str, tuple[torch.Tensor, ...]]:
    """What a call returned by name; each tensor is judged by itself, the gradients of a network as one vector."""
    if case.mode == "step":
        return {"loss": outputs[:1], "gradients": (torch.cat([t.reshape(-1).double() for t in outputs[1:]]),)}
    found = {} if case.mode == "backward" else {"y": outputs[:1]}
    rest = outputs if case.mode == "backward" else outputs[1:]
    if rest:
        found["dx"] = rest[:1]
    if len(rest) > 1:
        found["gradients"] = rest[1:]
    return found


def norm_error(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """The worst relative error by norm; NaN where there is one. What has no gradient is judged beside all others."""
    norms = torch.stack([t.norm() for t in want])
    whole = norms.norm().clamp_min(1e-30)
    scales = torch.where(norms < NO_GRADIENT * whole, whole, norms)
    errors = torch.stack([(a.detach().double() - b).norm() for a, b in zip(got, want, strict=True)])
    return float((errors / scales).max())


def _floor(case: Case, part: str) -> float:
    if case.mode == "step":
        return NETWORK_FLOOR[part]
    if part == "y":
        return FLOOR[case.dtype]
    tie = 0.0  # where no tie is cleared, rounding decides one term of a sum now and then
    if case.op in ("unit", "norm_relu") and case.numel >= 4096:
        tie = 4 / math.sqrt(case.numel)
    if case.dtype == "bf16" and part == "gradients":
        tie = 2 / math.sqrt(math.prod(case.shape[:2]))  # hidden units of the gate
    return FLOOR[case.dtype] + CANCELS + tie


class Judge:
    """Compares calls of one case with the port in float64."""

    def __init__(self, case: Case, port: Call, exact: Call) -> None:
        self.case = case
        self.want = {
            name: tuple(t.detach().double() for t in found) for name, found in parts(case, exact.once()).items()
        }
        self.port = self._errors(port.once())

    def _errors(self, outputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
        got = parts(self.case, outputs)
        return {name: norm_error(got[name], want) for name, want in self.want.items()}

    def objection(self, call: Call) -> str | None:
        """What is wrong with this very call's results, or None."""
        for part, error in self._errors(call.once()).items():
            # four: the compiler's order of a sum that cancels came out at 2.1 times the port's error
            limit = 4 * self.port[part] + _floor(self.case, part)
            if not error <= limit:  # also where it is NaN
                return f"{part} differs from the popular port in float64 by {error:.1e} (norm), allowed {limit:.1e}"
        return None


# ---- ties ------------------------------------------------------------------------------------------------------------


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
