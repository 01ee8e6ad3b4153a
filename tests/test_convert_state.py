"""What a forward reads: a converted module goes on as the original would."""

import copy
import dataclasses
import functools
import random
import sys
import types

import numpy
import pytest
import torch
from torch import nn
from watched_modules import Base, X, attribute, converted, made, runs_fused

import drsn_kernels as dk
from drsn_kernels.convert.plans import Converted

SCALE = 1.0
TABLE = {"scale": 1.0}
THIS = sys.modules[__name__]


class Settings:
    scale = 1.0


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    deep: dict = dataclasses.field(default_factory=lambda: {"scales": [1.0, 2.0]})


# ---- what it reads ---------------------------------------------------------------------------------------------------

READS = {
    "number": (attribute(1.0, lambda self: self.t), lambda m: setattr(m, "t", 0.25)),
    "flag": (attribute(False, lambda self: 0.25 if self.t else 1.0), lambda m: setattr(m, "t", True)),
    "text": (attribute("one", lambda self: 1.0 if self.t == "one" else 0.25), lambda m: setattr(m, "t", "other")),
    "None": (attribute(None, lambda self: 1.0 if self.t is None else self.t), lambda m: setattr(m, "t", 0.25)),
    "absent": ({"scale": lambda self: getattr(self, "t", 1.0)}, lambda m: setattr(m, "t", 0.25)),
    "__dict__": (attribute(1.0, lambda self: vars(self)["t"]), lambda m: setattr(m, "t", 0.25)),
    "property": (
        {"set_up": lambda self: setattr(self, "_t", 1.0), "t": property(lambda self: self._t),
         "scale": lambda self: self.t},
        lambda m: setattr(m, "_t", 0.25),
    ),
    "class": ({"t": 1.0, "scale": lambda self: self.t}, lambda m: setattr(m, "t", 0.25)),
    "dict": (attribute(lambda: {"t": 1.0}, lambda self: self.t["t"]), lambda m: m.t.update(t=0.25)),
    "nested": (attribute(lambda: {"t": [1.0, {"u": 1.0}]}, lambda self: self.t["t"][1]["u"]),
               lambda m: m.t["t"][1].update(u=0.25)),
    "tuple": (attribute((1.0, 2.0), lambda self: self.t[0]), lambda m: setattr(m, "t", (0.25, 2.0))),
    "namespace": (attribute(lambda: types.SimpleNamespace(t=1.0), lambda self: self.t.t),
                  lambda m: setattr(m.t, "t", 0.25)),
    "dataclass": (attribute(Options, lambda self: self.t.scale), lambda m: setattr(m.t, "scale", 0.25)),
    "deep in a dataclass": (attribute(Options, lambda self: self.t.deep["scales"][0]),
                            lambda m: m.t.deep["scales"].__setitem__(0, 0.25)),
    "array": (attribute(lambda: numpy.ones(2), lambda self: float(self.t[0])), lambda m: m.t.fill(0.25)),
    "function": (attribute(lambda: abs, lambda self: self.t(1.0)), lambda m: setattr(m, "t", lambda v: 0.25)),
    "partial": (attribute(lambda: functools.partial(max, 0.25), lambda self: self.t(1.0)),
                lambda m: setattr(m, "t", functools.partial(min, 0.25))),
    "method": ({}, lambda m: setattr(m, "scale", lambda: 0.25)),
    "tensor": (attribute(lambda: torch.tensor(1.0), lambda self: self.t), lambda m: m.t.fill_(0.25)),
    "tensor of integers": (attribute(lambda: torch.tensor(1), lambda self: self.t), lambda m: m.t.fill_(3)),
    "buffer": (
        {"set_up": lambda self: self.register_buffer("t", torch.tensor(1.0)), "scale": lambda self: self.t},
        lambda m: m.t.fill_(0.25),
    ),
    "parameter": (
        {"set_up": lambda self: setattr(self, "t", nn.Parameter(torch.ones(8))), "scale": lambda self: self.t},
        lambda m: m.t.data.fill_(0.25),
    ),
    "child that is replaced": ({}, lambda m: setattr(m, "pool", nn.AdaptiveMaxPool1d(1))),
    "number of a child": ({}, lambda m: setattr(m.pool, "output_size", 2)),
    "number of a child that is not called": (
        {"set_up": lambda self: setattr(self, "drop", nn.Dropout(1.0)), "scale": lambda self: self.drop.p},
        lambda m: setattr(m.drop, "p", 0.25),
    ),
}  # fmt: skip


class Config:
    t = 1.0

    @classmethod
    def get(cls):
        return cls.t


class Silent(Config):
    """Says itself what a pickle holds: nothing."""

    def __init__(self):
        self.u = 1.0

    def __getstate__(self):
        return {}

    def __deepcopy__(self, memo):
        new = Silent()
        new.u = self.u
        return new

    def read(self):
        return self.u


def _function():
    return _function.t


_function.t = 1.0


