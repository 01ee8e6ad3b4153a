"""batch_norm_relu: values, running statistics, derivatives, layouts, what is kept; more in test_transforms.py."""

import fractions
import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, LAYOUTS, batch_norm_act, check, close, wide
from test_autograd_memory import Saved

import drsn_kernels as dk
from drsn_kernels import checked
from drsn_kernels.backends import BACKENDS, cpu
from drsn_kernels.backends.step import Backend

SHAPES = [(2, 3, 17), (2, 3, 65), (2, 3, 1027), (1, 2, 32771), (5, 7), (300, 3), (3, 1, 1), (2, 70, 3), (9, 33, 1, 1)]
SHAPES += [(2, 4, 56, 56), (2, 64, 7, 7), (70, 4, 8, 2), (2, 3, 2, 3, 5), (2, 3, 1, 2, 1, 2, 1, 3)]
ACTIVATIONS = [("relu", 0.01), ("leaky", 0.2), ("leaky", -0.5), ("leaky", 1.5), ("leaky", 0), (None, 0.01)]
np = pytest.importorskip("numpy")
pytestmark = pytest.mark.usefixtures("one_thread")
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
native = pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")


@pytest.fixture
def kernels(kernels):
    if type(BACKENDS[kernels.backend]).norm is Backend.norm:
        pytest.skip(f"the {kernels.backend} backend has no batch normalisation")
    return kernels


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def affine(x: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """weight and bias as leaves; one weight is negative."""
    weight, bias = 0.5 + torch.rand(x.shape[1]), torch.randn(x.shape[1]) / 4
    weight[0] *= -1
    return tuple(t.to(x.device, dtype or wide(x.dtype)).requires_grad_() for t in (weight, bias))


def statistics(x: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Running ones, some way from those of x."""
    mean, var = torch.randn(x.shape[1]) / 4, 0.5 + torch.rand(x.shape[1])
    return tuple(t.to(x.device, dtype or wide(x.dtype)) for t in (mean, var))


def check_all(run, x, weight, bias, running, training: bool, activation="relu", slope=0.01, g=None) -> None:
    """y, the gradients of x, weight and bias, and the running statistics, of one step with momentum 0.3."""
    x.requires_grad_()
    options = {"activation": activation, "slope": slope}
    mean, var = (t.clone() for t in running)
    batches = torch.tensor(7, device=x.device)

    def formula(dtype, x, weight, bias):
        given = () if training else (t.to(dtype) for t in running)
        return batch_norm_act(x, weight, bias, *given, **options)

    def ours(x, weight, bias):
        return run(x, mean, var, weight, bias, training, 0.3, num_batches_tracked=batches, **options)

    wider = [None if t is None else t.detach().double() for t in (x, weight, bias)]
    z = batch_norm_act(*wider, *(() if training else (t.double() for t in running)), activation=None)
    g = torch.randn(x.shape, device=x.device) if g is None else g
    # 0 where rounding decides on which side of 0 z is: sums are free of it then
    g = torch.where(z.abs() < 1e-4, 0.0, g).to(x.dtype) if activation else g.to(x.dtype)
    check(ours, formula, {"x": x, "weight": weight, "bias": bias}, [g])
    assert int(batches) == 7 + training
    exact = [t.double() for t in running]
    if training:
        moved = torch.var_mean(x.detach().double(), [0, *range(2, x.dim())])
        exact = [torch.lerp(t, new, 0.3) for t, new in zip(exact, reversed(moved), strict=True)]
    for name, t, right in zip(("running_mean", "running_var"), (mean, var), exact, strict=True):
        close(t, right, right.to(wide(x.dtype)), name)


def check_step(run, x, training=True, activation="relu", slope=0.01, g=None, dtype=None) -> None:
    check_all(run, x, *affine(x, dtype), statistics(x, dtype), training, activation, slope, g)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernels, shape, layout, dtype, training):
    if kernels.backend == "torch" and dtype in DTYPES[2:]:
        pytest.skip("PyTorch's own sums of halves are less exact")
    x = (torch.randn(shape) * 2 + 1).to(kernels.device, dtype)
    check_step(kernels.batch_norm_relu, laid_out(x, layout), training)


@MODES
@pytest.mark.parametrize("activation, slope", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_activations(kernels, layout, activation, slope, training):
    x = torch.randn(5, 6, 70, device=kernels.device)
    check_step(kernels.batch_norm_relu, laid_out(x, layout), training, activation, slope)


@MODES
def test_compiled(compiled, training):
    check_step(compiled.batch_norm_relu, torch.randn(3, 6, 70), training)


@MODES
@pytest.mark.parametrize("g_layout", ["contiguous", "sliced channels_last", "expanded space"])
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_layouts(kernels, x_layout, g_layout, training):
    if kernels.backend == "torch" and x_layout not in ("contiguous", "channels_last", "sliced", "offset"):
        pytest.skip("PyTorch's own y is contiguous")
    x, g = (LAYOUTS[layout](3, 5, 6, 7) for layout in (x_layout, g_layout))
    y = kernels.batch_norm_relu(x.requires_grad_(), *statistics(x), training=training)
    (dx,) = torch.autograd.grad(y, x, g)
    assert y.stride() == dx.stride() == torch.empty_like(x.detach()).stride()
    check_step(kernels.batch_norm_relu, x.detach(), training, g=g)


@MODES
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_without_parameters(kernels, layout, absent, training):
    x = torch.randn(5, 6, 70, device=kernels.device)
    x = laid_out(x, layout)
    parameters = (None if name in absent else t for name, t in zip(("weight", "bias"), affine(x), strict=True))
    check_all(kernels.batch_norm_relu, x, *parameters, statistics(x), training)


@MODES
@pytest.mark.parametrize("parameters", DTYPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_another_dtype(kernels, dtype, parameters, training):
    """They, and the running statistics, keep it; torch's own refuses most pairs."""
    x = torch.randn(5, 6, 70, device=kernels.device).to(dtype)
    check_step(kernels.batch_norm_relu, x, training, dtype=parameters)


def test_statistics_that_are_slices(kernels):
    x, whole, kept = torch.randn(5, 6, 7, device=kernels.device), *(torch.ones(2, 6, 2, device=kernels.device),) * 2
    mean, var = whole[0, :, 0], whole.clone()[1, :, 1]
    kernels.batch_norm_relu(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, x.mean([0, 2]))
    torch.testing.assert_close(var, x.var([0, 2]))
    assert torch.equal(whole[0, :, 1], kept[1, :, 1])


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_large_mean_does_not_cancel(kernels, layout, offset):
    """The variance of x about a mean that is much larger; mean is rounded to float32 once.

    On GPUs the deviations are from a mean that is rounded, in parts and when these are merged. What that adds to the
    variance is a square. Sums of squares would be off by `offset` times as much and more.
    """
    if kernels.backend == "torch":
        pytest.skip("PyTorch's own statistics are less exact")
    x = torch.randn(40, 6, 700, device=kernels.device) + offset
    x = laid_out(x, layout)
    mean, var = torch.zeros(6, device=x.device), torch.zeros(6, device=x.device)
    y = kernels.batch_norm_relu(x, mean, var, training=True, momentum=1.0, activation=None)
    exact_var, exact_mean = torch.var_mean(x.double(), [0, 2])
    unit = torch.finfo(torch.float32).eps
    roundings = 3 if kernels.backend == "triton" else 0
    off = roundings * unit * offset
    torch.testing.assert_close(var.double(), exact_var, rtol=4 * unit + off**2, atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=max(roundings, 1) * unit, atol=0)
    allowed = (unit / 2 * offset + off) / exact_var.sqrt().min() + (16 * unit + off**2) * 5
    assert (y.double() - batch_norm_act(x.double(), activation=None)).abs().max() <= allowed


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_a_mean_whose_square_is_no_number(kernels, layout):
    deviations = torch.randn(40, 3, 33, dtype=torch.float64)
    x = laid_out((1 + 1e-10 * deviations) * 1e160, layout)
    y = kernels.batch_norm_relu(x, training=True, activation=None)
    exact = (deviations - deviations.mean((0, 2), keepdim=True)) / deviations.std((0, 2), correction=0, keepdim=True)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_a_constant_channel_has_no_variance(kernels, layout):
    if kernels.backend == "torch":
        pytest.skip("PyTorch's own statistics are less exact")
    x = torch.randn(6, 5, 90, device=kernels.device)
    x[:, 3] = 0.1
    x = laid_out(x, layout)
    mean, var = statistics(x)
    y = kernels.batch_norm_relu(x, mean, var, bias=torch.full((5,), 2.0, device=x.device), training=True, momentum=1.0)
    assert mean[3] == x[0, 3, 0] and var[3] == 0 and (y[:, 3] == 2).all()


# ---- special values and sizes ----------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_as_in_pytorch(kernels, value, layout, training):
    """They stay in their channel."""
    x = torch.randn(6, 20, 9, device=kernels.device)
    x[2, 3, 4] = value
    x = laid_out(x, layout).requires_grad_()
    g, running = torch.randn_like(x), statistics(x)
    results = []
    for run in (kernels.batch_norm_relu, lambda *of, **how: F.relu(F.batch_norm(*of, **how))):
        mean, var = (t.clone() for t in running)
        y = run(x, mean, var, training=training)
        results.append((y, torch.autograd.grad(y, x, g)[0], *(t.isfinite() for t in (mean, var))))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


@MODES
@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3)], ids=str)
def test_an_empty_batch(kernels, shape, training):
    """Training counts it and moves no statistics, as in torch."""
    x = torch.randn(shape, device=kernels.device, requires_grad=True)
    (weight, bias), (mean, var) = affine(x), (running := statistics(x))
    before, batches = [t.clone() for t in running], torch.tensor(0, device=x.device)
    y = kernels.batch_norm_relu(x, mean, var, weight, bias, training, num_batches_tracked=batches)
    assert y.shape == x.shape and int(batches) == training
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))
    dx, *others = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert dx.shape == x.shape and not any(t.any() for t in others)


