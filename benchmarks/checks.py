"""No row without its check: what a call returns, against the popular port in float64."""

import math

import torch

from .cases import Case
from .measure import Call

# An error is fine up to four times the port's own in that dtype, plus this. A whole network amplifies a rounding error.
FLOOR = {"fp32": 1e-5, "bf16": 1e-2}  # in bf16 about three roundings
CANCELS = 1e-4  # more for gradients: behind a batch normalisation most of a sum cancels
NETWORK_FLOOR = {"loss": 1e-4, "gradients": 2e-2}
NO_GRADIENT = 1e-4  # of all parameters' together: a bias in front of a batch normalisation has only rounding


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


def _error(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
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
    tie = 0.0  # where ties.py does not reach, rounding decides one term of a sum now and then
    if case.op == "unit" and case.numel >= 4096:
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
        return {name: _error(got[name], want) for name, want in self.want.items()}

    def objection(self, call: Call) -> str | None:
        """What is wrong with this very call's results, or None."""
        for part, error in self._errors(call.once()).items():
            # four: the compiler's order of a sum that cancels came out at 2.1 times the port's error
            limit = 4 * self.port[part] + _floor(self.case, part)
            if not error <= limit:  # also where it is NaN
                return f"{part} differs from the popular port in float64 by {error:.1e} (norm), allowed {limit:.1e}"
        return None
