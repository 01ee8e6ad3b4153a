"""Networks of residual shrinkage units, the networks they are compared with, and factories by name."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..batch_norm import FusedSequential, is_norm, run
from ..ops.checks import positive
from ..ops.dispatch import not_eager
from .unit import BATCH_NORM, CONV, ResidualShrinkageUnit, check_choice, check_input, check_options

Stages = Sequence[tuple[int, int, int]]


class DRSN(nn.Module):
    """Deep residual shrinkage network: Conv, stages of units, BN, ReLU, global average pooling, FC.

    With ``order="post"`` the BN and ReLU follow the first convolution instead. The defaults are the paper's network
    (Table II) for one input channel: Conv(4, stride 2), then stages of four units with 4, 8 and 16 channels, each
    halving the length. :func:`network` builds it and its relatives by name.

    Weights are drawn from a normal distribution of std sqrt(2 / fan_in) truncated at two std; biases start at 0, those
    of `gate_bias` there.

    Args:
        in_channels: channels of the input.
        classes: number of outputs (logits).
        stages: (channels, units, stride of the first unit) for each stage.
        stem: (channels, stride) of the first convolution.
        dims, kernel_size, attention, order, shortcut, reduction, norm, threshold, slope, gate_bias, fused: as in
            :class:`ResidualShrinkageUnit`.

    Shapes:
        (N, in_channels, *lengths) -> (N, classes).

    Raises:
        TypeError, ValueError: an argument outside the above; in forward, an x of another rank or channel count.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 8,
        *,
        stages: Stages = ((4, 4, 2), (8, 4, 2), (16, 4, 2)),
        stem: tuple[int, int] = (4, 2),
        dims: int = 1,
        kernel_size: int = 3,
        attention: str | None = "cw",
        order: str = "pre",
        shortcut: str | None = "pad",
        reduction: int = 1,
        norm: bool = True,
        threshold: str = "soft",
        slope: float = 0.0,
        gate_bias: float | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, classes=classes)
        check_options(dims, kernel_size, attention, order, shortcut, reduction, threshold, slope, gate_bias)
        if not isinstance(stem, Sequence) or len(stem) != 2:
            raise ValueError(f"stem must be (channels, stride), got {stem!r}")
        if not (isinstance(stages, Sequence) and stages) or any(
            not isinstance(stage, Sequence) or len(stage) != 3 for stage in stages
        ):
            raise ValueError(f"stages must be a sequence of (channels, units, stride), got {stages!r}")
        channels, stride = stem
        positive(stem_channels=channels, stem_stride=stride)
        self.in_channels, self.classes, self.dims = in_channels, classes, dims
        self.attention, self.order, self.shortcut = attention, order, shortcut
        conv = CONV[dims](
            in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=order == "pre"
        )
        self.fused, sequential = fused, FusedSequential if fused else nn.Sequential
        self.stem = conv if order == "pre" else sequential(conv, BATCH_NORM[dims](channels), nn.ReLU())
        options = {"dims": dims, "kernel_size": kernel_size, "attention": attention, "order": order}
        options |= {"shortcut": shortcut, "reduction": reduction, "norm": norm, "threshold": threshold, "slope": slope}
        options |= {"gate_bias": gate_bias, "fused": fused}
        layers = []
        for stage_channels, units, stage_stride in stages:
            positive(units=units)
            layer = []
            for index in range(units):
                unit_stride = stage_stride if index == 0 else 1
                layer.append(ResidualShrinkageUnit(channels, stage_channels, unit_stride, **options))
                channels = stage_channels
            layers.append(nn.Sequential(*layer))
        self.stages = nn.Sequential(*layers)
        self.norm = BATCH_NORM[dims](channels) if order == "pre" else None
        self.fc = nn.Linear(channels, classes)
        self.apply(_initialise)
        if gate_bias is not None:
            for unit in (unit for stage in self.stages for unit in stage):
                nn.init.constant_(unit.shrinkage.fc[-2].bias, gate_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels, self.dims)
        x = self.stages(self.stem(x))
        if self.norm is not None:
            fused = self.fused and is_norm(self.norm) and not_eager(x) is None
            x = run(self.norm, x, 0.0) if fused else F.relu(self.norm(x))
        return self.fc(x.flatten(2).mean(2))

    def extra_repr(self) -> str:
        lengths = "length" if self.dims == 1 else "height, width"
        return (
            f"(N, {self.in_channels}, {lengths}) -> (N, {self.classes}), attention={self.attention!r}, "
            f"order={self.order!r}, shortcut={self.shortcut!r}"
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        std = math.sqrt(2 / module.weight[0].numel())
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# What tells the networks apart; everything else about them is the same.
_NETWORKS = {
    "convnet": {"attention": None, "shortcut": None},
    "resnet": {"attention": None},
    "senet": {"attention": "se"},
    "drsn-cs": {"attention": "cs"},
    "drsn-cw": {"attention": "cw"},
}
NAMES = tuple(_NETWORKS)

_CIFAR = {"stages": ((16, 1, 1), (32, 1, 2), (32, 1, 2)), "stem": (16, 1), "reduction": 4}
_18_LAYERS = {  # 16 of them in the units
    "stages": ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)),
    "stem": (64, 1),
    "order": "post",
    "shortcut": "projection",
}


