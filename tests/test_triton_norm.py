"""Batch normalisation and an activation by the Triton kernels, interpreted, against torch's own in float64.

The backend's methods, without the operator around them. `oracle.close` allows twice the error of torch's batch_norm in
the dtype of sums, and a few units of the last place.
"""

import functools

import pytest
import steps
import torch
from oracle import LAYOUTS, close, features, wide
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import drsn_kernels as dk
from drsn_kernels.backends import BACKENDS, gpu
from drsn_kernels.backends.step import Norm, Running
from drsn_kernels.layout import layout_of

pytestmark = pytest.mark.skipif(
    not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted (no CUDA device)"
)
if gpu.missing() is None:
    from drsn_kernels.backends.gpu import norm_passes, tuned
    from drsn_kernels.backends.gpu import walk as walks

SLOPES = [0.0, 1.0, 0.1]
EPS = 1e-5


@pytest.fixture(autouse=True)
def as_planned(monkeypatch):
    monkeypatch.setattr(tuned, "CHANNELS", 256)
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture(params=["on chip", "several", "merged", "64-bit offsets"])
def plan(request, monkeypatch) -> str:
    """A channel in one program; in several tiles, some of them walked; merged by a launch; as if beyond 2^31."""
    if request.param != "on chip":
        monkeypatch.setattr(tuned, "NORM_ON_CHIP", 0)
        monkeypatch.setattr(tuned, "NORM_TILE", 256)
        monkeypatch.setattr(tuned, "NORM_GIVEN", 256)
        monkeypatch.setattr(norm_passes, "multiprocessors", lambda device: 3)
        monkeypatch.setattr(tuned, "NORM_MERGED", 4)  # several turns
    if request.param == "merged":
        monkeypatch.setattr(tuned, "NORM_PARTIALS", 1)
    if request.param == "64-bit offsets":
        monkeypatch.setattr(norm_passes, "walk", functools.partial(walks.walk, force_wide=True))
    tuned.forget()
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
            found |= {"running mean": mean, "running var": var, "M2": spread * (x.numel() // x.shape[1])}
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
            close(value, exact[name], plain[name], name)


SHAPES = [(2, 3, 100), (7, 5, 49), (3, 2, 400), (40, 3, 5), (5, 9), (2, 17, 7, 5), (33, 4, 16)]


@pytest.mark.sampled(16)
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "given"])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_batch_norm(plan, shape, layout, batch):
    x, g = features(shape), torch.randn(shape)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    Case(x, g, batch).check()


@pytest.mark.sampled(16)
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_activations(plan, dtype, slope):
    """Rows of 32 are 16-byte accesses in every dtype."""
    shape = (9, 3, 32)
    Case(features(shape).to(dtype), torch.randn(shape).to(dtype), slope=slope, affine=slope != 0.1).check()


@pytest.mark.sampled(16)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(plan, layout):
    """x and g as they lie; y and dx as torch.empty_like(x)."""
    x = LAYOUTS[layout](3, 5, 6, 8)
    if layout.startswith("expanded") or layout == "scalar":
        x = (x + torch.zeros(())).expand_as(x)
    Case(x, LAYOUTS["sliced"](3, 5, 6, 8), batch=layout != "scalar").check()


