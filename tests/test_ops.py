"""abs_mean, soft_threshold and shrink against the float64 oracle; higher derivatives, of squeeze_excite too."""

import functools
import math
from collections.abc import Callable, Sequence

import other_device
import pytest
import torch
from oracle import (
    AVERAGES,
    DTYPES,
    abs_mean,
    check,
    check_shrink,
    far_from_kinks,
    features,
    shrink,
    smooth_gate,
    smooth_gate_for,
    soft_threshold,
    squeeze_excite,
    wide,
)

import drsn_kernels as dk

# Around every width in the kernels: bytes and words of a plane, SIMD registers, chunks of 512, segments of 32768.
LENGTHS = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 513, 1027, 32768, 32771, 65600]
# The benchmark shapes, scaled down, and degenerate ones.
SHAPES = [
    (2, 8, 1024), (2, 64, 128), (3, 32, 16), (8, 4, 512), (8, 32, 32), (1, 3, 9600), (2, 128, 30),
    (2, 4, 56, 56), (2, 8, 28, 28), (2, 16, 14, 14), (2, 64, 7, 7), (2, 128, 4, 4), (4, 4, 256, 1), (8, 8, 1, 3),
    (2, 25, 24), (3, 5, 1), (2, 3, 1, 1), (1, 1, 1), (1, 7, 12), (2, 3, 2, 3, 5), (1, 2, 1, 2, 1, 2, 3, 5),
]  # fmt: skip


