"""Shrinkage as users write it: one class for each way seen in public ports, and imitations that are something else.

Written from descriptions of the ports, in their style: names, labels and order of operations are theirs to choose.
"""

import torch
from torch import nn
from torch.nn import functional as F


def fc(channels: int, out: int | None = None, norm: bool = True) -> nn.Sequential:
    norms = [nn.BatchNorm1d(channels)] if norm else []
    last = nn.Linear(channels, out or channels)
    return nn.Sequential(nn.Linear(channels, channels), *norms, nn.ReLU(inplace=True), last, nn.Sigmoid())


class Popular1d(nn.Module):
    def __init__(self, channel, gap_size=1, norm=True):
        super().__init__()
        self.gap = nn.AdaptiveAvgPool1d(gap_size)
        self.fc = fc(channel, norm=norm)

    def forward(self, x):
        x_raw = x
        x = torch.abs(x)
        x_abs = x
        x = self.gap(x)
        x = torch.flatten(x, 1)
        average = x
        x = self.fc(x)
        x = torch.mul(average, x)
        x = x.unsqueeze(2)
        sub = x_abs - x
        zeros = sub - sub
        n_sub = torch.max(sub, zeros)
        return torch.mul(torch.sign(x_raw), n_sub)


class Popular2d(nn.Module):
    """The same in 2-D, by another name and with a gate without norm."""

    def __init__(self, c):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.net = fc(c, norm=False)

    def forward(self, x):
        magnitude = x.abs()
        n, c, _, _ = x.size()
        mean = self.pool(magnitude).view(n, c)
        tau = (mean * self.net(mean)).view(n, c, 1, 1)
        return x.sign() * F.relu(magnitude - tau)


class CalledSharedButPerChannel(nn.Module):
    """Labelled channel-shared; the average is shared, alpha is not."""

    def __init__(self, c):
        super().__init__()
        self.fc = fc(c)

    def forward(self, x):
        a = F.adaptive_avg_pool1d(x.abs(), 1).flatten(1)
        alpha = self.fc(a)
        tau = torch.mul(torch.mean(a, dim=1, keepdim=True), alpha).unsqueeze(2)
        return torch.sign(x) * torch.clamp(torch.abs(x) - tau, min=0)