def test_one_parameter_and_no_running_statistics(plan):
    case = Case(features((6, 3, 40)), torch.randn(6, 3, 40))
    y, stats = case.backend.norm(case.x, case.layout, case.norm, case.weight, None)
    case.bias = None
    exact, plain = case.exact(torch.float64), case.exact(torch.float32)
    close(y, exact["y"], plain["y"])
    close(stats[1], exact["rstd"], plain["rstd"])


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_lose_nothing_to_cancellation(plan, channels_last):
    """Deviations of 1 around 4096, and a first sample that lies elsewhere: rstd is right to rounding."""
    x = torch.randn(20, 3, 33) + 4096
    x[0] -= 64
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    stats = BACKENDS["triton"].norm_statistics(x, layout_of(x))
    exact = x.double()
    torch.testing.assert_close(stats[0].double(), exact.mean((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1].double(), exact.var((0, 2), correction=0) * 660, rtol=1e-4, atol=0)


def test_sums_of_other_processes_are_taken(plan):
    """dx of a half of the batch, from the sums of both."""
    case = Case(features((8, 3, 24)), torch.randn(8, 3, 24))
    _, stats = case.backend.norm(case.x, case.layout, case.norm, case.weight, case.bias)
    whole, sums = case.grad(stats, True, True)
    case.x, case.g = case.x[:4], case.g[:4]
    case.layout = layout_of(case.x)
    dx, none = case.grad(stats, True, False, (sums, 8 * 24))
    assert none is None
    torch.testing.assert_close(dx, whole[:4], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_infinity(plan):
    """As torch's: a channel with one is NaN, the others are not touched; ReLU of a NaN is NaN."""
    x = features((4, 3, 40))
    x[1, 0, 7], x[2, 1, 3] = float("nan"), float("inf")
    case = Case(x, torch.randn(4, 3, 40))
    y, stats = case.backend.norm(x, case.layout, case.norm, case.weight, case.bias)
    dx, sums = case.grad(stats, True, True)
    assert y[:, :2].isnan().all() and dx[:, :2].isnan().all() and sums[1, :2].isnan().all()
    assert y[:, 2].isfinite().all() and dx[:, 2].isfinite().all() and sums[:, 2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 10), (3, 4, 0), (0, 4)], ids=str)
