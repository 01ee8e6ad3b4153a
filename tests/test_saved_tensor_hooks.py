"""Hooks on saved tensors: what they give back lies and is typed as they like, and kernels read by what was saved."""

import pytest
import torch
from oracle import gate_of, varied
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

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


def test_without_hooks_nothing_is_noted_and_strides_of_0_are_made_again():
    assert dispatch.as_saved(torch.ones(2)) is None
    x = torch.arange(3.0).expand(4, 2, 3)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        (how, none) = dispatch.as_saved(x, None)
    made = dispatch._restored(x.contiguous(), how)
    assert none is None and made.stride() == x.stride() == (0, 0, 1) and torch.equal(made, x)
    assert dispatch._restored(x, how) is x
