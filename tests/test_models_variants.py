"""The variants of the networks: order, shortcut, gate, factories; their parameters, keys, and thresholds."""

import itertools
import math
import random
import re
from pathlib import Path

import port_models as ports
import pytest
import torch
from torch import nn

import drsn_kernels as dk
from drsn_kernels.models import (
    DRSN,
    NAMES,
    ResidualShrinkageUnit,
    cifar_network,
    convnet,
    network,
    network18,
    paper_network,
    resnet,
    senet,
)
from drsn_kernels.modules import Shrinkage, SqueezeExcite

pytestmark = pytest.mark.usefixtures("one_thread")


def settle(model: nn.Module) -> nn.Module:
    """Random scales and running statistics, so that no BN is an identity; in float64."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return model


# ---- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("attention", ["cw", "cs", "se", None])
@pytest.mark.parametrize("shortcut", ["pad", "projection", None])
@pytest.mark.parametrize("training", [True, False])
def test_post_activation_unit(dims, attention, shortcut, training):
    unit = ResidualShrinkageUnit(4, 6, 2, dims=dims, attention=attention, shortcut=shortcut, order="post")
    settle(unit).train(training)
    x = torch.randn(5, 4, *(9, 8)[:dims], dtype=torch.float64)
    y = unit(x)
    conv1, bn1, relu, conv2, bn2 = unit.residual_function
    assert conv1.bias is None and conv2.bias is None and isinstance(relu, nn.ReLU)
    wanted = bn2(conv2(bn1(conv1(x)).relu()))
    spatial = tuple(range(2, 2 + dims))
    if attention == "se":
        gate = unit.shrinkage.fc(wanted.mean(spatial))
        wanted = wanted * gate.reshape(*gate.shape, *[1] * dims)
    elif attention:
        average = wanted.abs().mean(spatial)
        tau = unit.shrinkage.fc(average) * (average if attention == "cw" else average.mean(1, keepdim=True))
        wanted = wanted.sign() * (wanted.abs() - tau.reshape(*tau.shape, *[1] * dims)).relu()
    if shortcut == "projection":
        conv, bn = unit.shortcut
        assert conv.kernel_size == (1,) * dims and conv.bias is None
        wanted = wanted + bn(conv(x))
    elif shortcut == "pad":
        subsampled = x[:, :, ::2] if dims == 1 else x[:, :, ::2, ::2]
        wanted[:, 1:5] = wanted[:, 1:5] + subsampled
    torch.testing.assert_close(y, wanted.relu())


def test_projection_is_the_input_where_the_shape_stays():
    for dims, order in itertools.product((1, 2), ("pre", "post")):
        unit = ResidualShrinkageUnit(4, 4, dims=dims, order=order, shortcut="projection")
        x = torch.randn(2, 4, *(5, 6)[:dims])
        assert unit.shortcut(x) is x and not list(unit.shortcut.parameters())
    # other than zero channels, it can also take channels away
    assert ResidualShrinkageUnit(8, 4, shortcut="projection")(torch.randn(2, 8, 5)).shape == (2, 4, 5)


@pytest.mark.parametrize("attention", ["cw", "cs", "se"])
@pytest.mark.parametrize("reduction, norm", [(1, True), (4, True), (4, False), (100, False)])
def test_gate_options(attention, reduction, norm):
    fc = ResidualShrinkageUnit(8, 8, attention=attention, reduction=reduction, norm=norm).shrinkage.fc
    hidden = max(8 // reduction, 1)
    sizes = [(m.in_features, m.out_features) for m in fc if isinstance(m, nn.Linear)]
    assert sizes == [(8, hidden), (hidden, 1 if attention == "cs" else 8)]
    assert [m.num_features for m in fc if isinstance(m, nn.BatchNorm1d)] == [hidden] * norm


@pytest.mark.parametrize("in_channels, stride", [(6, 1), (4, 2)])
def test_loads_the_ports_unit(in_channels, stride):
    port = settle(ports.Block(in_channels, 6, stride)).eval()
    unit = ResidualShrinkageUnit(in_channels, 6, stride, order="post", shortcut="projection").double().eval()
    state = {k: v for k, v in port.state_dict().items() if not k.startswith("residual_function.5.")}  # shrinkage again
    unit.load_state_dict(state)
    x = torch.randn(3, in_channels, 17, dtype=torch.float64)
    torch.testing.assert_close(unit(x), port(x))


# ---- networks --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "paper": (lambda name: paper_network(name, 9), ((4, 4, 2), (8, 4, 2), (16, 4, 2)), 4, {}),
    "cifar": (lambda name: cifar_network(name), ((16, 1, 1), (32, 1, 2), (32, 1, 2)), 16, {"dims": 2, "reduction": 4}),
    "18": (lambda name: network18(name), ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)), 64, {"post": True}),
    "18-images": (
        lambda name: network18(name, dims=2, in_channels=3, classes=10),
        ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)),
        64,
        {"dims": 2, "post": True},
    ),
}


def counted(name: str, stages, stem: int, inputs: int, classes: int, dims=1, reduction=1, post=False) -> int:
    """Trainable parameters, layer by layer, from the layout alone."""

    def conv(a: int, b: int, kernel: int = 3) -> int:
        return a * b * kernel**dims + (0 if post else b)

    total, channels = conv(inputs, stem), stem
    for out, units, stride in stages:
        for index in range(units):
            total += conv(channels, out) + conv(out, out)
            total += 2 * out + 2 * (out if post else channels)  # two BNs, weight and bias
            if name in ("senet", "drsn-cs", "drsn-cw"):
                hidden, last = max(out // reduction, 1), 1 if name == "drsn-cs" else out
                total += (out + 1) * hidden + 2 * hidden + (hidden + 1) * last
            if post and name != "convnet" and (channels != out or (index == 0 and stride > 1)):
                total += channels * out + 2 * out
            channels = out
    return total + 2 * (stem if post else channels) + (channels + 1) * classes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts(layout, name):
    make, stages, stem, options = LAYOUTS[layout]
    with torch.device("meta"):  # shapes are all that is asked
        model = make(name)
    inputs = 3 if options.get("dims") == 2 else 1
    classes = {"paper": 9, "18": 8}.get(layout, 10)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == counted(name, stages, stem, inputs, classes, **options)


def test_the_counts_of_the_documentation():
    text = (Path(__file__).resolve().parent.parent / "docs" / "networks_and_training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.M)
    assert NAMES == ("convnet", "resnet", "senet", "drsn-cs", "drsn-cw")  # the columns
    for row, layout, inputs, classes in zip(rows, ("paper", "cifar", "18"), (1, 3, 1), (8, 10, 8), strict=True):
        _, stages, stem, options = LAYOUTS[layout]
        wanted = [counted(name, stages, stem, inputs, classes, **options) for name in NAMES]
        assert [int(cell.replace(",", "")) for cell in row[1:]] == wanted, row[0]


def test_18_layers():
    with torch.device("meta"):
        model = network18(dims=2, in_channels=3)
    main = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "fc." not in n]
    assert len([n for n in main if "shortcut" not in n]) == 18


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [cifar_network, lambda n: network18(n, stages=((4, 1, 1), (6, 2, 2)), stem=(4, 2))])
def test_networks_train(make, name):
    model = make(name)
    shape = (4, 3, 9, 12) if model.dims == 2 else (4, 1, 40)
    y = model(torch.randn(shape))
    assert y.shape == (4, model.classes)
    nn.functional.cross_entropy(y, torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.stem.weight.grad.any() if model.order == "pre" else model.stem[0].weight.grad.any()


def test_the_names_tell_the_attention():
    kinds = {"drsn-cw": (Shrinkage, "channel"), "drsn-cs": (Shrinkage, "sample"), "senet": (SqueezeExcite, None)}
    for name in NAMES:
        units = [m for m in network(name, stages=((4, 2, 1),)).modules() if isinstance(m, ResidualShrinkageUnit)]
        kind, average = kinds.get(name, (type(None), None))
        assert all(type(u.shrinkage) is kind and getattr(u.shrinkage, "average", None) == average for u in units)
        assert len(units) == 2 and all((u.shortcut is None) == (name == "convnet") for u in units)


@pytest.mark.parametrize("make", [DRSN, network, lambda **o: network18(**o, stages=((4, 1, 1),), stem=(4, 1))])
@pytest.mark.parametrize("threshold, slope", [("hard", 0.0), ("soft", 0.2), ("hard", 0.1)])
def test_other_thresholds(make, threshold, slope):
    model = settle(make(threshold=threshold, slope=slope)).eval()
    seen = []
    model.stages[0][0].shrinkage.register_forward_hook(lambda *call: seen.extend(call), with_kwargs=True)
    with dk.record_tau(model) as taus:
        model(torch.randn(2, 1, 64, dtype=torch.float64))
    _, (z,), given, y = seen
    wanted = dk.soft_threshold(z, taus["stages.0.0.shrinkage"], threshold=threshold, slope=slope)
    torch.testing.assert_close(y, wanted + given["residual"])
    assert all((m.threshold, m.slope) == (threshold, slope) for m in model.modules() if isinstance(m, Shrinkage))


@pytest.mark.parametrize("name", ["drsn-cs", "drsn-cw"])
@pytest.mark.parametrize("make", [network, network18])
def test_gate_bias(make, name):
    """The gates of all units begin at it; every other parameter is the default network's."""
    torch.manual_seed(0)
    plain = dict(make(name, stages=((4, 1, 1), (8, 2, 2)), stem=(4, 1)).named_parameters())
    torch.manual_seed(0)
    own = dict(make(name, stages=((4, 1, 1), (8, 2, 2)), stem=(4, 1), gate_bias=-2.0).named_parameters())
    last = [key for key in own if key.endswith("shrinkage.fc.3.bias")]
    assert len(last) == 3 and all((own[key] == -2).all() and (plain[key] == 0).all() for key in last)
    assert all(torch.equal(own[key], plain[key]) for key in plain if key not in last)


