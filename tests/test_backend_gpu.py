"""The triton backend's class, interpreted: split rows and 64-bit offsets, every plan of the fused gate, costs of plans.

The shapes and layouts that every backend is compared on are in test_backends.py.
"""

import functools

import pytest
import torch
from oracle import AVERAGES, LAYOUTS, features, gate_of, varied, wide
from oracle import standard_gate as wide_gate

from drsn_kernels import checked
from drsn_kernels import layout as layouts
from drsn_kernels.backends import gpu
from drsn_kernels.backends.eager import eager
from drsn_kernels.backends.gpu.backend import Gpu
from drsn_kernels.backends.step import GateShape, Step, Want
from drsn_kernels.gates import standard_gate
from drsn_kernels.layout import Planes
from drsn_kernels.reference import SOFT, Rule, threshold

pytestmark = pytest.mark.skipif(
    not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted (no CUDA device)"
)
if gpu.missing() is None:
    from drsn_kernels.backends.gpu import plans, sequence, stream, tuned
    from drsn_kernels.backends.gpu import walk as walks

ours, torchs = Gpu(), eager
RULES = {"soft": SOFT, "leaky": Rule(0.25, 0.75), "hard": Rule(0.1, 0.0)}


@pytest.fixture(autouse=True)
def fresh_plans():
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture(params=["split", "64-bit offsets"])
def sizes(request, monkeypatch):
    """Tiles so small that rows are looped over and split; and as if tensors were beyond 2^31."""
    if request.param == "split":
        for name, value in (("TILE", 128), ("WHOLE", 2), ("PART", 1), ("PIECE", 360)):
            monkeypatch.setattr(tuned, name, value)
    elif request.param == "64-bit offsets":
        for module in (stream, sequence):
            monkeypatch.setattr(module, "walk", functools.partial(walks.walk, force_wide=True))
    return request.param


def close(a, b):
    tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-9}.get(a.dtype, 2e-5)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_planes(a: Planes | None, b: Planes | None, layout) -> None:
    assert (a is None) == (b is None)
    if a is None:
        return
    assert a[1:] == b[1:] and a.bits.shape == b.bits.shape
    for one, other in zip(a.bits, b.bits, strict=True):
        assert torch.equal(layouts.unpack(one, layout), layouts.unpack(other, layout))


