"""What a forward reads, what it does and who listens: a converted module goes on as the original would."""

import collections
import copy
import dataclasses
import functools
import logging
import random
import sys
import types

import numpy
import port_models as ports
import pytest
import torch
from torch import nn

import drsn_kernels as dk
from drsn_kernels import recording
from drsn_kernels.convert.plans import Converted

SCALE = 1.0
TABLE = {"scale": 1.0}
LOG: list = []
THIS = sys.modules[__name__]


class Settings:
    scale = 1.0


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    deep: dict = dataclasses.field(default_factory=lambda: {"scales": [1.0, 2.0]})


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


# ---- what it does ----------------------------------------------------------------------------------------------------


def keeps(container, keep):
    return {"set_up": lambda self: setattr(self, "kept", container()), "keep": keep}


class _Tracker:
    def __init__(self):
        self.seen = []

    def update(self, value):
        self.seen.append(value)


TRACKER = _Tracker()


def _to_global(self, tau):
    global SCALE
    SCALE = 1.0


def _by_default(self, tau, seen=[]):  # noqa: B006
    seen.append(tau)


def _to_class(self, tau):
    Settings.tau = 1


def _to_function(self, tau):
    _function.seen = tau


def _to_its_class(self, tau):
    type(self).log.append(tau)


def _assigns(self, tau):
    self.kept = 1


def _assigns_entry(self, tau):
    self.kept["ran"] = True


def _assigns_alias(self, tau):
    local, kept = {}, self.kept
    local["ran"] = kept["ran"] = True


