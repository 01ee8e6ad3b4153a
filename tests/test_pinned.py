"""The pinned semantics on every backend, compiled too: ties, zeros, negative tau, NaN, Inf, dtypes, strides, and
degenerate shapes. Special values stand at every lane of a vector, in full blocks and in tails."""

import itertools

import pytest
import torch
from oracle import DTYPES, LAYOUTS, abs_mean, features, smooth_gate, soft_threshold, wide
from torch import nn

INF, NAN = float("inf"), float("nan")
LENGTH = 95  # a block of 64 elements, full vectors after it, and a tail, for every register width
TAUS = [0.5, 0.0, -1.0, INF, -INF, NAN]
VALUES = ["tau", "-tau", 0.0, -0.0, NAN, INF, -INF, 1e-30, 60000.0]
WALKS = ["rows", "channels_last", "strided", "strided channels_last"]


def walked(x: torch.Tensor, walk: str) -> torch.Tensor:
    """(R, 1, LENGTH) so that the kernels walk it as rows of L, as channels_last rows of C, or by strided staging."""
    if "strided" in walk:
        x = torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0]
    return x.transpose(1, 2) if "channels_last" in walk else x


def special(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, list]:
    """x (R, 1, LENGTH) and tau (R, 1): for each tau and value, LENGTH rows with the value wandering along them."""
    cases = list(itertools.product(TAUS, VALUES))
    tau = torch.tensor([t for t, _ in cases], dtype=wide(dtype), device=device).repeat_interleave(LENGTH)[:, None]
    values = [abs(t) if v == "tau" else -abs(t) if v == "-tau" else v for t, v in cases]
    x = torch.randn(len(cases), LENGTH, LENGTH).to(device, dtype)
    lanes = torch.arange(LENGTH)
    x[:, lanes, lanes] = torch.tensor(values).to(device, dtype)[:, None]
    return x.reshape(-1, 1, LENGTH), tau, [(t, v, lane) for t, v in cases for lane in range(LENGTH)]


def identical(actual: torch.Tensor, expected: torch.Tensor, where: list, but: torch.Tensor | None = None) -> None:
    """Equal bit for bit (NaN equals NaN, -0.0 equals 0.0); says at which (tau, value, lane) they are not."""
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if but is not None:
        wrong &= ~but
    rows = wrong.reshape(len(where), -1).any(1).nonzero().flatten().tolist()
    assert not rows, f"{len(rows)} rows differ, the first at (tau, value, lane) {[where[r] for r in rows[:5]]}"