def _build(name: str, in_channels: int, classes: int, layout: dict, options: dict) -> DRSN:
    check_choice("name", name, NAMES)
    own = _NETWORKS[name]
    for option in options:
        if option in own:
            raise TypeError(
                f"{name!r} has {option}={own[option]!r}: leave it out, or take another of {', '.join(NAMES)}; "
                f"got {option}={options[option]!r}"
            )
    return DRSN(in_channels, classes, **layout | options | own)


def network(name: str = "drsn-cw", *, dims: int = 1, in_channels: int = 1, classes: int = 8, **options) -> DRSN:
    """A network by name: for signals the paper's layout, for images the authors' for CIFAR.

    Args:
        name: "convnet", "resnet", "senet", "drsn-cs" or "drsn-cw". They differ in the attention and the shortcut
            alone; the gates of the last three have the same layers.
        dims: 1, :func:`paper_network`'s layout, or 2, :func:`cifar_network`'s.
        in_channels, classes: of the input, of the output.
        options: other keyword arguments of :class:`DRSN`, instead of the layout's: stages, stem, kernel_size, order,
            reduction, norm, shortcut ("convnet" has none), and threshold, slope and gate_bias ("drsn-cs" and "drsn-cw"
            only).

    Raises:
        TypeError, ValueError: an argument outside the above.

    Example::

        network("resnet", dims=2, in_channels=3, classes=10, stages=((32, 3, 1), (64, 3, 2)), order="post")
    """
    return _build(name, in_channels, classes, (_CIFAR if dims == 2 else {}) | {"dims": dims}, options)


def paper_network(name: str = "drsn-cw", classes: int = 8) -> DRSN:
    """A network of Table II of the paper, for input (N, 1, 2048); returns logits (N, classes).

    Trainable parameters with 8 classes: "convnet" and "resnet" 8,416, "drsn-cs" 10,220, "drsn-cw" 11,552; "senet",
    which is not in the paper, 11,552, because its gates are DRSN-CW's.

    Raises ValueError for another name.
    """
    return network(name, classes=classes)


def cifar_network(name: str = "drsn-cw", classes: int = 10, in_channels: int = 3) -> DRSN:
    """The network of the authors' CIFAR code: Conv(16), units of 16, 32 and 32 channels, gates of C // 4.

    For input (N, in_channels, height, width); the second and third unit halve both. Returns logits (N, classes).

    Source: the paper's authors' TFLearn code (github.com/zhao62/Deep-Residual-Shrinkage-Networks).
    """
    return network(name, dims=2, in_channels=in_channels, classes=classes)


def network18(name: str = "drsn-cw", *, dims: int = 1, in_channels: int = 1, classes: int = 8, **options) -> DRSN:
    """The 18-layer network of the public ports: 64 to 512 channels, two units a stage, post-activation, projections.

    The unit's keys in the state_dict are the ports'. Input (N, in_channels, *lengths), of which the last three stages
    halve each length; returns logits (N, classes). Arguments and errors: as in :func:`network`.
    """
    return _build(name, in_channels, classes, _18_LAYERS | {"dims": dims}, options)


def resnet(in_channels: int = 1, classes: int = 8, **options) -> DRSN:
    """The DRSN without shrinkage: a ResNet. Takes the other keyword arguments of :class:`DRSN`, with its defaults.

    So its layout is the paper's for ``dims=2`` too, where ``network("resnet", dims=2)`` has the authors' for CIFAR.
    """
    return _build("resnet", in_channels, classes, {}, options)


def senet(in_channels: int = 1, classes: int = 8, **options) -> DRSN:
    """The DRSN with a squeeze-and-excitation instead of the shrinkage. Layout and arguments: as in :func:`resnet`."""
    return _build("senet", in_channels, classes, {}, options)


def convnet(in_channels: int = 1, classes: int = 8, **options) -> DRSN:
    """The ResNet without shortcuts: a plain ConvNet. Layout and arguments: as in :func:`resnet`."""
    return _build("convnet", in_channels, classes, {}, options)


def parameter_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict]:
    """Optimizer parameter groups with weight decay on the weights of convolutions and linear layers only.

    Biases and normalisation parameters get none, as in the paper's recipe. Parameters that do not require a
    gradient are left out.

    Example::

        torch.optim.SGD(parameter_groups(model), lr=0.1, momentum=0.9)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in weights], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in weights], "weight_decay": 0.0},
    ]
