"""convert and revert: what is found, what is left alone, and that nothing else about a model changes."""

import copy
import io
import pickle
from functools import partial
from pathlib import Path

import port_models as ports
import pytest
import torch
from torch import nn

import drsn_kernels as dk
from drsn_kernels import recording
from drsn_kernels.convert.plans import Converted
from drsn_kernels.demo.timing import Call, saved_bytes

SHAPES = {3: (4, 8, 30), 4: (4, 8, 6, 5), 5: (3, 8, 3, 4, 2)}
FOUND = {  # the class, x's rank, and what it becomes
    "popular": (ports.Popular1d, 3, "shrink(x, self.fc, average='channel')"),
    "2-D, no norm": (ports.Popular2d, 4, "shrink(x, self.net, average='channel')"),
    "hybrid labelled shared": (ports.CalledSharedButPerChannel, 3, "shrink(x, self.fc, average='sample')"),
    "shared, one neuron": (ports.SharedOneNeuron, 4, "shrink(x, self.gate, average='sample')"),
    "reduction, LeakyReLU, Hardsigmoid": (ports.Reduced, 3, "shrink(x, self.squeeze, average='channel')"),
    "reduction, GELU": (partial(ports.Reduced, activation=nn.GELU), 3, "shrink(x, self.squeeze, average='channel')"),
    "Conv1d gate that pools": (ports.Conv1dGate, 3, "shrink(x, its own code, average=None)"),
    "Conv2d gate, BatchNorm2d": (ports.Conv2dGate, 4, "shrink(x, its own code, average=None)"),
    "fc1, bn, fc2": (ports.SeparateLayers, 3, "shrink(x, the standard gate of its layers, average='channel')"),
    "fc1, bn, fc2 in 2-D": (ports.SeparateLayers, 4, "shrink(x, the standard gate of its layers, average='channel')"),
    "fc1, bn, fc2 in 3-D": (ports.SeparateLayers, 5, "shrink(x, the standard gate of its layers, average='channel')"),
    "LayerNorm": (ports.Normed, 3, "shrink(x, its own code, average=None)"),
    "InstanceNorm": (partial(ports.Normed, norm="instance"), 3, "shrink(x, its own code, average=None)"),
    "learnable scale, a buffer": (ports.LearnableScale, 3, "shrink(x, its own code, average=None)"),
    "no average": (ports.NoAverage, 4, "shrink(x, self.gate, average=None)"),
    "signed pooling": (ports.SignedPooling, 3, "soft_threshold(x, its own code of the mean of x)"),
    "cached threshold": (ports.CachesThreshold, 3, "shrink(x, its own code, average=None)"),
    "dropout in the gate": (ports.DropoutInGate, 3, "shrink(x, self.gate, average='channel')"),
    "detached average": (ports.DetachedAverage, 3, "shrink(x, its own code, average=None)"),
    "steps in modules": (ports.Steps, 3, "shrink(x, self.gate, average='channel')"),
    "in place": (ports.InPlace, 3, "shrink(x, its own code, average=None)"),
    "learnable threshold": (ports.Fixed, 3, "soft_threshold(x, its own code of its parameters)"),
    "one learnable number": (partial(ports.Fixed, each=False), 4, "soft_threshold(x, its own code of its parameters)"),
}  # fmt: skip
LEFT = {
    ports.Garrote: "not one threshold a plane",
    ports.Hard: "zeroes what exceeds its threshold",
    ports.HalfSoft: "zeroes what exceeds its threshold",
    ports.SignMissing: "x's signs",
    ports.MaxPooled: "does not follow from the mean",
    ports.OnlyInTraining: "in training",
    ports.OnlyInEval: "there is no threshold",
    ports.StraightThrough: "may change the result",
    ports.Counts: "changes the attribute calls",
    ports.KeepsOutput: "attribute last",
    ports.Moving: "in training its forward writes over self.ema",
    ports.WritesOverInput: "writes over x",
    ports.InFloat32: "another dtype",
}