def test_one_value_a_channel(kernels):
    x = torch.randn(1, 3, 1, device=kernels.device)
    check_step(kernels.batch_norm_relu, x, training=False)
    mean, var = running = statistics(x)
    before, batches = [t.clone() for t in running], torch.tensor(0, device=x.device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        kernels.batch_norm_relu(x.detach(), mean, var, training=True, num_batches_tracked=batches)
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True)) and int(batches) == 0
    assert kernels.batch_norm_relu(torch.ones(4, 0, 5, device=x.device), training=True).shape == (4, 0, 5)


@pytest.mark.parametrize("momentum", [0, 0.1, 1])
def test_running_statistics_of_several_steps(kernels, momentum):
    own, torchs = ([torch.zeros(6), torch.ones(6)] for _ in range(2))
    batches = torch.tensor(0)
    for shape in ((4, 6, 9), (3, 6), (2, 6, 5, 5)):
        x = torch.randn(shape) + 3
        kernels.batch_norm_relu(x, *own, training=True, momentum=momentum, num_batches_tracked=batches)
        F.batch_norm(x, *torchs, training=True, momentum=momentum)
        for a, b in zip(own, torchs, strict=True):
            torch.testing.assert_close(a, b)
    assert int(batches) == 3
    only = torch.tensor(0)
    kernels.batch_norm_relu(x, training=True, num_batches_tracked=only)
    assert int(only) == 1


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 5, 70_001), (600, 70, 9), (40, 3, 33, 31)], ids=str)
def test_the_same_bits_with_any_number_of_threads(kernels, shape, layout):
    """Several segments of a sum, and of the last not all."""
    if kernels.interpreted:
        pytest.skip("one program after another")
    x, g = (laid_out(torch.randn(shape) + 1, layout) for _ in range(2))
    weight, bias = affine(x)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        y = kernels.batch_norm_relu(x.requires_grad_(), mean, var, weight, bias, training=True)
        results.append((y, mean, var, *torch.autograd.grad(y, [x, weight, bias], g)))
    if kernels.backend != "torch":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    check_step(kernels.batch_norm_relu, x.detach(), g=g.detach())


