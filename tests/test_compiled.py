"""What torch.compile makes of a call: the operations of its graphs, what they keep, derivatives, shapes, devices."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from oracle import AVERAGES, smooth_gate
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import drsn_kernels as dk
from drsn_kernels.ops import dispatch

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(
        not hasattr(torch.compiler, "is_exporting"), reason="before torch 2.7 a traced call is always the reference"
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Graphs:
    """A backend for torch.compile: AOTAutograd and inductor's partitioner; the graphs are kept, and run as they are."""

    def __init__(self):
        self.forward: list[torch.fx.Graph] = []
        self.backward: list[torch.fx.Graph] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        compilers = {"fw_compiler": self._keeping(self.forward), "bw_compiler": self._keeping(self.backward)}
        compilers["inference_compiler"] = compilers["fw_compiler"]
        return aot_autograd(**compilers, partition_fn=min_cut_rematerialization_partition)(module, inputs)

    @staticmethod
    def _keeping(graphs: list) -> Callable:
        def compiler(module, inputs):
            graphs.append(module.graph)
            return make_boxed_func(module.forward)

        return compiler

    def ops(self) -> tuple[list[str], list[str]]:
        """Our operators in the forward and in the backward graphs, in order."""
        return tuple([_name(n) for graph in graphs for n in _ours(graph)] for graphs in (self.forward, self.backward))

    def saved(self) -> list[torch.Tensor]:
        """What the backward graph is given besides gradients, as fake tensors."""
        (graph,) = self.backward
        taken = (n for n in graph.nodes if n.op == "placeholder" and not n.name.startswith("tangents"))
        return [n.meta["val"] for n in taken if isinstance(n.meta["val"], torch.Tensor)]


def _ours(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if getattr(n.target, "namespace", None) == "drsn_kernels"]


def _name(node: torch.fx.Node) -> str:
    return node.target._schema.name.removeprefix("drsn_kernels::")


FORWARD, BACKWARD = ["abs_mean", "soft_threshold"], ["tau_grad", "shrink_grad"]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def results(run: Callable, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """What run returns, and the gradients of a fixed combination of it."""
    out = run(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    seed = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=seed).to(y) for y in out]
    return [*out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], weights)]


