"""No row without its check: what a call returns, against the popular port in float64."""

import math

import torch

from .cases import Case
from .measure import Call

# An error is fine up to twice the port's own in that dtype, plus this. A whole network amplifies a rounding error.
FLOOR = {"fp32": 1e-5, "bf16": 1e-2}  # in bf16 about three roundings
CANCELS = 1e-4  # more for the gate's gradients in fp32: behind a batch normalisation most of a sum cancels
NETWORK_FLOOR = {"loss": 1e-4, "gradients": 2e-2}


def parts(case: Case, outputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """What a call returned by name, parameters' gradients as one vector: a tiny one (a bias in front of a batch
    normalisation has a gradient of zero but for rounding) is judged beside the others."""
    if case.mode == "step":
        return {"loss": outputs[0].reshape(1), "gradients": _vector(outputs[1:])}
    found = {} if case.mode == "backward" else {"y": outputs[0]}
    rest = outputs if case.mode == "backward" else outputs[1:]
    if rest:
        found["dx"] = rest[0]
    if len(rest) > 1:
        found["gradients"] = _vector(rest[1:])
    return found


def _vector(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([t.reshape(-1).double() for t in tensors])


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """By norm: a single element that flips at |x| == tau by rounding must not decide."""
    got = got.detach()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def _floor(case: Case, part: str) -> float:
    if case.mode == "step":
        return NETWORK_FLOOR[part]
    if part == "y":
        return FLOOR[case.dtype]
    # rounding now and then decides at |x| == tau, or at a hidden unit of 0, which is worth one gradient among n
    n = case.numel if part == "dx" else math.prod(case.shape[:2])
    return FLOOR[case.dtype] + CANCELS + (2 / math.sqrt(n) if n >= 4096 else 0)


class Judge:
    """Compares calls of one case with the port in float64."""

    def __init__(self, case: Case, port: Call, exact: Call) -> None:
        self.case = case
        self.want = {name: t.detach().double() for name, t in parts(case, exact.once()).items()}
        self.port = self._errors(port.once())

    def _errors(self, outputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
        got = parts(self.case, outputs)
        return {name: _error(got[name], want) for name, want in self.want.items()}

    def objection(self, call: Call) -> str | None:
        """What is wrong with this very call's results, or None."""
        for part, error in self._errors(call.once()).items():
            limit = 2 * self.port[part] + _floor(self.case, part)
            if not error <= limit:  # also where it is NaN
                return f"{part} differs from the popular port in float64 by {error:.1e} (norm), allowed {limit:.1e}"
        return None