def outcome(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers of a pass on a copy."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(module.named_buffers())}


def assert_close(ours: dict, theirs: dict, rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    floor = max(t.abs().max().item() for name, t in theirs.items() if name not in ("y", "dx")) if len(theirs) > 2 else 1
    for name, t in theirs.items():
        scale = max(t.abs().max().item(), floor)
        torch.testing.assert_close(ours[name], t, rtol=0, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", FOUND)
def test_found_by_what_it_computes_and_equal_in_every_respect(case):
    make, rank, plan = FOUND[case]
    module = make(8)
    original, keys = copy.deepcopy(module), list(module.state_dict())
    own = set(vars(module))
    report = dk.convert(module)
    (row,) = report.converted
    assert not report.left_alone and not report.inline
    assert row.detail == plan and row.difference < 1e-8 and row.own_difference < 1e-5
    assert isinstance(module, type(original)) and list(module.state_dict()) == keys
    for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        for training in (True, False):
            for scale in (1e-2, 1.0, 30.0):
                x = torch.randn(SHAPES[rank]).to(dtype) * scale
                theirs = outcome(original.to(dtype).train(training), x)
                assert_close(outcome(module.to(dtype).train(training), x), theirs, rtol)
    assert dk.revert(module) == [""] and type(module) is type(original) and set(vars(module)) == own


@pytest.mark.parametrize("imitation", LEFT, ids=lambda c: c.__name__)
def test_what_differs_anywhere_is_left_alone(imitation):
    module = imitation(8)
    before = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    report = dk.convert(module)
    assert [row.module for row in report.left_alone] == [imitation.__name__] and not report.converted
    assert not report.inline and LEFT[imitation] in report.left_alone[0].detail
    assert type(module) is imitation and {k: v for k, v in vars(module).items() if not k.startswith("_")} == before


def test_names_do_not_matter():
    """The same code under other names of class and attributes."""

    class ResidualAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.conv = nn.Identity(), ports.fc(8)

        def forward(self, features):
            energy = features.abs().mean(-1)
            cut = (energy * self.conv(energy))[..., None]
            return features - torch.clamp(features, -cut, cut)

    (row,) = dk.convert(ResidualAttention()).converted
    assert row.detail == "shrink(x, self.conv, average='channel')"


def calls_of(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The operators that a pass calls."""
    called = []
    before, recording.active = recording.active, lambda step, *_, **__: called.append(getattr(step, "op", step))
    try:
        model(x)
    finally:
        recording.active = before
    return called


def test_an_object_with_two_names_is_converted_once_and_runs():
    net = ports.Net()
    report = dk.convert(net, norms=False)
    assert [row.names for row in report.converted] == [
        ("layers.0.shrinkage", "layers.0.residual_function.5"),
        ("layers.1.shrinkage", "layers.1.residual_function.5"),
    ]
    assert not report.left_alone
    block = net.layers[0]
    assert block.shrinkage is block.residual_function[5]
    assert calls_of(net, torch.randn(2, 1, 64)) == ["shrink", "shrink"]
    assert not dk.convert(net, norms=False).rows  # what is converted already is not looked at
    assert dk.revert(net) == ["layers.0.shrinkage", "layers.1.shrinkage"]
    assert calls_of(net, torch.randn(2, 1, 64)) == []


def test_probing_leaves_no_trace():
    net = ports.Net(ports.CachesThreshold).train()
    x = torch.randn(4, 1, 64)
    net(x).sum().backward()
    net.layers[0].eval()
    seen = []
    net.layers[0].shrinkage.fc[0].register_forward_hook(lambda *args: seen.append(args))
    state = {k: (v, v.clone(), v._version) for k, v in net.state_dict(keep_vars=True).items()}
    grads = {k: p.grad for k, p in net.named_parameters()}
    modes = {k: m.training for k, m in net.named_modules()}
    cached = net.layers[0].shrinkage.last_threshold
    value, random = cached.clone(), torch.get_rng_state()
    assert len(dk.convert(net).converted) == 2
    for name, t in net.state_dict(keep_vars=True).items():
        before, content, version = state[name]
        assert t is before and t.equal(content) and t._version == version, name
    assert all(p.grad is grads[k] for k, p in net.named_parameters())
    assert modes == {k: m.training for k, m in net.named_modules()}
    assert net.layers[0].shrinkage.last_threshold is cached and cached.equal(value)
    assert torch.get_rng_state().equal(random) and not seen


def test_a_threshold_kept_for_a_look_stays_up_to_date():
    module = ports.CachesThreshold(8).eval()
    x = torch.randn(3, 8, 20)
    module(x)
    expected = module.last_threshold
    dk.convert(module)
    module(x * 2)
    assert not module.last_threshold.allclose(expected)
    module(x)
    torch.testing.assert_close(module.last_threshold, expected)
    module.last_threshold = module.fc(x.abs().mean(2))  # with a graph, which deepcopy refuses
    dk.revert(module)
    assert dk.convert(module).converted


def test_hooks_on_the_module_and_in_its_gate_go_on():
    module = ports.Popular1d(8)
    called = []
    module.register_forward_hook(lambda m, args, y: called.append("module"))
    module.register_forward_pre_hook(lambda m, args: called.append("before"))
    dk.convert(module)
    x = torch.randn(3, 8, 20)
    module(x)
    assert called == ["before", "module"]
    module.fc[4].register_forward_hook(lambda m, args, alpha: called.append("gate") or alpha * 0)
    assert module(x).equal(x)  # the hook's alpha counts
    assert called[2:] == ["before", "gate", "module"]
    dk.revert(module)
    assert module(x).equal(x) and called[5:] == ["before", "gate", "module"]


def test_deepcopy_and_pickle_of_a_converted_model_and_back():
    net = ports.Net(ports.SeparateLayers).eval()
    x = torch.randn(3, 1, 64)
    dk.convert(net, norms=False)
    y = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)]
    for other in others:
        shrinkage = other.layers[0].shrinkage
        assert shrinkage is other.layers[0].residual_function[5] and isinstance(shrinkage, ports.SeparateLayers)
        assert other(x).equal(y) and calls_of(other, x) == ["shrink", "shrink"]
        shrinkage.fc2.bias.data += 1  # its own gate, not the original's
        assert not other(x).equal(y) and net(x).equal(y)
        assert dk.revert(other) == dk.revert(copy.deepcopy(net)) and type(shrinkage) is ports.SeparateLayers
        assert calls_of(other, x) == []
    dk.revert(net)
    assert type(pickle.loads(pickle.dumps(net)).layers[0].shrinkage) is ports.SeparateLayers


def test_pickles_of_an_earlier_version_load_and_revert():
    """Converted models and a Shrinkage as 0.1.0 of November 2026 pickled them (commit 07f6f11), with what they gave."""
    stored = torch.load(Path(__file__).with_name("pickles") / "converted.pt", weights_only=False)
    assert len(stored) == 5
    for name, (net, x, y) in stored.items():
        with torch.no_grad():
            torch.testing.assert_close(net(x), y)
        if name != "Shrinkage":
            assert calls_of(net, x) == ["shrink", "shrink"]
            assert len(dk.revert(net)) == 2 and calls_of(net, x) == []
            with torch.no_grad():
                torch.testing.assert_close(net(x), y)


def test_a_class_that_chooses_what_is_pickled():
    module = ports.OwnState(8).eval()
    module.calls_elsewhere = object()
    dk.convert(module)
    other = copy.deepcopy(module)
    x = torch.randn(3, 8, 20)
    assert calls_of(other, x) == ["shrink"] and other(x).equal(module(x)) and not hasattr(other, "calls_elsewhere")


def test_checkpoints_go_both_ways():
    plain, net = ports.Net(), ports.Net()
    dk.convert(net)
    assert list(plain.state_dict()) == list(net.state_dict())
    net.load_state_dict(plain.state_dict())
    x = torch.randn(3, 1, 64)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))
    ports.Net().load_state_dict(net.state_dict())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shrinkage", [ports.Popular1d, ports.Conv1dGate, ports.SignedPooling])
def test_training_follows_the_unconverted_model(shrinkage):
    torch.manual_seed(3)
    x, labels = torch.randn(16, 1, 64), torch.randint(4, (16,))
    plain = ports.Net(shrinkage)
    losses = []
    for net in (plain, copy.deepcopy(plain)):
        if losses:
            assert len(dk.convert(net).converted) == 2
        optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
        losses.append([])
        for _ in range(50):
            loss = nn.functional.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    theirs, ours = map(torch.tensor, losses)
    assert theirs[-1] < 0.7 * theirs[0]
    torch.testing.assert_close(ours[:5], theirs[:5], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("case", ["popular", "fc1, bn, fc2", "LayerNorm", "signed pooling"])
def test_what_is_kept_for_backward_falls_to_the_planes(case):
    make, rank, _ = FOUND[case]
    x = torch.randn(4, 8, 4096, requires_grad=True)

    def kept(module: nn.Module) -> float:
        return saved_bytes(Call(partial(module, x), parameters=(x,))) / x.numel()

    module = make(8)
    before = kept(module)
    dk.convert(module)
    assert before > 4 and kept(module) < 0.42 + 0.1  # and the gate's own tensors


def test_code_amid_a_block_is_reported_with_its_lines():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ports.InlineBlock(8)
            self.unit = ports.Shortcut(8)

        def forward(self, x):
            return self.unit(self.block(x))

    report = dk.convert(Net())
    rows = {row.names[0]: row for row in report.inline}
    assert set(rows) == {"block", "unit"} and not report.converted
    with open(ports.__file__) as file:
        lines = file.read().splitlines()
    first, last = (next(i for i, line in enumerate(lines, 1) if line.endswith(mark)) for mark in ("# first", "# last"))
    assert f"port_models.py:{first}-{last} to x = dk.shrink(x, self.FC, average='channel')" in rows["block"].detail
    assert rows["unit"].detail.endswith("return dk.shrink(x, self.gate, average='channel') + x")


def test_the_report_is_a_table():
    net = nn.ModuleList([ports.Net(), ports.Garrote(8), ports.InlineBlock(8), ports.Popular1d(8), nn.Conv1d(1, 1, 3)])
    text = str(dk.convert(net, norms=False))
    head, *rows = text.splitlines()
    assert head.split()[:3] == ["outcome", "class", "modules"] and len(rows) == 3
    assert "0.layers.0.shrinkage = 0.layers.0.residual_function.5" in rows[0] and "and 2 more" in rows[0], text
    assert "no module was examined" in str(dk.convert(nn.Conv1d(1, 1, 3)))
    assert "no module was examined" in str(dk.convert(dk.models.paper_network("drsn-cw")))


def test_a_standard_gate_may_be_fused_and_one_with_hooks_is_called():
    for make in (ports.Popular1d, ports.SeparateLayers):
        module = make(8)
        dk.convert(module)
        x = torch.randn(4, 8, 30)
        assert [c.fused for c in dk.explain(module, x)] == [True]
        layer = module.fc[0] if make is ports.Popular1d else module.fc1
        handle = layer.register_forward_hook(lambda *args: None)
        assert [c.fused for c in dk.explain(module, x)] == [False]
        handle.remove()
        assert [c.fused for c in dk.explain(module, x)] == [True]


def test_children_that_are_swapped_later_are_the_ones_that_run():
    module = ports.SeparateLayers(8).eval()
    dk.convert(module)
    x = torch.randn(4, 8, 30)
    module(x)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module.bn, nn.SyncBatchNorm) and [c.fused for c in dk.explain(module, x)] == [False]
    module.fc2 = nn.Linear(8, 8)
    nn.init.constant_(module.fc2.weight, 0)
    nn.init.constant_(module.fc2.bias, -1e4)
    assert module(x).equal(x)


def test_a_replica_runs_on_its_own_parameters():
    """What DataParallel makes on each device."""
    for make in (ports.Popular1d, ports.SeparateLayers, ports.LearnableScale):
        module = make(8).eval()
        dk.convert(module)
        x = torch.randn(4, 8, 30)
        expected = module(x)
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            other = copy.deepcopy(child)
            for p in other.parameters():
                p.data.zero_()
            replica._modules[name] = other
        for name, p in module.named_parameters(recurse=False):
            setattr(replica, name, p.detach() * 0)  # as torch.nn.parallel.replicate does
        assert isinstance(replica, Converted) and not replica(x).allclose(expected)
        assert module(x).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    for make in (ports.Popular1d, ports.SeparateLayers, ports.LearnableScale, ports.SignedPooling):
        module = make(8).to(dtype)
        before = copy.deepcopy(module).eval()
        (row,) = dk.convert(module).converted
        assert row.difference < 1e-8 and row.own_difference < 64 * torch.finfo(dtype).eps
        x = torch.randn(4, 8, 30).to(dtype)
        y = module.eval()(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, before(x), rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_frozen_and_inference_models():
    module = ports.Popular1d(8).eval().requires_grad_(False)
    assert dk.convert(module).converted and not any(p.requires_grad for p in module.parameters())
    with torch.inference_mode():
        net = ports.Net().eval()
        assert len(dk.convert(net, norms=False).converted) == 2
        assert calls_of(net, torch.randn(2, 1, 64)) == ["shrink", "shrink"]


def test_autocast_and_a_chosen_backend_around_the_call():
    with torch.autocast("cpu", dtype=torch.bfloat16), dk.use_backend("torch"):
        (row,) = dk.convert(ports.Popular1d(8)).converted
    assert row.own_difference < 1e-5


def test_other_calls_run_the_modules_own_forward():
    module = ports.DropoutInGate(8).eval()
    x = torch.randn(4, 8, 30)
    expected = module(x, 0.5), module(x, scale=0.5)
    dk.convert(module)
    assert module(x, 0.5).equal(expected[0]) and module(x, scale=0.5).equal(expected[1])
    only_1d = ports.Popular1d(8)
    with pytest.raises(Exception) as theirs:
        only_1d(torch.randn(2, 8, 3, 4, 5))
    dk.convert(only_1d)
    with pytest.raises(type(theirs.value)):
        only_1d(torch.randn(2, 8, 3, 4, 5))


def test_a_number_of_the_module_that_is_changed_later_counts():
    module = ports.InPlace(8)
    plain = copy.deepcopy(module)
    dk.convert(module)
    x = torch.randn(4, 8, 30)
    assert calls_of(module, x) == ["shrink"]
    module.temperature = plain.temperature = 0.01
    assert calls_of(module, x) == [] and module(x).equal(plain(x))
    module.temperature = 2.0
    assert calls_of(module, x) == ["shrink"]


def test_asserts_and_branches_on_the_rank_are_no_obstacle():
    module = ports.Careful(8).eval()
    plain = copy.deepcopy(module)
    assert dk.convert(module).converted
    for rank in (3, 4):
        x = torch.randn(SHAPES[rank])
        assert calls_of(module, x) == ["shrink"]
        torch.testing.assert_close(module(x), plain(x))
    with pytest.raises(ValueError, match="1-D or 2-D"):
        module(torch.randn(SHAPES[5]))


def test_a_module_that_hands_on_is_no_obstacle():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ports.Popular1d(8)

        def forward(self, x):
            return self.inner(x)

    report = dk.convert(Outer())
    assert [row.names for row in report.converted] == [("inner",)] and not report.left_alone


def test_under_autocast_as_without_conversion():
    for make in (ports.Popular1d, ports.SeparateLayers, ports.Conv1dGate, ports.LearnableScale, ports.SignedPooling):
        module = make(8).eval()
        plain = copy.deepcopy(module)
        dk.convert(module)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 8, 30).to(dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(module(x).float(), plain(x).float(), rtol=0.02, atol=0.02)


def test_exports_aten_operations_only():
    module = ports.SeparateLayers(8).eval()
    x = torch.randn(4, 8, 30)
    expected = module(x)
    dk.convert(module)
    program = torch.export.export(module, (x,))
    assert all(str(n.target).startswith("aten.") for n in program.graph.nodes if n.op == "call_function")
    torch.testing.assert_close(program.module()(x), expected)


def test_thresholds_are_recorded_by_name():
    net = ports.Net(ports.CachesThreshold).eval()
    dk.convert(net)
    with dk.record_tau(net) as taus:
        net(torch.randn(3, 1, 64))
        assert pickle.loads(pickle.dumps(net))(torch.randn(3, 1, 64)).shape == (3, 4)
    assert set(taus) == {f"layers.{i}.{name}" for i in (0, 1) for name in ("shrinkage", "residual_function.5")}
    torch.testing.assert_close(taus["layers.1.shrinkage"], net.layers[1].shrinkage.last_threshold)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", ["fc1, bn, fc2", "cached threshold", "signed pooling"])
def test_compiles_into_one_graph(case):
    make, rank, _ = FOUND[case]
    module = make(8)
    dk.convert(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        x = torch.randn(SHAPES[rank])
        expected = copy.deepcopy(module.train(training))(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)


def test_wrappers_are_reported_and_what_is_inside_converted():
    net = nn.DataParallel(ports.Net())
    report = dk.convert(net)
    assert len(report.converted) == 2 and "DataParallel" in report.notes[0]
    compiled = torch.compile(ports.Popular1d(8), backend="aot_eager")
    torch._dynamo.reset()
    x = torch.randn(4, 8, 30)
    expected = compiled.eval()(x)
    report = dk.convert(compiled)
    assert len(report.converted) == 1 and any("compiled" in note for note in report.notes)
    torch.testing.assert_close(compiled(x), expected)
    scripted = torch.jit.trace(ports.Popular2d(8).eval(), torch.randn(2, 8, 4, 4))
    report = dk.convert(scripted)
    assert not report.converted and any("TorchScript" in note for note in report.notes)


def test_what_cannot_be_probed_is_said():
    class Holds(ports.Popular1d):
        def __init__(self, c):
            super().__init__(c)
            self.file = io.FileIO(0, closefd=False)

    class Branches(ports.Popular1d):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(x)

    class Ours(ports.Popular1d):
        def forward(self, x):
            return dk.shrink(x, self.fc)

    replaced = ports.Popular1d(8)
    replaced.forward = lambda x: x
    cases = [
        (Holds(8), "cannot be copied"),
        (Branches(8), "branches"),
        (replaced, "replaced on the object"),
        (ports.Steps.Soft(), "one tensor"),
        (Ours(8), "calls the operators of drsn_kernels itself"),
        (ports.Popular1d(8).to("meta"), "meta"),
    ]
    for module, why in cases:
        (row,) = dk.convert(module).left_alone
        assert why in row.detail


def test_errors_and_a_class_that_was_changed_after():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        dk.convert(lambda x: x)
    with pytest.raises(TypeError, match="norms must be True or False, got 'no'"):
        dk.convert(nn.Linear(2, 2), norms="no")
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        dk.revert(3)
    assert dk.revert(ports.Net()) == []
    module = ports.LearnableScale(8)
    dk.convert(module)
    nn.utils.parametrize.register_parametrization(module, "scale", nn.Softplus())
    x = torch.randn(4, 8, 30)
    y = module(x)
    with pytest.raises(ValueError, match="class was changed to ParametrizedLearnableScale since"):
        dk.revert(module)
    nn.utils.parametrize.remove_parametrizations(module, "scale")
    torch.testing.assert_close(module(x), y)
    assert dk.revert(module) == [""]
    torch.testing.assert_close(module(x), y)


@pytest.mark.gpu
def test_on_a_gpu():
    net = ports.Net().cuda()
    plain = copy.deepcopy(net)
    assert len(dk.convert(net).converted) == 2
    x = torch.randn(8, 1, 64, device="cuda")
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