def test_the_baselines_of_the_class_have_its_layout_in_both_dimensions():
    """docs/networks_and_training.md, "Networks": by name, images get the authors' layout for CIFAR."""
    for name, make in (("resnet", resnet), ("senet", senet), ("convnet", convnet)):
        of_class, by_name = make(3, 10, dims=2), network(name, dims=2, in_channels=3, classes=10)
        assert [len(stage) for stage in of_class.stages] == [4, 4, 4] and of_class.stem.out_channels == 4
        assert [len(stage) for stage in by_name.stages] == [1, 1, 1] and by_name.stem.out_channels == 16


def keys(module: nn.Module) -> set[str]:
    """Prefixes of the keys: the modules that have state."""
    return {key.rpartition(".")[0] for key in module.state_dict()}


def test_state_dict_layout():
    """docs/networks_and_training.md, "state_dict"."""
    pre = network("drsn-cw", stages=((4, 1, 1), (6, 2, 2)))
    units = ["stages.0.0", "stages.1.0", "stages.1.1"]
    parts = ["residual_function.0", "residual_function.2", "residual_function.3", "residual_function.5"]
    gate = ["shrinkage.fc.0", "shrinkage.fc.1", "shrinkage.fc.3"]
    assert keys(pre) == {"stem", "norm", "fc"} | {f"{u}.{p}" for u in units for p in parts + gate}

    post = network("senet", stages=((4, 1, 1), (6, 2, 2)), order="post", shortcut="projection", norm=False)
    parts = ["residual_function.0", "residual_function.1", "residual_function.3", "residual_function.4"]
    gate = ["shrinkage.fc.0", "shrinkage.fc.2"]
    wanted = {"stem.0", "stem.1", "fc", "stages.1.0.shortcut.0", "stages.1.0.shortcut.1"}
    assert keys(post) == wanted | {f"{u}.{p}" for u in units for p in parts + gate}

    bare = network("resnet", stages=((4, 1, 1),))
    assert not any("shrinkage" in key or "shortcut" in key for key in bare.state_dict())
    assert set(pre.state_dict()) == set(network("drsn-cs", stages=((4, 1, 1), (6, 2, 2))).state_dict())


