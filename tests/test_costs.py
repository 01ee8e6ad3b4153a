"""The costs of plans against what a call really launches, allocates and keeps. Counts only: nothing is timed."""

import contextlib

import pytest
import steps
import torch
from oracle import AVERAGES
from test_autograd_memory import Saved

import drsn_kernels as dk
from drsn_kernels import checked
from drsn_kernels.backends import cost, cpu, cpu_called, cpu_gated, gpu
from drsn_kernels.backends.step import Cost
from drsn_kernels.ops import dispatch
from drsn_kernels.reference import Rule

pytestmark = pytest.mark.unpoisoned  # poison would be operations of its own

SHAPES = [(4, 6, 100), (3, 8, 5, 7), (2, 4, 33), (64, 5, 3)]  # small: the cpu backend keeps large outputs in an arena
LAYOUTS = ["rows", "channels_last"]


def features(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


class Counting(cost.Counting):
    """Leaves out the tensor without memory that layout_of asks for the strides of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if kwargs and kwargs.get("device") == torch.device("meta"):
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Measured:
    """Kernels and torch operations of what runs inside, and the bytes that torch is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str):
        self.monkeypatch, self.backend = monkeypatch, backend

    @contextlib.contextmanager
    def __call__(self):
        with self.monkeypatch.context() as patch, Counting() as mode:
            patch.setattr(dispatch, "_dispatch_modes", lambda: 0)  # or the operators would step aside for the mode
            self.mode = mode
            if self.backend == "cpu":
                patch.setattr(checked, "calls", {})  # passes that count are not for others
                for module in (cpu, cpu_called):
                    patch.setattr(module, "walk", lambda *of: Counted(cpu_gated.walk(*of), self))
                patch.setattr(cpu_gated, "prepared", self.passes)
            elif self.backend == "triton":
                from drsn_kernels.backends.gpu import launch

                patch.setattr(launch.Prepared, "_launch", lambda it, _: mode.kernels.append(it.fn.__name__))
            yield mode


    def passes(self, *of) -> cpu_gated.Gated:
        gated = cpu_gated.Gated(*of)
        gated._gate = Counted(gated._gate, self, "gated_")
        return gated


class Counted:
    """C++ kernels, each call noted by its name with whoever measures then."""

    def __init__(self, kernels, measured: Measured, prefix: str = ""):
        self.kernels, self.measured, self.prefix = kernels, measured, prefix

    def __getattr__(self, name: str):
        kernel = getattr(self.kernels, name)

        def run(*tensors, **arguments):
            self.measured.mode.kernels.append(self.prefix + name)
            return kernel(*tensors, **arguments)

        return run


@pytest.fixture(params=["cpu", "torch", "triton"])
def backend(request) -> str:
    """triton: planned and launched, but nothing runs, so results are whatever memory held."""
    if request.param == "cpu" and cpu._cpu is None:
        pytest.skip("no compiled CPU kernels")
    if request.param == "triton" and not (gpu.INSTALLED and gpu.interpreting()):
        pytest.skip("needs Triton, interpreted")
    with dk.use_backend(request.param, strict=True, save="memory"):  # x kept instead: at the end of the file
        yield request.param


@pytest.fixture
def measured(backend, monkeypatch) -> Measured:
    return Measured(monkeypatch, backend)


