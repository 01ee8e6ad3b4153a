"""explain: what it says of each way a call can go, that it is what the call does, and that it leaves no trace."""

import functools
import sys
import threading

import pytest
import steps
import torch
from oracle import smooth_gate
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import drsn_kernels as dk
from drsn_kernels import recording
from drsn_kernels.backends import cpu, gpu
from drsn_kernels.ops import dispatch
from drsn_kernels.untouched import untouched

pytestmark = pytest.mark.unpoisoned
needs_cpu = pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")
interpreted = pytest.mark.skipif(not (gpu.INSTALLED and gpu.interpreting()), reason="needs Triton, interpreted")


# ---- what it says ----------------------------------------------------------------------------------------------------


@needs_cpu
def test_a_model_in_training(capsys):
    """What is returned prints as a table; explain itself prints nothing."""
    model = dk.models.paper_network("drsn-cw")
    found = dk.explain(model, torch.randn(4, 1, 2048))
    names = [name for name, module in model.named_modules() if isinstance(module, dk.Shrinkage)]
    shrinks = [call for call in found if call.op == "shrink"]
    assert [call.module for call in shrinks] == names and len(shrinks) == 12
    norms = [call for call in found if call.op == "batch_norm_relu"]
    assert len(norms) == 25 and len(found) == 37 and {call.backend for call in norms} == {"cpu"}
    first = shrinks[0]
    assert (first.op, first.shape, first.dtype) == ("shrink", (4, 4, 512), torch.float32)
    assert (first.layout, first.backend, first.fused, first.plan.index_bits) == ("rows", "cpu", True, 64)
    assert first.why == "the default for cpu tensors" and not first.fallback
    forward, backward = steps.cost(steps.shrink((4, 4, 512), residual=True), "cpu")
    assert (first.forward, first.backward, first.saved) == (forward, backward, forward.saved)
    table = str(found)
    assert table.count("\n") > 38 and "1-37: cpu: the default for cpu tensors" in table
    assert all(name in table for name in names)
    assert repr(found) == table and capsys.readouterr().out == ""


@needs_cpu
def test_eval_and_no_grad_keep_nothing():
    model, x = dk.models.paper_network("drsn-cs").eval(), torch.randn(4, 1, 2048)
    with torch.no_grad():
        found = dk.explain(model, x)
    assert {(call.saved, call.backward.launches) for call in found} == {(0, 0)}
    assert all(call.saved > 0 for call in dk.explain(model, x))


@needs_cpu
def test_functions_and_each_operator():
    gate = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.Sigmoid())

    def run(x, residual):
        y = dk.shrink(x, gate, residual=residual)
        return dk.abs_mean(y), dk.soft_threshold(y[..., ::2], 0.5)

    x = torch.randn(3, 6, 40, requires_grad=True)
    found = dk.explain(run, x, torch.randn(3, 6, 40))
    assert [(call.op, call.layout, call.fused) for call in found] == [
        ("shrink", "rows", False), ("abs_mean", "rows", None), ("soft_threshold", "strided", None)
    ]  # fmt: skip
    assert found[0].gate == "the gate is not Linear, [BatchNorm1d], ReLU, Linear, Sigmoid"
    assert ("gate fused", found[0].gate) in found[0].plan.not_taken
    assert found[0].forward == steps.cost(steps.shrink((3, 6, 40), fused=False, residual=True), "cpu")[0]
    assert [plan for plan, _ in found[2].plan.not_taken] == ["contiguous runs"]
    assert [call.module for call in found] == ["", "", ""]


