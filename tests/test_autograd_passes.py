"""Backward passes of every sort: again, of any loss, of some inputs, with hooks, after x was changed."""

import other_device
import pytest
import torch
from oracle import AVERAGES, cast_gate, shrink, smooth_gate
from torch.profiler import ProfilerActivity, profile

import drsn_kernels as dk

pytestmark = pytest.mark.usefixtures("planes")


def test_a_second_backward_raises_as_in_torch(kernels):
    for op in (lambda x: kernels.shrink(x, smooth_gate(8)), lambda x: kernels.soft_threshold(x, 0.5), kernels.abs_mean):
        y = op(torch.randn(4, 8, 99, requires_grad=True))
        y.backward(torch.ones_like(y))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward(torch.ones_like(y))


def test_hooks_that_round_what_is_saved_leave_bits_alone(kernels):
    """As those that keep activations in half the bytes do."""
    x, gate = torch.randn(4, 8, 99, requires_grad=True), smooth_gate(8)
    exact = torch.autograd.grad(kernels.shrink(x, gate).square().sum(), x)[0]
    half = lambda t: t.half() if t.dtype == torch.float32 else t  # noqa: E731
    back = lambda t: t.float() if t.dtype == torch.half else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(half, back):
        y = kernels.shrink(x, gate)
    torch.testing.assert_close(torch.autograd.grad(y, x, 2 * y.detach())[0], exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("average", AVERAGES)
def test_retain_graph_gives_the_same_again(kernels, average):
    x, gate = torch.randn(4, 8, 99, requires_grad=True), smooth_gate(8)
    y = kernels.shrink(x, gate, average=average)
    wanted, gs = [x, *gate.parameters()], [torch.randn_like(y) for _ in range(3)]
    once = [torch.autograd.grad(y, wanted, g, retain_graph=True) for g in gs]
    torch.autograd.grad(y, wanted[1:], gs[0], retain_graph=True)  # leaves no trace in the next one
    for g, expected in zip(gs, once, strict=True):
        for a, b in zip(torch.autograd.grad(y, wanted, g, retain_graph=True), expected, strict=True):
            assert torch.equal(a, b)


LOSSES = {
    "y": lambda y, tau, alpha, pooled: [y],
    "tau": lambda y, tau, alpha, pooled: [tau],
    "alpha": lambda y, tau, alpha, pooled: [alpha],
    "A": lambda y, tau, alpha, pooled: [pooled],
    "y and tau": lambda y, tau, alpha, pooled: [y, tau],
    "y and alpha": lambda y, tau, alpha, pooled: [y, alpha],
    "all": lambda y, tau, alpha, pooled: [y, tau, alpha, pooled],
}
WANTED = ["x", "gate", "residual", "x and gate", "everything"]


@pytest.mark.parametrize("wants", WANTED)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("average", AVERAGES)
def test_any_loss_and_any_wanted_gradient(kernels, average, loss, wants):
    """The gate's input and output are within the user's reach, so losses on them count as well."""
    torch.manual_seed(3)
    x, residual, gate = torch.randn(3, 4, 50).double(), torch.randn(3, 4, 50).double(), smooth_gate(4).double()
    x.requires_grad_(wants in ("x", "x and gate", "everything"))
    residual.requires_grad_(wants in ("residual", "everything"))
    gate.requires_grad_(wants in ("gate", "x and gate", "everything"))
    leaves = [t for t in (x, residual, *gate.parameters()) if t.requires_grad]

    def gradients(run):
        seen = []

        def watched(pooled):
            seen.extend((gate(pooled), pooled))
            return seen[0]

        y, tau = run(x, watched, residual)
        outputs = [o for o in LOSSES[loss](y, tau, *seen) if o.requires_grad]
        torch.manual_seed(4)
        gs = [torch.randn_like(o) for o in outputs]
        return torch.autograd.grad(outputs, leaves, gs, allow_unused=True) if outputs else None

    ours = gradients(lambda x, gate, r: kernels.shrink(x, gate, average=average, residual=r, return_tau=True))
    exact = gradients(lambda x, gate, r: shrink(x, gate, average, r))
    if exact is None:  # no loss that anything wanted reaches; y and tau come from one node, so tau may require grad
        assert ours is None or set(ours) == {None}
        return
    for a, b in zip(ours, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_one_gate_for_several_shrinks(kernels):
    gate = smooth_gate(4, norm=True).double()
    x = torch.randn(3, 4, 50, dtype=torch.float64, requires_grad=True)

    def run(op):
        torch.manual_seed(5)
        y = x
        for average in AVERAGES:
            y = op(y, gate, average) + 0.5 * torch.randn_like(x)
        return torch.autograd.grad(y, [x, *gate.parameters()], torch.randn_like(y))

    for a, b in zip(
        run(lambda x, gate, average: kernels.shrink(x, gate, average=average)),
        run(lambda x, gate, average: shrink(x, gate, average)[0]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_x_used_elsewhere_too(kernels):
    x, gate = torch.randn(3, 4, 50, dtype=torch.float64, requires_grad=True), smooth_gate(4).double()
    g = torch.randn_like(x)

    def gradient(op):
        h = x * 2
        return torch.autograd.grad(h.square() + op(h) + h * h.cos(), x, g)[0]

    exact = gradient(lambda h: shrink(h, gate, "channel")[0])
    torch.testing.assert_close(gradient(lambda h: kernels.shrink(h, gate)), exact)


def test_hooks_on_x_see_the_whole_gradient(kernels):
    x, gate, seen = torch.randn(3, 4, 50, dtype=torch.float64, requires_grad=True), smooth_gate(4).double(), []
    h = x * 1
    h.register_hook(seen.append)
    y = kernels.shrink(h, gate)
    y.backward(torch.ones_like(y))
    assert len(seen) == 1 and torch.equal(seen[0], x.grad)
    exact = torch.autograd.grad(shrink(x, gate, "channel")[0], x, torch.ones_like(x))[0]
    torch.testing.assert_close(x.grad, exact)


def test_the_gradient_of_the_output_is_left_as_it_is(kernels):
    """g is handed on unmasked inside; the tensor of the caller must not change, nor the gradient of the residual."""
    x, residual = torch.randn(3, 4, 50, requires_grad=True), torch.randn(3, 4, 50, requires_grad=True)
    g = torch.randn_like(x)
    before = g.clone()
    y = kernels.shrink(x, smooth_gate(4), residual=residual)
    dx, dr = torch.autograd.grad(y, (x, residual), g)
    assert torch.equal(g, before) and torch.equal(dr, before) and not torch.equal(dx, dr)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("average", AVERAGES)
def test_no_add_of_two_gradients(kernels, average):
    """The direct gradient and the one through the gate meet inside one kernel."""
    if kernels.backend == "torch":
        pytest.skip("pure PyTorch adds them")
    leaf, gate = torch.randn(8, 16, 700, requires_grad=True), smooth_gate(16)
    y = kernels.shrink(leaf * 2, gate, average=average)
    g = torch.randn_like(y)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        torch.autograd.grad(y, [leaf, *gate.parameters()], g)
    big = [e.name for e in recorded.events() if any(torch.Size(s).numel() == leaf.numel() for s in e.input_shapes if s)]
    assert "MulBackward0" in big and not [name for name in big if name.startswith("aten::add")]


def test_changing_x_between_forward_and_backward_changes_nothing(kernels):
    """Only bits are kept, so x may be overwritten, as inplace=True does."""
    leaf, gate = torch.randn(3, 4, 50, requires_grad=True), smooth_gate(4)
    x, g = leaf * 1, torch.randn(3, 4, 50)
    expected = torch.autograd.grad(kernels.shrink(leaf, gate), leaf, g)[0]
    y = kernels.shrink(x, gate)
    with torch.no_grad():
        x.zero_()
    assert torch.equal(torch.autograd.grad(y, leaf, g)[0], expected)


def test_inplace_keeps_the_gradient_of_what_came_before(kernels):
    gate = smooth_gate(4).double()
    leaf = torch.randn(3, 4, 50, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(leaf)
    exact = torch.autograd.grad(shrink(leaf * 3, cast_gate(gate, torch.float64), "channel")[0], leaf, g)[0]
    y = kernels.shrink(leaf * 3, gate, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, g)[0], exact)
    needed = leaf.exp()  # exp keeps its output, which inplace overwrites: torch notices
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kernels.shrink(needed, gate, inplace=True), leaf, g)


@pytest.mark.parametrize("of", [dk.Shrinkage, dk.SqueezeExcite, dk.BatchNormReLU, lambda c: dk.SoftThreshold(0.3)])
def test_a_gradient_without_memory_is_a_gradient_of_zeros(of, kernels):
    if kernels.device == other_device.NAME:
        pytest.skip("its tensors have memory of the CPU, and torch has none without memory for it")
    module, x = of(6).to(kernels.device), torch.randn(4, 6, 9, device=kernels.device, requires_grad=True)
    module(x).backward(torch._efficientzerotensor(x.shape, device=kernels.device))
    assert not x.grad.any() and not any(p.grad.any() for p in module.parameters())