def walked(shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Features whose rows in memory have the last of `shape` elements: spatial ones, or channels."""
    x = features(shape, dtype, device)
    return x.transpose(1, 2) if channels_last else x


def tau_of(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=wide(x.dtype), device=x.device) + 0.1


SIZES = [
    *(pytest.param((3, 2, n), False, id=f"rows-of-{n}") for n in LENGTHS),
    *(pytest.param((3, 2, n), True, id=f"channels-of-{n}") for n in LENGTHS),
    *(pytest.param(s, False, id="x".join(map(str, s))) for s in SHAPES),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, channels_last", SIZES)
def test_abs_mean(kernels, dtype, shape, channels_last):
    x = walked(shape, channels_last, dtype, kernels.device).requires_grad_()
    g = torch.randn(x.shape[:2], dtype=wide(dtype), device=kernels.device)
    check(kernels.abs_mean, lambda d, x: abs_mean(x), {"x": x}, [g])
    with torch.no_grad():
        pooled = kernels.abs_mean(x)
    assert pooled.dtype is wide(dtype) and torch.equal(pooled, kernels.abs_mean(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, channels_last", SIZES)
def test_soft_threshold(kernels, dtype, shape, channels_last):
    x = walked(shape, channels_last, dtype, kernels.device).requires_grad_()
    tau = tau_of(x, *x.shape[:2]).requires_grad_()
    y = kernels.soft_threshold(x, tau)
    assert y.dtype is dtype
    inputs = {"x": x, "tau": tau}
    check(kernels.soft_threshold, lambda d, x, tau: soft_threshold(x, tau), inputs, [torch.randn_like(x)])
    with torch.no_grad():
        assert torch.equal(kernels.soft_threshold(x, tau), y)


TAU_SHAPES = [
    pytest.param((4, 3, 50), (), id="0-dim"),
    *(pytest.param((4, 3, 50), s, id=f"3-{s}") for s in [(4, 1), (4, 3), (1, 3, 1), (4, 3, 1), (4, 1, 1), (1, 1, 1)]),
    *(pytest.param((4, 3, 5, 7), s, id=f"4-{s}") for s in [(4, 1), (4, 3), (4, 3, 1, 1), (1, 3, 1, 1), (1, 1, 1, 1)]),
    *(pytest.param((4, 30), s, id=f"2-{s}") for s in [(), (4, 1), (4, 30), (1, 30), (1, 1)]),
    *(pytest.param((40,), s, id=f"1-{s}") for s in [(), (1,)]),
    pytest.param((), (), id="0-()"),
]  # fmt: skip
VARYING = [((4, 3, 50), (4, 3, 50)), ((4, 3, 50), (1, 1, 50)), ((4, 3, 5, 7), (4, 1, 5, 1)), ((40,), (40,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, tau_shape", TAU_SHAPES)
def test_tau_shapes(kernels, dtype, shape, tau_shape):
    x = features(shape, dtype, kernels.device).requires_grad_()
    inputs = {"x": x, "tau": tau_of(x, *tau_shape).requires_grad_()}
    check(kernels.soft_threshold, lambda d, x, tau: soft_threshold(x, tau), inputs, [torch.randn_like(x)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, tau_shape", VARYING, ids=str)
def test_tau_that_varies_along_space(kernels, dtype, shape, tau_shape):
    x = features(shape, dtype, kernels.device).requires_grad_()
    inputs = {"x": x, "tau": tau_of(x, *tau_shape).requires_grad_()}
    with dk.use_backend(kernels.backend):
        check(kernels.soft_threshold, lambda d, x, tau: soft_threshold(x, tau), inputs, [torch.randn_like(x)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (30,), (4, 30), (4, 3, 30), (4, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("tau", [0.3, 1, 0])
def test_tau_a_number(kernels, dtype, shape, tau):
    x = features(shape, dtype, kernels.device).requires_grad_()
    value = float(torch.tensor(tau, dtype=wide(dtype)))
    check(
        lambda x: kernels.soft_threshold(x, tau),
        lambda d, x: soft_threshold(x, torch.tensor(value, dtype=d, device=x.device)),
        {"x": x},
        [torch.randn_like(x)],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_tau_of_another_dtype_is_rounded_to_that_of_the_sums(kernels, dtype):
    x = features((4, 3, 50), device=kernels.device)
    tau = torch.rand(4, 3, device=kernels.device).to(dtype).requires_grad_()
    y = kernels.soft_threshold(x, tau)
    assert y.dtype is torch.float32 and torch.equal(y, kernels.soft_threshold(x, tau.detach().float()))
    g = torch.randn_like(y)
    wide_tau = tau.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(kernels.soft_threshold(x, wide_tau), wide_tau, g)
    (actual,) = torch.autograd.grad(y, tau, g)
    assert actual.dtype is dtype and torch.equal(actual, expected.to(dtype))


# ---- shrink ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("one", [False, True], ids=["per-channel", "per-sample"])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("return_tau", [False, True], ids=["y", "y-tau"])
def test_shrink_arguments(kernels, average, one, residual, inplace, return_tau):
    if inplace and residual is torch.float64:
        pytest.skip("an error, see test_errors.py: the sum would not fit x's dtype")
    x = features((3, 6, 70), device=kernels.device).requires_grad_()
    if residual is not None:
        residual = (3 * torch.randn_like(x)).detach().to(residual)
        residual.requires_grad_(residual.is_floating_point())
    check_shrink(kernels, x, smooth_gate_for(x, 1 if one else None), average, residual, inplace, return_tau)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrink_shapes(kernels, dtype, average, shape):
    x = features(shape, dtype, kernels.device).requires_grad_()
    check_shrink(kernels, x, smooth_gate_for(x, 1 if average == "sample" else None), average)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("length", [7, 17, 64, 95, 129, 513, 32771])
def test_shrink_lengths_with_residual(kernels, dtype, channels_last, length):
    x = walked((2, 3, length), channels_last, dtype, kernels.device)
    x, residual = (x * 0.7).requires_grad_(), x.clone().requires_grad_()
    check_shrink(kernels, x, smooth_gate_for(x), "channel", residual, return_tau=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residual_of_a_wider_dtype_is_added_after_the_rounding(kernels, dtype):
    x, gate = features((3, 6, 70), dtype, kernels.device), smooth_gate(6).to(kernels.device)
    residual = torch.randn(x.shape, device=x.device)
    with torch.no_grad():
        y = kernels.shrink(x, gate, residual=residual)
        assert y.dtype is torch.float32 and torch.equal(y, kernels.shrink(x, gate) + residual)


@pytest.mark.parametrize("training", [False, True], ids=["no_grad", "training"])
def test_a_threshold_that_is_a_part_of_x_in_place(kernels, training):
    x = torch.randn(2, 3, 40, device=kernels.device)
    x[..., 0].abs_()
    want = x.sign() * (x.abs() - x[..., :1]).relu()
    leaf = x.clone().requires_grad_(training)
    work = leaf * 1 if training else leaf
    y = kernels.shrink(work, lambda pooled: work.detach()[..., 0], average=None, inplace=True)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
@pytest.mark.parametrize("training", [False, True], ids=["no_grad", "training"])
def test_inplace_returns_x(kernels, view, training):
    gate, leaf = smooth_gate(6).to(kernels.device), features((3, 8, 70), device=kernels.device).requires_grad_(training)
    with torch.set_grad_enabled(training):
        whole = leaf * 1
        x = whole[:, 1:7] if view else whole[:, :6].clone()
        expected = kernels.shrink(x.clone(), gate)
        y = kernels.shrink(x, gate, inplace=True)
    assert y.data_ptr() == x.data_ptr() and y is x
    # a view may not be aligned as its clone is, and sums then come in another order
    torch.testing.assert_close(x, expected, rtol=1e-5 if view else 0, atol=1e-6 if view else 0)
    if view:
        assert torch.equal(whole[:, 1:7], y) and torch.equal(whole[:, :1], leaf[:, :1])
    if training:  # the rows that the view leaves out keep their gradient of 1
        g = torch.randn_like(whole)
        (dx,) = torch.autograd.grad(whole, leaf, g) if view else torch.autograd.grad(y, leaf, g[:, 1:7])
        other = leaf.detach().clone().requires_grad_()
        part = other[:, 1:7] if view else other[:, :6]
        (right,) = torch.autograd.grad(kernels.shrink(part, gate), other, g[:, 1:7])
        if view:
            right[:, [0, 7]] = g[:, [0, 7]]
        torch.testing.assert_close(dx, right)


# ---- derivatives, numerically ----------------------------------------------------------------------------------------

each_step = pytest.mark.parametrize("step", [*AVERAGES, "squeeze_excite"])


def step_of(kernels, step: str | None) -> Callable:
    """squeeze_excite, or shrink by this average, of (x, gate)."""
    if step == "squeeze_excite":
        return kernels.squeeze_excite
    return lambda x, gate: kernels.shrink(x, gate, average=step)


def formula_of(step: str | None) -> Callable:
    return squeeze_excite if step == "squeeze_excite" else lambda x, gate: shrink(x, gate, step)[0]


OTHER_RULES = {"hard": {"threshold": "hard"}, "leaky": {"slope": 0.3}}


@pytest.mark.sampled(12)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("out", [1, 3])
@pytest.mark.parametrize("way", ["new", "inplace", *OTHER_RULES])
def test_shrink_numerical_derivatives_with_batch_norm_in_training(kernels, average, out, way):
    if kernels.interpreted and average is None:
        pytest.skip("seconds in the interpreter, and no other kernel")
    gate = smooth_gate(3, out, norm=True).double()
    x = far_from_kinks((4, 3, 5), gate, average)
    residual = torch.randn_like(x, requires_grad=True)

    def run(x, residual, *_):
        options = {"inplace": way == "inplace", **OTHER_RULES.get(way, {})}
        return kernels.shrink(x * 1, gate, average=average, residual=residual, return_tau=True, **options)

    inputs = (x, residual, *gate.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@each_step
def test_full_jacobians(kernels, step):
    if kernels.interpreted and step != "sample":
        pytest.skip("seconds in the interpreter, and no other kernel")
    gate, run = smooth_gate(2, None, norm=True).double(), step_of(kernels, step)
    x = far_from_kinks((3, 2, 4), gate, step if step in AVERAGES else "channel")
    assert torch.autograd.gradcheck(lambda x: run(x, gate), (x,))
    assert torch.autograd.gradgradcheck(lambda x: run(x, gate), (x,))


@each_step
def test_third_derivative(kernels, step):
    if kernels.interpreted and step != "channel":
        pytest.skip("seconds in the interpreter, and no other kernel")
    gate = smooth_gate(2).double()  # without batch norm, whose own third derivative is wrong in PyTorch
    x, run = far_from_kinks((3, 2, 4), gate, step if step in AVERAGES else "channel"), step_of(kernels, step)

    def gradient(x):
        return torch.autograd.grad(run(x, gate).square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (x,), fast_mode=True)


def lying(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() if channels_last else x


@pytest.mark.sampled(12)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("rule", ["soft", *OTHER_RULES])
@pytest.mark.parametrize("shape", [(3, 2), (3, 1), (1, 2, 1), ()], ids=str)
def test_soft_threshold_numerical_derivatives(kernels, shape, rule, channels_last):
    x = far_from_kinks((3, 2, 4), lambda a: torch.full((3, 2), 0.4, dtype=torch.float64), None)
    inputs = lying(x, channels_last), torch.full(shape, 0.4, dtype=torch.float64, requires_grad=True)
    run = functools.partial(kernels.soft_threshold, **OTHER_RULES.get(rule, {}))
    fast = kernels.interpreted or kernels.device == other_device.NAME  # whose kernels are the cpu backend's
    assert torch.autograd.gradcheck(run, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=fast)


@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
def test_abs_mean_numerical_derivatives(kernels, channels_last):
    x = lying(far_from_kinks((3, 2, 4), torch.zeros_like, None), channels_last)
    assert torch.autograd.gradcheck(kernels.abs_mean, (x,))
    assert torch.autograd.gradgradcheck(kernels.abs_mean, (x,))


# ---- backward passes of every sort -----------------------------------------------------------------------------------


@each_step
def test_create_graph_gives_the_same_first_gradient_and_a_penalty_reaches_the_gate(kernels, step):
    x, gate = features((3, 6, 70), torch.float64, kernels.device).requires_grad_(), smooth_gate(6).double()
    wanted, g, run = [x, *gate.parameters()], torch.randn(3, 6, 70, dtype=torch.float64), step_of(kernels, step)
    plain = torch.autograd.grad(run(x, gate), wanted, g)
    graph = torch.autograd.grad(run(x, gate), wanted, g, create_graph=True)
    exact = torch.autograd.grad(formula_of(step)(x, gate), wanted, g, create_graph=True)
    for a, b, c in zip(plain, graph, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)
    penalties, right = (torch.autograd.grad(first[0].square().sum(), wanted) for first in (graph, exact))
    for a, b in zip(penalties, right, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_sum_of_a_long_row_is_accurate(kernels):
    x = torch.full((1, 2, 1 << 20), 0.1, device=kernels.device)
    x[0, 1] *= -3
    pooled = kernels.abs_mean(x).double()
    exact = x.double().abs().mean(2)
    assert ((pooled - exact).abs() / exact).max() < 2e-6 and math.isclose(exact[0, 0], 0.1, rel_tol=1e-6)
