"""What a forward does and who listens: a converted module goes on as the original would."""

import collections
import logging
import types

import numpy
import pytest
import torch
from torch import nn
from watched_modules import Hooked, X, converted, made, runs_fused

import drsn_kernels as dk

SCALE = 1.0
TABLE: dict = {}
LOG: list = []


class Settings:
    """What a forward may leave something in."""


def _function():
    return 1.0


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