@needs_cpu
def test_the_cpu_plans_of_the_standard_gate():
    module, x = dk.Shrinkage(16), torch.randn(64, 16, 1024)
    (training,) = dk.explain(module, x)
    with torch.no_grad():
        (blocks,) = dk.explain(module.eval(), x)
        (few,) = dk.explain(module, x[:2])
    assert (training.plan.name, blocks.plan.name, few.plan.name) == ("stages", "blocks", "stages")
    assert blocks.plan.not_taken == () and "whole batch" in training.plan.why
    assert dict(training.plan.not_taken)["blocks"].startswith("batch statistics")
    assert dict(few.plan.not_taken)["blocks"].startswith("2 samples are too few")
    full = x.numel() * 4
    assert [call.forward.read // full for call in (training, blocks)] == [2, 1]  # a block is read again from the cache


def test_layouts():
    x = torch.randn(2, 8, 6, 6)
    for t, layout in (
        (x, "rows"), (x.contiguous(memory_format=torch.channels_last), "channels_last"), (x[:, :, ::2], "strided"),
        (x.transpose(2, 3), "rows"), (torch.randn(2, 6, 8).transpose(1, 2), "channels_last"),
    ):  # fmt: skip
        assert dk.explain(dk.abs_mean, t)[0].layout == layout


def test_a_backend_that_was_asked_for(fusing):
    (call,) = dk.explain(dk.Shrinkage(6), torch.randn(3, 6, 40))
    assert (call.backend, call.why) == (fusing, "use_backend or DRSN_BACKEND asks for it")
    assert call.fused == (fusing == "cpu") and not call.fallback
    assert call.forward.launches == (1 if fusing == "cpu" else len(call.forward.kernels))


# ---- the plan is the launch's ----------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_triton_explains_with_the_objects_of_its_launches(monkeypatch, norm):
    from drsn_kernels.backends.gpu import launch

    launched = []
    monkeypatch.setattr(launch.Prepared, "_launch", lambda prepared, _: launched.append(prepared))
    module, x = dk.Shrinkage(16, norm=norm), torch.randn(8, 16, 100, requires_grad=True)
    with dk.use_backend("triton", strict=True):
        (call,) = dk.explain(module, x)
        forward = list(launched)
        module(x).sum().backward()
        assert [prepared.plan for prepared in launched[: len(forward)]] == [prepared.plan for prepared in forward]
    assert (call.backend, call.plan.index_bits, call.fused) == ("triton", 32, True)
    assert len(call.plan.launches) == len(launched) - len(forward)
    for planned, prepared in zip(call.plan.launches, launched[len(forward) :], strict=True):
        assert planned.kernel == prepared.fn.__name__ and planned.programs == prepared.grid[0]
        # g is expanded here, which is another plan
        assert planned.plan is prepared.plan or "grad" in planned.kernel or "backward" in planned.kernel
    if norm:
        assert call.plan.name.startswith("several launches")
        assert dict(call.plan.not_taken)["one pass"].startswith("BatchNorm in training couples the batch")
    else:
        assert (call.plan.name, call.plan.not_taken) == ("one pass", ())


@interpreted
def test_triton_says_why_a_slower_plan_is_taken(monkeypatch):
    from drsn_kernels.backends.gpu import launch

    monkeypatch.setattr(launch.Prepared, "_launch", lambda *_: None)
    with dk.use_backend("triton", strict=True), torch.no_grad():
        (few,) = dk.explain(dk.Shrinkage(64, norm=False), torch.randn(64, 64, 256))
        (short,) = dk.explain(dk.Shrinkage(64), torch.randn(16, 64, 3))
        (any_gate,) = dk.explain(lambda x: dk.shrink(x, torch.sigmoid), torch.randn(4, 6, 50))
    assert dict(few.plan.not_taken)["one pass"] == "64 programs of whole samples leave most of 132 multiprocessors idle"
    assert short.plan.name == "several launches"
    assert short.plan.why.startswith("the gate stands between reduce and map")
    assert any_gate.plan.not_taken == (("gate fused", "the gate is not an nn.Sequential"),)
    assert any_gate.plan.launches[0].plan.why.startswith("an access for each element")


# ---- where no kernel runs --------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_the_reference_says_why():
    x = torch.randn(2, 3, 5)
    reasons = []

    def ask(fn, *args):
        (call,) = dk.explain(fn, *args)
        assert (call.backend, call.forward, call.saved) == ("reference", None, None)
        reasons.append(call.why)
        return call.fallback == call.why

    assert ask(torch.func.grad(lambda t: dk.abs_mean(t).sum()), x)
    assert ask(torch.func.vmap(lambda t: dk.shrink(t, torch.sigmoid)), x[None])
    assert ask(dk.abs_mean, x.as_subclass(Subclass))
    with forward_ad.dual_level():
        assert ask(dk.abs_mean, x)
    assert ask(lambda t: torch.jit.trace(dk.abs_mean, t, check_trace=False), x)
    assert ask(dk.abs_mean, torch.complex(x, x).conj().imag)
    with FlopCounterMode(display=False):
        assert ask(dk.abs_mean, x)
    assert ask(dk.abs_mean, FakeTensorMode().from_tensor(x))
    assert not ask(dk.abs_mean, x[:0])  # nothing to be faster at
    assert reasons == [
        "a torch.func transform (grad, vmap, jvp, ...) is active",
        "a torch.func transform (grad, vmap, jvp, ...) is active",
        "a Subclass is a tensor subclass", "forward-mode AD is active",
        "torch.jit.trace records this call", "a tensor carries a minus that is not yet computed (is_neg)",
        "a dispatch mode (FakeTensorMode, a FLOP counter, ...) watches every operation",
        "a FakeTensor is a tensor subclass", "x has no elements",
    ]  # fmt: skip


def test_compiled_calls_are_reported_and_not_compiled():
    torch._dynamo.reset()
    module, x = dk.Shrinkage(6), torch.randn(3, 6, 40)
    counter = CompileCounter()
    run = torch.compile(module, backend=counter, fullgraph=True)
    for _ in range(12):  # more than torch.compile's limit of recompilations
        (call,) = dk.explain(run, x)
    assert (call.module, call.backend, call.plan.name) == ("", "compiler", "decomposed")
    reason = dispatch.IN_GRAPHS["cpu", torch.float32, "training"][1]
    assert call.plan.not_taken == (("opaque ops", reason),) and not call.fallback
    assert counter.frame_count == 0
    run(x), run(x)
    assert counter.frame_count == 1
    dk.explain(run, x)
    run(x)
    assert counter.frame_count == 1
    assert [call.module for call in dk.explain(nn.Sequential(run), x)] == ["0"]
    around = nn.Sequential(nn.Identity(), module)
    around[1].compile(backend=counter)
    assert [(call.module, call.backend) for call in dk.explain(around, x)] == [("1", "compiler")]
    outside = torch.compiler.disable(lambda t: dk.abs_mean(t))
    (call,) = dk.explain(torch.compile(lambda t: outside(t) + 1, backend=counter), x)
    assert call.backend != "compiler"


@needs_cpu
def test_compiled_calls_with_a_forced_backend_stay_opaque():
    with dk.use_backend("cpu"):
        (call,) = dk.explain(torch.compile(dk.Shrinkage(6), backend="eager"), torch.randn(3, 6, 40))
    assert (call.plan.name, call.plan.why) == ("opaque ops", "a backend is forced")


class Mine(torch.Tensor):
    pass


@needs_cpu
@pytest.mark.parametrize(
    "x, tau, reason",
    [
        (torch.randn(3, 6, 40), torch.rand(3, 6, 1), ""),
        (torch.randn(3, 6, 40), torch.rand(3, 6, 40), "one threshold for each plane"),
        (torch.randn(40), torch.rand(40), "one threshold for each plane"),
        (torch.randn(40), 0.5, "one threshold for each plane"),
        (torch.randn(3, 6, 40).as_subclass(Mine), torch.rand(3, 6), "a tensor subclass"),
    ],
    ids=["rows", "a tau for each element", "rank 1", "rank 1, one tau", "a subclass"],
)
def test_compiled_calls_are_reported_as_what_the_graph_holds(x, tau, reason):
    torch._dynamo.reset()
    held = []

    def backend(module, inputs):
        held.extend(str(node.target) for node in module.graph.nodes if "drsn_kernels" in str(node.target))
        return module.forward

    run = torch.compile(lambda x, tau: dk.soft_threshold(x, tau), backend=backend)
    with dk.use_backend("cpu"):
        (call,) = dk.explain(run, x, tau)
        run(x, tau)
    assert (call.plan.name == "opaque ops") == bool(held) == (reason == "")
    assert reason in dict(call.plan.not_taken).get("opaque ops", "")


@needs_cpu
@pytest.mark.parametrize("name, value", [("_CAN_TELL_EXPORT", False), ("_CAN_TELL", False)])
def test_compiled_calls_of_a_torch_that_cannot_tell(monkeypatch, name, value):
    monkeypatch.setattr(dispatch, name, value)
    with dk.use_backend("cpu"):
        (call,) = dk.explain(torch.compile(dk.Shrinkage(6), backend="eager"), torch.randn(3, 6, 40))
    assert call.plan.name == "decomposed" and dict(call.plan.not_taken)["opaque ops"]


class Ending:
    """recording, where another thread's explain ends as soon as `active` was read."""

    def __init__(self):
        self.told, self.reads = [], 0

    @property
    def active(self):
        self.reads += 1
        return (lambda *args, **kwargs: self.told.append(args)) if self.reads == 1 else None


@needs_cpu
@pytest.mark.parametrize(
    "name, call",
    [
        ("abs_mean", dk.abs_mean),
        ("soft_threshold", lambda x: dk.soft_threshold(x, 0.5)),
        ("shrink", lambda x: dk.shrink(x, torch.sigmoid)),
        ("gated_shrink", dk.Shrinkage(6)),
        ("squeeze_excite", lambda x: dk.squeeze_excite(x, torch.sigmoid)),
    ],
    ids=["abs_mean", "soft_threshold", "shrink", "a fused gate", "squeeze_excite"],
)
def test_an_explain_of_another_thread_may_end_at_any_moment(monkeypatch, name, call):
    ending = Ending()
    monkeypatch.setattr(sys.modules[f"drsn_kernels.ops.{name}"], "recording", ending)
    call(torch.randn(3, 6, 40))
    assert len(ending.told) == 1


# ---- strict ----------------------------------------------------------------------------------------------------------


@needs_cpu
def test_strict_raises_instead_of_a_fallback():
    x = torch.randn(3, 6, 40)
    hooked = dk.Shrinkage(6)
    hooked.fc[0].register_forward_hook(lambda *_: None)
    block = nn.Sequential(nn.Identity(), hooked)
    assert "hooks" in dk.explain(block, x)[0].fallback
    with pytest.raises(RuntimeError, match=r"strict: shrink in 1 of \(3, 6, 40\).*not fused: the gate has hooks"):
        dk.explain(block, x, strict=True)
    assert recording.active is None
    with pytest.raises(RuntimeError, match="strict: "):
        dk.explain(torch.func.grad(lambda t: dk.abs_mean(t).sum()), x, strict=True)
    with pytest.raises(RuntimeError, match="running in pure PyTorch: x has 9 dimensions"):
        dk.explain(dk.abs_mean, torch.randn(2, 3, *[1] * 7), strict=True)
    fine = nn.Sequential(dk.Shrinkage(6), dk.Shrinkage(6, activation=nn.GELU))  # another gate is no fallback
    assert len(dk.explain(fine, x, strict=True)) == 2
    with dk.use_backend("torch"):  # nor is what the user asks for
        assert len(dk.explain(fine, x, strict=True)) == 2


def test_calls_of_other_threads_are_neither_told_of_nor_strict():
    x, refused = torch.randn(3, 6, 40), torch.randn(2, 3, *[1] * 7)
    raised = []

    def elsewhere():
        try:
            dk.abs_mean(refused)  # a fallback
        except RuntimeError as error:
            raised.append(error)

    def run(t):
        other = threading.Thread(target=elsewhere)
        other.start(), other.join()
        return dk.abs_mean(t)

    for strict in (False, True):
        assert [call.op for call in dk.explain(run, x, strict=strict)] == ["abs_mean"]
    assert raised == []


def test_keyword_arguments_are_fns_own():
    x = torch.randn(3, 6, 40)
    (call,) = dk.explain(dk.shrink, x=x, gate=torch.sigmoid, residual=x.clone(), strict=False)
    assert (call.op, call.shape) == ("shrink", (3, 6, 40))
    (call,) = dk.explain(lambda t, fn: fn(t), x, fn=dk.abs_mean, strict=True)
    assert call.op == "abs_mean"
    model = nn.Sequential(dk.Shrinkage(6))
    (call,) = dk.explain(lambda t, *, models: models["a"](t), x, models={"a": model})
    assert call.module == "argument['models']['a'].0"
    with pytest.raises(TypeError, match="thoroughly"):
        dk.explain(dk.abs_mean, x, thoroughly=True)


def test_what_is_refused():
    with pytest.raises(TypeError, match="fn must be a module or a callable, got int"):
        dk.explain(3, torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="x must have shape"):
        dk.explain(dk.abs_mean, torch.randn(2, 3))
    assert recording.active is None
    assert str(dk.explain(torch.abs, torch.randn(2))) == "no operator of drsn_kernels was called"


# ---- it leaves no trace ----------------------------------------------------------------------------------------------


def state(module: nn.Module) -> list:
    return [
        *((name, t, t.clone(), t._version) for name, t in module.named_buffers()),
        *((name, p, p.clone(), p._version) for name, p in module.named_parameters()),
        *((name, m.training) for name, m in module.named_modules()),
    ]


def same(before: list, after: list) -> bool:
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return all(all(map(equal, a, b)) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("how", ["module", "function", "partial", "method", "argument"])
def test_nothing_changes(fusing, how):
    module, x = nn.Sequential(dk.Shrinkage(6), nn.Dropout(), nn.BatchNorm1d(6)), torch.randn(5, 6, 40)
    module[0].eval()
    x.requires_grad_()
    y = module(x * 1)  # a graph that is still to go backward
    y.sum().backward(retain_graph=True)
    grads = [(p.grad, p.grad.clone()) for p in (x, *module.parameters())]
    before, generator, content = state(module), torch.get_rng_state(), x.detach().clone()

    def run(t, model=module):
        model.train()
        out = model(t)
        out.square().sum().backward()
        with torch.no_grad():
            t.zero_()
            model[0].fc[1].running_mean = torch.ones(6)
        return torch.rand(3)

    call = {
        "module": module,
        "function": lambda t: run(t),
        "partial": functools.partial(run, model=module),
        "method": module.forward,
        "argument": lambda t, model: run(t, model),
    }[how]
    found = dk.explain(call, x, *([module] if how == "argument" else []))
    assert len(found) == 1
    assert same(before, state(module)) and torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, content)
    for (grad, kept), p in zip(grads, (x, *module.parameters()), strict=True):
        assert p.grad is grad and torch.equal(grad, kept)
    y.sum().backward()


def test_inputs_in_containers_are_restored():
    batch = {"x": torch.randn(3, 6, 40), "more": [(torch.randn(2),), torch.randn(2, requires_grad=True)]}
    tensors = [batch["x"], batch["more"][0][0], batch["more"][1]]
    before = [t.detach().clone() for t in tensors]
    grad = tensors[2].grad = torch.ones(2)

    def run(inputs, *, again):
        (inputs["more"][1] * 2).sum().backward()
        with torch.no_grad():
            for t in (inputs["x"], inputs["more"][0][0], inputs["more"][1], again[0]):
                t.add_(1)
        return dk.abs_mean(inputs["x"])

    again = [torch.zeros(4)]
    assert len(dk.explain(run, batch, again=again)) == 1
    assert all(map(torch.equal, tensors, before)) and torch.equal(again[0], torch.zeros(4))
    assert tensors[2].grad is grad and torch.equal(grad, torch.ones(2))


def test_nothing_changes_where_the_model_raises():
    module = dk.Shrinkage(6)
    before = state(module)

    def run(x):
        module(x)
        module.eval()
        raise KeyError("the model's own")

    with pytest.raises(KeyError):
        dk.explain(run, torch.randn(4, 6, 30))
    assert same(before, state(module)) and recording.active is None


def test_inside_no_grad_and_inference_mode():
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            module, x = smooth_gate(6, norm=True), torch.randn(4, 6, 30)
            mean = module[1].running_mean.clone()
            (call,) = dk.explain(lambda t, module=module: dk.shrink(t, module, inplace=True), x)
            assert call.saved == 0 and torch.equal(module[1].running_mean, mean)


def test_a_norm_that_has_no_shape_yet():
    model, x = torch.nn.Sequential(dk.Shrinkage(8), torch.nn.LazyBatchNorm1d(), torch.nn.ReLU()), torch.randn(4, 8, 16)
    assert len(dk.explain(model, x).calls) >= 1
    dk.convert(torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3), torch.nn.LazyBatchNorm1d(), torch.nn.ReLU()))


def test_untouched_keeps_a_tensor_and_its_gradient():
    x = torch.randn(3, requires_grad=True)
    x.grad = torch.ones(3)
    grad, content = x.grad, x.detach().clone()
    expanded = nn.Module()
    expanded.register_buffer("mask", torch.ones(1).expand(5))
    with untouched([expanded], [x]):
        assert x.grad is None
        (x * 2).sum().backward()
        x.detach().zero_()
    assert x.grad is grad and torch.equal(grad, torch.ones(3)) and torch.equal(x, content)
