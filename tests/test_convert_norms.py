"""convert on batch normalisation and ReLU: what runs as one operator, under which conditions, and what stays."""

import copy
import io
import pickle
from functools import partial

import port_models as ports
import pytest
import torch
from test_convert import assert_close, calls_of, outcome
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import drsn_kernels as dk
from drsn_kernels.convert.plans import Converted

NORM = "batch_norm_relu"


def conv(i, o, k=3, s=1):
    return nn.Conv2d(i, o, k, s, k // 2, bias=False)


class BasicBlock(nn.Module):
    """As in torchvision: one ReLU in place, called twice."""

    def __init__(self, i, c, stride=1):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(i, c, 3, stride), nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(c, c), nn.BatchNorm2d(c)
        self.downsample = nn.Sequential(conv(i, c, 1, stride), nn.BatchNorm2d(c)) if stride != 1 or i != c else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, i, c):
        super().__init__()
        self.conv1, self.bn1 = conv(i, c, 1), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv(c, c), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = conv(c, i, 1), nn.BatchNorm2d(i)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + x, inplace=True)


class ResNet(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, c), nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(c, c), BasicBlock(c, 2 * c, 2))
        self.fc = nn.Linear(2 * c, 5)

    def forward(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivation(nn.Module):
    """Normalisation first; the ReLU's result has two uses, one of them in place."""

    def __init__(self, c=6):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(c), conv(c, c), nn.BatchNorm2d(c), conv(c, c)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.conv1(out)
        z = self.bn2(out)
        z.relu_()
        return self.conv2(z) + shortcut + z


class DenseNet(nn.Module):
    """The last norm ends a Sequential, and the forward around it has the ReLU."""

    class Layer(nn.Module):
        def __init__(self, c, growth):
            super().__init__()
            self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(c), nn.ReLU(inplace=True), conv(c, growth)

        def forward(self, x):
            new = self.conv1(self.relu1(self.norm1(x)))
            return torch.cat([x, F.dropout(new, p=0.2, training=self.training)], 1)

    class Transition(nn.Sequential):
        def __init__(self, i, o):
            super().__init__()
            self.add_module("norm", nn.BatchNorm2d(i))
            self.add_module("relu", nn.ReLU(inplace=True))
            self.add_module("conv", conv(i, o, 1))

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 4), self.Layer(4, 2), self.Layer(6, 2), self.Transition(8, 4), nn.BatchNorm2d(4)
        )
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(out.mean((2, 3)))


class ConvNormAct(nn.Module):
    """As in timm: nothing between the two, as a module; a leaky activation."""

    def __init__(self, i=3, c=6):
        super().__init__()
        self.conv, self.bn, self.drop, self.act = conv(i, c), nn.BatchNorm2d(c), nn.Identity(), nn.LeakyReLU(0.2)
        self.aa = None

    def forward(self, x):
        x = self.act(self.drop(self.bn(self.conv(x))))
        return self.aa(x) if self.aa is not None else x


class Functional(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm1d(c) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(c, 1))

    def forward(self, x):
        for bn in self.bns:
            x = F.leaky_relu(bn(x), 0.1) * self.scale
        return x


def conv_bn_relu(i=3, c=6, **norm):
    return nn.Sequential(conv(i, c), nn.BatchNorm2d(c, **norm), nn.ReLU(inplace=True))


