"""Batch normalisation and an activation by the Triton kernels, interpreted, against torch's own in float64.

The backend's methods, without the operator around them. `oracle.close` allows twice the error of torch's batch_norm in
the dtype of sums, and a few units of the last place.
"""

import functools

import pytest
import torch
from oracle import LAYOUTS, close, features, wide
from torch.nn import functional as F

from drsn_kernels.backends import BACKENDS, gpu
from drsn_kernels.backends.step import Norm, Running
from drsn_kernels.layout import layout_of

pytestmark = pytest.mark.skipif(
    not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted (no CUDA device)"
)
if gpu.missing() is None:
    from drsn_kernels.backends.gpu import norm_passes, plans
    from drsn_kernels.backends.gpu import walk as walks

SLOPES = [0.0, 1.0, 0.1]
EPS = 1e-5


def forget_plans() -> None:
    for prepare in (norm_passes.prepare_norm, norm_passes.prepare_statistics, norm_passes.prepare_grad):
        prepare.cache_clear()


@pytest.fixture(autouse=True)
def as_planned(monkeypatch):
    monkeypatch.setattr(plans, "CHANNELS", 256)
    forget_plans()
    yield
    forget_plans()


@pytest.fixture(params=["on chip", "several", "merged", "64-bit offsets"])
def plan(request, monkeypatch) -> str:
    """A channel in one program; in several tiles, some of them walked; merged by a launch; as if beyond 2^31."""
    if request.param != "on chip":
        monkeypatch.setattr(plans, "NORM_ON_CHIP", 0)
        monkeypatch.setattr(plans, "NORM_TILE", 256)
        monkeypatch.setattr(plans, "NORM_GIVEN", 256)
        monkeypatch.setattr(norm_passes, "multiprocessors", lambda device: 3)
        monkeypatch.setattr(plans, "NORM_MERGED", 32)  # several turns
    if request.param == "merged":
        monkeypatch.setattr(plans, "NORM_PARTIALS", 1)
    if request.param == "64-bit offsets":
        monkeypatch.setattr(norm_passes, "walk", functools.partial(walks.walk, force_wide=True))
    forget_plans()
    return request.param


def formula(x, weight, bias, mean, var, batch: bool, slope: float, factor: float = 0.0):
    """act(batch_norm(x)); mean and var are updated by it."""
    z = F.batch_norm(x, mean, var, weight, bias, batch, factor, EPS)
    return z if slope == 1 else torch.where(z <= 0, slope * z, z)


class Case:
    """Parameters and statistics of C channels, and one call of each of the backend's methods on them."""

    def __init__(self, x, g, batch=True, slope=0.0, affine=True):
        self.x, self.g, self.batch, self.slope = x, g, batch, slope
        c, self.dtype = x.shape[1], wide(x.dtype)
        new = functools.partial(torch.rand, c, dtype=self.dtype)
        self.weight, self.bias = (new() + 0.5, new() - 0.5) if affine else (None, None)
        self.mean, self.var = new() - 0.5, new() + 0.5
        self.layout, self.norm = layout_of(x), Norm(slope, batch, EPS)
        self.backend = BACKENDS["triton"]
        z = self.exact(torch.float64, slope=1.0)["y"]  # rounding decides on which side of 0 a gradient comes through
        self.g = torch.where(z.abs() < 1e-4, torch.zeros((), dtype=g.dtype), g)

    def exact(self, dtype, slope: float | None = None) -> dict[str, torch.Tensor]:
        slope = self.slope if slope is None else slope

        def cast(t):
            return None if t is None else t.detach().to(dtype).clone()

        x, weight, bias = (None if t is None else cast(t).requires_grad_() for t in (self.x, self.weight, self.bias))
        mean, var = cast(self.mean), cast(self.var)
        ones = torch.ones(x.shape[1], dtype=dtype, requires_grad=True)
        zeros = torch.zeros(x.shape[1], dtype=dtype, requires_grad=True)
        weight, bias = ones if weight is None else weight, zeros if bias is None else bias
        y = formula(x, weight, bias, mean, var, self.batch, slope, 0.3)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), self.g.to(dtype))
        dims = [0, *range(2, x.dim())]
        used, spread = (x.mean(dims), x.var(dims, correction=0)) if self.batch else (mean, var)
        found = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "mean": used, "rstd": (spread + EPS).rsqrt()}
        if self.batch:
            found |= {"running mean": mean, "running var": var, "M2": x.var(dims, correction=0) * (x.numel() // x.shape[1])}
        return {name: t.detach() for name, t in found.items()}

    def ours(self) -> dict[str, torch.Tensor]:
        running, given, batches = None, (self.mean, self.var), None
        if self.batch:
            batches = torch.tensor(6)
            running, given = Running(self.mean.clone(), self.var.clone(), 0.3, batches), None
        y, stats = self.backend.norm(self.x, self.layout, self.norm, self.weight, self.bias, given, running)
        assert y.stride() == self.layout.strides and y.dtype == self.x.dtype
        dx, sums = self.grad(stats, True, True)
        assert dx.stride() == self.layout.strides and dx.dtype == self.x.dtype
        found = {"y": y, "dx": dx, "dweight": sums[1], "dbias": sums[0], "mean": stats[0], "rstd": stats[1]}
        if self.batch:
            assert batches == 7
            found |= {"running mean": running.mean, "running var": running.var}
            moments = self.backend.norm_statistics(self.x, self.layout)
            torch.testing.assert_close(moments[0], stats[0])
            found["M2"] = moments[1]
        alone = self.grad(stats, True, False), self.grad(stats, False, True)
        assert alone[0][1] is alone[1][0] is None
        torch.testing.assert_close(alone[0][0], dx, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[1][1], sums)
        return found

    def grad(self, stats, want_x, want_sums, given=None):
        return self.backend.norm_grad(
            self.g, self.x, self.layout, self.norm, self.weight, self.bias, stats, want_x, want_sums, given
        )  # fmt: skip

    def check(self) -> None:
        with torch.no_grad():
            found = self.ours()
        exact, plain = self.exact(torch.float64), self.exact(self.dtype)
        for name, value in found.items():
            size = exact["M2"].abs().max() if name == "M2" else None
            close(value, exact[name], plain[name], name, None if size is None else lambda size=size: size)


SHAPES = [(2, 3, 100), (7, 5, 49), (3, 2, 700), (40, 3, 5), (5, 9), (2, 33, 7, 5), (33, 4, 16)]


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "given"])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_batch_norm(plan, shape, layout, batch):
    x, g = features(shape), torch.randn(shape)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    Case(x, g, batch).check()