# ---- derivatives -----------------------------------------------------------------------------------------------------


def away_from_0(shape, training: bool, running, weight, bias) -> torch.Tensor:
    """float64 x whose z is not near the kink, where a finite difference would step across."""
    given = () if training else running
    for _ in range(100):
        x = torch.randn(shape, dtype=torch.float64, device=weight.device)
        if batch_norm_act(x, weight, bias, *given, activation=None).abs().min() > 1e-2:
            return x.requires_grad_()
    raise AssertionError("no such x")


@MODES
@pytest.mark.parametrize("activation, slope", ACTIVATIONS[:3] + ACTIVATIONS[-1:])
@pytest.mark.parametrize("shape", [(4, 3, 5), (5, 3)], ids=str)
def test_numerical_derivatives(kernels, shape, activation, slope, training):
    like = torch.empty(shape, dtype=torch.float64, device=kernels.device)
    (weight, bias), running = affine(like), statistics(like)
    x = away_from_0(shape, training, running, weight, bias)

    def run(x, weight, bias):
        return kernels.batch_norm_relu(x, *running, weight, bias, training, 0.0, activation=activation, slope=slope)

    assert torch.autograd.gradcheck(run, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, weight, bias), fast_mode=True)


@MODES
def test_third_derivatives(kernels, training):
    if kernels.backend == "torch" and training:
        pytest.skip("in PyTorch's own the statistics are constants of the second derivative")
    like = torch.empty(4, 3, 6, dtype=torch.float64, device=kernels.device)
    (weight, bias), running = affine(like), statistics(like)
    leaves = away_from_0(like.shape, training, running, weight, bias), weight, bias
    found = []
    for run in (
        lambda *t: kernels.batch_norm_relu(t[0], *running, *t[1:], training, 0.0, activation="leaky", slope=0.3),
        lambda *t: batch_norm_act(*t, *(() if training else running), activation="leaky", slope=0.3),
    ):
        value, orders = run(*leaves).pow(4).sum(), []
        for _ in range(3):
            orders.append(torch.autograd.grad(value, leaves, create_graph=True))
            value = sum(t.square().sum() for t in orders[-1])
        found.append([t for order in orders for t in order])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@MODES
