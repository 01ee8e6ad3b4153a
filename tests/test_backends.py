"""Every method of a backend against the torch backend's: planes to the bit, values to rounding, in any layout."""

import copy
import itertools

import pytest
import torch
from oracle import AVERAGES, DTYPES, LAYOUTS, standard_gate, varied, wide

from drsn_kernels import gates
from drsn_kernels.backends import BACKENDS, cpu, cpu_gated
from drsn_kernels.backends.cpu_plan import BatchPlan
from drsn_kernels.backends.eager import Eager
from drsn_kernels.backends.step import Backend, GateShape, Step, Want
from drsn_kernels.layout import Layout, Planes, layout_of, pack
from drsn_kernels.reference import SOFT, Rule, threshold

# Rows in one byte, two, and whole words; of more than a staging buffer of 512, and than a segment of 32,768.
SHAPES = [(3, 5, 6, 7), (5, 9, 2, 2), (2, 40, 5, 20), (2, 3, 1, 9), (1, 70, 37, 1), (2, 3, 9, 57), (1, 2, 1, 32_771)]
RULES = (SOFT, Rule(0.0, 0.0), Rule(0.25, 0.75))  # soft, hard, leaky
eager = Eager()
native = pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")


@pytest.fixture
def on_each(kernels) -> Backend:
    if kernels.backend == "torch":
        pytest.skip("what the others are compared with")
    return BACKENDS[kernels.backend]


@pytest.fixture
def on(kernels, on_each) -> Backend:
    if kernels.interpreted:
        pytest.skip("test_backend_gpu.py has this for Triton interpreted, with every plan")
    return on_each


