"""Random shapes, strides, dtypes, thresholds, averages, residuals and gates against the float64 oracle.

The `kernels` fixture gives each test the backends, and the cpu backend's instruction sets.
"""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import (
    AVERAGES,
    DTYPES,
    abs_mean,
    cast_gate,
    check,
    check_step,
    shrink,
    smooth_gate,
    soft_threshold,
    standard_gate,
    wide,
    without_ties,
)

from drsn_kernels.backends import BACKENDS, cpu
from drsn_kernels.backends.cpu_plan import BatchPlan
from drsn_kernels.layout import layout_of

LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129]


@st.composite
def shapes(draw) -> list[int]:
    spatial = draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 5, 8, 9, 17, 33, 70]))]
    sizes += [draw(st.sampled_from(LENGTHS)) if spatial == 1 else draw(st.integers(1, 9)) for _ in range(spatial)]
    return sizes


@st.composite
def strided(draw, shape: list[int], dtype: torch.dtype, expand: bool = True) -> torch.Tensor:
    """A tensor of this shape: dimensions in any order in memory, steps and margins along each, some expanded."""
    rank = len(shape)
    stored = draw(st.permutations(range(rank)))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in range(rank)]
    margins = [draw(st.sampled_from([0, 0, 0, 1, 3])) for _ in range(rank)]
    expanded = [expand and draw(st.integers(0, 9)) == 0 for _ in range(rank)]
    sizes = [1 if expanded[d] else shape[d] * steps[d] + margins[d] for d in stored]
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    base = torch.randn(sizes)
    base[torch.rand(sizes) < 0.1] = 0
    x = base.to(dtype).permute([stored.index(d) for d in range(rank)])
    index = tuple(slice(0, None) if expanded[d] else slice(margins[d], None, steps[d]) for d in range(rank))
    return x[index][tuple(slice(0, s) for s in shape)].expand(shape)


@st.composite
def cases(draw) -> dict:
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    tensor = lambda d=dtype: draw(strided(shape, d))  # noqa: E731
    return {
        "x": tensor(),
        "g": tensor(),
        "residual": tensor() if draw(st.booleans()) else None,
        "tau": torch.rand(shape[0], draw(st.sampled_from([1, shape[1]])), dtype=wide(dtype)) * 2 - 0.3,
        "average": draw(st.sampled_from(AVERAGES)),
        "one": draw(st.booleans()),
        "inplace": draw(st.booleans()),
    }