@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(range(3), n)], ids=str)
def test_some_of_the_gradients(kernels, wanted, training):
    x = torch.randn(4, 6, 20, device=kernels.device)
    tensors, running = [x, *(t.detach() for t in affine(x))], statistics(x)
    for i in wanted:
        tensors[i].requires_grad_()
    y = kernels.batch_norm_relu(x, *running, *tensors[1:], training, 0.0)
    exact = batch_norm_act(*tensors, *(() if training else running))
    g, leaves = torch.where(exact.detach().abs() < 1e-4, 0.0, torch.randn_like(x)), [tensors[i] for i in wanted]
    for a, b in zip(*(torch.autograd.grad(t, leaves, g) for t in (y, exact)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not kernels.batch_norm_relu(x, *running, *tensors[1:], training, 0.0).requires_grad


def test_backward_twice(kernels):
    x = torch.randn(4, 6, 20, requires_grad=True)
    y, g = kernels.batch_norm_relu(x, training=True), torch.randn(4, 6, 20)
    first = torch.autograd.grad(y, x, g, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, g)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("overwritten", ["x", "weight"])
def test_what_is_overwritten_before_backward_is_an_error(kernels, overwritten):
    leaf = torch.randn(4, 6, 20, requires_grad=True)
    x, weight = leaf * 1, torch.ones(6, requires_grad=True) * 1
    y = kernels.batch_norm_relu(x, weight=weight, training=True)
    {"x": x, "weight": weight}[overwritten].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_each_momentum_is_checked(kernels):
    x, running = torch.randn(4, 6, 20), [torch.zeros(6), torch.ones(6)]
    kernels.batch_norm_relu(x, *running, training=True, momentum=0.1)
    with pytest.raises(TypeError, match="momentum must be a number, got None"):
        kernels.batch_norm_relu(x, *running, training=True, momentum=None)


def test_training_is_a_bool_whatever_was_called_before(kernels):
    x = torch.randn(4, 6, 20)
    kernels.batch_norm_relu(x, training=True)
    with pytest.raises(TypeError, match="training must be True or False, got 1"):
        kernels.batch_norm_relu(x, training=1)


def test_calls_that_differ_in_what_requires_grad_are_known_beside_each_other(fusing, monkeypatch):
    if fusing == "torch":
        pytest.skip("nothing is kept")
    x, kept, keep = torch.randn(4, 6, 20), [], checked.keep
    monkeypatch.setattr(checked, "keep", lambda *call: kept.append(call) or keep(*call))
    weights = torch.ones(6), torch.ones(6, requires_grad=True)
    given = [(y, weight, torch.zeros(6)) for y in (x, x.clone().requires_grad_()) for weight in weights]
    for _ in range(3):
        for y, weight, bias in given:
            dk.batch_norm_relu(y, weight=weight, bias=bias, training=True)
    assert len(kept) == len(given)


def test_numbers_of_any_sort(kernels):
    x, found = torch.randn(4, 6, 20), []
    for number in (float, fractions.Fraction, np.float32):
        running = [torch.zeros(6), torch.ones(6)]
        options = {"momentum": number(1 / 8), "eps": number(1 / 64)}
        found.append([kernels.batch_norm_relu(x, *running, training=True, **options), *running])
    for other in found[1:]:
        for t, expected in zip(other, found[0], strict=True):
            assert torch.equal(t, expected)


def test_a_graph_in_which_torchs_norm_was_called_first(kernels):
    """It has saved the running statistics, which move without a word, as in torch."""
    x, running = torch.randn(4, 6, 20, requires_grad=True), statistics(torch.empty(4, 6, 20))
    gradients = []
    for norm in (kernels.batch_norm_relu, lambda *of, **told: F.relu(F.batch_norm(*of, **told))):
        moving = [t.clone() for t in running]
        loss = F.batch_norm(x, *moving, training=True).pow(3).sum() + norm(x, *moving, training=True).square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    for module in (torch.nn.BatchNorm1d(6, momentum=None), torch.nn.BatchNorm1d(6).to(torch.bfloat16)):
        fused, y = dk.FusedSequential(module.to(x.device)), x.to(module.weight.dtype)
        (module(y).sum() + fused(y).sum()).backward()
        assert int(module.num_batches_tracked) == 2 and module.running_mean.any()
    with torch.inference_mode():
        running = [torch.zeros(6), torch.ones(6)]
        assert kernels.batch_norm_relu(x, *running, training=True).is_inference() and running[0].any()


# ---- what is kept ----------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes(kernels, dtype, training):
    """x, and two numbers a channel; never more than BatchNorm and ReLU keep."""
    x = torch.randn(4, 8, 99).to(dtype).requires_grad_()
    running, own = statistics(x), []
    for run in (kernels.batch_norm_relu, lambda *of: F.relu(F.batch_norm(*of))):
        parameters = affine(x)
        with Saved() as saved:
            y = run(x, *running, *parameters, training)
        own.append(saved.bytes)
        y.backward(torch.randn_like(y))
        assert saved.alive == 0
    assert own[0] <= own[1]
    if kernels.backend != "torch":
        assert own[0] == x.nbytes + 4 * 8 * 4  # weight and bias too


def test_saved_tensors_on_another_place(kernels):
    x, g = torch.randn(3, 6, 40, requires_grad=True), torch.randn(3, 6, 40)
    expected = torch.autograd.grad(kernels.batch_norm_relu(x, training=True), x, g)[0]
    with torch.autograd.graph.save_on_cpu():
        y = kernels.batch_norm_relu(x, training=True)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], expected)