each_layout = pytest.mark.parametrize("where", ["contiguous", "channels_last", "sliced", "image transposed"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def made(where: str, dtype: torch.dtype, count: int, sizes: str) -> list[torch.Tensor]:
    """Of the layout still after the conversion; rows of 368 elements where they are to be split."""
    spatial = (16, 23) if sizes == "split" else (6, 7)
    out = []
    for _ in range(count):
        x = LAYOUTS[where](2, 5, *spatial)
        out.append(torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x))
    return out


@pytest.mark.sampled(4)
@each_layout
@each_dtype
@pytest.mark.parametrize("kind", ["magnitude", "value", "product"])
def test_reduce(sizes, kind, dtype, where):
    x, times = made(where, dtype, 2, sizes)
    layout = layouts.layout_of(x)
    times = times if kind == "product" else None
    keep = kind == "magnitude"
    for kept in {keep, False}:
        a, planes = ours.reduce(x, layout, kind=kind, times=times, keep=kept)
        b, wanted = torchs.reduce(x, layout, kind=kind, times=times, keep=kept)
        assert a.dtype == wide(dtype)
        close(a, b)
        same_planes(planes, wanted, layout)


@pytest.mark.sampled(12)
@each_layout
@each_dtype
@pytest.mark.parametrize("rule", RULES)
def test_map_by_every_rule(sizes, rule, dtype, where):
    x, residual = made(where, dtype, 2, sizes)
    layout = layouts.layout_of(x)
    for keep, shape, added in ((0, (2, 5), residual), (2, (2, 1), None), (3, (1, 5), residual), (3, (1, 1), None)):
        tau = torch.rand(shape, dtype=wide(dtype))
        arguments = dict(rule=RULES[rule], residual=added, keep=keep)
        a, planes = ours.map(x, layout, tau, **arguments)
        b, wanted = torchs.map(x, layout, tau, **arguments)
        assert a.stride() == layout.strides
        close(a, b)
        same_planes(planes, wanted, layout)
    start = x.clone()
    assert ours.map(start, layouts.layout_of(start), tau, rule=RULES[rule], out=start)[0] is start
    close(start, torchs.map(x, layout, tau, rule=RULES[rule])[0])


@pytest.mark.sampled(12)
@each_layout
@each_dtype
@pytest.mark.parametrize("shifted", [False, True])
def test_map_scales(sizes, shifted, dtype, where):
    x, residual = made(where, dtype, 2, sizes)
    layout = layouts.layout_of(x)
    shift = torch.randn(5, 2, dtype=wide(dtype)).t() if shifted else None
    for columns in (5, 1):
        t = torch.rand(2, columns, dtype=wide(dtype))
        arguments = dict(kind="scale", residual=None if shifted else residual, shift=shift)
        close(ours.map(x, layout, t, **arguments)[0], torchs.map(x, layout, t, **arguments)[0])


@pytest.mark.sampled(16)
@each_layout
@each_dtype
@pytest.mark.parametrize("rule", RULES)
def test_grad(sizes, rule, dtype, where):
    x, g = made(where, dtype, 2, sizes)
    layout, dA = layouts.layout_of(x), torch.randn(2, 5, dtype=wide(dtype))
    tau = torch.rand(2, 5, dtype=wide(dtype))
    _, planes = ours.map(x, layout, tau, keep=3)
    _, averaged = ours.reduce(x, layout, keep=True)
    cases = [
        (planes, g, dict(want_dtau=True)),
        (planes, g, dict(want_dtau=True, want_dx=False)),
        (planes, g, dict(dA=dA)),
        (planes, g, dict(dA=dA, want_dtau=True)),
        (planes._replace(nonzero=None), g, {}),
        (averaged, None, dict(dA=dA)),
    ]
    for kept, gradient, options in cases:
        found = ours.grad(layout, dtype, kept, gradient, rule=RULES[rule], **options)
        wanted = torchs.grad(layout, dtype, kept, gradient, rule=RULES[rule], **options)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)


# ---- the standard gate -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["on chip", "twice", "launches"])
def plan(request, monkeypatch):
    """One of the plans, whatever the shape would take."""
    if request.param != "on chip":
        monkeypatch.setattr(tuned, "ON_CHIP", 0)
    if request.param == "launches":
        monkeypatch.setattr(tuned, "L2_BYTES", 0)
    else:  # whatever the weights cost and however few programs there are
        one = plans.one_pass
        monkeypatch.setattr(plans, "one_pass", lambda on, h, o, size, sms, keep: one(on, 0, 0, size, 0, keep))
    return request.param


@pytest.mark.sampled(16)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("one", [False, True], ids=["an alpha a channel", "one alpha"])
@pytest.mark.parametrize("kind", ["plain", "norm", "batch norm"])
def test_gated_step(plan, kind, one, average, channels_last):
    """Forward against the formula, backward against its derivative by autograd, the user's gradient of tau included."""
    if kind == "batch norm" and plan != "launches":
        pytest.skip("takes several launches")
    n, c = 5, 6
    x, residual, g = (varied((n, c, 70)) for _ in range(3))
    if channels_last:
        x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    check_gated(x, residual, g, gate_of(c, kind, "sample" if one else "channel"), average, plan)


@pytest.mark.sampled(16)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["norm", "batch norm"])
def test_gated_step_in_other_dtypes_and_splits(sizes, kind, dtype):
    x, residual, g = (features((4, 3, 600), dtype) for _ in range(3))
    check_gated(x, residual, g, gate_of(3, kind, "channel").to(wide(dtype)), "channel", None)


