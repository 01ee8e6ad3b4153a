"""Where memory, nodes or settings are shared: in-place x used elsewhere, several backward passes, default device."""

import warnings

import pytest
import torch
from oracle import shrink, smooth_gate
from processes import in_threads
from torch import nn

import drsn_kernels as dk


def plain(x, gate, residual=None):
    return shrink(x, gate, "channel", residual)[0]


def leaf():
    return torch.randn(4, 8, 70, dtype=torch.float64, requires_grad=True)


def assert_same_gradient(ours, exact):
    x, g = leaf(), torch.randn(4, 8, 70, dtype=torch.float64)
    a, b = ours(x), exact(x)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a, x, g), torch.autograd.grad(b, x, g))


def test_inplace_with_itself_as_residual(kernels):
    gate = smooth_gate(8).double()

    def ours(x):
        z = x * 1.5
        return dk.shrink(z, gate, residual=z, inplace=True)

    assert_same_gradient(ours, lambda x: plain(x * 1.5, gate, x * 1.5))


def test_inplace_with_a_gate_that_looks_at_x(kernels):
    gate = smooth_gate(8).double()

    def ours(x):
        z = x * 1.5
        return dk.shrink(z, lambda pooled: gate(pooled) * z.mean(2).sigmoid(), inplace=True)

    assert_same_gradient(ours, lambda x: plain(x * 1.5, lambda p: gate(p) * (x * 1.5).mean(2).sigmoid()))


@pytest.mark.parametrize("return_tau", [False, True])
def test_inplace_on_a_view(kernels, return_tau):
    gate = smooth_gate(4).double()

    def ours(x):
        base = x * 1.5
        dk.shrink(base[:, :4], gate, inplace=True, return_tau=return_tau)
        return base

    assert_same_gradient(ours, lambda x: torch.cat([plain(x[:, :4] * 1.5, gate), x[:, 4:] * 1.5], 1))


def test_inplace_on_one_of_several_views_changes_nothing(kernels):
    x = leaf() * 1.5
    before, part = x.detach().clone(), x.chunk(2, 1)[0]
    with pytest.raises(RuntimeError):  # torch forbids it for every in-place operation
        dk.shrink(part, smooth_gate(4).double(), inplace=True)
    assert torch.equal(x, before)


def test_inplace_without_gradient_is_seen_by_who_saved_x(kernels):
    x = leaf()
    e = x.exp()  # keeps its result for backward
    with torch.no_grad():
        dk.shrink(e, torch.sigmoid, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        e.sum().backward()


def test_a_backward_pass_inside_another(kernels):
    """A hook on alpha runs the same graph again while the first pass is between Apply and Pool."""
    x, g, gate = leaf(), torch.randn(4, 8, 70, dtype=torch.float64), smooth_gate(8).double()
    inner, fired = [], []

    def hooked(pooled):
        alpha = gate(pooled)
        if alpha.requires_grad:
            alpha.register_hook(lambda _: again())
        return alpha

    def again():
        if not fired:
            fired.append(True)
            inner.append(torch.autograd.grad(y, x, g, retain_graph=True)[0])

    y = dk.shrink(x, hooked)
    (outer,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (exact,) = torch.autograd.grad(plain(x, gate), x, g)
    torch.testing.assert_close(outer, exact)
    torch.testing.assert_close(inner[0], exact)


def test_concurrent_backward_passes_over_one_graph(kernels):
    x, gate = leaf(), smooth_gate(8).double()
    y = dk.shrink(x, gate)
    gs = [torch.randn(4, 8, 70, dtype=torch.float64) for _ in range(4)]
    exact = [torch.autograd.grad(plain(x, gate), x, g)[0] for g in gs]

    def run(i):
        found = [torch.autograd.grad(y, x, gs[i], retain_graph=True)[0] for _ in range(25)]
        return all(torch.allclose(dx, exact[i]) for dx in found)

    assert all(in_threads(run))


def test_gradients_of_the_gate_alone_leave_nothing_behind(kernels):
    x, gate = leaf(), smooth_gate(8).double()
    y = dk.shrink(x, gate)
    torch.autograd.grad(y, list(gate.parameters()), torch.randn_like(y), retain_graph=True)
    node = y.grad_fn
    assert node.pool.handed == {}  # Pool did not run: g must not stay with it


@pytest.mark.parametrize("again", [False, True], ids=["detached", "a leaf of its own"])
def test_a_gate_may_detach_its_input_in_place(kernels, again):
    """Then nothing leads from y to the node that pools, and x has its gradient from the threshold alone."""
    x, g = leaf(), torch.randn(4, 8, 70, dtype=torch.float64)
    y = dk.shrink(x, lambda A: A.detach_().requires_grad_(again).sigmoid())
    A = x.detach().abs().mean(2)
    want = dk.soft_threshold(x, A.sigmoid() * A)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(want, x, g))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "strided"])
def test_the_default_device_does_not_matter(kernels, step):
    x, tau = torch.randn(4, 8, 700)[..., ::step], torch.rand(4, 8)
    want = dk.soft_threshold(x, tau), dk.shrink(x, torch.sigmoid)
    with torch.device("meta"):
        got = dk.soft_threshold(x, tau), dk.shrink(x, torch.sigmoid)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_jit_trace(kernels):
    module, x = dk.Shrinkage(8).eval(), torch.randn(4, 8, 70)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, x)
        other = torch.randn(4, 8, 70)
        torch.testing.assert_close(traced(other), module(other))


def test_tau_of_no_average_is_not_the_gates_own_tensor(kernels):
    own = torch.full((4, 8), 0.5)
    for requires_grad in (False, True):
        x = torch.randn(4, 8, 70, requires_grad=requires_grad)
        _, tau = dk.shrink(x, lambda pooled: own, average=None, return_tau=True)
        with torch.no_grad():
            tau.zero_()
        assert (own == 0.5).all()


DENSE_ONLY = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3)], layout=torch.jagged),
}


@pytest.mark.parametrize("layout", DENSE_ONLY)
def test_other_layouts_are_refused(kernels, layout):
    x = DENSE_ONLY[layout]()
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        dk.soft_threshold(x, 0.5)


def test_meta_module_in_low_precision():
    module = dk.Shrinkage(8).bfloat16().to("meta")
    assert module(torch.randn(4, 8, 70, dtype=torch.bfloat16, device="meta")).shape == (4, 8, 70)


def test_numpy_scalars():
    np = pytest.importorskip("numpy")
    x = torch.randn(2, 8, 5)
    assert torch.equal(dk.soft_threshold(x, np.float32(0.5)), dk.soft_threshold(x, 0.5))
    assert isinstance(dk.Shrinkage(np.int64(8)), nn.Module)
