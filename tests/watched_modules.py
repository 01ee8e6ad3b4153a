"""Modules whose forwards read and do more than the step, for the tests of convert."""

import copy

import torch
from torch import nn

import drsn_kernels as dk
from drsn_kernels import recording


class Base(nn.Module):
    """The step, with a factor on the threshold and something done to it."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid())
        self.set_up()

    def set_up(self):
        pass

    def scale(self):
        return 1.0

    def keep(self, tau):
        pass

    def forward(self, x):
        a = self.pool(x.abs()).flatten(1)
        tau = a * self.fc(a) * self.scale()
        self.keep(tau.detach())
        return torch.sign(x) * torch.relu(x.abs() - tau.unsqueeze(2))


class Hooked(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.fc = nn.Sequential(nn.Linear(c, c), nn.BatchNorm1d(c), nn.ReLU(), nn.Linear(c, c), nn.Sigmoid())
        self.act = nn.ReLU()

    def forward(self, x):
        a = self.gap(x.abs())
        return torch.sign(x) * self.act(x.abs() - (a * self.fc(a)).unsqueeze(2))


def made(name: str, **members) -> type[Base]:
    return type(name, (Base,), {"__module__": __name__, **members})


def attribute(value, read):
    def set_up(self):
        self.t = value() if callable(value) else value

    return {"set_up": set_up, "scale": read}


def converted(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The original and its converted copy, in eval."""
    torch.manual_seed(0)
    own = cls().eval()
    ours = copy.deepcopy(own)
    assert dk.convert(ours).converted, dk.convert(copy.deepcopy(own))
    return own, ours


def runs_fused(module: nn.Module, x: torch.Tensor) -> bool:
    called = []
    before, recording.active = recording.active, lambda *args, **kwargs: called.append(args)
    try:
        module(x)
    finally:
        recording.active = before
    return bool(called)


X = torch.randn(3, 8, 20)