def same(found: list, expected: list) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("threshold, slope", [("soft", 0.0), ("soft", 0.25), ("hard", 0.1)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("average", AVERAGES)
def test_shrink_is_two_ops_each_way_and_keeps_planes_instead_of_x(average, residual, threshold, slope):
    linear = nn.Linear(6, 6).double()

    def run(x, r):
        # x, z and the residual's part are the compiler's business; what shrink reads is 2 * x
        z = 2 * x
        y, tau = dk.shrink(
            z, lambda a: linear(a).sigmoid(), average=average, residual=r if residual else None, return_tau=True,
            threshold=threshold, slope=slope,
        )  # fmt: skip
        return y, tau

    leaves = double(3, 6, 4, 10).requires_grad_(), double(3, 6, 4, 10).requires_grad_()
    leaves = leaves if residual else (leaves[0], double(3, 6, 4, 10))
    expected, graphs = results(run, *leaves), Graphs()
    with dk.use_backend("cpu"):
        same(results(torch.compile(run, fullgraph=True, backend=graphs), *leaves), expected)
    assert graphs.ops() == (FORWARD, BACKWARD)
    saved = graphs.saved()
    assert [t.shape for t in saved if t.dtype is torch.int32] == [(3, 3 * 6 * 64 // 32)]
    assert max(t.numel() for t in saved if t.is_floating_point()) == 36  # the gate's weight


@pytest.mark.parametrize("dims", [1, 2])
def test_a_unit_keeps_no_activation_for_the_step(dims):
    """Convolution, shrinkage, convolution: what is kept are their inputs, and not the step's."""
    conv = nn.Conv1d if dims == 1 else nn.Conv2d
    model = nn.Sequential(conv(2, 6, 3), dk.Shrinkage(6), conv(6, 4, 3)).double()
    x, graphs = double(3, 2, *[12] * dims).requires_grad_(), Graphs()
    expected = results(model, x)
    with dk.use_backend("cpu"):
        same(results(torch.compile(model, fullgraph=True, backend=graphs), x), expected)
    assert graphs.ops() == (FORWARD, BACKWARD)
    full = [t for t in graphs.saved() if t.is_floating_point() and t.shape[:2] == (3, 6) and t.dim() == dims + 2]
    assert len(full) == 1  # y, the second convolution's input


def test_what_needs_no_gradient_is_not_kept():
    module, x = dk.Shrinkage(6).eval(), torch.randn(3, 6, 40)
    with dk.use_backend("cpu"):
        graphs = Graphs()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=graphs)(x), module(x))
        assert graphs.ops() == (FORWARD, []) and [_planes(n) for n in _ours(graphs.forward[0])] == [0, 0]
        torch._dynamo.reset()
        graphs = Graphs()  # the gate learns, x has no gradient
        same(*(
            results(lambda x, w, run=run: run(x, lambda a: (a @ w).sigmoid()), x, torch.eye(6, requires_grad=True))
            for run in (torch.compile(dk.shrink, fullgraph=True, backend=graphs), dk.shrink)
        ))  # fmt: skip
        assert graphs.ops() == (FORWARD, ["tau_grad"])
        assert [_planes(n) for n in _ours(graphs.forward[0])] == [0, 2]


def _planes(node: torch.fx.Node) -> int:
    return len(node.meta["val"][1])


def test_each_operator_alone():
    x, tau = double(2, 3, 40).requires_grad_(), torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    for run, leaves, ops in (
        (dk.abs_mean, (x,), (["abs_mean"], ["abs_mean_grad"])),
        (dk.soft_threshold, (x, tau), (["soft_threshold"], ["soft_threshold_grad"])),
        (lambda x: dk.soft_threshold(x, 0.3, slope=0.2), (x,), (["soft_threshold"], ["shrink_grad"])),
        (lambda x, t: dk.soft_threshold(x, t[:, :1], threshold="hard"), (x, tau), None),
        (dk.soft_threshold, (x, torch.rand_like(x)), ([], [])),  # a tau for every element
        (lambda x: dk.soft_threshold(x[0, 0], 0.1), (x,), ([], [])),
    ):
        torch._dynamo.reset()
        graphs, expected = Graphs(), results(run, *leaves)
        with dk.use_backend("cpu"):
            same(results(torch.compile(run, fullgraph=True, backend=graphs), *leaves), expected)
        assert graphs.ops() == (ops or (["soft_threshold"], ["soft_threshold_grad"]))


def test_losses_on_either_output():
    """y, A (which a gate gives away) and both; A alone does without y's backward pass."""
    x, w = double(3, 6, 40).requires_grad_(), double(6, 6).requires_grad_()

    def run(x, w, which):
        seen = []
        y = dk.shrink(x, lambda a: seen.append(a) or (a @ w).sigmoid())
        return {"y": y, "A": seen[0] @ w, "both": (y, seen[0] * 3)}[which]

    for which, ops in (("y", BACKWARD), ("A", ["abs_mean_grad"]), ("both", BACKWARD)):
        torch._dynamo.reset()
        graphs, expected = Graphs(), results(lambda x, w, which=which: run(x, w, which), x, w)
        with dk.use_backend("cpu"):
            compiled = torch.compile(lambda x, w, which=which: run(x, w, which), fullgraph=True, backend=graphs)
            same(results(compiled, x, w), expected)
        assert graphs.ops()[1] == ops
        assert all(t.numel() < x.numel() for t in graphs.saved())


def test_a_gate_that_breaks_the_graph_or_changes_its_input():
    """The ops of one shrink then do not know of each other, and each writes its own part of dx."""
    linear, x = nn.Linear(6, 6).double(), double(3, 6, 40).requires_grad_()

    def breaks(a):
        torch._dynamo.graph_break()
        return linear(a).sigmoid()

    for gate, several in ((breaks, True), (lambda a: linear(a.mul_(2)).sigmoid(), False)):
        torch._dynamo.reset()
        graphs, run = Graphs(), lambda x, gate=gate: dk.shrink(x, gate)
        expected = results(run, x)
        with dk.use_backend("cpu"):
            same(results(torch.compile(run, backend=graphs), x), expected)
        assert (len(graphs.forward) > 1) == several
        assert sorted(graphs.ops()[1]) == ["abs_mean_grad", "soft_threshold_grad"]


def test_in_place():
    gate, x = smooth_gate(6).double(), double(3, 6, 40).requires_grad_()
    run = lambda x: dk.shrink(x * 2, gate, inplace=True)  # noqa: E731
    graphs, expected = Graphs(), results(run, x)
    with dk.use_backend("cpu"):
        same(results(torch.compile(run, fullgraph=True, backend=graphs), x), expected)
    assert graphs.ops() == (FORWARD, BACKWARD)


# ---- higher derivatives ----------------------------------------------------------------------------------------------


def penalty(run: Callable, x: torch.Tensor) -> torch.Tensor:
    (dx,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    return dx.pow(3).sum()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("slope", [0.0, 0.25])
@pytest.mark.parametrize("average", AVERAGES)
def test_second_derivatives_of_a_compiled_call(average, slope):
    """Of the ops, through the graph as torch.compile hands it on; AOTAutograd has no second derivative yet."""
    gate, x = smooth_gate(6, norm=True).double(), double(3, 6, 20).requires_grad_()
    run = lambda x: dk.shrink(x, gate, average=average, slope=slope)  # noqa: E731
    expected = results(lambda x: penalty(run, x), x)
    with dk.use_backend("cpu"):
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        same(results(lambda x: penalty(compiled, x), x), expected)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            penalty(compiled, x).backward()


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch does not trace torch.autograd.grad"
)
def test_a_first_and_second_derivative_within_one_graph(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    gate, x = smooth_gate(6).double(), double(3, 6, 20).requires_grad_()
    run = lambda x: penalty(lambda x: dk.shrink(x, gate), x)  # noqa: E731
    graphs, expected = Graphs(), results(run, x)
    with dk.use_backend("cpu"):
        same(results(torch.compile(run, fullgraph=True, backend=graphs), x), expected)
    assert set(FORWARD + BACKWARD) < set(sum(graphs.ops(), []))


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
def test_batch_sizes_and_lengths_without_recompilation(marked):
    """One graph for a batch that is marked dynamic; else torch makes the first one static, and one for all others."""
    module, counter = dk.Shrinkage(6).double(), CompileCounterWithBackend("aot_eager")
    with dk.use_backend("cpu"):
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for batch, length in [(4, 40), (7, 70), (3, 40), (64, 41), (5, 500)]:
            x = double(batch, 6, length).requires_grad_()
            if marked:
                torch._dynamo.mark_dynamic(x, 0), torch._dynamo.mark_dynamic(x, 2)
            same(results(compiled, x), results(module, x))
    assert counter.frame_count == (1 if marked else 2)


# ---- which form a call takes -----------------------------------------------------------------------------------------


def test_one_table_says_which_form_a_call_takes(monkeypatch):
    module, x = dk.Shrinkage(6), torch.randn(3, 6, 40)
    key = "cpu", torch.float32, "training"
    for form, ops in ((dispatch.DECOMPOSED, ([], [])), (dispatch.OPAQUE, (FORWARD, BACKWARD))):
        torch._dynamo.reset()
        monkeypatch.setitem(dispatch.IN_GRAPHS, key, (form, "a row"))
        graphs = Graphs()
        compiled = torch.compile(module, fullgraph=True, backend=graphs)
        compiled(x.requires_grad_()).sum().backward()
        assert graphs.ops() == ops
        (call,) = dk.explain(compiled, x)
        assert call.plan.name == form and "a row" in {call.plan.why, *(why for _, why in call.plan.not_taken)}
    with torch.no_grad():
        assert dispatch.in_graph(x) == dispatch.IN_GRAPHS["cpu", torch.float32, "inference"]
        assert dispatch.in_graph(x.half()) == dispatch.IN_GRAPHS["cpu", None, "inference"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_answers_for_every_call(device):
    with FakeTensorMode():
        tensors = [torch.empty(2, 3, 4, dtype=d, device=device) for d in (torch.float32, torch.float64, torch.bfloat16)]
    for x in tensors:
        for training in (True, False):
            with torch.set_grad_enabled(training):
                form, why = dispatch.in_graph(x)
            assert form in (dispatch.DECOMPOSED, dispatch.OPAQUE) and "no kernels for this device" not in why


def test_a_subclass_stays_with_the_reference():
    class Mine(torch.Tensor):
        pass

    held, gate, x = [], smooth_gate(6), torch.randn(3, 6, 40)

    def recording(module, inputs):
        held.extend(map(_name, _ours(module.graph)))
        return module.forward

    with dk.use_backend("cpu"):
        y = torch.compile(lambda x: dk.shrink(x, gate), backend=recording)(x.as_subclass(Mine))
    assert type(y) is Mine and not held
    torch.testing.assert_close(y.as_subclass(torch.Tensor), dk.shrink(x, gate))


# ---- a CUDA device that is not there ---------------------------------------------------------------------------------


# Without gradients: autograd asks for a CUDA device's stream, and a torch built for CPUs aborts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [dispatch.DECOMPOSED, dispatch.OPAQUE])
def test_the_graph_of_fake_cuda_tensors(monkeypatch, form, dtype):
    for key in dispatch.IN_GRAPHS:
        monkeypatch.setitem(dispatch.IN_GRAPHS, key, (form, "a row"))
    graphs = Graphs()
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 6, 5, 9, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.empty(6, 6, device="cuda")
        run = torch.compile(lambda x, w: dk.shrink(x, lambda a: (a @ w).sigmoid(), residual=x), backend=graphs)
        y = run(x, w)
    assert (y.device.type, y.dtype, y.stride()) == ("cuda", dtype, x.stride())
    assert graphs.ops() == ((FORWARD if form == dispatch.OPAQUE else []), [])


def test_the_ops_on_fake_cuda_tensors():
    ops = torch.ops.drsn_kernels

    def both_ways(x, g):
        A, _ = ops.abs_mean(x)
        y, planes = ops.soft_threshold(x, A, None, A, 0.0, 1.0, 3)
        meta = x.shape, x.stride(), x.dtype
        return A, y, planes, ops.tau_grad(g, planes, *meta), ops.shrink_grad(g, planes, *meta, 0.0, A)

    with FakeTensorMode():
        x = torch.empty(4, 6, 5, 9, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        graph = make_fx(both_ways)(x, x)
        found = graph(x, x)
    assert [_name(n) for n in _ours(graph.graph)] == ["abs_mean", "soft_threshold", "tau_grad", "shrink_grad"]
    sums, planes, like_x = ((4, 6), torch.float32), ((3, 4 * 45 * 8 // 32), torch.int32), (x.shape, x.dtype)
    assert [(t.shape, t.dtype) for t in found] == [sums, like_x, planes, sums, like_x]
    assert {t.device.type for t in found} == {"cuda"} and found[1].stride() == found[4].stride() == x.stride()
