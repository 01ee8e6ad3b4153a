"""Batch normalisation that convert leaves alone, and the reason that it gives."""

import port_models as ports
import pytest
import torch
from test_convert_norms import ResNet, conv, conv_bn_relu
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import drsn_kernels as dk
from drsn_kernels.convert.plans import Converted


class Kept(nn.Module):
    """The norm's result is used besides."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        z = self.bn(x)
        return F.relu(z) + z


class AfterReLU(Kept):
    def forward(self, x):
        z = self.bn(x)
        y = z.view(-1)
        F.relu_(z)
        return z + y.view_as(z)


class Branches(Kept):
    def forward(self, x):
        return F.relu(self.bn(x)) if x.sum() > 0 else F.relu(self.bn(x * 2))


class Counts(Kept):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.bn(x))


class Remembers(Kept):
    def forward(self, x):
        self.z = self.bn(x)
        return F.relu(self.z)


class TwoInputs(Kept):
    def forward(self, x, y):
        return F.relu(self.bn(x)) + y


class NoGradient(Kept):
    def forward(self, x):
        with torch.no_grad():
            z = self.bn(x)
        return F.relu(z) * x


class Checkpointed(Kept):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 3)

    def forward(self, x):
        return checkpoint(self.conv, F.relu(self.bn(x)), use_reentrant=False)


class OfItsOwn(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Derived(Kept):
    def __init__(self):
        super().__init__()
        self.bn = OfItsOwn(3)
        self.other = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x)) + self.other(x)


LEFT = {
    Kept: "bn (its result goes to relu and +)",
    AfterReLU: "bn (its result goes to view and relu_",
    Branches: "branches on sizes or values",
    Counts: "changes the attribute calls",
    Remembers: "keeps the attribute z",
    TwoInputs: "cannot be called with one tensor",
    NoGradient: "runs lines under torch.no_grad",
    Checkpointed: "calls torch.utils.checkpoint",
    Derived: "other (its result goes to +)",
}


@pytest.mark.parametrize("cls", LEFT, ids=lambda c: c.__name__)
def test_what_is_left_alone_with_its_reason(cls):
    model = cls()
    report = dk.convert(model)
    (row,) = (row for row in report.rows if row.outcome == "norms left alone")
    assert LEFT[cls] in row.detail, row.detail
    assert type(model) is cls and not report.norms and "0 of" in report.notes[-1]


def test_a_model_that_torch_fx_has_written():
    traced = fx.symbolic_trace(ResNet())
    report = dk.convert(traced)
    assert not report.norms and any("written by torch.fx" in row.detail for row in report.rows)


def test_standard_gates_and_torchs_own_sequentials_keep_their_class():
    gate = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())
    fused = torch.ao.nn.intrinsic.BNReLU2d(nn.BatchNorm2d(3), nn.ReLU())
    model = nn.ModuleList([gate, fused, dk.Shrinkage(4), dk.models.paper_network("drsn-cw")])
    assert not dk.convert(model).norms and type(gate) is nn.Sequential and type(fused) is type(fused).mro()[0]
    assert not any(isinstance(m, Converted) for m in model.modules())


def test_norms_false_leaves_them_out():
    model = nn.Sequential(ports.Block(4, 4), conv_bn_relu())
    report = dk.convert(model, norms=False)
    assert report.converted and not report.norms and not any("batch norm" in note for note in report.notes)
    assert type(model[1]) is nn.Sequential and dk.revert(model) == ["0.shrinkage"]
