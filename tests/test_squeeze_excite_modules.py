"""SqueezeExcite, and the modules of existing models that convert() finds to compute the same."""

import copy
import itertools

import pytest
import torch
from oracle import close, squeeze_excite
from torch import nn

import drsn_kernels as dk

# ---- the module ------------------------------------------------------------------------------------------------------


class SELayer(nn.Module):
    """As in the ports."""

    def __init__(self, channel, reduction=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


def test_the_module_takes_the_ports_checkpoints_and_computes_the_same(kernels):
    port, ours = SELayer(32), dk.SqueezeExcite(32, bias=False)
    ours.load_state_dict(port.state_dict())
    x, g = torch.randn(3, 32, 5, 6, requires_grad=True), torch.randn(3, 32, 5, 6)
    for a, b in zip(*((m(x), *torch.autograd.grad(m(x), [x, *m.parameters()], g)) for m in (port, ours)), strict=True):
        torch.testing.assert_close(b, a)
    torch.testing.assert_close(ours(x, g), port(x) + g)


def test_the_modules_arguments():
    assert [type(m) for m in dk.SqueezeExcite(32).fc] == [nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]
    normed = dk.SqueezeExcite(32, (1, 1), reduction=4, norm=True, activation=nn.GELU, dtype=torch.float64)
    assert [type(m) for m in normed.fc] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear, nn.Sigmoid]
    assert normed.fc[0].weight.shape == (8, 32) and normed.fc[3].weight.dtype is torch.float64
    assert dk.SqueezeExcite(8).fc[0].out_features == 1  # at least one
    assert dk.SqueezeExcite(64, rd_ratio=1 / 4).fc[0].out_features == 16
    assert repr(normed).startswith("SqueezeExcite(\n  32\n")
    x, g = torch.randn(4, 32, 9, dtype=torch.float64, requires_grad=True), torch.randn(4, 32, 9, dtype=torch.float64)
    again = copy.deepcopy(normed)
    close(normed(x), squeeze_excite(x, again.fc), squeeze_excite(x, again.fc))
    (dx,) = torch.autograd.grad(normed(x), x, g)
    torch.testing.assert_close(dx, torch.autograd.grad(squeeze_excite(x, again.fc), x, g)[0])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"channels": 0}, ValueError, "channels must be a positive integer, got 0"),
        ({"channels": 8, "reduction": 2.0}, TypeError, "reduction must be a positive integer, got 2.0"),
        ({"channels": 8, "gap_size": 2}, ValueError, r"gap_size must be 1, \(1,\) or \(1, 1\).*got 2"),
        ({"channels": 8, "reduction": 2, "rd_ratio": 0.5}, ValueError, "said twice: reduction=2"),
    ],
)
def test_the_modules_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.SqueezeExcite(**arguments)


# ---- modules that exist ----------------------------------------------------------------------------------------------


class Keepdim(nn.Module):
    """timm's way: means that keep their dimensions, 1x1 convolutions, any activation."""

    def __init__(self, c):
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Conv2d(c, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, c, 1)

    def forward(self, x):
        squeezed = x.mean((2, 3), keepdim=True)
        return x * nn.functional.hardsigmoid(self.fc2(self.bn(self.fc1(squeezed)).relu()))


class Torchvision(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.avgpool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def _scale(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))

    def forward(self, x):
        return self._scale(x) * x


class Efficient(nn.Module):
    """ECA: a convolution along the channels."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        y = x.flatten(2).mean(-1)
        return x * self.conv(y.unsqueeze(1)).squeeze(1).sigmoid()[:, :, None, None]


class Separate(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.down, self.up = nn.Linear(c, 4), nn.Linear(4, c)

    def forward(self, x):
        s = torch.sigmoid(self.up(torch.relu(self.down(x.mean([2, 3])))))
        return x * s.view(s.size(0), s.size(1), 1, 1)


class LayerScale(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, c, 1, 1))

    def forward(self, x):
        return x * self.gamma


class MaxPooled(SELayer):
    def forward(self, x):
        return x * self.fc(x.amax((2, 3)))[:, :, None, None]


class Shared(SELayer):
    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).mean(0)[None, :, None, None]


class StraightThrough(SELayer):
    def forward(self, x):
        return x * self.fc(x.detach().mean((2, 3)))[:, :, None, None]


@pytest.mark.parametrize(
    "make, plan",
    [
        (lambda c: SELayer(c, 2), "squeeze_excite(x, self.fc)"),
        (Keepdim, "squeeze_excite(x, its own code)"),
        (Torchvision, "squeeze_excite(x, its own code)"),
        (Efficient, "squeeze_excite(x, its own code)"),
        (Separate, "squeeze_excite(x, the standard gate of its layers)"),
        (lambda c: StraightThrough(c, 2), "squeeze_excite(x, its own code)"),
    ],
)
def test_converted_by_what_it_computes(make, plan):
    module = make(8)
    original = copy.deepcopy(module)
    (row,) = dk.convert(module).converted
    assert row.detail == plan and row.difference < 1e-8 and row.own_difference < 1e-5
    assert list(module.state_dict()) == list(original.state_dict()) and isinstance(module, type(original))
    assert [call.op for call in dk.explain(module, torch.randn(4, 8, 6, 5))] == ["squeeze_excite"]
    for dtype, training in itertools.product((torch.float32, torch.float64), (True, False)):
        x = torch.randn(4, 8, 6, 5, dtype=dtype) + torch.randn(4, 8, 1, 1, dtype=dtype)  # averages of 0 suit no norm
        g, results = torch.randn_like(x.requires_grad_()), []
        for m in (module, original):
            m.to(dtype).train(training)
            y = m(x)
            results.append([y, *torch.autograd.grad(y, [x, *m.parameters()], g), *m.buffers()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="nothing converted"):  # it has no threshold
        dk.record_tau(module).__enter__()
    assert dk.revert(module) == [""] and type(module) is type(original)


@pytest.mark.parametrize(
    "make, why",
    [
        (LayerScale, "factors that do not follow from the mean of x"),
        (lambda c: MaxPooled(c, 2), "factors that do not follow from the mean of x"),
        (lambda c: Shared(c, 2), "its factor is shared by the samples of a batch"),
    ],
)
def test_scaling_by_anything_else_is_left_alone(make, why):
    module = make(8)
    report = dk.convert(module)
    assert not report.converted and not report.inline and why in report.left_alone[0].detail


def test_a_network_of_both_is_converted_and_ours_is_left_alone():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), SELayer(8, 2), dk.SqueezeExcite(8), dk.Shrinkage(8))
    report = dk.convert(net)
    assert [row.names for row in report.converted] == [("1",)] and not report.left_alone
    copied = copy.deepcopy(net)
    x = torch.randn(2, 1, 9, 9)
    torch.testing.assert_close(copied.eval()(x), net.eval()(x))