def compare(kernels, case: dict) -> None:
    x, g, residual, average = case["x"].requires_grad_(), case["g"], case["residual"], case["average"]
    gate = smooth_gate(x.shape[1], 1 if case["one"] else None).to(wide(x.dtype))
    pooled_g = torch.randn(x.shape[:2], dtype=wide(x.dtype))
    check(kernels.abs_mean, lambda d, x: abs_mean(x), {"x": x}, [pooled_g])
    inputs = {"x": x, "tau": case["tau"].requires_grad_()}
    check(kernels.soft_threshold, lambda d, x, tau: soft_threshold(x, tau), inputs, [g])

    with torch.no_grad():
        tau = shrink(x.double(), cast_gate(gate, torch.float64), average)[1]
        clear = without_ties(g, x, tau)

    def ours(x, residual):
        start = x.clone() if case["inplace"] else x
        return kernels.shrink(start, gate, average=average, residual=residual, inplace=case["inplace"], return_tau=True)

    check(
        ours,
        lambda d, x, r: shrink(x, cast_gate(gate, d), average, r),
        {"x": x, "residual": None if residual is None else residual.requires_grad_()},
        [clear if not torch.equal(clear, g) else g, torch.randn_like(tau).to(wide(x.dtype))],
    )
    y = ours(x, None)[0]
    (dx,) = torch.autograd.grad(y, x, g)
    lying = [[s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (torch.empty_like(x), y, dx)]
    assert lying[0] == lying[2] and (case["inplace"] or lying[0] == lying[1])


# ---- the standard gate, which cpu and triton fuse with the step ------------------------------------------------------

BLOCKS = [0, 1, 2, 3]  # samples a block; 0: stages


@st.composite
def gated_cases(draw) -> dict:
    case = draw(cases())
    shape, dtype = case["x"].shape, case["x"].dtype
    kind = draw(st.sampled_from(["plain", "norm", "batch norm"]))
    assume(kind != "batch norm" or shape[0] > 1)
    hidden = draw(st.sampled_from([1, 2, 3, 5, 8, 17, 33, 70]))
    gate = standard_gate(shape[1], hidden, 1 if case["one"] else shape[1], kind).to(wide(dtype))
    if kind != "plain":  # a large eps: nearly equal samples are not amplified, which would show rounding only
        gate[1].eps, gate[1].momentum = draw(st.sampled_from([0.1, 1.0])), draw(st.sampled_from([0.1, 0.0, 1.0]))
    if 0 not in case["x"].stride():  # samples at levels of their own, for the same reason
        case["x"].mul_(0.5 + torch.rand(shape[0], *[1] * (len(shape) - 1)))
    return {**case, "gate": gate, "block": draw(st.sampled_from(BLOCKS))}


def compare_gated(kernels, case: dict, monkeypatch) -> None:
    """The cpu backend in blocks or in stages, whatever the shape would take."""
    block = lambda step: 0 if step.gate.batch_stats else case["block"]  # noqa: E731
    monkeypatch.setattr(cpu, "batch_plan", lambda step: BatchPlan("", block(step), ""))
    x, gate = case["x"], case["gate"]
    exact = cast_gate(gate, torch.float64)
    with torch.no_grad():
        hidden = exact[0](abs_mean(x.double()))
        if exact[1].training and len(exact) == 5:  # equal averages: what BatchNorm makes of them is rounding
            assume((hidden.std(0, correction=0) > 1e-3 * hidden.mean(0).abs()).all())
        assume(exact[1:-3](hidden).abs().min() > 1e-4)  # rounding would decide on which side of 0 a unit is

    def ours(x, gate, average, residual):
        start = x * 1 if case["inplace"] else x
        return kernels.shrink(
            start, gate, average=average, residual=residual, inplace=case["inplace"], return_tau=True
        )  # fmt: skip

    check_step(ours, x, case["residual"], gate, case["average"], case["g"], units=128)  # through two layers and a norm


SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=25, deadline=None, suppress_health_check=SHARED, derandomize=True)
@given(case=cases())
def test_random_cases(kernels, case):
    compare(kernels, case)


def many(kernels, strategy, compare) -> None:
    """200 cases of a backend; 20 where each is compiled or interpreted, which takes longer."""
    examples = 20 if kernels.compiled or kernels.interpreted else 200

    @settings(max_examples=examples, deadline=None, suppress_health_check=SHARED)
    @given(case=strategy)
    def every(case):
        compare(kernels, case)

    every()


@pytest.mark.slow
def test_many_random_cases(kernels):
    many(kernels, cases(), compare)


@settings(max_examples=25, deadline=None, suppress_health_check=SHARED, derandomize=True)
@given(case=gated_cases())
def test_random_standard_gates(kernels, case, monkeypatch):
    compare_gated(kernels, case, monkeypatch)


@pytest.mark.slow
def test_many_random_standard_gates(kernels, monkeypatch):
    many(kernels, gated_cases(), lambda kernels, case: compare_gated(kernels, case, monkeypatch))


@pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")
@settings(max_examples=25, deadline=None, suppress_health_check=SHARED, derandomize=True)
@given(case=cases())
def test_instruction_sets_agree(case):
    """y, dx without a sum in it, and the planes do not depend on the instruction set at all."""
    x, tau, before, results = case["x"].detach(), case["tau"], cpu._cpu.isa(), {}
    on, layout = BACKENDS["cpu"], layout_of(x)
    used = layout.rows * layout.row_bits // 8
    try:
        for isa in cpu._cpu.available_isas():
            cpu._cpu.set_isa(isa)
            y, planes = on.map(x, layout, tau, residual=case["residual"], keep=3)
            dx, _ = on.grad(layout, x.dtype, planes, case["g"])
            bits = [*planes.bits, *on.reduce(x, layout, keep=True)[1].bits]
            results[isa] = [y, dx, *(plane.view(torch.uint8)[:used] for plane in bits)]
    finally:
        cpu._cpu.set_isa(before)
    reference = results.pop("portable")
    for isa, values in results.items():
        assert all(torch.equal(a, b) for a, b in zip(values, reference, strict=True)), isa