def test_repr_tells_what_runs():
    text = repr(network("drsn-cs", stages=((8, 1, 2),)))
    assert "(N, 1, length) -> (N, 8), attention='cs', order='pre', shortcut='pad'" in text
    assert "4 -> 8, stride=2, order='pre': residual_function, attention='cs', + shortcut\n" in text
    assert "8, average='sample'" in text and "stride=2, zero channels 2 in front, 2 behind" in text
    text = repr(network("convnet", dims=2, stages=((8, 1, 1),), order="post"))
    assert "(N, 1, height, width) -> (N, 8), attention=None, order='post', shortcut=None" in text
    assert "16 -> 8, stride=1, order='post': residual_function, attention=None, no shortcut, ReLU\n" in text


# ---- the three conditions on a threshold: positive, not above max |x|, each sample's own -----------------------------


def thresholds(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of every shrinkage: its threshold and max |x| of what it thresholds, (N, C) each or (N, 1) for the sample."""
    peaks = {}

    def watch(name: str):
        def hook(module, args):
            rows = args[0].detach().abs().flatten(2).amax(2)
            peaks[name] = rows if module.average == "channel" else rows.amax(1, keepdim=True)

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, Shrinkage)]
    try:
        with dk.record_tau(model) as taus:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    assert set(taus) == set(peaks)
    return {name: (taus[name], peaks[name]) for name in taus}


@pytest.mark.parametrize("name", ["drsn-cw", "drsn-cs"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("seed", range(6))
def test_three_conditions(name, backend, seed):
    draw = random.Random(seed)
    dims = draw.choice((1, 2))
    width = draw.choice((3, 5, 8))
    model = network(
        name,
        dims=dims,
        in_channels=2,
        stages=((width, draw.choice((1, 2)), 2), (width + draw.choice((0, 1, 4)), 2, draw.choice((1, 2)))),
        stem=(width, 1),
        order=draw.choice(("pre", "post")),
        shortcut=draw.choice(("pad", "projection")),
        reduction=draw.choice((1, 2)),
        norm=draw.choice((True, False)),
    )
    scale = 10 ** draw.uniform(-2, 2)
    x = scale * torch.randn(7, 2, *(33, 14)[:dims]) * torch.linspace(0.2, 2, 7).view(7, 1, *[1] * dims)
    with dk.use_backend(backend):
        for training in (True, False):
            found = thresholds(model.train(training), x)
            assert len(found) >= 3
            for key, (tau, peak) in found.items():
                assert tau.shape == peak.shape == (7, tau.shape[1]), key
                assert (tau.shape[1] == 1) == (name == "drsn-cs"), key
                assert (tau > 0).all() and (tau <= peak).all(), key
                assert len(tau.unique(dim=0)) == 7, f"{key}: two samples share a threshold"
        # In eval a sample's threshold is its own: the others do not change it.
        order = torch.randperm(7)
        moved = thresholds(model, torch.cat([x[order], 100 * x[:1]]))
        for key, (tau, _) in found.items():
            torch.testing.assert_close(moved[key][0][:7], tau[order], rtol=1e-4, atol=0)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ResidualShrinkageUnit(4, 4, order="mid"), ValueError, "order must be one of 'pre', 'post', got 'mid'"),
        (
            lambda: ResidualShrinkageUnit(4, 4, shortcut=True),
            ValueError,
            "shortcut must be one of 'pad', 'projection' or None, got True",
        ),
        (lambda: ResidualShrinkageUnit(4, 4, reduction=0), ValueError, "reduction must be a positive integer, got 0"),
        (lambda: network(dims=3), ValueError, "dims must be 1 or 2, got 3"),
        (lambda: network("drsn"), ValueError, "name must be one of 'convnet', .* got 'drsn'"),
        (lambda: network18("vgg"), ValueError, "name must be one of .* got 'vgg'"),
        (lambda: network("resnet", attention="cw"), TypeError, "'resnet' has attention=None: leave it out, .*'cw'"),
        (lambda: network("convnet", shortcut="pad"), TypeError, "'convnet' has shortcut=None: leave it out"),
        (lambda: dk.models.parameter_groups(3), TypeError, "model must be an nn.Module, got int"),
        (lambda: network(depth=18), TypeError, "depth"),
        (lambda: network(dims=[1]), ValueError, r"dims must be 1 or 2, got \[1\]"),
        (lambda: network(dims=True), ValueError, "dims must be 1 or 2, got True"),
        (lambda: network18(dims="2"), ValueError, "dims must be 1 or 2, got '2'"),
        (lambda: network(stages=(4, 4, 2)), ValueError, r"stages must be a sequence of .*, got \(4, 4, 2\)"),
        (lambda: network(stages=4), ValueError, r"stages must be a sequence of .*, got 4"),
        (lambda: network(stem=4), ValueError, r"stem must be \(channels, stride\), got 4"),
        (lambda: network(threshold="firm"), ValueError, "threshold must be 'soft' or 'hard', got 'firm'"),
        (lambda: network(slope=1), ValueError, "slope must be a number from 0 to less than 1, got 1"),
        (
            lambda: network("senet", threshold="hard"),
            ValueError,
            "threshold and slope need a threshold, .* got attention='se', threshold='hard', slope=0.0",
        ),
        (lambda: network(gate_bias=math.nan), ValueError, "gate_bias must be a finite number or None, got nan"),
        (lambda: network("senet", gate_bias=-2.0), ValueError, "gate_bias needs a threshold, .* got 'se'"),
        (lambda: network("resnet", slope=0.1), ValueError, "got attention=None, threshold='soft', slope=0.1"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