def check_special_values(backend, dtype, walk):
    """y as in sign(x) * relu(|x| - tau); dx = g where |x| > tau and x != 0, 0 elsewhere, not pinned where y is NaN."""
    x, tau, where = special(dtype, backend.device)
    if backend.interpreted and "channels_last" in walk:  # a program for each sample
        some = torch.randperm(len(x))[:60]
        x, tau, where = x[some], tau[some], [where[i] for i in some]
    expected = soft_threshold(x.to(wide(dtype)), tau).to(dtype)
    kept = (x.to(wide(dtype)).abs() > tau[..., None]) & (x != 0)
    g = torch.randn_like(x)
    there = walked(x, walk).requires_grad_()
    y = backend.soft_threshold(there, tau)
    (dx,) = torch.autograd.grad(y, there, walked(g, walk))
    back = (0, 2, 1) if "channels_last" in walk else (0, 1, 2)
    identical(y.permute(back), expected, where)
    identical(dx.permute(back), torch.where(kept, g, 0), where, but=expected.isnan())


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(kernels, dtype, walk):
    check_special_values(kernels, dtype, walk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_compiled(compiled, dtype):
    check_special_values(compiled, dtype, "rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_as_numbers_and_without_a_gradient(kernels, dtype):
    x, tau, where = special(dtype, kernels.device)
    for value in TAUS:
        rows = (tau[:, 0] == value) | (tau[:, 0].isnan() if value != value else False)
        y = kernels.soft_threshold(x[rows], value)
        identical(y, soft_threshold(x[rows].to(wide(dtype)), tau[rows]).to(dtype), [where[i] for i in rows.nonzero()])


def test_an_element_equal_to_tau_has_no_derivative(backend):
    x = torch.tensor([[[0.5, -0.5, 0.75, -0.25]]], device=backend.device, requires_grad=True)
    tau = torch.full((1, 1), 0.5, device=backend.device, requires_grad=True)
    y = backend.soft_threshold(x, tau)
    dx, dtau = torch.autograd.grad(y, (x, tau), torch.tensor([[[1.0, 2.0, 4.0, 8.0]]], device=x.device))
    assert y.tolist() == [[[0, 0, 0.25, 0]]] and dx.tolist() == [[[0, 0, 4, 0]]] and dtau.tolist() == [[-4]]


def test_zero_stays_zero_and_a_negative_tau_expands(backend):
    x = torch.tensor([[[0.0, -0.0, 1.0, -2.0, 1e-3]]], device=backend.device, requires_grad=True)
    tau = torch.full((1, 1), -1.0, device=backend.device, requires_grad=True)
    y = backend.soft_threshold(x, tau)
    dx, dtau = torch.autograd.grad(y, (x, tau), torch.tensor([[[1.0, 2.0, 4.0, 8.0, 16.0]]], device=x.device))
    torch.testing.assert_close(y, torch.tensor([[[0.0, 0.0, 2.0, -3.0, 1.001]]], device=x.device))
    assert dx.tolist() == [[[0, 0, 4, 8, 16]]] and dtau.tolist() == [[-(4 - 8 + 16)]]


class Half(nn.Module):
    """alpha = 0.5 for every channel, differentiable and without parameters."""

    def forward(self, pooled):
        return pooled * 0 + 0.5


@pytest.mark.sampled(6)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("average", ["channel", "sample", None])
def test_shrink_spreads_nan_and_inf_as_eager_does(backend, value, average):
    x = features((3, 5, 67), device=backend.device)
    x[1, 2, 66] = value
    gate = nn.Softplus() if average is None else nn.Sigmoid()
    pooled = abs_mean(x)
    tau = gate(pooled) * {"channel": pooled, "sample": pooled.mean(1, keepdim=True), None: 1.0}[average]
    expected = soft_threshold(x, tau)
    for there in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        y, actual = backend.shrink(there, gate, average=average, return_tau=True)
        torch.testing.assert_close(actual, tau, equal_nan=True)
        torch.testing.assert_close(y, expected, equal_nan=True)
        if backend.compiled:  # strides mean nothing to it
            break
    assert expected.isnan().any() and not expected[0].isnan().any()


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_a_plane_of_zeros(backend, value):
    x = features((2, 3, 67), device=backend.device)
    x[1, 1] = value
    x.requires_grad_()
    y, tau = backend.shrink(x, Half(), return_tau=True)
    g = torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, x, g)
    assert tau[1, 1] == 0 and not y[1, 1].any() and not dx[1, 1].any()
    assert dx[0].any()


def test_a_saturated_gate_may_zero_a_constant_plane(backend):
    x = torch.full((2, 3, 64), 0.75, device=backend.device)
    assert not backend.shrink(x, lambda a: torch.sigmoid(a + 30)).any()


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_receives_its_own_dtype(kernels, dtype, gate_dtype):
    seen = []

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(3, dtype=torch.float64))  # a buffer does not count
            if gate_dtype is not None:
                self.index = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)  # nor an integer
                self.inner = nn.Linear(4, 4, dtype=gate_dtype, device=kernels.device)

        def forward(self, a):
            seen.append(a.dtype)
            return self.inner(a).sigmoid() if gate_dtype is not None else a.sigmoid()

    x = features((2, 4, 33), dtype, kernels.device).requires_grad_()
    assert kernels.squeeze_excite(x, Gate()).dtype is dtype
    y, tau = kernels.shrink(x, Gate(), return_tau=True)
    assert seen == [gate_dtype or wide(dtype)] * 2
    assert y.dtype is dtype and tau.dtype is wide(dtype)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.dtype is dtype


def test_a_plain_function_receives_the_dtype_of_the_sums(backend):
    for dtype in (torch.bfloat16, torch.float64):
        x = features((2, 4, 33), dtype, backend.device)
        sums = wide(dtype)
        for op in (backend.shrink, backend.squeeze_excite):
            assert op(x, lambda a, sums=sums: a.sigmoid() if a.dtype is sums else None).dtype is dtype
        assert backend.abs_mean(x).dtype is wide(dtype)


def test_a_low_precision_gate_takes_part_in_float32(backend):
    """alpha goes back to float32 before tau: tau is alpha's bfloat16 value times A, not rounded again."""
    x, gate = features((3, 6, 70), torch.bfloat16, backend.device), smooth_gate(6).to(backend.device, torch.bfloat16)
    tau = backend.shrink(x, gate, return_tau=True)[1]
    pooled = backend.abs_mean(x)
    torch.testing.assert_close(tau, gate(pooled.bfloat16()).float() * pooled, rtol=1e-6, atol=0)
    assert (tau.bfloat16().float() != tau).any()


@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_promotes_as_in_torch(kernels, dtype, residual):
    x = features((2, 4, 33), dtype, kernels.device)
    y = kernels.shrink(x, torch.sigmoid, residual=torch.ones_like(x, dtype=residual))
    assert y.dtype is torch.promote_types(dtype, residual)


# ---- memory format ---------------------------------------------------------------------------------------------------


