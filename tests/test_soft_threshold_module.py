"""dk.SoftThreshold: a tau or one a channel, fixed or learnable."""

import copy

import pytest
import torch
from oracle import features, soft_threshold
from test_modules import through_pickle, through_torch_save
from torch import nn

import drsn_kernels as dk


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("tau", [0.25, 1, [0.1, 0.2, 0.3]], ids=str)
def test_soft_threshold_module(kernels, tau, as_tensor, learnable):
    tau = torch.tensor(tau, dtype=torch.float32) if as_tensor else tau
    module = dk.SoftThreshold(tau, learnable=learnable)
    assert list(module.state_dict()) == ["tau"] and len(list(module.parameters())) == learnable
    for shape in [(2, 3, 40), (2, 3, 5, 6), (4, 3)]:
        x = features(shape)
        value = torch.as_tensor(tau, dtype=torch.float32)
        value = value if value.dim() == 0 else value.view(1, -1, *[1] * (len(shape) - 2))
        y = module(x)
        torch.testing.assert_close(y, x.sign() * (x.abs() - value).relu())
        if learnable:
            (dtau,) = torch.autograd.grad(y, module.tau, torch.rand_like(y) * y.sign())
            assert dtau.shape == module.tau.shape and dtau.any()


def test_soft_threshold_module_does_not_share_the_tensor_it_was_given():
    tau = torch.tensor([0.1, 0.2])
    module = dk.SoftThreshold(tau, learnable=True)
    tau.zero_()
    assert module.tau.tolist() == pytest.approx([0.1, 0.2])
    with pytest.raises(ValueError, match=r"tau must be a number or have shape \(C,\), got shape \(1, 2\)"):
        dk.SoftThreshold(tau[None])


@pytest.mark.parametrize(
    "options", [{"threshold": "hard"}, {"slope": 0.25}, {"threshold": "hard", "slope": 0.1}], ids=str
)
def test_soft_threshold_module_with_another_threshold(kernels, options):
    module = dk.SoftThreshold([0.1, 0.2, 0.3], learnable=True, **options)
    x = features((2, 3, 40))
    assert torch.equal(module(x), dk.soft_threshold(x, module.tau.view(1, 3, 1), **options))
    assert not torch.equal(module(x), dk.soft_threshold(x, module.tau.view(1, 3, 1)))
    assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())
    with pytest.raises(ValueError, match="threshold must be 'soft' or 'hard', got 'firm'"):
        dk.SoftThreshold(threshold="firm")


def test_soft_threshold_module_loads_its_state():
    module = dk.SoftThreshold([0.1, 0.2])
    module.load_state_dict(dk.SoftThreshold([0.3, 0.4], learnable=True).state_dict())
    assert module.tau.tolist() == pytest.approx([0.3, 0.4])
    assert "tau" in repr(module) and "channel" in repr(dk.Shrinkage(4))


# ---- a learnable tau -------------------------------------------------------------------------------------------------


def descend(module: nn.Module, direction: float, lr: float = 0.3) -> None:
    """A step that raises tau (1) or lowers it (-1) by lr, whatever x is."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    x = torch.tensor([[[3.0], [3.0]]])
    optimizer.zero_grad()
    (direction * module(x)).sum().backward()  # dtau is -1 for each channel
    optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_learnable_tau_works_from_zero_on_and_can_rise_again(backend):
    module, x = dk.SoftThreshold([0.1, 0.5], learnable=True), torch.randn(4, 2, 30)
    with dk.use_backend(backend):
        descend(module, -1)
        expected = torch.tensor([0.0, 0.2])
        torch.testing.assert_close(module(x), soft_threshold(x, expected.expand(4, 2)))
        descend(module, -1)  # below 0 it has a gradient still
        assert (module.tau < 0).all() and torch.equal(module(x), x)
        descend(module, 1), descend(module, 1), descend(module, 1)
        torch.testing.assert_close(module(x), soft_threshold(x, torch.tensor([0.4, 0.8]).expand(4, 2)))


@pytest.mark.parametrize("tau", ["a", None, 1j, torch.tensor(1j), True, [[]], []], ids=repr)
def test_a_tau_of_another_sort(tau):
    with pytest.raises((TypeError, ValueError), match="^tau must be a number, or |^tau must be a number or have shape"):
        dk.SoftThreshold(tau)


def test_a_tau_a_channel_of_other_channels():
    with pytest.raises(ValueError, match=r"x must have 2 channels, as many as tau, got shape \(4, 8, 16\)"):
        dk.SoftThreshold([1.0, 2.0])(torch.randn(4, 8, 16))


def test_reading_and_printing_a_learnable_tau_changes_nothing():
    """In place of a penalty or a log: the backward pass finds what the forward pass had."""
    module, x = dk.SoftThreshold(0.1, learnable=True), torch.randn(4, 2, 30)
    descend(module, -1)
    before, version = module.tau.item(), module.tau._version
    loss = (module(x) * module.tau).sum() + module.tau.square()
    assert str(module) == "SoftThreshold(tau=0.0)"
    loss.backward()
    assert before < 0 and module.tau.item() == before and module.tau._version == version


def test_the_raw_tau_by_option():
    module, x = dk.SoftThreshold(0.1, learnable=True, nonnegative=False), torch.randn(4, 2, 30)
    descend(module, -1)
    assert module.tau.item() == pytest.approx(0.1 - 2 * 0.3)
    torch.testing.assert_close(module(x), x + 0.5 * x.sign())
    assert dk.SoftThreshold(-0.1, learnable=True, nonnegative=False).tau.item() == pytest.approx(-0.1)
    assert dk.SoftThreshold(-0.1).tau.item() == pytest.approx(-0.1)  # nothing learns
    with pytest.raises(ValueError, match="a learnable tau must be at least 0, or have nonnegative=False; got -0.1"):
        dk.SoftThreshold(-0.1, learnable=True)


@pytest.mark.parametrize("through", [through_pickle, through_torch_save, copy.deepcopy, copy.copy])
def test_checkpoints_and_copies_of_a_learnable_tau(through):
    module, x = dk.SoftThreshold([0.1, 0.2], learnable=True), torch.randn(4, 2, 30)
    assert list(module.state_dict()) == ["tau"]
    module.load_state_dict({"tau": torch.tensor([-0.1, 0.3])})  # of a run with the raw one
    torch.testing.assert_close(module(x), soft_threshold(x, torch.tensor([[0.0, 0.3]]).expand(4, 2)))
    again = through(module)
    assert torch.equal(again(x), module(x)) and again.nonnegative
    assert torch.equal(torch.compile(again, backend="eager", fullgraph=True)(x), module(x))
    del again.__dict__["nonnegative"]  # as in a pickle from before there was a choice
    torch.testing.assert_close(again(x)[:, 0], x[:, 0] + 0.1 * x[:, 0].sign())  # the raw one


def test_two_passes_before_a_backward_and_a_look_between_them(kernels):
    module, x = dk.SoftThreshold([0.1, 0.2], learnable=True), torch.randn(4, 2, 30)
    y = module(x)
    assert (module.tau > 0).all()
    (y + module(2 * x)).sum().backward()
    assert module.tau.grad.any()