def check_gated(x, residual, g, module, average, name):
    parts = standard_gate(module, x)
    layout = layouts.layout_of(x)
    step = Step(
        "shrink", layout, x.stride(), x.dtype, x.device, average, outputs=len(parts.w2), gate=GateShape.of(parts),
        residual=residual.stride(), keep=True, want=Want(True, True, True),
    )  # fmt: skip
    acc = wide(x.dtype)
    running = [None if t is None else t.clone() for t in (parts.mean, parts.var, parts.batches)]
    expected = [None if t is None else t.clone() for t in (parts.mean, parts.var, parts.batches)]

    leaf = x.to(acc).clone().requires_grad_()
    parameters = [None if p is None else p.detach().clone().requires_grad_() for p in parts[:6]]
    formula = parts._replace(
        **dict(zip(("w1", "b1", "gamma", "beta", "w2", "b2"), parameters, strict=True)), mean=expected[0],
        var=expected[1],
    )  # fmt: skip
    pooled = torchs.reduce(leaf, layout)[0]
    tau = threshold(formula.alpha(pooled), pooled, average)
    y = torchs.map(leaf, layout, tau, residual=residual)[0]
    tau_grad = torch.randn_like(tau)
    leaves = [leaf, *(p for p in parameters if p is not None)]
    wanted = torch.autograd.grad([y, tau], leaves, [g.to(y.dtype), tau_grad])
    if parts.batch_stats:
        with torch.no_grad():
            torch.nn.functional.batch_norm(
                torch.nn.functional.linear(pooled, parts.w1, parts.b1), expected[0], expected[1], training=True,
                momentum=parts.momentum,
            )  # fmt: skip

    with torch.no_grad():
        passes = ours.gated(step)
        fresh = parts._replace(mean=running[0], var=running[1], batches=running[2])
        out, found_tau, kept = passes.forward(x, fresh, residual)
        if name is not None:
            taken = sequence.prepare_forward(step, out.stride())
            assert ("launches" if taken.one is None else "twice" if taken.one.plan.loop else "on chip") == name
        dx, *grads = passes.backward((*kept, *parts[:6]), g, tau_grad, (True,) * 7)
    close(out, y.detach().to(x.dtype))
    close(found_tau, tau.detach())
    wanted_planes = torchs.map(x, layout, found_tau, keep=3)[1]
    same_planes(layouts.thresholded(passes.unpacked(kept).bits, nonzero=True), wanted_planes, layout)
    close(dx, wanted[0].to(x.dtype))
    grads = [grad for grad, p in zip(grads, parameters, strict=True) if p is not None]
    if acc is torch.float64:  # in float32 a norm over 4 samples cancels: test_triton.py has the oracle for it
        torch.testing.assert_close(grads, list(wanted[1:]), rtol=1e-9, atol=1e-9)
    if parts.batch_stats:
        close(running[0], expected[0])
        close(running[1], expected[1])
        assert running[2] == 1

    with torch.no_grad():  # without a gradient, into x
        if parts.mean is not None:
            again = parts._replace(mean=parts.mean.clone(), var=parts.var.clone(), batches=parts.batches.clone())
        else:
            again = parts
        quiet = step._replace(keep=False, want=Want(), residual=None)
        start = x.clone()
        y, tau, kept = ours.gated(quiet).forward(start, again, None, start)
        assert y is start and tau is None and kept == (None,) * 4
        close(start, torchs.map(x, layout, found_tau)[0])


# ---- plans and costs -------------------------------------------------------------------------------------------------


def shrink_step(shape, gate: GateShape | None, keep=True, **options) -> Step:
    x = torch.empty(shape, device="meta")
    return Step(
        "shrink", layouts.layout_of(x), x.stride(), x.dtype, torch.device("cpu"), "channel", outputs=shape[1],
        gate=gate, keep=keep, want=Want(keep, keep), **options,
    )  # fmt: skip


