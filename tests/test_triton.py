"""The Triton kernels in the interpreter: tiles as planned, the fused gate on every plan, forced 64-bit offsets.

The rest of the suite runs on this backend too, with large tiles (conftest.py).
"""

import copy
import functools

import pytest
import torch
from oracle import AVERAGES, LAYOUTS, check_step, features, gate_of, varied, wide
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import drsn_kernels as dk
from drsn_kernels import layout as layouts
from drsn_kernels.backends import gpu

pytestmark = pytest.mark.skipif(
    not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted (no CUDA device)"
)
if gpu.missing() is None:
    import triton
    import triton.language as tl

    from drsn_kernels.backends.gpu import plans, sequence, stream, tuned
    from drsn_kernels.backends.gpu import walk as walks


@pytest.fixture(autouse=True)
def strictly_triton(monkeypatch):
    monkeypatch.setattr(tuned, "TILE", 512)
    monkeypatch.setattr(tuned, "CHANNELS", 256)
    tuned.forget()
    with dk.use_backend("triton", strict=True):
        yield
    tuned.forget()


@pytest.fixture(params=["as planned", "small tiles", "64-bit offsets"])
def sizes(request, monkeypatch):
    """Tiles as planned; so small that short rows are looped over and split; and as if tensors were beyond 2^31."""
    if request.param == "small tiles":
        monkeypatch.setattr(tuned, "TILE", 64)
        monkeypatch.setattr(tuned, "PIECE", 64)
    elif request.param == "64-bit offsets":
        for module in (stream, sequence):
            monkeypatch.setattr(module, "walk", functools.partial(walks.walk, force_wide=True))
    tuned.forget()
    return request.param


# ---- any gate --------------------------------------------------------------------------------------------------------