IMAGE, SIGNAL = (4, 3, 9, 8), (4, 4, 20)
MODELS = {  # x, the pairs, and all calls of the operator
    "ResNet": (ResNet, IMAGE, 3, 6),
    "BasicBlock": (partial(BasicBlock, 3, 6, 2), IMAGE, 1, 3),
    "Bottleneck": (partial(Bottleneck, 3, 5), IMAGE, 2, 3),
    "pre-activation": (partial(PreActivation, 3), IMAGE, 2, 2),
    "DenseNet": (DenseNet, IMAGE, 4, 4),
    "ConvNormAct": (ConvNormAct, IMAGE, 1, 1),
    "functions, a list": (Functional, SIGNAL, 3, 3),
    "Sequential": (conv_bn_relu, IMAGE, 1, 1),
    "momentum None": (partial(conv_bn_relu, momentum=None), IMAGE, 1, 1),
    "no parameters": (partial(conv_bn_relu, affine=False), IMAGE, 1, 1),
    "no running statistics": (partial(conv_bn_relu, track_running_stats=False), IMAGE, 1, 1),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(BasicBlock(3, 3)), IMAGE, 1, 2),
    "3-D": (lambda: nn.Sequential(nn.BatchNorm3d(3), nn.LeakyReLU(0.3)), (3, 3, 2, 3, 2), 1, 1),
}


def both(make):
    torch.manual_seed(0)
    plain = make()
    for m in plain.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.uniform_(m.bias, -0.5, 0.5)
    ours = copy.deepcopy(plain)
    return plain, ours, dk.convert(ours)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", MODELS)
def test_the_same_numbers_with_the_norms_fused(case):
    make, shape, pairs, calls = MODELS[case]
    plain, ours, report = both(make)
    assert report.norms and not report.converted
    count = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules())
    assert f"{pairs} of {count} batch normalisations" in report.notes[-1], report
    for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        for training in (True, False):
            x = torch.randn(shape, dtype=dtype)
            theirs = outcome(plain.to(dtype).train(training), x)
            assert_close(outcome(ours.to(dtype).train(training), x), theirs, rtol)
            assert calls_of(copy.deepcopy(ours), x) == [NORM] * calls
    assert list(ours.state_dict()) == list(plain.state_dict()) and repr(ours) == repr(plain)
    assert len(dk.revert(ours)) == len(report.norms) and not any(isinstance(m, Converted) for m in ours.modules())
    assert calls_of(ours, x) == []


def test_several_steps_move_the_statistics_likewise():
    plain, ours, _ = both(ResNet)
    for model in (plain, ours):
        optimizer, generator = torch.optim.SGD(model.parameters(), 0.05), torch.Generator().manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(IMAGE, generator=generator)).square().mean().backward()
            optimizer.step()
    for (name, ours_), theirs in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype, channels_last", [(torch.bfloat16, False), (torch.bfloat16, True), (None, True)])
def test_in_bfloat16_under_autocast_and_channels_last(dtype, channels_last):
    plain, ours, _ = both(ResNet)
    x = torch.randn(IMAGE)
    form = torch.channels_last if channels_last else torch.contiguous_format
    plain, ours, x = (t.to(memory_format=form) for t in (plain, ours, x))
    if dtype is None:
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
        return
    with torch.autocast("cpu", dtype=dtype):
        assert calls_of(ours, x) == [NORM] * 6
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=0.05, atol=0.05)
    ours, plain, x = ours.to(dtype), plain.to(dtype), x.to(dtype)
    torch.testing.assert_close(ours(x), plain(x), rtol=0.05, atol=0.05)


# ---- conditions at each call -----------------------------------------------------------------------------------------


def _hook(seen):
    return lambda module, args, y: seen.append(y.detach().clone())


