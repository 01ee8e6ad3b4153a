"""Hard and leaky thresholds, and element-wise tau: the options of soft_threshold, shrink and Shrinkage."""

import oracle
import pytest
import torch
from oracle import (
    AVERAGES,
    LAYOUTS,
    abs_mean,
    check,
    check_shrink,
    features,
    smooth_gate,
    smooth_gate_for,
    wide,
    without_ties,
)
from test_transforms import aten_only
from torch import nn

import drsn_kernels as dk

RULES = [("hard", 0.0), ("soft", 0.3), ("hard", 0.1)]
each_rule = pytest.mark.parametrize("threshold, slope", [("hard", 0.0), ("soft", 0.3)], ids=["hard", "leaky"])


def check_soft_threshold(kernels, x, tau, threshold, slope, g=None):
    g = torch.randn(x.shape, device=x.device).to(x.dtype) if g is None else g
    check(
        lambda x, tau: kernels.soft_threshold(x, tau, threshold=threshold, slope=slope),
        lambda d, x, tau: oracle.soft_threshold(x, tau, threshold, slope),
        {"x": x, "tau": tau},
        [without_ties(g, x, tau)],
    )


# ---- values and gradients --------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("length", [1, 17, 65, 1027, 32771])
def test_lengths(kernels, length, channels_last, dtype, threshold, slope):
    x = features((3, 2, length), dtype, kernels.device)
    x = (x.transpose(1, 2) if channels_last else x).requires_grad_()
    tau = (torch.rand(x.shape[:2], dtype=wide(dtype), device=x.device) + 0.1).requires_grad_()
    check_soft_threshold(kernels, x, tau, threshold, slope)


@each_rule
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "image transposed", "expanded channels"])
def test_layouts(kernels, layout, threshold, slope):
    x, tau = LAYOUTS[layout](3, 5, 6, 7).requires_grad_(), torch.rand(3, 5).requires_grad_()
    check_soft_threshold(kernels, x, tau, threshold, slope, LAYOUTS["sliced channels_last"](3, 5, 6, 7))
    y = kernels.soft_threshold(x, tau, threshold=threshold, slope=slope)
    assert y.stride() == torch.empty_like(x.detach()).stride()


@each_rule
@pytest.mark.parametrize(
    "shape, tau_shape",
    [((4, 3, 50), ()), ((4, 3, 50), (4, 1)), ((4, 3, 50), (1, 3, 1)), ((4, 30), (4, 30)), ((40,), (1,)), ((), ())],
    ids=str,
)
def test_tau_of_every_shape(kernels, shape, tau_shape, threshold, slope):
    x = features(shape, device=kernels.device).requires_grad_()
    check_soft_threshold(kernels, x, (torch.rand(tau_shape) + 0.1).to(x.device).requires_grad_(), threshold, slope)


@pytest.mark.parametrize("threshold, slope", [("soft", 0.0), *RULES], ids=str)
@pytest.mark.parametrize(
    "shape, tau_shape",
    [((4, 3, 50), (4, 3, 50)), ((4, 3, 5, 7), (4, 1, 5, 1)), ((1, 2, 70, 3), (70, 1)), ((40,), (40,))],
)
def test_element_wise_tau(kernels, shape, tau_shape, threshold, slope):
    x = features(shape, device=kernels.device).requires_grad_()
    tau = (torch.rand(tau_shape) + 0.1).view((1,) * (x.dim() - len(tau_shape)) + tau_shape)
    check_soft_threshold(kernels, x, tau.to(x.device).requires_grad_(), threshold, slope)


