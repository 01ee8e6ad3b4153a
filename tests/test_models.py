"""drsn_kernels.models: the paper's parameter counts, the shortcut, and what PyTorch users do with a network."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from drsn_kernels.models import DRSN, ResidualShrinkageUnit, convnet, paper_network, parameter_groups, resnet
from drsn_kernels.modules import Shrinkage

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"stages": ((4, 1, 1), (6, 2, 2)), "stem": (3, 2)}


@pytest.mark.parametrize(
    "name, count",
    [("convnet", 8416), ("resnet", 8416), ("drsn-cs", 10220), ("drsn-cw", 11552), ("senet", 11552)],
)
def test_paper_network_of_table_ii(name, count):
    model = paper_network(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 1, 2048)).shape == (2, 8)
    assert shapes == [(4, 512), (8, 256), (16, 128)]
    assert [len(stage) for stage in model.stages] == [4, 4, 4]


def test_initialisation():
    torch.manual_seed(0)
    model = paper_network("drsn-cw")
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Linear)):
            std = math.sqrt(2 / (module.weight.numel() / module.weight.shape[0]))
            assert module.weight.abs().max() <= 2 * std and not module.bias.any()
        if isinstance(module, nn.BatchNorm1d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    wide = DRSN(stages=((64, 2, 1),), stem=(64, 1)).stages[0][0].residual_function[2].weight
    assert abs(wide.std() / (0.8796 * math.sqrt(2 / 192)) - 1) < 0.03  # 0.8796: a normal truncated at two std


@pytest.mark.parametrize("cin, cout", [(4, 4), (4, 8), (3, 8)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shortcut_against_a_loop(cin, cout, stride):
    x = torch.randn(2, cin, 13)
    wanted = torch.zeros(2, cout, -(-13 // stride))
    front = (cout - cin) // 2
    for c in range(cin):
        for i in range(wanted.shape[2]):
            wanted[:, front + c, i] = x[:, c, i * stride]
    unit = ResidualShrinkageUnit(cin, cout, stride).eval()
    assert torch.equal(unit.shortcut(x), wanted)
    assert unit(x).shape == wanted.shape

    image = torch.randn(2, cin, 6, 13)
    unit = ResidualShrinkageUnit(cin, cout, stride, dims=2)
    identity = unit.shortcut(image)
    assert torch.equal(identity[:, front : front + cin], image[:, :, ::stride, ::stride])
    assert not identity[:, :front].any() and not identity[:, front + cin :].any()
    assert unit(image).shape == identity.shape


@pytest.mark.parametrize("attention, average", [("cw", "channel"), ("cs", "sample")])
def test_unit_is_pre_activation_with_the_identity_as_residual(attention, average):
    unit = ResidualShrinkageUnit(4, 8, 2, attention=attention).double()
    x = torch.randn(5, 4, 32, dtype=torch.float64)
    given = []
    unit.shrinkage.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((*args, kwargs.get("residual"))), with_kwargs=True
    )
    y = unit(x)
    ((z, residual),) = given
    assert unit.shrinkage.average == average and torch.equal(residual, unit.shortcut(x))

    bn1, relu1, conv1, bn2, relu2, conv2 = unit.residual_function
    torch.testing.assert_close(z, conv2(bn2(conv1(bn1(x).relu())).relu()))
    pooled = z.abs().mean(2)
    tau = unit.shrinkage.fc(pooled) * (pooled if average == "channel" else pooled.mean(1, keepdim=True))
    wanted = z.sign() * (z.abs() - tau.unsqueeze(2)).clamp_min(0) + residual
    torch.testing.assert_close(y, wanted)


def test_baselines_differ_by_shrinkage_and_shortcut_only():
    x = torch.randn(4, 4, 32)
    plain = ResidualShrinkageUnit(4, 8, 2, attention=None, shortcut=None)
    residual = ResidualShrinkageUnit(4, 8, 2, attention=None)
    residual.load_state_dict(plain.state_dict())
    torch.testing.assert_close(residual(x), plain(x) + residual.shortcut(x))
    assert (
        set(resnet().state_dict())
        == set(convnet().state_dict())
        == {key for key in DRSN().state_dict() if "shrinkage" not in key}
    )
    assert not any(isinstance(module, Shrinkage) for module in resnet().modules())


@pytest.mark.parametrize("dims, shape", [(1, (4, 2, 33)), (2, (4, 2, 17, 20))])
@pytest.mark.parametrize("attention", ["cw", "cs", "se", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_backward_pickle_deepcopy(dims, shape, attention, dtype):
    model = DRSN(2, 3, dims=dims, attention=attention, **SMALL).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    y = model(x)
    assert y.shape == (4, 3) and y.dtype == dtype
    y.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # Convolution biases in front of a batch norm have no effect; everything else must learn.
    assert all(stage[0].residual_function[2].weight.grad.any() for stage in model.stages)
    model.eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training):
    unit = ResidualShrinkageUnit(2, 4, 2).train(training)
    x = torch.randn(3, 2, 33)
    compiled = torch.compile(copy.deepcopy(unit), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), unit(x))


def test_weight_decay_groups():
    model = paper_network("drsn-cw")
    decayed, others = parameter_groups(model)
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert {p.dim() for p in decayed["params"]} == {2, 3} and {p.dim() for p in others["params"]} == {1}
    assert "stages.0.0.shrinkage.fc.0.weight" in {names[id(p)] for p in decayed["params"]}
    assert "stages.0.0.shrinkage.fc.1.weight" in {names[id(p)] for p in others["params"]}
    torch.optim.SGD(parameter_groups(model, 0.5), lr=0.1, momentum=0.9)

    model.fc.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model)) == len(names) - 2


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ResidualShrinkageUnit(0, 4), ValueError, "in_channels must be a positive integer, got 0"),
        (lambda: ResidualShrinkageUnit(4, 4.0), TypeError, "out_channels must be a positive integer, got 4.0"),
        (lambda: ResidualShrinkageUnit(8, 4), ValueError, "out_channels must be at least in_channels, 8, .* got 4"),
        (lambda: ResidualShrinkageUnit(4, 4, 0), ValueError, "stride must be a positive integer, got 0"),
        (lambda: ResidualShrinkageUnit(4, 4, dims=3), ValueError, "dims must be 1 or 2, got 3"),
        (lambda: ResidualShrinkageUnit(4, 4, kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
        (
            lambda: ResidualShrinkageUnit(4, 4, attention="CW"),
            ValueError,
            "attention must be one of 'cw', 'cs', 'se' or None, got 'CW'",
        ),
        (lambda: DRSN(stages=((4, 4),)), ValueError, r"stages must be a sequence of \(channels, units, stride\)"),
        (lambda: DRSN(stages=()), ValueError, "stages must be"),
        (lambda: DRSN(stages=((4, 0, 1),)), ValueError, "units must be a positive integer, got 0"),
        (lambda: DRSN(stem=(4,)), ValueError, r"stem must be \(channels, stride\)"),
        (lambda: DRSN(classes=0), ValueError, "classes must be a positive integer, got 0"),
        (lambda: paper_network("vgg"), ValueError, "name must be one of 'convnet', .*, 'drsn-cw', got 'vgg'"),
        (lambda: DRSN()(torch.randn(2, 2048)), ValueError, r"x must have shape \(N, 1, length\), got \(2, 2048\)"),
        (lambda: DRSN(3, dims=2)(torch.randn(2, 1, 8, 8)), ValueError, r"\(N, 3, height, width\), got \(2, 1, 8, 8\)"),
        (lambda: ResidualShrinkageUnit(4, 8)(torch.randn(2, 3, 8)), ValueError, r"\(N, 4, length\), got \(2, 3, 8\)"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