CHANGES = {  # of a BasicBlock, and how many operators run then
    "nothing": (lambda m: None, 3),
    "the norm is frozen": (lambda m: m.bn1.eval(), 3),
    "all norms are frozen": (lambda m: [n.eval() for n in (m.bn1, m.bn2)], 3),
    "its momentum": (lambda m: setattr(m.bn1, "momentum", 0.5), 3),
    "its eps": (lambda m: setattr(m.bn1, "eps", 0.5), 3),
    "a hook on the norm": (lambda m: m.bn1.register_forward_hook(lambda *a: a[2] * 2), 2),
    "a hook before the norm": (lambda m: m.bn1.register_forward_pre_hook(lambda m, a: (a[0] * 2 + 1,)), 2),
    "a hook on the ReLU": (lambda m: m.relu.register_forward_hook(lambda *a: a[2] + 1), 2),
    "another activation": (lambda m: setattr(m, "relu", nn.GELU()), 2),
    "a leaky one": (lambda m: setattr(m, "relu", nn.LeakyReLU(0.3)), 3),
    "the norm is gone": (lambda m: setattr(m, "bn1", nn.Identity()), 2),
    "a norm of another class": (lambda m: setattr(m, "bn1", nn.InstanceNorm2d(6)), 2),
    "the norm's own forward": (lambda m: setattr(m.bn1, "forward", lambda x: x - 1), 2),
    "a parametrized norm": (lambda m: nn.utils.parametrize.register_parametrization(m.bn1, "weight", nn.Softplus()), 2),
    "the shortcut is gone": (lambda m: setattr(m, "downsample", nn.Sequential(conv(3, 6, 1, 2))), 0),
    "a hook on the shortcut": (lambda m: m.downsample.register_forward_hook(lambda *a: a[2] * 2), 0),
    "the forward is patched": (lambda m: setattr(m, "forward", lambda x: x - 1), 0),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CHANGES)
def test_a_change_after_the_conversion_counts(case):
    change, calls = CHANGES[case]
    plain, ours, _ = both(partial(BasicBlock, 3, 6, 2))
    for model in (plain, ours):
        torch.manual_seed(1)
        change(model)
    x = torch.randn(IMAGE)
    for training in (None, False):  # None: as the change left them
        if training is not None:
            plain.eval(), ours.eval()
        seen = calls_of(copy.deepcopy(ours), x)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    assert seen == [NORM] * calls


def test_a_layer_that_is_put_between():
    plain, ours, _ = both(conv_bn_relu)
    x = torch.randn(IMAGE)
    for model in (plain, ours):
        model.insert(2, nn.Hardtanh(-0.5, 0.5))
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    for model in (plain, ours):
        del model[2]
    assert calls_of(copy.deepcopy(ours), x) == [NORM]
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1:](ours[0](x)), plain[1:](plain[0](x)), rtol=1e-4, atol=1e-5)


def test_a_hook_sees_what_the_norm_gives():
    plain, ours, _ = both(ResNet)
    seen = {plain: [], ours: []}
    for model in (plain, ours):
        model.layer1[0].bn1.register_forward_hook(_hook(seen[model]))
        model.eval()(torch.ones(IMAGE))
    torch.testing.assert_close(seen[ours], seen[plain], rtol=1e-4, atol=1e-5)
    assert seen[ours][0].min() < 0


def test_a_class_whose_forward_is_replaced():
    class Block(BasicBlock):
        pass

    _, ours, report = both(partial(Block, 3, 6, 2))
    assert report.norms
    Block.forward = lambda self, x: x
    x = torch.randn(IMAGE)
    assert ours(x) is x


# ---- with the rest of the world --------------------------------------------------------------------------------------


def test_together_with_the_shrinkage_and_back():
    plain, ours, report = both(ports.Net)
    assert len(report.converted) == 2 and [row.names for row in report.norms] == [
        ("layers.0.residual_function",),
        ("layers.1.residual_function",),
    ]
    x = torch.randn(3, 1, 64)
    called = calls_of(copy.deepcopy(ours), x)
    assert called.count("shrink") == 2 and called.count(NORM) == 4  # the second norm of a block runs alone
    assert_close(outcome(ours, x), outcome(plain, x), 1e-4)
    with dk.record_tau(ours) as taus:
        ours(x)
    assert all("shrinkage" in name or ".5" in name for name in taus)
    text = str(report)
    assert "norms fused" in text and "1 + 2" in text and "2 of 5 batch norm" in text, text
    again = dk.convert(ours)
    assert not again.norms and not again.converted and "2 of 5 batch norm" in again.notes[-1]
    assert len(dk.revert(ours)) == 4 and calls_of(ours, x) == []
    assert all(type(m) is type(n) for m, n in zip(ours.modules(), plain.modules(), strict=True))