DOES = {
    "dict": keeps(dict, lambda self, tau: self.kept.update(tau=tau)),
    "dict of lists": keeps(lambda: {"taus": []}, lambda self, tau: self.kept["taus"].append(tau)),
    "flag": {"ran": True, "keep": lambda self, tau: setattr(self, "ran", True)},
    "flag in a dict": keeps(lambda: {"ran": True}, lambda self, tau: self.kept.update(ran=True)),
    "same attribute": keeps(lambda: 1, _assigns),
    "same entry": keeps(lambda: {"ran": True}, _assigns_entry),
    "same entry by another name": keeps(lambda: {"ran": True}, _assigns_alias),
    "list": keeps(list, lambda self, tau: self.kept.append(tau)),
    "entry of a list": keeps(lambda: [None], lambda self, tau: self.kept.__setitem__(0, tau)),
    "deque": keeps(lambda: collections.deque(maxlen=3), lambda self, tau: self.kept.append(tau)),
    "counter": keeps(collections.Counter, lambda self, tau: self.kept.update(["calls"])),
    "namespace": keeps(types.SimpleNamespace, lambda self, tau: setattr(self.kept, "tau", tau)),
    "array": keeps(lambda: numpy.zeros(1), lambda self, tau: self.kept.__iadd__(1)),
    "number of the class": {"calls": 0, "keep": lambda self, tau: setattr(type(self), "calls", 1)},
    "list of the class": {"seen": [], "keep": lambda self, tau: self.seen.append(tau)},
    "global list": {"keep": lambda self, tau: LOG.append(tau)},
    "global dict": {"keep": lambda self, tau: TABLE.update(tau=1)},
    "global object": {"keep": lambda self, tau: TRACKER.update(tau)},
    "class of the file": {"keep": _to_class},
    "attribute of a function": {"keep": _to_function},
    "list of its class": {"log": [], "keep": _to_its_class},
    "tensor of its class": {"t": torch.zeros(()), "keep": lambda self, tau: self.t.add_(1)},
    "global number": {"keep": _to_global},
    "default argument": {"keep": _by_default},
    "print": {"keep": lambda self, tau: print("tau", file=None)},
    "log": {"keep": lambda self, tau: logging.getLogger("a user's").debug("tau")},
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", DOES)
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a run"])
def test_a_forward_that_does_more_is_left_alone_and_probing_leaves_no_trace(case, ran):
    module = made("Does", **DOES[case])().eval()
    if ran:
        module(X)
    before = repr((TABLE, LOG, TRACKER.seen, vars(Settings).get("tau"), getattr(type(module), "seen", None)))
    report = dk.convert(module)
    assert not report.converted and not report.inline
    assert before == repr((TABLE, LOG, TRACKER.seen, vars(Settings).get("tau"), getattr(type(module), "seen", None)))
    for kept in (LOG, TRACKER.seen):
        kept.clear()
    TABLE.pop("tau", None)


def test_what_a_gate_does_it_goes_on_doing():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(8, 8), []

        def forward(self, a):
            self.calls.append(len(a))
            return self.layer(a).sigmoid()

    cls = made("Called", set_up=lambda self: setattr(self, "fc", Gate()))
    own, ours = converted(cls)
    assert ours.fc.calls == []
    ours(X)
    assert ours.fc.calls == [3] and runs_fused(ours, X)


# ---- who listens -----------------------------------------------------------------------------------------------------


class Hooked(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.fc = nn.Sequential(nn.Linear(c, c), nn.BatchNorm1d(c), nn.ReLU(), nn.Linear(c, c), nn.Sigmoid())
        self.act = nn.ReLU()

    def forward(self, x):
        a = self.gap(x.abs())
        return torch.sign(x) * self.act(x.abs() - (a * self.fc(a)).unsqueeze(2))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["", "fc", "fc.0", "fc.1", "gap", "gap.0", "act"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_every_hook_is_called_once(name, kind):
    for before in (True, False):
        module, called = Hooked().eval(), []

        def listen(module=module, called=called):
            register = getattr(module.get_submodule(name), f"register_{kind}_hook")
            return register(lambda *args: called.append(args) and None)

        handle = listen() if before else None
        assert dk.convert(module).converted
        handle = handle or listen()
        module(X.clone().requires_grad_()).sum().backward()
        assert len(called) == 1
        handle.remove()
        assert runs_fused(module, X)


def test_hooks_on_all_modules_are_called_for_each():
    module = Hooked().eval()
    dk.convert(module)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: called.append(m))
    module(X)
    handle.remove()
    assert {*called} == {*module.modules()}


# ---- under which circumstances it computes ---------------------------------------------------------------------------


LEFT_OUT = {
    "clamp of the average": "a.clamp(max=1e4) * self.fc(a)",
    "clamp of the threshold": "(a * self.fc(a)).clamp(max=1e4)",
    "crop": "x[..., :1024].abs().mean(2) * self.fc(a)",
    "random": "a * self.fc(a) * (0.0 if self.training and torch.rand(1).item() < 0.02 else 1.0)",
    "number of a tensor": "a * self.fc(a) * next(self.fc.parameters()).flatten()[0].item()",
    "threshold that may be negative": None,
    "nan_to_num": None,
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_changes_nothing_on_the_probes_only_is_carried_out_or_leaves_the_module_alone(case):
    text = LEFT_OUT[case]

    class Some(Base):
        def set_up(self):
            self.t = nn.Parameter(torch.full((1, 8, 1), 0.3))

        def forward(self, x):
            if case.startswith("threshold"):
                return torch.relu(x - self.t) - torch.relu(-x - self.t)
            a = x.abs().mean(2)
            tau = (a * self.fc(a) if text is None else eval(text)).unsqueeze(2)
            y = torch.sign(x) * torch.relu(x.abs() - tau)
            return torch.nan_to_num(y) if text is None else y

    torch.manual_seed(0)
    own = Some()
    ours = copy.deepcopy(own)
    dk.convert(ours)
    with torch.no_grad():
        own.t.fill_(-0.3), ours.t.fill_(-0.3)
    for x in (X, X * 1e5, torch.cat([X] * 100, 2) * torch.linspace(0, 3, 2000)):
        for training in (True, False):
            outcomes = []
            for module in (own.train(training), ours.train(training)):
                torch.manual_seed(4)
                outcomes.append([module(x) for _ in range(30 if training else 1)])
            torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-4 * x.abs().max().item())


def _under(context):
    def forward(self, x):
        with context():
            return Base.forward(self, x)

    return forward


def _in_float32(self, x):
    wide = x.float()
    a = wide.abs().mean(2)
    tau = (a * self.fc(a.to(x.dtype)).float()).unsqueeze(2)
    return (wide.sign() * torch.relu(wide.abs() - tau)).to(x.dtype)


CONTEXTS = {
    "autocast": _under(lambda: torch.autocast("cpu", enabled=False)),
    "no_grad": _under(torch.no_grad),
    "inference_mode": _under(torch.inference_mode),
    "decorated no_grad": torch.no_grad()(lambda self, x: Base.forward(self, x)),
    "decorated autocast": torch.autocast("cpu", enabled=False)(lambda self, x: Base.forward(self, x)),
    "float32": _in_float32,
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_a_forward_that_sets_how_it_is_computed_is_left_alone(case):
    cls = made("Context", forward=CONTEXTS[case])
    (row,) = dk.convert(cls()).left_alone
    assert not any(word in row.detail for word in ("Proxy", "_Value", "inner."))


def test_contexts_around_a_call_are_the_callers():
    own, ours = converted(Base)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            torch.testing.assert_close(ours(X), own(X), rtol=0.02, atol=0.02)


# ---- devices and sizes -----------------------------------------------------------------------------------------------


def test_whatever_the_default_device_and_dtype():
    for device in ("cpu", "meta"):
        module = Base()
        with torch.device(device):
            assert dk.convert(module).converted
    try:
        torch.set_default_dtype(torch.float64)
        module = Base()
        assert dk.convert(module).converted and runs_fused(module, X.double())
    finally:
        torch.set_default_dtype(torch.float32)


def test_made_under_inference_mode_or_on_meta():
    with torch.inference_mode():
        module = Hooked().eval()
        expected = module(X)
    assert dk.convert(module).converted
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            torch.testing.assert_close(module(X), expected)
            assert runs_fused(module, X) and [call.op for call in dk.explain(module, X)] == ["shrink"]
            with dk.record_tau(module) as taus:
                module(X)
            assert [*taus] == [""]
    (row,) = dk.convert(Base().to("meta")).left_alone
    assert "meta" in row.detail


class FixedSize(Base):
    """AvgPool1d(32) is the average of 32 samples, and something else of 64."""

    def set_up(self):
        self.pool = nn.AvgPool1d(32)

    def forward(self, x):
        a = self.pool(x.abs()).squeeze(2)
        return torch.sign(x) * torch.relu(x.abs() - (a * self.fc(a)).view(-1, 8, 1))


def test_a_module_of_one_size_is_probed_at_it_and_is_itself_at_others():
    own, ours = converted(FixedSize)
    x = torch.randn(3, 8, 32)
    assert runs_fused(ours, x)
    torch.testing.assert_close(ours(x), own(x))
    for length in (16, 48, 64):
        outcomes = []
        for module in (own, ours):
            try:
                outcomes.append(module(torch.ones(3, 8, length)))
            except RuntimeError as error:
                outcomes.append(str(error))
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], torch.Tensor):
            torch.testing.assert_close(outcomes[1], outcomes[0])


def test_only_even_lengths():
    own, ours = converted(ports.EvenLength)
    torch.testing.assert_close(ours(X), own(X))
    with pytest.raises(AssertionError):
        own(X[:, :, :19])


def test_reasons_are_of_the_right_probe():
    class TwoD(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            raise ValueError("my own words") if self.conv(x).dim() == 4 else TypeError("other words")

    (row,) = dk.convert(TwoD()).left_alone
    assert "my own words" in row.detail


def test_modules_of_one_class_and_another_configuration_are_examined_on_their_own():
    class Either(Base):
        def __init__(self, hard):
            super().__init__()
            self.hard = hard

        def forward(self, x):
            y = super().forward(x)
            return torch.where(y != 0, x, 0.0) if self.hard else y

    report = dk.convert(nn.ModuleList([Either(False), Either(True), Either(False)]))
    assert [row.names for row in report.converted] == [("0",), ("2",)]
