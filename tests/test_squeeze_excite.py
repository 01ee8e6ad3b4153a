"""squeeze_excite: values, derivatives, layouts, what is kept, and what test_transforms.py does not have."""

import copy

import pytest
import torch
from oracle import DTYPES, LAYOUTS, check_gated, features, smooth_gate, smooth_gate_for, squeeze_excite, wide
from test_autograd_memory import Saved
from torch import nn

import drsn_kernels as dk
from drsn_kernels.backends import cpu, gpu
from drsn_kernels.backends.eager import spread
from drsn_kernels.layout import layout_of

LENGTHS = [1, 17, 65, 129, 1027, 32771]  # around the widths of the kernels: test_ops.py
SHAPES = [(2, 8, 1024), (8, 4, 512), (1, 3, 9600), (2, 4, 56, 56), (2, 64, 7, 7), (4, 4, 256, 1), (2, 3, 2, 3, 5)]
SHAPES += [(1, 1, 1), (3, 5, 1), (1, 7, 12), (2, 300, 3)]
native = pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")


def check_all(backend, x, gate: nn.Module, residual=None, g: torch.Tensor | None = None) -> None:
    """y and the gradients of x, residual and every gate parameter."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    g = torch.randn(x.shape, device=x.device).to(dtype) if g is None else g
    check_gated(lambda x, r: backend.squeeze_excite(x, gate, residual=r), squeeze_excite, x, gate, residual, [g])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(kernels, dtype, channels_last, length):
    x = features((2, 3, length), dtype, kernels.device)
    x = (x.transpose(1, 2) if channels_last else x).requires_grad_()
    check_all(kernels, x, smooth_gate_for(x), torch.randn_like(x).detach().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one", [False, True], ids=["per-channel", "per-sample"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernels, dtype, one, shape):
    x = features(shape, dtype, kernels.device).requires_grad_()
    check_all(kernels, x, smooth_gate_for(x, 1 if one else None))


def test_compiled(compiled):
    x = features((3, 6, 70)).requires_grad_()
    check_all(compiled, x, smooth_gate_for(x), torch.randn_like(x).detach().requires_grad_())


@pytest.mark.parametrize("residual", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_of_any_dtype(kernels, dtype, residual):
    x = features((3, 6, 70), dtype, kernels.device).requires_grad_()
    added = (3 * torch.randn(x.shape, device=x.device)).to(residual)
    added.requires_grad_(added.is_floating_point())
    y = kernels.squeeze_excite(x, smooth_gate_for(x), residual=added)
    assert y.dtype is torch.promote_types(dtype, residual)
    if dtype is torch.float32:
        check_all(kernels, x, smooth_gate_for(x), added)
    else:  # of another dtype, it is added to the rounded product
        gate = smooth_gate_for(x)
        added = added.to(torch.float32) if residual is dtype else added
        assert torch.equal(kernels.squeeze_excite(x, gate, residual=added), kernels.squeeze_excite(x, gate) + added)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
def test_the_sums_are_accurate(kernels, dtype, channels_last):
    """The mean of x and the sum of g * x, which may cancel: the error is measured by the sum of the magnitudes."""
    x, g = (torch.randn(2, 3, 40_000).to(kernels.device, dtype) for _ in range(2))
    if channels_last:
        x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
    backend = dk.backends.BACKENDS[kernels.backend]
    for found, terms in (
        (backend.reduce(x, layout_of(x), kind="value")[0], x.double() / x.shape[2]),
        (backend.reduce(g, layout_of(x), kind="product", times=x)[0], g.double() * x.double()),
    ):
        assert found.dtype is wide(dtype) and found.shape == (2, 3)
        limit = (1e-12 if dtype is torch.float64 else 2e-6) * terms.abs().sum(2)
        assert ((found.double() - terms.sum(2)).abs() <= limit).all()


@pytest.mark.parametrize("g_layout", ["contiguous", "sliced channels_last"])
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_layouts(kernels, x_layout, g_layout):
    """x in one layout, residual and g in the other."""
    x, residual, g = (LAYOUTS[layout](3, 5, 6, 7) for layout in (x_layout, g_layout, g_layout))
    x.requires_grad_(), residual.requires_grad_()
    gate = smooth_gate_for(x)
    y = kernels.squeeze_excite(x, gate, residual=residual)
    (dx,) = torch.autograd.grad(y, x, g)
    assert y.stride() == dx.stride() == torch.empty_like(x.detach()).stride()
    check_all(kernels, x, gate, residual, g)


# ---- special values and sizes ----------------------------------------------------------------------------------------


def test_nan_and_inf_as_in_pytorch(kernels):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[[1.0, nan]], [[inf, 1.0]], [[-inf, inf]], [[0.0, -0.0]]], device=kernels.device)
    for gate in (torch.sigmoid, lambda a: torch.zeros_like(a), lambda a: torch.full_like(a, inf)):
        y, expected = kernels.squeeze_excite(x, gate), squeeze_excite(x, gate)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0, equal_nan=True)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [1, 3])
def test_numerical_derivatives_with_batch_norm_in_training(kernels, out):
    gate = smooth_gate(3, out, norm=True).double()
    x, residual = (torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, residual, *gate.parameters())

    def run(x, residual, *_):
        return kernels.squeeze_excite(x, gate, residual=residual)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "gate", "residual", "x and gate"])
def test_some_of_the_gradients(kernels, wanted):
    leaf, residual = torch.randn(3, 6, 20, requires_grad=True), torch.randn(3, 6, 20, requires_grad=True)
    gate = smooth_gate(6)
    choice = {"x": [leaf], "gate": [*gate.parameters()], "residual": [residual]}
    leaves = [t for name in wanted.split(" and ") for t in choice[name]]
    g = torch.randn_like(leaf)
    ours = torch.autograd.grad(kernels.squeeze_excite(leaf, gate, residual=residual), leaves, g)
    for a, b in zip(ours, torch.autograd.grad(squeeze_excite(leaf, gate, residual), leaves, g), strict=True):
        torch.testing.assert_close(a, b)
    frozen = copy.deepcopy(gate).requires_grad_(False)
    if wanted == "gate":
        ours = torch.autograd.grad(kernels.squeeze_excite(leaf.detach(), gate), leaves, g)
        for a, b in zip(ours, torch.autograd.grad(squeeze_excite(leaf.detach(), gate), leaves, g), strict=True):
            torch.testing.assert_close(a, b)
    if wanted == "x":
        constant = frozen(leaf.detach().mean(2))  # no factor wants a gradient
        (dx,) = torch.autograd.grad(kernels.squeeze_excite(leaf, lambda a: constant), leaf, g)
        torch.testing.assert_close(dx, g * constant[..., None])


def test_a_gate_that_looks_at_x_or_whose_output_is_used_elsewhere(kernels):
    x, gate, seen = torch.randn(3, 6, 20, requires_grad=True), smooth_gate(6), []

    def looking(a):
        seen.append(gate(a) * x.amax(2))
        return seen[-1]

    def exact(x):
        s = gate(x.mean(2)) * x.amax(2)
        return x * s[..., None], s

    y, g, h = kernels.squeeze_excite(x, looking), torch.randn_like(x), torch.randn(3, 6)
    right, s = exact(x)
    for outputs, others, gs in (([y, seen[0]], [right, s], [g, h]), ([seen[0]], [s], [h]), ([y], [right], [g])):
        (dx,) = torch.autograd.grad(outputs, x, gs, retain_graph=True)
        torch.testing.assert_close(dx, torch.autograd.grad(others, x, gs, retain_graph=True)[0])


def test_backward_twice_and_a_backward_within_a_hook(kernels):
    x, gate = torch.randn(3, 6, 20, requires_grad=True), smooth_gate(6)
    y, g = kernels.squeeze_excite(x, gate), torch.randn_like(x)
    exact = torch.autograd.grad(squeeze_excite(x, gate), x, g)[0]
    inner = []
    gate[0].weight.register_hook(
        lambda _: inner.append(torch.autograd.grad(y, x, 2 * g, retain_graph=True)[0]) if not inner else None
    )
    dx, _ = torch.autograd.grad(y, [x, gate[0].weight], g, retain_graph=True)
    torch.testing.assert_close(dx, exact)
    torch.testing.assert_close(inner[0], 2 * exact)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], exact)


def test_x_that_is_overwritten_before_backward_is_an_error(kernels):
    leaf, gate = torch.randn(3, 6, 20, requires_grad=True), smooth_gate(6)
    x = leaf * 1
    y = kernels.squeeze_excite(x, gate)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [False, True], ids=["per-channel", "per-sample"])
@pytest.mark.parametrize("wants", ["x and factors", "x", "factors", "nothing"])
def test_saved_bytes(kernels, wants, one):
    """x where the factors want a gradient, the factors where x does."""
    x, s = torch.randn(4, 8, 99), torch.rand(4, 1 if one else 8)
    x.requires_grad_("x" in wants), s.requires_grad_("factors" in wants)
    with Saved() as saved:
        y = kernels.squeeze_excite(x, lambda a: s, residual=torch.randn_like(x))
    assert saved.bytes == 4 * (x.numel() * s.requires_grad + s.numel() * x.requires_grad)
    assert y.requires_grad == (wants != "nothing")
    if y.requires_grad:
        y.backward(torch.randn_like(y))
        assert saved.alive == 0


# ---- every other way -------------------------------------------------------------------------------------------------


@native
def test_explain():
    x, gate = torch.randn(3, 6, 40, requires_grad=True), smooth_gate(6)
    with dk.use_backend("cpu"):
        (call,) = dk.explain(lambda: dk.squeeze_excite(x, gate, residual=x))
        (frozen,) = dk.explain(lambda: dk.squeeze_excite(x.detach(), gate))
        (module,) = dk.explain(dk.SqueezeExcite(6), x, strict=True)  # a called gate is no fallback
    assert (call.op, call.backend, call.plan.name, call.fused) == ("squeeze_excite", "cpu", "passes over x", False)
    assert call.gate == dict(call.plan.not_taken)["gate fused"] == "squeeze_excite calls every gate"
    full, small = x.numel() * 4, 3 * 6 * 4
    assert (call.forward.read, call.forward.written, call.saved) == (3 * full + small, full + small, full + small)
    assert (call.backward.read, call.backward.written) == (3 * full + 2 * small, full + small)
    assert (call.forward.kernels, call.backward.kernels) == (("reduce", "map"), ("reduce", "map"))
    assert frozen.saved == full and frozen.backward.kernels == ("reduce",)
    assert module.fallback == "" and module.module == ""
    (compiled,) = dk.explain(torch.compile(dk.SqueezeExcite(6)), x)
    assert (compiled.backend, compiled.plan.name) == ("compiler", "decomposed")


def test_explain_of_triton_plans_the_launches_that_are_counted():
    if gpu.missing() is not None or not gpu.interpreting():
        pytest.skip("needs Triton, interpreted")
    x = torch.randn(3, 6, 40, requires_grad=True)
    with dk.use_backend("triton", strict=True):
        (call,) = dk.explain(lambda: dk.squeeze_excite(x, smooth_gate(6)), strict=True)
    assert call.forward.kernels == call.backward.kernels == ("reduce_kernel", "map_kernel")
    assert [planned.kernel for planned in call.plan.launches] == [*call.forward.kernels, *call.backward.kernels]
    assert call.plan.name == "two launches each way"


def test_the_gradient_of_a_mean_is_differentiable():
    """A gate whose output goes to a loss of its own: there is no g, and dx is dA / L alone."""
    da = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    dx = spread(da, layout_of(torch.empty(2, 3, 5)), torch.float64)
    assert torch.equal(dx, (da / 5)[..., None].expand(2, 3, 5)) and dx.is_contiguous()