def features(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """x with zeros of both signs, where no two elements share memory."""
    x = LAYOUTS[name](*shape).to(dtype)
    if "expanded" not in name and name != "scalar":
        x[x.abs() < 0.2] = 0.0
        x[x > 2] = -0.0
    return x


def same_values(ours: torch.Tensor | None, right: torch.Tensor | None) -> None:
    if right is None:
        assert ours is None
        return
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(ours.dtype, torch.finfo(ours.dtype).eps)
    torch.testing.assert_close(ours, right, rtol=rtol, atol=rtol * max(1.0, float(right.abs().max())))


def same_planes(ours: Planes | None, right: Planes | None, of: Layout) -> None:
    assert (ours is None) == (right is None)
    if right is None:
        return
    assert ours[1:] == right[1:] and ours.bits.shape == right.bits.shape
    used = of.rows * of.row_bits // 8  # the last word may end in bytes of no row
    for a, b in zip(ours.bits, right.bits, strict=True):
        assert torch.equal(a.view(torch.uint8)[:used], b.view(torch.uint8)[:used])


def all_planes(x: torch.Tensor, tau: torch.Tensor) -> Planes:
    return eager.map(x, layout_of(x), tau, keep=3)[1]


everywhere = pytest.mark.parametrize("dtype", DTYPES, ids=str)
laid_out = pytest.mark.parametrize("name", LAYOUTS)


@pytest.mark.sampled(6)
@laid_out
@everywhere
def test_reduce(on, dtype, name):
    for shape, kind in itertools.product(SHAPES, ("magnitude", "value", "product")):
        x = features(name, shape, dtype)
        of = layout_of(x)
        times = features("sliced channels_last", shape, dtype) if kind == "product" else None
        for keep in (False, True) if kind == "magnitude" else (False,):
            both = [b.reduce(x, of, kind=kind, times=times, keep=keep) for b in (on, eager)]
            (ours, planes), (right, expected) = both
            assert ours.dtype is wide(dtype) and ours.shape == shape[:2] and ours.is_contiguous()
            same_values(ours, right)
            same_planes(planes, expected, of)


@pytest.mark.sampled(6)
@laid_out
@everywhere
def test_map_with_a_threshold(on, dtype, name):
    """Every rule with each number of planes, with and without a residual; one column of tau or C, in turns."""
    for shape in SHAPES:
        x, columns = features(name, shape, dtype), itertools.cycle((1, shape[1]))
        of, overlaps = layout_of(x), "expanded" in name or name == "scalar"
        residuals = (None, LAYOUTS["image transposed"](*shape).to(dtype))
        for rule, keep, residual in itertools.product(RULES, (0, 2, 3), residuals):
            tau = torch.rand(shape[0], next(columns), dtype=wide(dtype))
            options = dict(rule=rule, residual=residual, keep=keep)
            right, expected = eager.map(x, of, tau, **options)
            ours, planes = on.map(x, of, tau, **options)
            assert ours.dtype is dtype and ours.stride() == of.strides
            same_values(ours, right)
            same_planes(planes, expected, of)
            if overlaps:
                continue
            here = x.clone() if x.is_contiguous() else torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
            y, planes = on.map(here, of, tau, out=here, **options)
            assert y is here and torch.equal(y, ours)
            same_planes(planes, expected, of)


@everywhere
@pytest.mark.parametrize("tau", ["transposed", "one", "expanded"])
def test_thresholds_of_any_strides(on_each, tau, dtype):
    x = features("channels_last", SHAPES[0], dtype)
    n, c = x.shape[:2]
    t = torch.rand(c, n, dtype=wide(dtype)).T
    t = {"transposed": t, "one": t[:1, :1], "expanded": t[:, :1].expand(n, c)}[tau]
    for view in (x, x.contiguous()):
        (ours, planes), (right, expected) = (b.map(view, layout_of(view), t, keep=3) for b in (on_each, eager))
        same_values(ours, right)
        same_planes(planes, expected, layout_of(view))


@laid_out
@everywhere
def test_map_with_a_factor(on, dtype, name):
    for shape in SHAPES:
        x = features(name, shape, dtype)
        of, residual = layout_of(x), LAYOUTS["padded rows"](*shape).to(dtype)
        shift = torch.randn(shape[:2], dtype=wide(dtype))
        for c, options in itertools.product((1, shape[1]), ({}, {"residual": residual}, {"shift": shift})):
            s = torch.randn(shape[0], c, dtype=wide(dtype))
            (ours, planes), (right, _) = (b.map(x, of, s, kind="scale", **options) for b in (on, eager))
            assert planes is None and ours.stride() == of.strides
            same_values(ours, right)


@pytest.mark.sampled(6)
@laid_out
@everywhere
def test_grad(on, dtype, name):
    """x in each layout, g in another one each time."""
    for shape, g_name in zip(SHAPES, itertools.cycle(("sliced", "expanded space", "channels_last"))):
        x = features(name, shape, dtype)
        of, tau = layout_of(x), torch.rand(shape[:2], dtype=wide(dtype))
        g, dA = LAYOUTS[g_name](*shape).to(dtype), torch.randn(shape[1], shape[0], dtype=wide(dtype)).T
        planes = all_planes(x, tau)
        asked = ({}, {"want_dtau": True}, {"want_dx": False, "want_dtau": True}, {"dA": dA})
        for rule, given in itertools.product(RULES, asked):
            ours, right = (b.grad(of, dtype, planes, g, rule=rule, **given) for b in (on, eager))
            same_values(ours[0], right[0])
            same_values(ours[1], right[1])
            assert ours[0] is None or ours[0].stride() == of.strides
        averaged = eager.reduce(x, of, keep=True)[1]  # of abs_mean alone
        ours, right = (b.grad(of, dtype, averaged, None, dA=dA) for b in (on, eager))
        same_values(ours[0], right[0])
        assert ours[1] is None


# ---- the standard gate -----------------------------------------------------------------------------------------------


def gated(x, gate, average, residual, keep=True, tau=True) -> tuple[Step, gates.StandardGate]:
    parts = gates.standard_gate(gate, x)
    assert isinstance(parts, gates.StandardGate), parts
    shape = GateShape.of(parts)
    added = None if residual is None else residual.stride()
    return Step(
        "shrink", layout_of(x), x.stride(), x.dtype, x.device, average=average, outputs=shape.outputs, gate=shape,
        residual=added, keep=keep, want=Want(x=keep, threshold=keep, tau=tau),
    ), parts  # fmt: skip


def near(ours: torch.Tensor, right: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
    """In the norm: the gate's sums cancel, and a unit's sign may flip by rounding."""
    relative, small = (1e-10, 1e-12) if dtype is torch.float64 else (1e-3, 1e-4)
    if ours.dtype.itemsize == 2:
        relative = 2e-2
    assert (ours - right).double().norm() <= relative * right.double().norm() + small * scale


def lying(t: torch.Tensor, how: int) -> torch.Tensor:
    """As rows, in channels_last, or with gaps."""
    if how == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.stack([t, t], -1).flatten(-2)[..., ::2] if how == 2 else t


GATES = [  # x, hidden units, alphas: products on both sides of a tile of 6, of a vector, of 64 and of 128
    ((24, 6, 70), 7, 6), ((24, 6, 70), 7, 1), ((9, 37, 3), 7, 37), ((131, 3, 2), 2, 3), ((5, 70, 20), 66, 1),
    ((3, 130, 2), 131, 130), ((2, 2, 32_771), 1, 2),
]  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["plain", "norm", "batch norm"])
@pytest.mark.parametrize("average", AVERAGES)
@everywhere
def test_the_gated_step(on, kind, average, dtype, monkeypatch):
    """Each stage against PyTorch on what the stage before it gave; the gate's own gradients against autograd."""
    if not on.fuses_gates:
        pytest.skip("calls every gate")
    monkeypatch.setattr(cpu_gated, "prepared", cpu_gated.Gated)
    for i, (shape, hidden, outputs) in enumerate(GATES):
        block = BatchPlan("", 0 if kind == "batch norm" else i % 4, "")  # samples a block of the cpu backend
        monkeypatch.setattr(cpu_gated, "batch_plan", lambda step, block=block: block)
        x, residual, g = (lying(t, (i + k) % 3) for k, t in enumerate(varied(shape, dtype) for _ in range(3)))
        residual = residual if outputs > 1 else None
        gate = standard_gate(shape[1], hidden, outputs, kind).to(wide(dtype))
        called = copy.deepcopy(gate)
        step, parts = gated(x, gate, average, residual)
        if (why := on.gate_unsupported(x, parts)) is not None:
            assert on.name != "cpu", why
            continue
        passes = on.gated(step)
        y, tau, kept = passes.forward(x, parts, residual)

        pooled = eager.reduce(x, step.layout)[0].requires_grad_()
        expected = threshold(parts.alpha(pooled), pooled, average)
        same_values(kept.pooled, pooled.detach())
        torch.testing.assert_close(tau, expected.detach(), rtol=2e-4, atol=2e-5)
        right, planes = eager.map(x, step.layout, tau, residual=residual, keep=3)
        same_values(y, right)
        same_planes(Planes(passes.unpacked(kept).bits, 0, 1, 2), planes, step.layout)
        with torch.no_grad():
            called(pooled)
        for ours, buffer in zip(gate.buffers(), called.buffers(), strict=True):
            torch.testing.assert_close(ours, buffer, rtol=1e-4, atol=1e-5)

        tau_g = torch.randn_like(tau)
        dx, *grads = passes.backward((*kept, *parts[:6]), g, tau_g, (True,) * 7)
        dtau = eager.grad(step.layout, dtype, planes, g, want_dx=False, want_dtau=True)[1]
        wanted = [pooled, *(p for p in parts[:6] if p is not None)]
        dA, *exact = torch.autograd.grad(expected, wanted, dtau.sum_to_size(tau.shape) + tau_g)
        grads = [t for t in grads if t is not None]
        largest = max(float(t.norm()) for t in exact)
        for ours, t in zip(grads, exact, strict=True):
            near(ours, t, largest, dtype)
        near(dx, eager.grad(step.layout, dtype, planes, g, dA=dA)[0], 1.0, dtype)
        if kind != "batch norm":  # without what is kept for backward
            light, parts = gated(x, gate, average, residual, keep=False, tau=False)
            again, tau, kept = on.gated(light).forward(x, parts, residual, torch.empty_like(x))
            assert torch.equal(again, y) and tau is None and all(t is None for t in kept)


@native
def test_what_excludes_one_another_is_refused():
    """No operator asks for it; the extension would leave one of the two out."""
    x, small = torch.randn(2, 3, 40), torch.rand(2, 3)
    on, layout = BACKENDS["cpu"], layout_of(x)
    _, planes = on.map(x, layout, small, keep=3)
    with pytest.raises(ValueError, match="map adds a residual or a shift, not both"):
        on.map(x, layout, small, kind="scale", residual=x, shift=small)
    with pytest.raises(ValueError, match="the cpu backend makes dtau without dA, not both at once"):
        on.grad(layout, x.dtype, planes, x, dA=small, want_dtau=True)


def test_only_wanted_gradients_of_a_gate(on_each):
    if not on_each.fuses_gates:
        pytest.skip("calls every gate")
    x, gate = varied((8, 4, 33)), standard_gate(4, 3, 4, "norm")
    step, parts = gated(x, gate, "channel", None)
    passes = on_each.gated(step)
    saved = (*passes.forward(x, parts)[2], *parts[:6])
    everything = passes.backward(saved, x, None, (True,) * 7)
    for i in range(7):
        some = passes.backward(saved, x, None, tuple(k == i for k in range(7)))
        assert some[i] is not None
        # without dx the launches may be others, and sums come in another order
        torch.testing.assert_close(some[i], everything[i], rtol=1e-5, atol=1e-6)
        assert i == 0 or some[0] is None


# ---- the bindings of the cpu backend ---------------------------------------------------------------------------------


@native
@laid_out
def test_the_extension_counts_the_words_of_a_plane_as_the_layout_does(name):
    for shape in (*SHAPES, (2, 3, 1, 9), (1, 70, 37, 1)):
        of = layout_of(LAYOUTS[name](*shape))
        assert cpu._cpu.Walk(dtype=0, shape=of.shape, strides=of.strides).words == of.words
        assert of.words == pack(torch.zeros(shape, dtype=torch.bool), of).numel()


@native
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"out": None, "sums": None}, TypeError, "unexpected argument sums"),
        ({"kind": "abs"}, ValueError, "kind must be one of magnitude, value, product, got 'abs'"),
        ({"x": torch.ones(2, 2)}, ValueError, "a tensor of rank 3"),
        ({"x": torch.ones(2, 2, 2, device="meta")}, ValueError, r"got one of shape \(2, 2, 2\) on meta"),
        ({"x": 0}, AttributeError, "stride"),
        ({"sign": "0", "planes": torch.ones(2, dtype=torch.int32)}, TypeError, "str"),
        ({"x": torch.ones(2, 2, 2)}, TypeError, "the cpu kernels need the argument out"),
        ({"".join(["ki", "nd"]): "value", "out": torch.ones(2, 2)}, TypeError, "the cpu kernels need the argument x"),
    ],
)
def test_arguments_of_the_extension_that_do_not_fit(arguments, error, message):
    walk = cpu._cpu.Walk(dtype=0, shape=(2, 2, 2), strides=(4, 2, 1))
    with pytest.raises(error, match=message):
        walk.reduce(**arguments)
    with pytest.raises(TypeError, match="keyword arguments only"):
        walk.reduce(0)