class SharedOneNeuron(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = fc(c, 1)

    def forward(self, x):
        a = x.abs().mean(dim=(2, 3))
        tau = self.gate(a) * a.mean(1, keepdim=True)
        return torch.sign(x) * F.relu(x.abs() - tau[:, :, None, None])


class Reduced(nn.Module):
    def __init__(self, c, activation=nn.LeakyReLU, last=nn.Hardsigmoid):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Linear(c, c // 4), activation(), nn.Linear(c // 4, c), last())

    def forward(self, x):
        a = torch.mean(torch.abs(x), dim=2)
        t = (self.squeeze(a) * a)[..., None]
        return torch.where(x.abs() > t, x.sign() * (x.abs() - t), torch.zeros_like(x))


class Conv1dGate(nn.Module):
    """Pooling is part of the gate."""

    def __init__(self, c):
        super().__init__()
        self.gap = nn.AdaptiveAvgPool1d(1)
        self.att = nn.Sequential(
            nn.AdaptiveAvgPool1d(1), nn.Conv1d(c, c // 2, 1), nn.ReLU(), nn.Conv1d(c // 2, c, 1), nn.Sigmoid()
        )

    def forward(self, x):
        magnitude = torch.abs(x)
        tau = self.att(magnitude) * self.gap(magnitude)
        return torch.sign(x) * torch.relu(magnitude - tau)


class Conv2dGate(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a = nn.Conv2d(c, c, 1)
        self.n = nn.BatchNorm2d(c)
        self.b = nn.Conv2d(c, c, 1)

    def forward(self, x):
        gap = x.abs().mean((2, 3), keepdim=True)
        tau = gap * torch.sigmoid(self.b(F.gelu(self.n(self.a(gap)))))
        return x.sign() * (x.abs() - tau).clamp_min(0)


class SeparateLayers(nn.Module):
    """The standard gate, spread over attributes and functions."""

    def __init__(self, c):
        super().__init__()
        self.fc2 = nn.Linear(c, c)
        self.bn = nn.BatchNorm1d(c)
        self.fc1 = nn.Linear(c, c)

    def forward(self, x):
        b, c, *_ = x.shape
        a = x.abs().reshape(b, c, -1).mean(-1)
        z = torch.sigmoid(self.fc2(F.relu(self.bn(self.fc1(a)))))
        tau = (a * z).reshape(b, c, *[1] * (x.dim() - 2))
        return x.sign() * (x.abs() - tau).relu()


class Careful(SeparateLayers):
    """Checks what it is given, and goes by its rank."""

    def forward(self, x):
        assert x.size(1) == self.fc1.in_features, "channels"
        if x.dim() == 3:
            a = F.adaptive_avg_pool1d(x.abs(), 1).squeeze(-1)
        elif len(x.shape) == 4:
            a = F.adaptive_avg_pool2d(x.abs(), 1).flatten(1)
        else:
            raise ValueError("1-D or 2-D")
        tau = torch.sigmoid(self.fc2(self.fc1(a))) * a
        return x.sign() * torch.relu(x.abs() - tau.view(tau.shape + (1,) * (x.ndim - 2)))


class EvenLength(nn.Module):
    """Takes even lengths only, as behind a pooling by two."""

    def __init__(self, c=8):
        super().__init__()
        self.fc = fc(c, norm=False)

    def forward(self, x):
        assert x.shape[2] % 2 == 0, "an even length"
        a = F.avg_pool1d(x.abs(), 2).mean(2)
        return torch.sign(x) * torch.relu(x.abs() - (a * self.fc(a)).unsqueeze(2))


class Normed(nn.Module):
    def __init__(self, c, norm="layer"):
        super().__init__()
        self.l1 = nn.Linear(c, c)
        self.norm = nn.LayerNorm(c) if norm == "layer" else nn.InstanceNorm1d(1, affine=True)
        self.l2 = nn.Linear(c, c)

    def forward(self, x):
        a = x.abs().mean(2)
        h = self.l1(a)
        h = self.norm(h.unsqueeze(1)).squeeze(1)
        tau = (torch.sigmoid(self.l2(torch.tanh(h))) * a).unsqueeze(-1)
        return x.sign() * torch.relu(x.abs() - tau)


class LearnableScale(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("floor", torch.full((1, c), 1e-3))
        self.gate = nn.Sequential(nn.Linear(c, c), nn.Sigmoid())

    def forward(self, x):
        a = torch.abs(x).mean(2)
        tau = (self.scale * self.gate(a) * a + self.floor).unsqueeze(2)
        return torch.sign(x) * torch.maximum(x.abs() - tau, torch.zeros_like(x))


class NoAverage(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(c, c), nn.Softplus())

    def forward(self, x):
        tau = self.gate(x.abs().flatten(2).mean(2))
        tau = tau.view(*tau.shape, *(1 for _ in range(x.ndim - 2)))
        return F.relu(x - tau) - F.relu(-x - tau)  # one more way to write it


class SignedPooling(nn.Module):
    """The mean of x, not of |x|: the threshold may be negative, and then the step expands."""

    def __init__(self, c):
        super().__init__()
        self.fc = fc(c)

    def forward(self, x):
        a = x.mean(2)
        tau = (a * self.fc(a)).unsqueeze(2)
        return torch.sign(x) * torch.relu(torch.abs(x) - tau)


class CachesThreshold(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = fc(c)
        self.last_threshold = None

    def forward(self, x):
        a = x.abs().mean(2)
        tau = self.fc(a) * a
        self.last_threshold = tau.detach()
        return x.sign() * torch.relu(x.abs() - tau.unsqueeze(2))


class OwnState(Popular1d):
    """Says itself what a copy holds."""

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name in vars(nn.Module())}


class DropoutInGate(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(c, c), nn.Dropout(0.5), nn.Sigmoid())

    def forward(self, x, scale=1.0):
        a = x.abs().mean(2)
        return x.sign() * torch.relu(x.abs() - (scale * self.gate(a) * a)[:, :, None])


class DetachedAverage(nn.Module):
    """No gradient through the average: part of the module's own code, and kept."""

    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(c, c), nn.Sigmoid())

    def forward(self, x):
        a = x.abs().mean(2)
        return x.sign() * torch.relu(x.abs() - (self.gate(a) * a.detach()).unsqueeze(2))


class Steps(nn.Module):
    """Pooling and soft thresholding in modules of their own."""

    class Soft(nn.Module):
        def forward(self, x, t):
            return x.sign() * torch.relu(x.abs() - t)

    class Pool(nn.Module):
        def forward(self, x):
            return x.abs().mean(2)

    def __init__(self, c):
        super().__init__()
        self.pool, self.soft, self.gate = self.Pool(), self.Soft(), fc(c)

    def forward(self, x):
        a = self.pool(x)
        return self.soft(x, (a * self.gate(a)).unsqueeze(2))


class InPlace(nn.Module):
    """Operations that write over their inputs, and a number that the module holds."""

    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(c, c), nn.Sigmoid())
        self.temperature = 2.0

    def forward(self, x):
        y = x.abs()
        tau = self.gate(y.mean(2) / self.temperature) * y.mean(2)
        y -= tau.unsqueeze(2)
        return y.clamp_(min=0).mul_(x.sign())


class Fixed(nn.Module):
    def __init__(self, c, each=True):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros((1, c, 1) if each else 1))

    def forward(self, x):
        return x.sign() * torch.relu(x.abs() - F.softplus(self.raw))


# ---- imitations ------------------------------------------------------------------------------------------------------


class _Imitation(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(c, c), nn.Sigmoid())

    def tau(self, x):
        a = x.abs().mean(2)
        return (self.gate(a) * a).unsqueeze(2)


class Garrote(_Imitation):
    def forward(self, x):
        tau = self.tau(x)
        return torch.where(x.abs() > tau, x - tau**2 / x, torch.zeros_like(x))


class Hard(_Imitation):
    def forward(self, x):
        return x * (x.abs() > self.tau(x))


class HalfSoft(_Imitation):
    def forward(self, x):
        return torch.where(x.abs() > self.tau(x), x.sign() * (x.abs() - self.tau(x) / 2), torch.zeros_like(x))


class SignMissing(_Imitation):
    def forward(self, x):
        return torch.relu(x.abs() - self.tau(x))


class MaxPooled(_Imitation):
    def forward(self, x):
        a = x.abs().amax(2)
        return x.sign() * torch.relu(x.abs() - (self.gate(a) * a).unsqueeze(2) / 4)


class OnlyInTraining(_Imitation):
    """The operator in eval; noise on the threshold of each element in training."""

    def forward(self, x):
        tau = self.tau(x)
        if self.training:
            tau = tau * (1 + 0.01 * torch.rand_like(x))
        return x.sign() * torch.relu(x.abs() - tau)


class OnlyInEval(_Imitation):
    def forward(self, x):
        return x.sign() * torch.relu(x.abs() - self.tau(x)) if self.training else x


class StraightThrough(_Imitation):
    """The operator's values, the identity's gradient."""

    def forward(self, x):
        y = x.sign() * torch.relu(x.abs() - self.tau(x))
        return x + (y - x).detach()


class Shortcut(_Imitation):
    def forward(self, x):
        return x.sign() * torch.relu(x.abs() - self.tau(x)) + x


class Counts(_Imitation):
    """Right, but a call changes what the fused form does not know of."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x.sign() * torch.relu(x.abs() - self.tau(x))


class KeepsOutput(_Imitation):
    def forward(self, x):
        self.last = x.sign() * torch.relu(x.abs() - self.tau(x))
        return self.last


class Moving(_Imitation):
    """A running mean of the threshold, in training."""

    def __init__(self, c):
        super().__init__(c)
        self.register_buffer("ema", torch.zeros(c))

    def forward(self, x):
        tau = self.tau(x)
        if self.training:
            self.ema.lerp_(tau.detach().mean((0, 2)), 0.1)
        return x.sign() * torch.relu(x.abs() - tau)


class WritesOverInput(_Imitation):
    def forward(self, x):
        tau, sign = self.tau(x), x.sign()
        return F.relu_(x.abs_().sub_(tau)) * sign


class InFloat32(_Imitation):
    def forward(self, x):
        wide = x.float()
        tau = self.gate(x.abs().mean(2)) * wide.abs().mean(2)
        return (wide.sign() * torch.relu(wide.abs() - tau.unsqueeze(2))).to(x.dtype)


# ---- around them -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A building unit; the shrinkage is registered twice, and the second entry is the one that runs."""

    def __init__(self, c_in, c, stride=1, shrinkage=Popular1d):
        super().__init__()
        self.shrinkage = shrinkage(c)
        self.residual_function = nn.Sequential(
            nn.Conv1d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm1d(c), nn.ReLU(inplace=True),
            nn.Conv1d(c, c, 3, 1, 1, bias=False), nn.BatchNorm1d(c), self.shrinkage,
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c:
            self.shortcut = nn.Sequential(nn.Conv1d(c_in, c, 1, stride, bias=False), nn.BatchNorm1d(c))

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class Net(nn.Module):
    def __init__(self, shrinkage=Popular1d, c=8, classes=4):
        super().__init__()
        self.stem = nn.Conv1d(1, c, 7, 2, 3)
        self.layers = nn.Sequential(Block(c, c, 1, shrinkage), Block(c, 2 * c, 2, shrinkage))
        self.head = nn.Linear(2 * c, classes)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean(2))


class InlineBlock(nn.Module):
    """The operator between a block's other lines: nothing to swap."""

    def __init__(self, c):
        super().__init__()
        self.BRC = nn.Sequential(nn.BatchNorm1d(c), nn.ReLU(inplace=True), nn.Conv1d(c, c, 3, padding=1))
        self.global_average_pool = nn.AdaptiveAvgPool1d(1)
        self.FC = fc(c)

    def forward(self, x):
        identity = x
        x = self.BRC(x)
        x_abs = torch.abs(x)  # first
        gap = self.global_average_pool(x_abs).flatten(1)
        threshold = (gap * self.FC(gap)).unsqueeze(2)
        n_sub = torch.max(x_abs - threshold, torch.zeros_like(x))
        x = torch.sign(x) * n_sub  # last
        return x + identity