def test_shared_modules_are_converted_once():
    layer = conv_bn_relu(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(layer, layer), "b": layer})
    report = dk.convert(model)
    assert [row.names for row in report.norms] == [("a.0", "a.1", "b")]
    x = torch.randn(IMAGE)
    assert calls_of(model["a"], x) == [NORM] * 2 and model["b"] is model["a"][1]
    assert dk.revert(model) == ["a.0"]


@pytest.mark.parametrize("make", [ResNet, DenseNet, conv_bn_relu])
def test_deepcopy_pickle_and_checkpoints(make):
    plain, ours, _ = both(make)
    x = torch.randn(IMAGE)
    ours.eval(), plain.eval()
    calls = calls_of(ours, x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert other(x).equal(ours(x)) and calls_of(other, x) == calls and calls
        other.load_state_dict(plain.state_dict())
        assert dk.revert(other) == dk.revert(copy.deepcopy(ours)) and calls_of(other, x) == []
        torch.testing.assert_close(other(x), plain(x))


def test_graphs_hold_the_modules_own_operations():
    plain, ours, _ = both(ResNet)
    x = torch.randn(IMAGE)
    plain.eval(), ours.eval()
    expected = plain(x)
    program = torch.export.export(ours, (x,))
    assert all(str(n.target).startswith("aten.") for n in program.graph.nodes if n.op == "call_function")
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    traced = fx.symbolic_trace(ours)
    assert [n.target for n in traced.graph.nodes] == [n.target for n in fx.symbolic_trace(plain).graph.nodes]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(ours)(x), expected, rtol=1e-4, atol=1e-5)
    batched = torch.func.vmap(ours)(x[None])[0]
    torch.testing.assert_close(batched, expected, rtol=1e-4, atol=1e-5)


def test_convolutions_are_folded_after_revert():
    plain, ours, _ = both(conv_bn_relu)
    dk.revert(ours.eval())
    x = torch.randn(IMAGE)
    ours[0], ours[1] = fuse_conv_bn_eval(ours[0], ours[1]), nn.Identity()
    torch.testing.assert_close(ours(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_replica_runs_on_its_own_parameters():
    """As DataParallel makes them: a module without parameters, whose tensors are plain attributes."""
    _, ours, _ = both(partial(BasicBlock, 3, 3))
    x = torch.randn(IMAGE)
    expected = ours.eval()(x)
    replicas = {m: m._replicate_for_data_parallel() for m in ours.modules()}
    for m, replica in replicas.items():
        replica._modules = {name: replicas[child] if child is not None else None for name, child in m._modules.items()}
        for name, p in m._parameters.items():
            setattr(replica, name, None if p is None else p.detach() * 1)
    assert calls_of(replicas[ours], x) == [NORM] * 2
    torch.testing.assert_close(replicas[ours](x), expected)


def test_memory_is_let_go_as_in_the_forward():
    """Under no_grad a value lives until its last use, not until the end."""
    sizes = []

    class Weighs(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = out

        def forward(self, x):
            import gc

            gc.collect()
            sizes.append(sum(isinstance(o, torch.Tensor) and o.shape == x.shape for o in gc.get_objects()))
            return x

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.bns = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(4)])
            self.weighs = nn.ModuleList([nn.Identity() for _ in range(4)])

        def forward(self, x):
            for bn, weighs in zip(self.bns, self.weighs, strict=True):
                x = weighs(F.relu(bn(x)))
            return x

    model = Long().eval()
    assert dk.convert(model).norms
    for i in range(4):
        model.weighs[i] = Weighs(sizes)
    with torch.no_grad():
        model(torch.randn(2, 3, 17, 13))
    assert len(sizes) == 4 and sizes[1:] == [sizes[1]] * 3, sizes
