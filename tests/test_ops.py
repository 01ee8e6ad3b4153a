"""abs_mean, soft_threshold and shrink: values, gradients and higher derivatives against the float64 oracle."""

import math
from collections.abc import Sequence

import pytest
import torch
from oracle import (
    AVERAGES,
    DTYPES,
    abs_mean,
    aligned,
    cast_gate,
    check,
    features,
    shrink,
    smooth_gate,
    soft_threshold,
    wide,
    without_ties,
)
from torch import nn
from torch.func import functional_call

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


def check_shrink(kernels, x, gate: nn.Module, average, residual=None, inplace=False, return_tau=True) -> None:
    """y, tau and the gradients of x, residual and every gate parameter."""
    parameters = dict(gate.named_parameters())
    with torch.no_grad():
        tau = shrink(x.double(), cast_gate(gate, torch.float64), average)[1]
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        g = without_ties(torch.randn(x.shape, device=x.device), x, tau).to(dtype)

    def ours(x, residual, *_):
        return kernels.shrink(
            x * 1 if inplace else x, gate, average=average, residual=residual, inplace=inplace, return_tau=return_tau
        )

    def formula(d, x, residual, *values):
        inner = cast_gate(gate, d)
        given = dict(zip(parameters, values, strict=True))
        y, tau = shrink(x, lambda a: functional_call(inner, given, a), average, residual)
        return (y, tau) if return_tau else y

    gs = [g, torch.randn(tau.shape, dtype=wide(x.dtype), device=x.device)] if return_tau else [g]
    check(ours, formula, {"x": x, "residual": residual, **parameters}, gs)


def gate_for(x: torch.Tensor, out: int | None = None) -> nn.Module:
    gate = smooth_gate(x.shape[1], out)
    return gate.to(x.device, wide(x.dtype))


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
    check_shrink(kernels, x, gate_for(x, 1 if one else None), average, residual, inplace, return_tau)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrink_shapes(kernels, dtype, average, shape):
    x = features(shape, dtype, kernels.device).requires_grad_()
    check_shrink(kernels, x, gate_for(x, 1 if average == "sample" else None), average)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("length", [7, 17, 64, 95, 129, 513, 32771])
def test_shrink_lengths_with_residual(kernels, dtype, channels_last, length):
    x = walked((2, 3, length), channels_last, dtype, kernels.device)
    x, residual = (x * 0.7).requires_grad_(), x.clone().requires_grad_()
    check_shrink(kernels, x, gate_for(x), "channel", residual, return_tau=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residual_of_a_wider_dtype_is_added_after_the_rounding(kernels, dtype):
    x, gate = features((3, 6, 70), dtype, kernels.device), smooth_gate(6).to(kernels.device)
    residual = torch.randn(x.shape, device=x.device)
    with torch.no_grad():
        y = kernels.shrink(x, gate, residual=residual)
        assert y.dtype is torch.float32 and torch.equal(y, kernels.shrink(x, gate) + residual)


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
    assert torch.equal(x, expected)
    if view:
        assert torch.equal(whole[:, 1:7], expected) and torch.equal(whole[:, :1], leaf[:, :1])
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


def far_from_kinks(shape: Sequence[int], gate: nn.Module, average: str | None) -> torch.Tensor:
    """float64 x without zeros and without |x| near tau, where a finite difference would step across."""
    for _ in range(100):
        x = torch.randn(shape, dtype=torch.float64)
        tau = aligned(shrink(x, gate, average)[1], x.dim())
        if (x.abs() - tau).abs().min() > 2e-3 and x.abs().min() > 2e-3:
            return x.requires_grad_()
    raise AssertionError("no such x")


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("out", [1, 3])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_shrink_numerical_derivatives_with_batch_norm_in_training(kernels, average, out, inplace):
    if kernels.interpreted and average is None:
        pytest.skip("seconds in the interpreter, and no other kernel")
    gate = smooth_gate(3, out, norm=True).double()
    x = far_from_kinks((4, 3, 5), gate, average)
    residual = torch.randn_like(x, requires_grad=True)

    def run(x, residual, *_):
        x = x * 1 if inplace else x
        return kernels.shrink(x, gate, average=average, residual=residual, inplace=inplace, return_tau=True)

    inputs = (x, residual, *gate.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("average", AVERAGES)
def test_shrink_full_jacobians(kernels, average):
    if kernels.interpreted and average != "sample":
        pytest.skip("seconds in the interpreter, and no other kernel")
    gate = smooth_gate(2, None, norm=True).double()
    x = far_from_kinks((3, 2, 4), gate, average)
    for check_derivative in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_derivative(lambda x: kernels.shrink(x, gate, average=average), (x,))


def test_third_derivative(kernels):
    gate = smooth_gate(2).double()  # without batch norm, whose own third derivative is wrong in PyTorch
    x = far_from_kinks((3, 2, 4), gate, "channel")

    def gradient(x):
        return torch.autograd.grad(kernels.shrink(x, gate).square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (x,), fast_mode=True)


@pytest.mark.parametrize("shape", [(3, 2), (3, 1), (1, 2, 1), ()], ids=str)
def test_soft_threshold_numerical_derivatives(kernels, shape):
    x = far_from_kinks((3, 2, 4), lambda a: torch.full((3, 2), 0.4, dtype=torch.float64), None)
    tau = torch.full(shape, 0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.soft_threshold, (x, tau))
    assert torch.autograd.gradgradcheck(kernels.soft_threshold, (x, tau))


def test_abs_mean_numerical_derivatives(kernels):
    x = far_from_kinks((3, 2, 4), torch.zeros_like, None)
    assert torch.autograd.gradcheck(kernels.abs_mean, (x,))
    assert torch.autograd.gradgradcheck(kernels.abs_mean, (x,))


# ---- backward passes of every sort -----------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
def test_create_graph_gives_the_same_first_gradient(kernels, average):
    x, gate = features((3, 6, 70), torch.float64, kernels.device).requires_grad_(), smooth_gate(6).double()
    wanted, g = [x, *gate.parameters()], torch.randn(3, 6, 70, dtype=torch.float64)
    plain = torch.autograd.grad(kernels.shrink(x, gate, average=average), wanted, g)
    graph = torch.autograd.grad(kernels.shrink(x, gate, average=average), wanted, g, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_gradient_penalty_reaches_the_gate(kernels):
    x, gate = far_from_kinks((4, 3, 9), smooth_gate(3).double(), "channel"), smooth_gate(3).double()
    g = torch.randn_like(x)

    def penalty(run, gate):
        (dx,) = torch.autograd.grad(run(x, gate), x, g, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(gate.parameters()))

    exact = penalty(lambda x, gate: shrink(x, gate, "channel")[0], gate)
    for actual, expected in zip(penalty(kernels.shrink, gate), exact, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_sum_of_a_long_row_is_accurate(kernels):
    x = torch.full((1, 2, 1 << 20), 0.1, device=kernels.device)
    x[0, 1] *= -3
    pooled = kernels.abs_mean(x).double()
    exact = x.double().abs().mean(2)
    assert ((pooled - exact).abs() / exact).max() < 2e-6 and math.isclose(exact[0, 0], 0.1, rel_tol=1e-6)