def test_the_cost_of_a_gated_step_is_the_sum_of_its_launches():
    gate = GateShape(16, 16, True, True, 1e-5, 0.1)
    step = shrink_step((8, 16, 1024), gate)
    plan = ours.plan(step)
    assert plan.name == "several launches" and plan.not_taken[0][0] == "one pass"
    assert plan.forward.kernels == ("reduce_kernel", "hidden_kernel", "alpha_kernel", "map_kernel")
    assert plan.backward.kernels == ("grad_kernel", "hidden_grad_kernel", "linear_grad_kernel", "grad_kernel")
    assert tuple(launch.kernel for launch in plan.launches) == plan.forward.kernels + plan.backward.kernels
    full, sums, plane = 4 * 8 * 16 * 1024, 4 * 8 * 16, 4 * step.layout.words
    assert plan.forward.saved == 3 * plane + 3 * sums + 4 * 2 * 16
    small = 20 * sums + 8 * 4 * 16 * 17
    assert 2 * full < plan.forward.read < 2 * full + small
    assert full + 3 * plane < plan.forward.written < full + 3 * plane + small
    assert 2 * full + 5 * plane < plan.backward.read < 2 * full + 5 * plane + small


def test_one_pass_costs_each_element_once():
    step = shrink_step((8, 16, 1024), GateShape(16, 16, True, False, 1e-5, 0.1), keep=False)
    plan = ours.plan(step)
    assert plan.name == "one pass" and plan.forward.kernels == ("forward_kernel",) and plan.forward.saved == 0
    assert plan.forward.written == 4 * 8 * 16 * 1024 and plan.backward.launches == 0


def test_one_pass_walks_large_samples_where_they_would_have_a_multiprocessor_each():
    def taken(samples, length=256, keep=False):
        step = shrink_step((samples, 64, length), GateShape(64, 64, True, False, 1e-5, 0.1), keep=keep)
        one = sequence.prepare_forward(step, step.layout.strides).one
        return one and (one.plan.loop, one.plan.rows * one.plan.columns, one.plan.warps, one.options["maxnreg"])

    small_tiles, whole = (True, 8192, 8, 128), (False, 16384, 16, None)
    assert taken(512) == taken(133) == small_tiles  # 132 multiprocessors are planned for here
    assert taken(132) == taken(512, keep=True) == whole
    assert taken(512, length=128) == small_tiles
    assert taken(512, length=512) == (True, 8192, 8, 255)  # four for each multiprocessor do not fit the L2
    with tuned.using(CROWDED_BYTES=1 << 30):
        assert taken(512) == whole
    assert taken(512) == small_tiles


def test_calls_are_checked_anew_for_other_constants():
    checked.keep("a call", True)
    with tuned.using(THREAD=32):
        assert not checked.find("a call")
        checked.keep("another", True)
    assert not checked.find("another")


def test_a_called_gate_is_planned_by_its_streams():
    plan = ours.plan(shrink_step((8, 16, 1024), None))
    own = tuple(name for name in plan.forward.kernels + plan.backward.kernels if not name.startswith("aten::"))
    assert own == ("reduce_kernel", "map_kernel", "grad_kernel", "grad_kernel")
    assert tuple(launch.kernel for launch in plan.launches) == own
    assert str(plan.launches[1]).startswith("map_kernel: ") and plan.index_bits == 32


def test_gates_that_torch_computes_faster_are_called(monkeypatch):
    def reason(n: int, c: int, hidden: int) -> str | None:
        x, gate = torch.empty(n, c, 1, device="meta"), wide_gate(c, hidden, c, "batch norm").to("meta")
        return ours.gate_unsupported(x, standard_gate(gate, x))

    for c, hidden in ((1025, 4), (4, 1025)):
        assert reason(4, c, hidden) == (
            f"{c} channels and {hidden} hidden units, the fused gate takes at most 1024 of each"
        )
    assert reason(1024, 512, 512) is None and reason(65536, 64, 64) is None
    assert reason(1025, 512, 512) == "1025 samples x 512 channels x 512 hidden units are more than 268435456 products"
    monkeypatch.setattr(tuned, "MOST_CHANNELS", 1025)
    assert reason(4, 1025, 4) is None


def test_a_pointer_of_another_name_is_refused():
    x = torch.randn(2, 3, 8)
    launch = stream.prepare_reduce(
        layouts.layout_of(x), x.stride(), None, x.dtype, x.device, "magnitude", False
    )  # fmt: skip
    with pytest.raises(TypeError, match="reduce_kernel takes x, times, out, planes, not y"):
        launch(x=x, y=x)