def check(op, costs, measured, leaves: list[torch.Tensor], module=None, given: int = 0) -> None:
    """Forward and backward of op() against its costs. given: bytes that count as kept and are the caller's."""
    forward, backward = costs
    with Saved(module) as saved, measured() as ran:
        y = op()
    outputs = sum(t.numel() * t.element_size() for t in (y if isinstance(y, tuple) else (y,)))
    assert tuple(ran.kernels) == forward.kernels
    assert ran.allocated == outputs + forward.saved + forward.workspace - given
    assert saved.bytes == forward.saved
    if not leaves:
        assert (backward.launches, backward.bytes, saved.bytes) == (0, 0, 0)
        return
    y = y[0] if isinstance(y, tuple) else y
    g = torch.empty_like(y).fill_(1)
    with measured() as ran:
        gradients = torch.autograd.grad(y, leaves, g)
    assert tuple(ran.kernels) == backward.kernels
    made = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gradients}
    assert ran.allocated <= sum(made.values()) + backward.workspace
    assert ran.allocated >= max(sum(made.values()), backward.workspace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_abs_mean(backend, measured, shape, layout, dtype):
    x = features(shape, layout, dtype).requires_grad_()
    common = {"channels_last": layout == "channels_last"}
    for keep in (True, False):
        costs, t = steps.cost(steps.abs_mean(shape, dtype, grad=keep, **common), backend), x if keep else x.detach()
        check(lambda t=t: dk.abs_mean(t), costs, measured, [t] if keep else [])


@pytest.mark.parametrize("wants", ["x", "tau", "both", "none"])
@pytest.mark.parametrize("columns", [True, False], ids=["a tau for each channel", "for each sample"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_threshold(backend, measured, layout, columns, wants):
    shape = (4, 6, 100)
    x, tau = features(shape, layout), torch.rand(4, 6 if columns else 1)
    x.requires_grad_(wants in ("x", "both"))
    tau.requires_grad_(wants in ("tau", "both"))
    costs = steps.cost(steps.soft_threshold(
        shape, tau=tuple(tau.shape), channels_last=layout == "channels_last", grad=wants != "none",
        input_grad=x.requires_grad, tau_grad=tau.requires_grad), backend)  # fmt: skip
    check(lambda: dk.soft_threshold(x, tau), costs, measured, [t for t in (x, tau) if t.requires_grad])


@pytest.mark.parametrize("mode", ["train", "frozen input", "no grad", "returned tau"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("average", ["channel", None])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_shrink_with_any_gate(backend, measured, shape, average, residual, mode):
    """The gate is a parameter: nothing of its own is in the counts."""
    if backend == "torch" and average is None and mode in ("train", "returned tau"):
        pytest.skip("this gate leaves A without a gradient, and pure PyTorch then does less than budgeted")
    x, alpha = features(shape, "rows"), torch.rand(shape[:2])
    added = torch.randn(shape) if residual else None
    leaves = []
    if mode != "no grad":
        x.requires_grad_(mode != "frozen input")
        alpha.requires_grad_()
        leaves = [t for t in (x, alpha) if t.requires_grad]
    costs = steps.cost(steps.shrink(
        shape, fused=False, average=average, residual=residual, grad=mode != "no grad",
        input_grad=mode != "frozen input", return_tau=mode == "returned tau"), backend)  # fmt: skip

    def op():
        return dk.shrink(x, lambda _: alpha, average=average, residual=added, return_tau=mode == "returned tau")

    check(op, costs, measured, leaves, given=0 if mode == "no grad" else alpha.numel() * 4)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen input", "no grad"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("shape", [(16, 8, 200), (6, 32, 7), (4, 8, 5, 7), (200, 16, 3)], ids=str)
def test_shrink_with_the_standard_gate(backend, measured, shape, average, norm, mode):
    if backend == "torch":
        pytest.skip("calls the gate")
    module = dk.Shrinkage(shape[1], average=average, norm=norm, reduction=2).train(mode in ("train", "frozen input"))
    x = features(shape, "channels_last" if len(shape) == 4 else "rows").requires_grad_(mode in ("train", "eval"))
    leaves = [*([x] if x.requires_grad else []), *module.parameters()] if mode != "no grad" else []
    costs = steps.cost(steps.shrink(
        shape, average=average, norm=norm, hidden=shape[1] // 2, training=module.training,
        channels_last=len(shape) == 4, grad=mode != "no grad", input_grad=x.requires_grad), backend)  # fmt: skip
    with torch.set_grad_enabled(mode != "no grad"):
        op = torch.no_grad()(lambda: module(x)) if mode == "no grad" else lambda: module(x)
        check(op, costs, measured, leaves, module)


@pytest.mark.parametrize("rule", [Rule(0.0, 0.0), Rule(0.3, 0.7)], ids=["hard", "leaky"])
def test_other_thresholds(backend, measured, rule):
    shape, options = (4, 6, 100), {"threshold": "soft" if rule.offset else "hard", "slope": rule.inside}
    x, tau, alpha = (t.requires_grad_() for t in (features(shape, "rows"), torch.rand(4, 6), torch.rand(4, 6)))
    costs = steps.cost(steps.soft_threshold(shape, rule=rule), backend)
    check(lambda: dk.soft_threshold(x, tau, **options), costs, measured, [x, tau])
    costs = steps.cost(steps.shrink(shape, rule=rule), backend)
    op = lambda: dk.shrink(x, lambda _: alpha, **options)  # noqa: E731
    check(op, costs, measured, [x, alpha], given=alpha.numel() * 4)


@pytest.mark.parametrize("wants", ["x and factors", "x", "factors", "none"])
@pytest.mark.parametrize("columns", [True, False], ids=["a factor for each channel", "for each sample"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_excite(backend, measured, layout, residual, columns, wants):
    """The gate is a parameter: nothing of its own is in the counts."""
    if backend == "torch" and wants == "x and factors":
        pytest.skip("this gate leaves A without a gradient, and pure PyTorch then does less than budgeted")
    shape = (4, 6, 100)
    x, w = features(shape, layout), torch.rand(4, 6 if columns else 1)
    x.requires_grad_("x" in wants), w.requires_grad_("factors" in wants)
    added = features(shape, layout) if residual else None
    costs = steps.cost(steps.squeeze_excite(
        shape, outputs=w.shape[1], residual=residual, channels_last=layout == "channels_last",
        grad=wants != "none", input_grad=x.requires_grad, gate_grad=w.requires_grad), backend)  # fmt: skip
    given = (x.numel() * w.requires_grad + w.numel() * x.requires_grad) * 4
    leaves = [t for t in (x, w) if t.requires_grad]
    check(lambda: dk.squeeze_excite(x, lambda _: w, residual=added), costs, measured, leaves, given=given)


@pytest.mark.parametrize("wants", ["x and parameters", "x", "parameters", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_relu(backend, measured, layout, dtype, training, wants):
    """weight and bias are kept too, and are the caller's."""
    if backend != "cpu":
        pytest.skip("PyTorch's own operations, or no kernels of it")
    shape = (4, 6, 100)
    x, parameters = features(shape, layout, dtype), [torch.rand(6) for _ in range(2)]
    running = [torch.zeros(6), torch.ones(6)]
    x.requires_grad_("x" in wants), [t.requires_grad_("parameters" in wants) for t in parameters]
    forward, backward = steps.cost(steps.batch_norm_relu(
        shape, dtype, training=training, channels_last=layout == "channels_last", input_grad=x.requires_grad,
        parameter_grad="parameters" in wants), backend)  # fmt: skip
    leaves = [t for t in (x, *parameters) if t.requires_grad]
    with Saved() as saved, measured() as ran:
        y = dk.batch_norm_relu(x, *running, *parameters, training)
    small = 6 * 4
    assert tuple(ran.kernels) == forward.kernels == ("norm",)
    assert ran.allocated == y.nbytes + 2 * small
    assert saved.bytes == forward.saved + (2 * small if leaves else 0)
    assert forward.saved == (x.nbytes + 2 * small if leaves else 0)
    if leaves:
        g = torch.ones_like(y)
        with measured() as ran:
            gradients = torch.autograd.grad(y, leaves, g)
        assert tuple(ran.kernels) == backward.kernels == ("norm_grad",)
        made = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gradients}
        assert sum(made.values()) <= ran.allocated <= x.requires_grad * x.nbytes + 2 * small
        assert backward.read == 2 * x.nbytes + 4 * small
    else:
        assert backward.launches == 0


FULL, PLANE, SMALL = 128 * 64 * 1024 * 4, 128 * 64 * 1024 // 8, 128 * 64 * 4


@pytest.mark.parametrize("backend_name", ["cpu", "triton"])
def test_the_feature_map_is_moved_as_designed(backend_name):
    """Any gate: 2 reads and a write each way, and 3 bits an element kept."""
    if backend_name == "triton" and not gpu.INSTALLED:
        pytest.skip("Triton is not installed")
    forward, backward = steps.cost(steps.shrink((128, 64, 1024), fused=False), backend_name)
    assert 0 <= forward.read - 2 * FULL <= 3 * SMALL and 0 <= forward.written - FULL - 3 * PLANE <= 3 * SMALL
    assert 0 <= backward.read - 2 * FULL - 5 * PLANE <= 6 * SMALL and 0 <= backward.written - FULL <= 4 * SMALL
    assert forward.saved == 3 * PLANE + 2 * SMALL
    more, _ = steps.cost(steps.shrink((128, 64, 1024), fused=False, residual=True), backend_name)
    assert more.read - forward.read == FULL and more.written == forward.written
    assert forward.saved / (FULL / 4) < 0.42  # bytes an element


def test_one_pass_reads_once():
    if not gpu.INSTALLED:
        pytest.skip("Triton is not installed")
    forward, backward = steps.cost(steps.shrink((128, 64, 256), norm=False), "triton")
    full = 128 * 64 * 256 * 4
    assert forward.kernels == ("forward_kernel",)
    assert backward.kernels == ("backward_kernel", "linear_grad_kernel")
    assert full <= forward.read < 1.01 * full and full <= backward.read < 1.15 * full
    _, backward = steps.cost(steps.shrink((1024, 64, 256), norm=False), "triton")
    assert backward.kernels == ("backward_kernel", "linear_grad_kernel", "add_shares_kernel")  # the batch is shared out
    forward, backward = steps.cost(steps.shrink((128, 64, 256), norm=True), "triton")
    assert (forward.launches, backward.launches) == (4, 4)


def test_costs_add_up():
    one, two = Cost(1, 2, ("a",), 3, 4), Cost(10, 20, ("b", "c"), 30, 40)
    assert one + two == Cost(11, 22, ("a", "b", "c"), 33, 44)
    assert ((one + two).launches, (one + two).bytes) == (3, 33)


# ---- the torch backend where it keeps x instead of planes ------------------------------------------------------------


@pytest.fixture
def keeping_x(monkeypatch):
    with dk.use_backend("torch", strict=True):
        yield Measured(monkeypatch, "torch")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeping_x(keeping_x, layout, dtype):
    shape, common = (4, 6, 100), {"channels_last": layout == "channels_last"}
    x, tau, alpha = features(shape, layout, dtype).requires_grad_(), torch.rand(4, 6), torch.rand(4, 6)
    costs = steps.cost(steps.abs_mean(shape, dtype, **common), "torch")
    check(lambda: dk.abs_mean(x), costs, keeping_x, [x], given=x.nbytes)
    for leaf in (x, tau, alpha):
        leaf.requires_grad_()
    costs = steps.cost(steps.soft_threshold(shape, dtype, **common), "torch")
    check(lambda: dk.soft_threshold(x, tau), costs, keeping_x, [x, tau], given=x.nbytes + tau.nbytes)
    costs = steps.cost(steps.shrink(shape, dtype, fused=False, **common), "torch")
    given = x.nbytes + alpha.nbytes
    check(lambda: dk.shrink(x, lambda a: alpha), costs, keeping_x, [x, alpha], given=given)
    with torch.no_grad():
        costs = steps.cost(steps.shrink(shape, dtype, fused=False, grad=False, **common), "torch")
        check(lambda: dk.shrink(x, lambda a: alpha), costs, keeping_x, [])