def test_a_process_without_samples(plan, shape):
    """It adds nothing to the sums of the others."""
    x, given, dense = torch.empty(shape), (torch.zeros(4), torch.ones(4)), layout_of(torch.empty(shape))
    backend = BACKENDS["triton"]
    y, stats = backend.norm(x, dense, Norm(0.0, False, EPS), None, None, given)
    assert y.shape == shape and stats.isfinite().all()
    dx, sums = backend.norm_grad(x, x, dense, Norm(0.0, True, EPS), None, None, stats, True, True)
    assert dx.shape == shape and torch.equal(sums, torch.zeros(2, 4))
    assert norm_passes.of_step(steps.batch_norm_relu(shape, training=False))  # what explain shows


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.9, 1.0])
def test_running_statistics_far_from_the_batch(plan, factor):
    x, mean, var = torch.randn(20, 3, 33) / 100, torch.full((3,), 1e6), torch.full((3,), 1e6)
    running = Running(mean.clone(), var.clone(), factor, None)
    BACKENDS["triton"].norm(x, layout_of(x), Norm(0.0, True, EPS), None, None, None, running)
    for found, before, batch in ((running.mean, mean, x.mean((0, 2))), (running.var, var, x.var((0, 2)))):
        torch.testing.assert_close(found, factor * batch + (1 - factor) * before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_over_batches_prepares_no_launch_for_each(plan, dtype):
    """momentum=None, as torch.optim.swa_utils.update_bn sets it: the batch's part is another one at every step."""
    ours, torchs = (made(3, momentum=None).to(dtype) for made in (dk.BatchNormReLU, nn.BatchNorm1d))
    prepared = []
    with dk.use_backend("triton", strict=True):
        for step in range(4):
            x = torch.randn(4, 3, 9).add(step).to(dtype)
            ours(x), torchs(x)
            prepared.append(norm_passes.prepare_norm.cache_info().currsize)
    assert prepared[0] == prepared[-1]
    assert int(ours.num_batches_tracked) == 4
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
def test_means_whose_squares_are_no_float(plan, channels_last):
    x = 3e19 + 1e16 * torch.randn(20, 3, 33)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    mean, around = BACKENDS["triton"].norm_statistics(x, layout_of(x)).double()
    torch.testing.assert_close(mean, x.double().mean((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(around, x.double().var((0, 2), correction=0) * 660, rtol=1e-2, atol=0)


def test_pieces_beyond_two_to_the_31_are_merged_by_their_length():
    """Of 2.3e9 elements a channel, the last piece is the shortest: by its full length the mean would be another."""
    rows = 2_300_000_000
    x = torch.empty((rows, 2), dtype=torch.bfloat16, device="meta")
    over = norm_passes.Over.of(layout_of(x), (x.stride(), x.stride()), x.dtype, torch.device("cpu"), "xy", 1)
    piece = over.plan.rows * over.plan.piece
    last = rows - (over.plan.splits - 1) * piece
    assert over.on.wide and over.plan.merge and 0 < last < piece
    partial, merged = torch.zeros(2, over.plan.splits, 2), torch.empty(2, 2)
    partial[0, -1] = 100
    over.merging("moments")._launch({"partial": partial, "merged": merged})
    share = last / rows
    exact = torch.tensor([[100 * share], [1e4 * share * (1 - share) * rows]]).expand(2, 2)
    torch.testing.assert_close(merged, exact.float(), rtol=1e-4, atol=0)


def test_plans_are_as_said():
    """Launches by shape, and that the plan names what runs."""
    kernels = {
        (64, 64, 64): (["norm"], ["norm_grad"]),
        (128, 64, 1024): (["moments", "norm"], ["sums", "norm_grad"]),
        (64, 64, 56, 56): (["moments", "merge", "norm"], ["sums", "merge", "norm_grad"]),  # channels_last
        (1, 2, 1 << 20): (["moments", "merge", "norm"], ["sums", "merge", "norm_grad"]),
    }
    for shape, expected in kernels.items():
        step = steps.batch_norm_relu(shape, channels_last=len(shape) == 4)
        ahead, back = norm_passes.of_step(step)
        found = [[launch.name.removesuffix("_kernel") for launch in each.launches] for each in (ahead, back)]
        assert tuple(found) == expected, shape
        plan = BACKENDS["triton"].plan(step)
        assert [one.kernel for one in plan.launches] == [*plan.forward.kernels, *plan.backward.kernels]
        full = step.layout.numel * 4
        passes = 1 if expected[0] == ["norm"] else 2
        assert 0 <= plan.forward.read - passes * full < full / 16 and 0 <= plan.forward.written - full < full / 16
        assert 0 <= plan.backward.read - 2 * passes * full < full / 16 and 0 <= plan.backward.written - full < full / 16
    given = norm_passes.of_step(steps.batch_norm_relu((64, 64, 56), training=False, parameter_grad=False))
    assert [launch.name for each in given for launch in each.launches] == ["norm_kernel", "norm_grad_kernel"]


@pytest.mark.sampled(16)
@pytest.mark.parametrize("training", [True, False])
def test_the_operator_and_its_derivatives(plan, training):
    """First derivatives by the kernels, second ones through them, and the same bits from run to run."""
    x = torch.randn(5, 3, 14, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(3, dtype=torch.float64).add_(0.5).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def call(x, weight, bias):
        return dk.batch_norm_relu(x, mean.clone(), var.clone(), weight, bias, training, activation="leaky", slope=0.3)

    with dk.use_backend("triton", strict=True):
        assert type(call(x, weight, bias).grad_fn).__name__.startswith("NormAct")
        assert gradcheck(call, (x, weight, bias), fast_mode=True, nondet_tol=0)
        assert gradgradcheck(call, (x, weight, bias), fast_mode=True)


@pytest.mark.sampled(3)
def test_a_module_trains_as_torchs(plan):
    """Ten steps: parameters, running statistics and the number of batches stay together."""
    ours, other = dk.BatchNormReLU(3).double(), nn.BatchNorm1d(3).double()
    for step in range(10):
        x, g = torch.randn(6, 3, 20, dtype=torch.float64) * (step + 1), torch.randn(6, 3, 20, dtype=torch.float64)
        with dk.use_backend("triton", strict=True):
            ours(x).backward(g)
        F.relu(other(x)).backward(g)
        with torch.no_grad():
            for p in (*ours.parameters(), *other.parameters()):
                p -= 0.01 * p.grad
                p.grad = None
    for a, b in zip(ours.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert ours.num_batches_tracked == 10