SHAPES = [(2, 3, 100), (1, 2, 3001), (3, 40, 9), (2, 33, 7, 5), (40, 5, 3), (1, 1, 1)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("layout", ["rows", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_gate(sizes, shape, dtype, layout):
    if shape[-1] == 3001 and sizes == "small tiles" and dtype is torch.bfloat16:
        pytest.skip("seconds, and float32 takes the same way")
    x, residual, g = (features(shape).to(dtype) for _ in range(3))
    if layout == "channels_last":
        x, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual))
    if layout == "sliced":
        x, g = (torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (x, g))
    compare(x, residual, nn.Softsign(), "channel", g)


@pytest.mark.parametrize("rows", [65_536, 70_001])
def test_more_rows_than_a_grid_dimension_holds(rows, monkeypatch):
    monkeypatch.setattr(tuned, "TILE", 1 << 16)
    x = features((rows, 1, 8))
    assert torch.equal(dk.soft_threshold(x, 0.5), x.sign() * (x.abs() - 0.5).relu())


def test_a_grid_has_one_dimension_and_a_program_for_every_tile():
    strides = (3 * 4096, 4096, 1)
    layout = layouts.dense((70_000, 3, 4096), strides)
    launch = stream.prepare_reduce(
        layout, strides, None, torch.float32, torch.device("cpu"), "magnitude", False
    )  # fmt: skip
    assert launch.grid == (210_000, 1, 1)


# ---- the standard gate -----------------------------------------------------------------------------------------------

PLANS = ["on chip", "twice", "launches"]
GATES = ["plain", "norm", "batch norm"]


@pytest.fixture
def plan(request, monkeypatch):
    """One of PLANS, whatever the shape would take."""
    if request.param != "on chip":
        monkeypatch.setattr(tuned, "ON_CHIP", 0)
    if request.param == "launches":
        monkeypatch.setattr(tuned, "L2_BYTES", 0)
    else:  # whatever the weights cost and however few programs there are
        one = plans.one_pass
        monkeypatch.setattr(plans, "one_pass", lambda on, h, o, size, sms, keep: one(on, 0, 0, size, 0, keep))
    tuned.forget()
    return request.param


def compare(x, residual, gate, average, g, fused: bool = False) -> None:
    def ours(x, gate, average, residual):
        y, tau = dk.shrink(x, gate, average=average, residual=residual, return_tau=True)
        assert type(y.grad_fn).__name__.startswith("GatedShrink") == fused
        return y, tau

    check_step(ours, x, residual, gate, average, g)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("plan", PLANS, indirect=True)
def test_fused_gate(plan, kind, average, channels_last):
    if kind == "batch norm" and plan != "launches":
        pytest.skip("takes several launches")
    x, residual, g = (varied((5, 6, 70)) for _ in range(3))
    if channels_last:
        x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    compare(x, residual, gate_of(6, kind, average), average, g, fused=True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("plan", ["on chip", "launches"], indirect=True)
def test_fused_gate_in_other_dtypes(plan, kind, dtype):
    x, g = (varied((9, 17, 13), dtype) for _ in range(2))
    compare(x, None, gate_of(17, kind, "channel", 2).to(wide(dtype)), "channel", g, fused=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("one", [False, True], ids=["channels", "one"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("plan", ["twice", "launches"], indirect=True)
def test_fused_gate_with_one_alpha_or_many_for_every_average(plan, average, one):
    gate = gate_of(6, "norm", "sample" if one else "channel")
    x, g = (features((3, 6, 40)) for _ in range(2))
    compare(x, None, gate, average, g, fused=True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", ["on chip", "launches"], indirect=True)
def test_fused_gate_in_any_layout(plan, layout):
    x = LAYOUTS[layout](3, 5, 6, 7)
    residual, g = LAYOUTS["image transposed"](3, 5, 6, 7), LAYOUTS["sliced"](3, 5, 6, 7)
    compare(x, residual, gate_of(5, "norm", "channel"), "channel", g, fused=True)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("shape", [(5, 1, 5), (9, 66, 4), (70, 3, 2), (7, 20, 300), (6, 9, 16, 16)], ids=str)
def test_fused_gate_as_planned(sizes, shape, kind):
    x, g = varied(shape), features(shape)
    compare(x, None, gate_of(shape[1], kind, "channel"), "channel", g, fused=True)


@pytest.mark.parametrize("plan", ["on chip", "launches"], indirect=True)
def test_of_a_frozen_gate_only_x_has_a_gradient(plan):
    """Nothing is made of the others': in one pass there is no launch for them, else no program."""
    x, g, gate = varied((5, 6, 70)), features((5, 6, 70)), gate_of(6, "norm", "channel")
    wanted = torch.autograd.grad(dk.shrink(x.requires_grad_(), gate), [x, *gate.parameters()], g)[0]
    y = dk.shrink(x, gate.requires_grad_(False))
    assert torch.equal(*torch.autograd.grad(y, x, g), wanted)
    back = y.grad_fn.gated._back[g.stride(), True, False]  # what that backward pass took
    launched = [one.name for one in back.launches]
    if plan == "on chip":
        assert launched == ["backward_kernel"]
    else:
        assert launched == ["grad_kernel", "hidden_grad_kernel", "linear_grad_kernel", "grad_kernel"]
        all_of_them = sequence.prepare_backward(y.grad_fn.gated.step, g.stride(), True, True)
        assert back.gate.linear.grid[0] == back.gate.pooled < all_of_them.gate.linear.grid[0]


def test_a_row_of_an_expanded_tensor_has_more_columns_than_its_offsets_say():
    for shape in ((1, 1, 2**32), (1, 3, 2**31 - 8), (2, 2, 2**31 + 16)):
        x = torch.ones(1).expand(shape)
        assert walks.walk(layouts.layout_of(x), x.stride()).wide


def test_training_follows_the_module(monkeypatch):
    """Ten steps of SGD beside the reference: weights and running statistics stay together."""
    gate = gate_of(6, "batch norm", "channel").double()
    other, x = copy.deepcopy(gate), features((7, 6, 20), torch.float64)
    for step in range(10):
        g = torch.randn_like(x)
        for module, name in ((gate, "triton"), (other, "torch")):
            with dk.use_backend(name):
                dk.shrink(x * (step + 1), module).backward(g)
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.01 * p.grad
                    p.grad = None
    for a, b in zip(gate.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert gate[1].num_batches_tracked == 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("average", AVERAGES)
def test_fused_gate_gradients_of_every_order(average, kind):
    gate = gate_of(3, kind, average).double()
    x, residual = (torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def step(x, residual, *parameters):
        with torch.no_grad():  # gradcheck perturbs its inputs in place: the gate's own parameters are the inputs
            assert all(a is b for a, b in zip(parameters, gate.parameters(), strict=True))
        y, tau = dk.shrink(x, gate, average=average, residual=residual, return_tau=True)
        return y, tau

    inputs = (x, residual, *gate.parameters())
    assert gradcheck(step, inputs, fast_mode=True, nondet_tol=0)
    assert gradgradcheck(step, inputs, fast_mode=True)


def test_a_third_derivative_and_a_vmapped_gradient():
    gate = gate_of(3, "norm", "channel").double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for name in ("triton", "torch"):
        with dk.use_backend(name):
            y = dk.shrink(x, gate)
            (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
            found.append([first, second, torch.autograd.grad((second**2).sum(), x)[0]])
            directions = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)[:4]
            found[-1] += torch.autograd.grad(dk.shrink(x, gate), x, directions, is_grads_batched=True)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_in_place_frozen_and_without_a_gradient(training):
    gate = gate_of(6, "batch norm" if training else "norm", "channel")
    x, g = features((5, 6, 33)), torch.randn(5, 6, 33)
    with dk.use_backend("torch"):
        wanted = dk.shrink(x, copy.deepcopy(gate), residual=g)
    with torch.no_grad():
        torch.testing.assert_close(dk.shrink(x, copy.deepcopy(gate), residual=g), wanted)
        assert dk.shrink(start := x.clone(), copy.deepcopy(gate), residual=g, inplace=True) is start
        torch.testing.assert_close(start, wanted)
    leaf = x.clone().requires_grad_()
    for parameters in (True, False):
        frozen = copy.deepcopy(gate).requires_grad_(parameters)
        inner = leaf * 1
        y = dk.shrink(inner, frozen, residual=g, inplace=True)
        assert y is inner
        torch.testing.assert_close(y, wanted)
        y.backward(g)
        assert leaf.grad is not None and (frozen[0].weight.grad is not None) == parameters
        torch.testing.assert_close(*(results_of_x(x, gate, g), leaf.grad))
        leaf.grad = None
    y = dk.shrink(x, copy.deepcopy(gate))  # only the gate learns
    assert y.requires_grad
    y.backward(g)


def results_of_x(x, gate, g):
    with dk.use_backend("torch"):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(dk.shrink(leaf, copy.deepcopy(gate)), leaf, g)[0]


@pytest.mark.parametrize("kind", GATES)
def test_compiled_checkpointed_and_under_autocast(kind):
    """The registered ops in a compiled graph, a recomputed forward pass, and a gate that stays in float32."""
    x, g = varied((5, 6, 33)).requires_grad_(), torch.randn(5, 6, 33)
    gate = gate_of(6, kind, "channel")
    step = lambda x: dk.shrink(x, gate)  # noqa: E731
    y = step(x)
    (dx,) = torch.autograd.grad(y, x, g)
    again = checkpoint(step, x, use_reentrant=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(step(x), y) and torch.equal(again, y)
    assert torch.equal(torch.autograd.grad(again, x, g)[0], dx)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close(torch.autograd.grad(compiled, x, g)[0], dx)


def test_statistics_that_change_before_the_backward_pass_do_not_change_it():
    gate, x = gate_of(4, "norm", "channel"), features((3, 4, 9)).requires_grad_()
    expected = torch.autograd.grad(dk.shrink(x, gate).sum(), [x, *gate.parameters()])
    y = dk.shrink(x, gate)
    dk.shrink(x, gate.train())
    for a, b in zip(torch.autograd.grad(y.sum(), [x, *gate.parameters()]), expected, strict=True):
        assert torch.equal(a, b)


def test_a_hook_still_runs_and_one_sample_still_raises():
    seen, gate = [], gate_of(4, "norm", "channel")
    gate[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    dk.shrink(torch.randn(3, 4, 9), gate)
    assert seen == [(3, 4)]
    with pytest.raises(ValueError, match="one sample has no batch statistics"):
        dk.shrink(torch.randn(1, 4, 9), gate_of(4, "batch norm", "channel"))


# ---- the interpreter itself ------------------------------------------------------------------------------------------

if gpu.missing() is None:

    @triton.jit
    def _copy(x, y, B: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        tl.store(y + i, tl.load(x + i).to(tl.float32).to(y.dtype.element_ty))


def test_bfloat16_is_rounded_as_a_gpu_does():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    there = torch.empty(2**16)
    _copy[(1,)](every, there, B=2**16)
    assert torch.equal(there.nan_to_num(7), every.float().nan_to_num(7))
    numbers = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    back = torch.empty(2**16, dtype=torch.bfloat16)
    _copy[(1,)](numbers, back, B=2**16)
    assert torch.equal(back.nan_to_num(7), numbers.bfloat16().nan_to_num(7))