OF_CLASSES = {
    "object of a class": lambda self: self.cfg.t,
    "class as an attribute": lambda self: type(self.cfg).t,
    "class method": lambda self: Config.get(),
    "class by getattr": lambda self: getattr(Config, "t"),  # noqa: B009
    "class by another name": lambda self: [c.t for c in (Config,)][0],
}


@pytest.mark.parametrize("case", OF_CLASSES)
def test_a_change_of_a_class_counts(case, monkeypatch):
    members = {"set_up": lambda self: setattr(self, "cfg", Config()), "scale": OF_CLASSES[case]}
    own, ours = converted(made("Reads", **members))
    monkeypatch.setattr(Config, "t", 0.25)
    torch.testing.assert_close(ours(X), own(X))


def test_a_change_of_the_modules_own_class_counts():
    for read in (lambda self: type(self).t, lambda self: self.__class__.t):
        cls = made("Reads", t=1.0, scale=read)
        own, ours = converted(cls)
        cls.t = 0.25
        torch.testing.assert_close(ours(X), own(X))


READS |= {
    "object that hides its state": (attribute(Silent, lambda self: self.t.u), lambda m: setattr(m.t, "u", 0.25)),
    "method of an object": (
        {"set_up": lambda self: (setattr(self, "o", Silent()), setattr(self, "t", self.o.read)) and None,
         "scale": lambda self: self.t()},
        lambda m: setattr(m.t.__self__, "u", 0.25),
    ),
    "layer that is added": (
        {"set_up": lambda self: setattr(self, "more", nn.Sequential()),
         "scale": lambda self: 0.25 if len(self.more) else 1.0},
        lambda m: m.more.append(nn.Identity()),
    ),
    "kind of a child that is called": (
        {"scale": lambda self: 1.0 if isinstance(self.fc, nn.Sequential) else 0.25},
        lambda m: torch.manual_seed(5) and setattr(m, "fc", nn.Linear(8, 8)),
    ),
    "buffer that is removed": (
        {"set_up": lambda self: self.register_buffer("t", torch.tensor(2.0)),
         "scale": lambda self: 1.0 if self.t is None else self.t},
        lambda m: setattr(m, "t", None),
    ),
}  # fmt: skip


def test_a_change_of_a_functions_attribute_counts(monkeypatch):
    own, ours = converted(made("Reads", scale=lambda self: _function()))
    monkeypatch.setattr(_function, "t", 0.25)
    torch.testing.assert_close(ours(X), own(X))


def test_two_names_of_one_gate():
    class Two(Base):
        def set_up(self):
            self.gate = self.fc

        def forward(self, x):
            a = x.abs().mean(2)
            return torch.sign(x) * torch.relu(x.abs() - (a * self.gate(a)).unsqueeze(2))

    own, ours = converted(Two)
    torch.manual_seed(3)
    own.gate = ours.gate = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    torch.testing.assert_close(ours(X), own(X))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", READS)
def test_a_change_of_what_the_forward_reads_counts(case):
    members, change = READS[case]
    own, ours = converted(made("Reads", **members))
    assert runs_fused(ours, X)
    torch.testing.assert_close(ours(X), own(X))
    change(own), change(ours)

    def outcome(module):
        try:
            return module(X)
        except RuntimeError as error:
            return str(error)

    expected, got = outcome(own), outcome(ours)
    if isinstance(expected, str):  # a pool of two no longer fits: the same error
        assert got == expected
    else:
        torch.testing.assert_close(got, expected)
    dk.revert(ours)
    assert not isinstance(ours, Converted)


GLOBALS = {
    "number": (lambda self: SCALE, "SCALE", 0.25),
    "dict": (lambda self: TABLE["scale"], "TABLE", {"scale": 0.25}),
    "class attribute": (lambda self: Settings.scale, "Settings", type("Other", (), {"scale": 0.25})),
    "in a module": (lambda self: THIS.SCALE, "SCALE", 0.25),
}


@pytest.mark.parametrize("case", GLOBALS)
def test_a_change_of_a_global_counts(case, monkeypatch):
    scale, name, value = GLOBALS[case]
    own, ours = converted(made("Reads", scale=scale))
    assert runs_fused(ours, X)
    before = ours(X)
    monkeypatch.setitem(globals(), name, value)
    torch.testing.assert_close(ours(X), own(X))
    assert not ours(X).allclose(before)


def test_a_method_or_forward_of_the_class_that_is_replaced_counts():
    cls = made("Patched")
    own, ours = converted(cls)
    cls.scale = lambda self: 0.25
    torch.testing.assert_close(ours(X), own(X))
    del cls.scale
    assert runs_fused(ours, X)
    cls.forward = lambda self, x: x
    assert ours(X).equal(X)


class Temperature(nn.Module):
    t = 1.0

    def forward(self, tau):
        return tau * self.t


