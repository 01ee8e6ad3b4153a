"""Calls as users write them, with the types that mypy --strict and pyright must find. test_typing.py runs it too."""

import torch
from torch import nn
from typing_extensions import assert_type

import drsn_kernels as dk

x = torch.randn(2, 4, 32)
gate = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

# ---- functions -------------------------------------------------------------------------------------------------------

assert_type(dk.soft_threshold(x, 0.5), torch.Tensor)
assert_type(dk.soft_threshold(x, torch.tensor(0.5), threshold="hard", slope=0.1), torch.Tensor)
assert_type(dk.abs_mean(x), torch.Tensor)
assert_type(dk.shrink(x, gate), torch.Tensor)
assert_type(dk.shrink(x, torch.sigmoid, average=None, residual=x, return_tau=False), torch.Tensor)
assert_type(dk.squeeze_excite(x, gate, residual=x), torch.Tensor)
y, tau = dk.shrink(x, gate, average="sample", return_tau=True)
assert_type(tau, torch.Tensor)


def either(return_tau: bool) -> torch.Tensor:
    out = dk.shrink(x, gate, return_tau=return_tau)
    assert_type(out, torch.Tensor | tuple[torch.Tensor, torch.Tensor])
    return out[0] if isinstance(out, tuple) else out


assert either(True).equal(either(False))

# ---- modules ---------------------------------------------------------------------------------------------------------

assert_type(dk.Shrinkage(4, average="sample", reduction=2)(x, x), torch.Tensor)
assert_type(dk.Shrinkage(4, (1, 1), activation=nn.GELU).fc, nn.Sequential)
assert_type(dk.SqueezeExcite(4)(x), torch.Tensor)
assert_type(dk.SoftThreshold(0.5, learnable=True)(x), torch.Tensor)
assert_type(dk.SoftThreshold([0.1, 0.2, 0.3, 0.4])(x), torch.Tensor)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.shrinkage = dk.Shrinkage(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shrinkage(self.conv(x), residual=x)


model = Block(4)
with dk.record_tau(model) as taus:
    model(x)
    assert_type(taus, dict[str, torch.Tensor])
report = dk.convert(nn.Sequential(Block(4)))
assert_type(str(report), str)

# ---- the choice of a backend, and what it came to --------------------------------------------------------------------

with dk.use_backend("torch"):
    for call in dk.explain(model, x):
        assert_type(call.backend, str)
dk.use_backend("auto", strict=False, save="time")


@dk.use_backend("torch")
def step(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return dk.soft_threshold(x, 0.5) * scale


assert_type(step(x, scale=2.0), torch.Tensor)
assert dk.explain(step, x)[0].backend == "torch"

# ---- subpackages, which need no import of their own ------------------------------------------------------------------

assert_type(dk.models.DRSN(1, 2), dk.models.DRSN)
assert_type(dk.noise.add_noise(x, 5.0), torch.Tensor)
assert_type(dk.train.Recipe(epochs=1), dk.train.Recipe)
assert_type(dk.data.simulate_bearing(2, 1, 1, length=256), dk.data.Dataset)
assert_type(dk.__version__, str)
