"""Where and under which settings a forward runs: a converted module goes on as the original would."""

import copy

import port_models as ports
import pytest
import torch
from torch import nn
from watched_modules import Base, Hooked, X, converted, made, runs_fused

import drsn_kernels as dk

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