def check_strides(backend, memory, residual, ops=("abs_mean", "soft_threshold", "shrink")):
    """y and dx lie in memory as torch.empty_like(x) does, whatever g and the residual do."""
    x = LAYOUTS[memory](2, 5, 3, 4).to(backend.device).requires_grad_()
    expected = torch.empty_like(x).stride()
    g = LAYOUTS[residual or "contiguous"](2, 5, 3, 4).to(backend.device)
    added = g if residual else None
    gate, tau = smooth_gate(5).to(backend.device), torch.rand(2, 5, device=backend.device)
    pooled, y, z = backend.abs_mean(x), backend.soft_threshold(x, tau), backend.shrink(x, gate, residual=added)
    assert (y.stride(), z.stride()) == (expected, expected)
    gradients = {
        "abs_mean": torch.autograd.grad(pooled, x, torch.randn_like(pooled)),
        "soft_threshold": torch.autograd.grad(y, x, g),
        "shrink": torch.autograd.grad(z, x, g),
    }
    assert {op: gradients[op][0].stride() for op in ops} == dict.fromkeys(ops, expected)


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("residual", [None, "contiguous", "channels_last", "sliced", "expanded space"])
def test_strides_of_the_results(kernels, memory, residual):
    check_strides(kernels, memory, residual)
    with torch.no_grad():
        x = LAYOUTS[memory](2, 5, 3, 4).to(kernels.device)
        assert kernels.shrink(x, torch.sigmoid).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    "stride", [(1, 0, 2), (1, 0, 1), (7, 0, 2), (1, 1, 2), (0, 0, 0), (1, 4, 2), (2, 1, 1)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (1, 4, 3), (2, 3, 1)], ids=str)
def test_ambiguous_strides(kernels, shape, stride):
    """Dimensions of one element and expanded ones may have any stride, and views of x may come with others."""
    x = torch.randn(40).as_strided(shape, stride)
    expected = [torch.empty_like(x).stride()[d] for d in range(3) if shape[d] > 1]
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        y, tau = kernels.shrink(x, Half(), residual=x.detach(), return_tau=True)
        torch.testing.assert_close(y, soft_threshold(x, tau) + x)
        assert [y.stride()[d] for d in range(3) if shape[d] > 1] == expected
        y = kernels.soft_threshold(x, 0.4)
        torch.testing.assert_close(y, soft_threshold(x, torch.tensor(0.4)))
        assert [y.stride()[d] for d in range(3) if shape[d] > 1] == expected
    g = torch.randn(shape)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.equal(dx, torch.where(x.abs() > 0.4, g, 0))
    assert [dx.stride()[d] for d in range(3) if shape[d] > 1] == expected


@pytest.mark.sampled(6)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "image transposed", "sliced", "expanded space"])
def test_strides_of_compiled_results(compiled, memory):
    if compiled.backend == "cpu" and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("before torch 2.7 a traced call is always the reference, and aot_eager loses its strides")
    # the gradient of a plain mean is contiguous in PyTorch itself
    ops = ("soft_threshold", "shrink") + (("abs_mean",) if compiled.backend == "cpu" else ())
    check_strides(compiled, memory, "channels_last", ops)


# ---- degenerate shapes -----------------------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (0, 4, 5, 6), (0, 0, 3)], ids=str)
def test_empty_tensors(backend, shape):
    x = torch.randn(shape, device=backend.device, requires_grad=True)
    pooled = backend.abs_mean(x)
    assert pooled.shape == shape[:2] and pooled.dtype is torch.float32
    assert torch.autograd.grad(pooled, x, torch.ones_like(pooled))[0].shape == shape
    gate = nn.Linear(shape[1], shape[1]).to(backend.device)
    y, tau = backend.shrink(x, gate, residual=torch.randn(shape, device=x.device), return_tau=True)
    assert tau.shape == shape[:2]
    z = backend.squeeze_excite(x, gate, residual=torch.randn(shape, device=x.device))
    for out in (y, z):
        assert torch.autograd.grad(out, x, torch.ones_like(out))[0].shape == out.shape == shape
    assert backend.soft_threshold(x, 0.5).shape == shape


def test_no_spatial_elements(backend):
    """The mean over nothing is NaN, as in torch; y has nothing in it."""
    x = torch.randn(2, 4, 0, device=backend.device)
    assert backend.abs_mean(x).isnan().all()
    assert backend.shrink(x, torch.sigmoid).shape == backend.squeeze_excite(x, torch.sigmoid).shape == (2, 4, 0)


@pytest.mark.parametrize("shape", [(3, 4, 1), (1, 4, 1), (1, 1, 1), (3, 4, 1, 1), (1, 4, 1, 7), (2, 1, 37)], ids=str)
def test_lengths_of_one(backend, shape):
    x = torch.randn(shape, device=backend.device, requires_grad=True)
    y, tau = backend.shrink(x, Half(), return_tau=True)
    torch.testing.assert_close(tau, 0.5 * abs_mean(x))
    torch.testing.assert_close(y, soft_threshold(x, tau))


def test_batch_norm_of_one_sample_raises(kernels):
    gate = smooth_gate(4, norm=True).to(kernels.device)
    x = torch.randn(1, 4, 16, device=kernels.device)
    for op in (kernels.shrink, kernels.squeeze_excite):
        with pytest.raises(ValueError, match="one sample has no batch statistics"):
            op(x, gate.train())
        assert op(x, gate.eval()).shape == x.shape
