"""Shrinkage in timm's attn_layer slot: its way of saying the gate's width, and networks of its ResNet family."""

from functools import partial

import pytest
import torch
from torch import nn

import drsn_kernels as dk

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(scope="module")
def timm():
    try:
        import timm
    except Exception as error:  # a torchvision built for another torch fails with a RuntimeError
        pytest.skip(f"timm cannot be imported ({type(error).__name__}: {error}): pip install timm")
    return timm


# ---- the slot's arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, hidden",
    [
        ({}, 72),
        ({"rd_ratio": 1.0}, 72),
        ({"rd_ratio": 0.25}, 16),  # 18 to a multiple of 8
        ({"rd_ratio": 0.28}, 24),  # 20.16: halfway and more goes up
        ({"rd_ratio": 0.25, "rd_divisor": 1}, 18),
        ({"rd_ratio": 1 / 16}, 8),  # never below the divisor
        ({"rd_ratio": 2}, 144),
        ({"rd_channels": 5}, 5),
        ({"rd_channels": 5, "rd_ratio": 0.5}, 5),
        ({"rd_divisor": 16}, 72),  # nothing is reduced
    ],
    ids=str,
)
def test_width_in_timms_words(arguments, hidden):
    module = dk.Shrinkage(72, **arguments)
    assert (module.fc[0].out_features, module.fc[1].num_features, module.fc[3].in_features) == (hidden,) * 3
    assert module(torch.randn(2, 72, 5, 5)).shape == (2, 72, 5, 5)


def test_device_and_dtype():
    module = dk.Shrinkage(8, device="meta", dtype=torch.float64)
    floats = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert len(floats) == 8 and all((t.device.type, t.dtype) == ("meta", torch.float64) for t in floats)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"rd_ratio": 0}, ValueError, "rd_ratio must be a positive number, got 0"),
        ({"rd_ratio": float("nan")}, ValueError, "rd_ratio must be a positive number, got nan"),
        ({"rd_ratio": "0.25"}, TypeError, "rd_ratio must be a positive number, got '0.25'"),
        ({"rd_ratio": True}, TypeError, "rd_ratio must be a positive number, got True"),
        ({"rd_channels": 0}, ValueError, "rd_channels must be a positive integer, got 0"),
        ({"rd_divisor": 1.5, "rd_ratio": 0.5}, TypeError, "rd_divisor must be a positive integer, got 1.5"),
        ({"rd_ratio": 0.5, "reduction": 2}, ValueError, "the gate's width is said twice: reduction=2 and rd_ratio"),
    ],
)
def test_argument_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.Shrinkage(8, **arguments)


# ---- with timm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rd_ratio", [1.0, 0.25, 1 / 16, 0.3])
@pytest.mark.parametrize("channels", [16, 64, 72, 100])
def test_the_width_is_that_of_timms_own_modules(timm, channels, rd_ratio):
    theirs = timm.layers.create_attn("se", channels, rd_ratio=rd_ratio)
    ours = timm.layers.create_attn(partial(dk.Shrinkage, rd_ratio=rd_ratio), channels)
    assert ours.fc[0].out_features == theirs.fc1.out_channels


NETWORKS = {
    "resnet18": {},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "seresnext26d_32x4d": {"layers": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("attn_layer", [dk.Shrinkage, partial(dk.Shrinkage, rd_ratio=0.25, average="sample")])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train(timm, name, attn_layer):
    """One for each block, on the cpu kernels with its gate fused, and every parameter learns."""
    model = timm.create_model(
        name, num_classes=3, zero_init_last=False, block_args={"attn_layer": attn_layer}, **NETWORKS[name]
    )
    blocks = [m for m in model.modules() if hasattr(m, "se")]
    assert all(type(block.se) is dk.Shrinkage for block in blocks)
    x = torch.randn(4, 3, 48, 48)
    with dk.use_backend("cpu", strict=True):
        calls = dk.explain(model, x, strict=True)
        assert len(calls) == len(blocks) and all((c.backend, c.fused) == ("cpu", True) for c in calls)
        model(x).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())
    expected = model.eval()(x)
    with dk.use_backend("torch"):
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_blocks_that_start_at_zero_never_learn(timm):
    """timm's default zeroes the scale of each block's last norm: the threshold and its input are then 0 for ever. The
    documentation asks for zero_init_last=False for this reason, and this test tells when it no longer has to."""
    model = timm.create_model("resnet18", num_classes=3, block_args={"attn_layer": dk.Shrinkage})
    model(torch.randn(2, 3, 48, 48)).square().sum().backward()
    block = model.layer1[0]
    assert not block.bn2.weight.any() and not any(p.grad.any() for p in block.parameters())


def test_state_dict_round_trip(timm):
    arguments = {"num_classes": 3, "zero_init_last": False, "block_args": {"attn_layer": dk.Shrinkage}}
    model, other = (timm.create_model("resnet18", **arguments).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert "layer1.0.se.fc.0.weight" in model.state_dict()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(other(x), model(x))
    assert isinstance(model.layer1[0].se.fc[1], nn.BatchNorm1d)