def test_a_child_that_was_the_identity_counts():
    class Child(Base):
        def set_up(self):
            self.temper, self.after = Temperature(), nn.Identity()

        def forward(self, x):
            return self.after(super().forward(x) if self.temper is None else self.step(x))

        def step(self, x):
            a = self.pool(x.abs()).flatten(1)
            tau = self.temper(a * self.fc(a)).unsqueeze(2)
            return torch.sign(x) * torch.relu(x.abs() - tau)

    for change in (
        lambda m: setattr(m.temper, "t", 0.25),
        lambda m: setattr(m, "after", nn.Hardtanh(-0.1, 0.1)),
        lambda m: setattr(m, "temper", None),
    ):
        own, ours = converted(Child)
        change(own), change(ours)
        torch.testing.assert_close(ours(X), own(X))


class Clamped(nn.Module):
    """x minus what it is clamped to: soft thresholding where no threshold is negative."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid())

    def forward(self, x):
        a = x.abs().mean(2)
        return self.shrunk(x, (self.fc(a) * a).unsqueeze(2))

    def shrunk(self, x, tau):
        return x - x.clamp(-tau, tau)


class MinMax(Clamped):
    def shrunk(self, x, tau):
        return x - torch.minimum(torch.maximum(x, -tau), tau)


class Below(Clamped):
    def shrunk(self, x, tau):
        return torch.where(x.abs() < tau, 0.0, x - x.sign() * tau)


def inside_a_block(form: type[Clamped]) -> nn.Module:
    class Block(form):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            return Clamped.forward(self, self.conv(x)) + x

    return Block()


@pytest.mark.parametrize("form", [MinMax, Below])
def test_a_form_that_learns_behind_a_zero_initialised_residual_is_left_alone(form):
    report = dk.convert(form())
    assert not report.converted and "where x and its threshold are 0 it lets a gradient pass" in str(report)
    # nor is it advised to write shrink in its place
    assert dk.convert(inside_a_block(Clamped)).inline and not dk.convert(inside_a_block(form)).inline
    block = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), Clamped())
    nn.init.zeros_(block[1].weight)
    own = copy.deepcopy(block)
    assert dk.convert(block).converted
    for model in (own, block):
        (model(X) - 1).square().sum().backward()
    assert not own[1].weight.grad.any() and not block[1].weight.grad.any()


@pytest.mark.parametrize("form", [MinMax, Below])
def test_where_a_threshold_is_never_0_it_does_not_matter(form):
    class Unscaled(form):
        def forward(self, x):
            return self.shrunk(x, self.fc(x.abs().mean(2)).unsqueeze(2))

    own, ours = converted(Unscaled)
    assert runs_fused(ours, X)
    own.fc[3], ours.fc[3] = nn.ReLU(), nn.ReLU()
    torch.testing.assert_close(ours(X), own(X))
    assert not runs_fused(ours, X)


ANOTHER = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
NEGATIVE = {
    "last layer": lambda m: m.fc.__setitem__(3, nn.Tanh()),
    "one layer more": lambda m: m.fc.append(nn.Tanh()),
    "gate": lambda m: setattr(m, "fc", ANOTHER),
    "hook on the gate": lambda m: m.fc.register_forward_hook(lambda module, args, out: out - 0.9),
    "hook on its last layer": lambda m: m.fc[3].register_forward_hook(lambda module, args, out: out - 0.9),
}


@pytest.mark.parametrize("change", NEGATIVE)
def test_what_makes_a_threshold_negative_counts_where_the_form_must_not_meet_one(change):
    own, ours = converted(Clamped)
    assert runs_fused(ours, X)
    NEGATIVE[change](own), NEGATIVE[change](ours)
    torch.testing.assert_close(ours(X), own(X))
    assert not runs_fused(ours, X)


def test_a_tensor_that_is_the_identity_beside_the_threshold_leaves_the_module_alone():
    class After(Base):
        def set_up(self):
            self.register_buffer("by", torch.tensor(1.0))
            self.mask = torch.ones(20, dtype=torch.bool)

        def forward(self, x):
            return super().forward(x) * self.by

    class Masked(After):
        def forward(self, x):
            return Base.forward(self, x) * self.mask

    for cls in (After, Masked):
        assert not dk.convert(cls()).converted


def test_what_cannot_be_watched_leaves_the_module_alone_with_its_name():
    hidden = 1.0

    class Closed(Base):
        def scale(self):
            return hidden

    cases = {
        "hidden, a variable of the function around it": Closed,
        "a tensor that its forward makes anew": made(
            "Holds", **attribute(lambda: {"t": torch.ones(1)}, lambda self: self.t["t"] * 1)
        ),
        "self.t, which is large": made("Large", **attribute(lambda: list(range(10000)), lambda self: float(self.t[1]))),
        "asks random": made("Random", scale=lambda self: random.random()),
        "asks numpy.random": made("NumpyRandom", scale=lambda self: float(numpy.random.rand())),
    }
    for why, cls in cases.items():
        (row,) = dk.convert(cls()).left_alone
        assert why in row.detail, row.detail