@native
def test_arguments_of_a_gate_of_the_extension_that_do_not_fit():
    walk, x = cpu._cpu.Walk(dtype=0, shape=(2, 2, 2), strides=(4, 2, 1)), torch.ones(2, 2, 2)
    gate = cpu._cpu.Gate(
        walk=walk, average=0, hidden=2, outputs=2, norm=False, batch_stats=False, eps=0.0, momentum=0.0, block=0,
        keep=True,
    )  # fmt: skip
    assert gate.state_bytes == (2 * 2 + 2 * 2) * 4 and gate.kept_bytes == gate.state_bytes + 3 * walk.words * 4
    for call, count in ((gate.forward, 15), (gate.backward, 17)):
        with pytest.raises(TypeError, match=f"takes {count} positional arguments: "):
            call(x)
        with pytest.raises(TypeError, match="takes"):
            call(*[x] * count, more=1)
        with pytest.raises(ValueError, match=r"got one of shape \(2, 2, 2\) on meta"):
            call(x.to("meta"), *[None] * (count - 1))
        with pytest.raises(ValueError, match="a tensor of rank 3"):
            call(x[0], *[None] * (count - 1))
    with pytest.raises(TypeError, match="the cpu kernels need the argument y"):
        gate.forward(x, *[None] * 14)
    with pytest.raises(TypeError, match="the cpu kernels need the argument kept"):
        gate.forward(x, x, None, None, torch.ones(2, 2), *[None] * 10)
    with pytest.raises(TypeError, match="the cpu kernels need the argument g"):
        gate.backward(*[None] * 17)