@pytest.mark.parametrize("layout", ["channels_last", "image transposed", "sliced", "expanded width"])
def test_element_wise_tau_in_every_layout(kernels, layout):
    """From the kernels, in x's memory format, and two bits an element kept (the torch backend keeps x and tau)."""
    x = LAYOUTS[layout](3, 4, 5, 6).to(kernels.device).requires_grad_()
    tau, sizes = torch.rand(3, 1, 5, 6).to(x.device).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        y = kernels.soft_threshold(x, tau)
    assert y.stride() == torch.empty_like(x.detach()).stride()
    planes = 2 * x.shape[0] * 4 * -(-x[0].numel() // 32)
    assert sum(sizes) <= (2 * 4 * x.numel() if kernels.backend == "torch" else planes)
    expected = dk.reference.soft_threshold(x, tau)
    assert torch.equal(y, expected)
    with torch.no_grad():
        z = kernels.soft_threshold(x, tau)
    assert torch.equal(z, expected) and z.mul_(tau).requires_grad  # no view, so it may be changed in place
    g = torch.randn_like(y)
    for ours, right in zip(*(torch.autograd.grad(out, (x, tau), g) for out in (y, expected)), strict=True):
        torch.testing.assert_close(ours, right)


@each_rule
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("one", [False, True], ids=["per-channel", "per-sample"])
@pytest.mark.parametrize("way", ["new", "inplace", "y-tau", "residual", "residual inplace"])
def test_shrink(kernels, way, one, average, threshold, slope):
    x = features((3, 6, 70), device=kernels.device).requires_grad_()
    residual = torch.randn_like(x).detach().requires_grad_() if "residual" in way else None
    gate, options = smooth_gate_for(x, 1 if one else None), {"threshold": threshold, "slope": slope}
    check_shrink(kernels, x, gate, average, residual, "inplace" in way, way == "y-tau", **options)


@pytest.mark.parametrize("threshold, slope", RULES, ids=str)
def test_float64_constants(kernels, threshold, slope):
    """The slope is not rounded to float32 on the way."""
    x, tau = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True), torch.rand(2, 3, dtype=torch.float64)
    y = kernels.soft_threshold(x, tau.requires_grad_(), threshold=threshold, slope=slope)
    g = torch.randn_like(y)
    exact = oracle.soft_threshold(x, tau, threshold, slope)
    torch.testing.assert_close(y, exact, rtol=1e-14, atol=1e-15)
    pairs = (torch.autograd.grad(t, [x, tau], g) for t in (y, exact))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


# ---- derivatives, numerically ----------------------------------------------------------------------------------------


# ---- where the pieces meet, and special values -----------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("way", ["kernels", "reference"])
def test_at_the_threshold_and_at_zero(kernels, way, threshold, slope):
    """Both derivatives are those of inside; a soft threshold is continuous."""
    x = torch.tensor([[[0.5, -0.5, 0.0, -0.0, 0.75, -0.25]]], device=kernels.device, requires_grad=True)
    tau = torch.full((1, 1), 0.5, device=kernels.device, requires_grad=True)
    if way == "kernels":
        y = kernels.soft_threshold(x, tau, threshold=threshold, slope=slope)
    else:
        y = dk.reference.soft_threshold(x, tau, rule=dk.ops.checks.rule(threshold, slope))
    outside = 0.75 if threshold == "hard" else 0.75 - (1 - slope) * 0.5
    torch.testing.assert_close(y[0, 0], torch.tensor([0.5 * slope, -0.5 * slope, 0.0, 0.0, outside, -0.25 * slope]))
    dx, dtau = torch.autograd.grad(y, [x, tau], torch.ones_like(y))
    torch.testing.assert_close(dx[0, 0], torch.tensor([slope, slope, slope, slope, 1.0, slope]))
    torch.testing.assert_close(dtau, torch.full((1, 1), 0.0 if threshold == "hard" else -(1 - slope)))


@each_rule
def test_nan_inf_and_negative_tau(kernels, threshold, slope):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, 1.5, -1.5, inf, -inf, nan])
    x = values.expand(6, 1, 6).contiguous()
    for i, tau in enumerate((0.5, -0.5, inf, nan, 0.0, -inf)):
        y = kernels.soft_threshold(x[:1], tau, threshold=threshold, slope=slope)[0, 0]
        v = values.double()
        outside = ~(v.abs() <= tau) & (v != 0)
        offset = 0.0 if threshold == "hard" else 1 - slope
        exact = torch.where(outside, v - v.sign() * offset * tau, slope * v).float()
        torch.testing.assert_close(y, exact, equal_nan=True, msg=lambda m, i=i: f"tau number {i}: {m}")
        assert y[5].isnan()  # a NaN is not lost


@each_rule
def test_a_zero_is_inside_even_of_a_tau_that_is_nan(kernels, threshold, slope):
    x, tau = torch.tensor([[[0.0, 2.0, -2.0]]]).requires_grad_(), torch.full((1, 1), torch.nan)
    y = kernels.soft_threshold(x, tau, threshold=threshold, slope=slope)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx[0, 0], torch.tensor([slope, 1.0, 1.0]))


# ---- what a hard threshold means for the gate ------------------------------------------------------------------------


def test_a_gate_does_not_learn_through_a_hard_threshold(kernels):
    x, gate = features((3, 6, 70), device=kernels.device).requires_grad_(), smooth_gate(6).to(kernels.device)
    y, tau = kernels.shrink(x, gate, threshold="hard", return_tau=True)
    g = torch.randn_like(y)
    dx, *parameters = torch.autograd.grad(y, [x, *gate.parameters()], g, retain_graph=True)
    assert not any(p.any() for p in parameters) and torch.equal(dx, torch.where(y.detach() != 0, g, 0))
    assert all(p.any() for p in torch.autograd.grad(tau.sum(), [*gate.parameters()]))  # a loss of its own reaches it


