"""Hooks on saved tensors: what they give back lies and is typed as they like, and kernels read by what was saved."""

import pytest
import torch
from oracle import gate_of, varied
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import drsn_kernels as dk
from drsn_kernels.backends import cpu
from drsn_kernels.ops import dispatch


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, which lie the other way round; of a vector, every other element of another."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else torch.stack([t, t], 1)[:, 0]


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def wider(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


HOOKS = {"contiguous": contiguous, "transposed": transposed, "wider": wider}


def shrinkage():
    gate = gate_of(6, "batch norm")
    return lambda kernels, x: kernels.shrink(x, gate, residual=x), list(gate.parameters())


def shrinkage_with_a_gate_called():
    alpha = nn.Parameter(torch.rand(5, 6))
    return lambda kernels, x: kernels.shrink(x, lambda pooled: alpha), [alpha]


def excitation():
    scale = nn.Parameter(torch.rand(5, 6))
    return lambda kernels, x: kernels.squeeze_excite(x, lambda pooled: scale), [scale]


def soft_threshold():
    tau = nn.Parameter(0.5 * torch.rand(5, 6))
    return lambda kernels, x: kernels.soft_threshold(x, tau), [tau]


def abs_mean():
    return lambda kernels, x: kernels.abs_mean(x), []


def normalisation():
    norm = nn.BatchNorm1d(6)
    buffers = norm.running_mean, norm.running_var
    return lambda kernels, x: kernels.batch_norm_relu(x, *buffers, *norm.parameters(), training=True), [
        *norm.parameters()
    ]


CALLS = (shrinkage, shrinkage_with_a_gate_called, excitation, soft_threshold, abs_mean, normalisation)
LAYOUTS = {
    "rows": lambda: varied((5, 6, 8, 9)),
    "channels_last": lambda: varied((5, 6, 8, 9)).contiguous(memory_format=torch.channels_last),
    "permuted": lambda: varied((8, 5, 6, 9)).permute(1, 2, 0, 3),
    "expanded": lambda: varied((5, 6, 1, 9)).expand(5, 6, 8, 9),
}


def gradients(kernels, call, parameters, x, hook=None) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    with saved_tensors_hooks(lambda t: t, hook or (lambda t: t)):
        y = call(kernels, x)
    return list(torch.autograd.grad(y, (x, *parameters), torch.linspace(-1, 1, y.numel()).to(y).view_as(y)))


def check(kernels, made, x, hook, exactness: float) -> None:
    call, parameters = made()
    wanted = gradients(kernels, call, parameters, x)
    for found, want in zip(gradients(kernels, call, parameters, x, hook), wanted, strict=True):
        assert found.dtype == want.dtype and found.shape == want.shape
        assert (found - want).norm() <= exactness * want.norm() + 1e-5


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("made", CALLS)
@pytest.mark.sampled(3)
def test_any_strides_and_dtype_may_come_back(kernels, made, layout, hook):
    by_torch = kernels.backend == "torch" and made in (shrinkage, normalisation)
    if kernels.compiled or (by_torch and hook == "wider"):
        pytest.skip("PyTorch's own operations are saved for, which take what they saved")
    check(kernels, made, LAYOUTS[layout](), HOOKS[hook], 1e-5)


def test_fewer_bits_may_come_back(kernels):
    """As from a compression that does not undo itself. Bit planes are integers, so they are as they were."""
    if kernels.compiled or kernels.backend == "torch":
        pytest.skip("PyTorch's own operations are saved for, which take what they saved")
    check(kernels, shrinkage, varied((5, 6, 40)), lambda t: t.bfloat16() if t.is_floating_point() else t, 0.05)


def test_another_shape_is_refused(kernels):
    if kernels.compiled:
        pytest.skip("PyTorch's own operations are saved for")
    call, parameters = soft_threshold()
    with pytest.raises(RuntimeError, match=r"a hook on saved tensors gave back \(\d+, .*\) on .* for \(\d+,.*\) on "):
        gradients(kernels, call, parameters, varied((5, 6, 40)), lambda t: t.unsqueeze(-1))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("made", [shrinkage, shrinkage_with_a_gate_called, soft_threshold])
def test_derivatives_that_ordinary_pytorch_makes(kernels, made, hook):
    """Of second order, and of a batch of gradients: from what the hooks gave back."""
    if kernels.compiled or kernels.backend == "torch":
        pytest.skip("PyTorch's own operations are saved for, which take what they saved")
    call, parameters = made()
    x = varied((5, 6, 40)).requires_grad_()

    def second(hook) -> list[torch.Tensor]:
        with saved_tensors_hooks(lambda t: t, hook):
            y = call(kernels, x)
        first = torch.autograd.grad(y, (x, *parameters), torch.ones_like(y).requires_grad_(), create_graph=True)
        return list(torch.autograd.grad(sum(d.square().sum() for d in first), (x, *parameters), allow_unused=True))

    def batch(hook) -> list[torch.Tensor]:
        with saved_tensors_hooks(lambda t: t, hook):
            y = call(kernels, x)
        torch.manual_seed(0)
        return list(torch.autograd.grad(y, (x, *parameters), torch.randn(2, *y.shape), is_grads_batched=True))

    for derivative in (second, batch):
        for found, want in zip(derivative(HOOKS[hook]), derivative(lambda t: t), strict=True):
            assert (found is None) == (want is None)
            assert want is None or (found - want).norm() <= 1e-3 * want.norm() + 1e-4


def test_a_loss_on_tau_alone(kernels):
    if kernels.compiled or kernels.backend == "torch":
        pytest.skip("PyTorch's own operations are saved for, which take what they saved")
    gate, x = gate_of(6, "batch norm"), varied((5, 6, 40)).requires_grad_()

    def gradient(hook) -> list[torch.Tensor]:
        with saved_tensors_hooks(lambda t: t, hook):
            _, tau = kernels.shrink(x, gate, return_tau=True)
        return list(torch.autograd.grad(tau, (x, *gate.parameters()), torch.linspace(0, 1, 30).view(5, 6)))

    for hook in HOOKS.values():
        for found, want in zip(gradient(hook), gradient(lambda t: t), strict=True):
            assert (found - want).norm() <= 1e-4 * want.norm() + 1e-5


def test_planes_of_the_registered_ops_may_be_copied():
    if cpu._cpu is None:
        pytest.skip("no compiled CPU kernels")
    x, tau = varied((5, 6, 40)).requires_grad_(), torch.rand(5, 6, requires_grad=True)

    def gradient(hook) -> tuple[torch.Tensor, ...]:
        torch.compiler.reset()
        with dk.use_backend("cpu"), saved_tensors_hooks(lambda t: t, hook):
            y = torch.compile(dk.soft_threshold, backend="eager")(x, tau)
        return torch.autograd.grad(y, (x, tau), torch.linspace(-1, 1, y.numel()).view_as(y))

    for found, want in zip(gradient(transposed), gradient(lambda t: t), strict=True):
        assert torch.equal(found, want)


def test_without_hooks_nothing_is_noted_and_what_is_as_it_was_stays():
    assert dispatch.as_saved(torch.ones(2)) is None
    x = torch.arange(6.0).view(2, 3)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        (how, expanded, none) = dispatch.as_saved(x, x[:, None].expand(2, 4, 3), None)
    assert none is None and dispatch._restored(x, how) is x
    assert dispatch._restored(x.t().contiguous().t(), how).stride() == (3, 1)
    kept = dispatch._restored(x[:, None].double().expand(2, 4, 3), expanded)
    assert kept.dtype == torch.float32 and kept.untyped_storage().nbytes() <= 4 * kept.numel()