@native
def test_explain():
    x, running = torch.randn(3, 6, 40), [torch.zeros(6), torch.ones(6)]
    leaf = x.clone().requires_grad_()
    with dk.use_backend("cpu"):
        (call,) = dk.explain(lambda: dk.batch_norm_relu(leaf, *running, training=True), strict=True)
        (evaluated,) = dk.explain(lambda: dk.batch_norm_relu(x, *running), strict=True)
        compiled = dk.explain(torch.compile(lambda: dk.batch_norm_relu(x, *running)))[0]
    assert (call.op, call.backend, call.plan.name) == ("batch_norm_relu", "cpu", "statistics, then x")
    full, small = x.nbytes, 6 * 4
    assert call.saved == full + 2 * small and evaluated.saved == 0
    assert evaluated.backward.launches == 0 and call.forward.kernels == ("norm",)
    assert (compiled.backend, compiled.plan.name) == ("compiler", "decomposed")
    (empty,) = dk.explain(lambda: dk.batch_norm_relu(x[:0], *running))
    assert (empty.backend, empty.fallback) == ("reference", "")


@pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("training", [True, False])
def test_sums_that_nobody_wants_are_not_asked_for(training, monkeypatch):
    """Of frozen parameters: what dx needs of them a backend makes by itself."""
    asked, norm_grad = [], cpu.Cpu.norm_grad
    monkeypatch.setattr(cpu.Cpu, "norm_grad", lambda *given: asked.append(given[-1]) or norm_grad(*given))
    x, running = torch.randn(4, 6, 20, requires_grad=True), (torch.zeros(6), torch.ones(6))
    with dk.use_backend("cpu", strict=True):
        for weight in (torch.ones(6), torch.ones(6, requires_grad=True)):
            dk.batch_norm_relu(x, *running, weight, training=training).sum().backward()
    assert asked == [False, True]


def test_a_nan_has_the_same_gradient_with_and_without_a_graph_of_it(kernels):
    x = torch.randn(4, 6, 20, device=kernels.device)
    x[1, 2, 3] = torch.nan
    x.requires_grad_()
    mean, var = torch.zeros(6, device=kernels.device), torch.ones(6, device=kernels.device)
    y = kernels.batch_norm_relu(x, mean, var, activation="leaky", slope=0.25)
    g = torch.ones_like(y)
    (first,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (recorded,) = torch.autograd.grad(y, x, g, create_graph=True)
    torch.testing.assert_close(recorded, first)