def test_the_defaults_are_the_soft_threshold_bit_for_bit(kernels):
    x, tau, gate = torch.randn(3, 6, 70, requires_grad=True), torch.rand(3, 6, requires_grad=True), smooth_gate(6)
    for run in (
        lambda **options: kernels.soft_threshold(x, tau, **options),
        lambda **options: kernels.shrink(x, gate, **options),
    ):
        plain, same = run(), run(threshold="soft", slope=0.0)
        assert torch.equal(plain, same)
        g = torch.randn_like(plain)
        assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (plain, same)))


# ---- every other way -------------------------------------------------------------------------------------------------


@each_rule
def test_compiled(compiled, threshold, slope):
    gate, x = smooth_gate(6), features((3, 6, 70)).requires_grad_()
    y = compiled.shrink(x, gate, threshold=threshold, slope=slope, residual=x)
    expected = dk.shrink(x, gate, threshold=threshold, slope=slope, residual=x)
    torch.testing.assert_close(y, expected)
    g = without_ties(torch.randn_like(x), x, gate(abs_mean(x)) * abs_mean(x))
    pairs = (torch.autograd.grad(t, [x, *gate.parameters()], g) for t in (y, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@each_rule
def test_export(threshold, slope):
    module, x = dk.Shrinkage(3, threshold=threshold, slope=slope).eval(), torch.randn(2, 3, 5)
    exported = torch.export.export(module, (x,))
    assert aten_only(exported.graph_module.graph)
    torch.testing.assert_close(exported.module()(x), module(x))


def test_the_module(kernels):
    x, residual = torch.randn(4, 6, 20), torch.randn(4, 6, 20)
    for threshold, slope in RULES:
        module = dk.Shrinkage(6, threshold=threshold, slope=slope).eval()
        with dk.record_tau(module) as taus:
            y = module(x, residual)
        torch.testing.assert_close(y, oracle.soft_threshold(x, taus[""], threshold, slope) + residual)
    assert module.extra_repr() == "6, average='channel', threshold='hard', slope=0.1"
    assert dk.Shrinkage(6).extra_repr() == "6, average='channel'"


def test_explain_says_that_the_standard_gate_steps_aside():
    x = torch.randn(4, 6, 20, requires_grad=True)
    for options in ({"threshold": "hard"}, {"slope": 0.2}):
        (call,) = dk.explain(dk.Shrinkage(6, **options), x, strict=True)  # its plan, and no fallback
        assert call.fused is False and call.gate == "the fused gate has soft thresholds only"
        assert dict(call.plan.not_taken)["gate fused"] == call.gate
    (call,) = dk.explain(lambda: dk.soft_threshold(x, 0.5, slope=0.1))
    assert call.op == "soft_threshold" and not call.fallback


# ---- errors, and modules of others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"threshold": "firm"}, ValueError, "threshold must be 'soft' or 'hard', got 'firm'"),
        ({"threshold": None}, ValueError, "threshold must be 'soft' or 'hard', got None"),
        ({"slope": 1}, ValueError, "slope must be a number from 0 to less than 1, got 1"),
        ({"slope": -0.1}, ValueError, "slope must be .*got -0.1"),
        ({"slope": float("nan")}, ValueError, "slope must be .*got nan"),
        ({"slope": "0.1"}, TypeError, "slope must be .*got '0.1'"),
        ({"slope": True}, TypeError, "slope must be .*got True"),
        ({"slope": torch.tensor(0.1)}, TypeError, "slope must be .*got tensor"),
    ],
)
def test_options_that_are_refused(kernels, options, error, message):
    x = torch.randn(2, 3, 4)
    with pytest.raises(error, match=message):
        kernels.soft_threshold(x, 0.5, **options)
    with pytest.raises(error, match=message):
        kernels.shrink(x, pytest.fail, **options)  # the gate does not run
    with pytest.raises(error, match=message):
        dk.Shrinkage(3, **options)


class Theirs(nn.Module):
    def __init__(self, threshold, slope):
        super().__init__()
        self.rule = threshold, slope
        self.fc = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())

    def forward(self, x):
        average = x.abs().mean(2)
        tau = (average * self.fc(average)).unsqueeze(2)
        return oracle.soft_threshold(x, tau, *self.rule)


@pytest.mark.parametrize("threshold, slope", RULES, ids=str)
def test_convert_leaves_other_thresholds_alone(threshold, slope):
    module = Theirs(threshold, slope)
    report = dk.convert(module)
    assert not report.converted and not report.inline and type(module) is Theirs
    assert "threshold" in report.left_alone[0].detail
