"""Deep residual shrinkage networks and the networks they are compared with, 1-D and 2-D.

Source: Zhao et al., "Deep Residual Shrinkage Networks for Fault Diagnosis", IEEE TII 2020, 16(7):4681-4690,
DOI 10.1109/TII.2019.2943898. Units are pre-activation, as there and in the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .modules import Shrinkage

_CONV = {1: nn.Conv1d, 2: nn.Conv2d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}

# What a unit applies to its last convolution's output: channels -> module with forward(x, residual=None).
ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "cw": partial(Shrinkage, average="channel"),
    "cs": partial(Shrinkage, average="sample"),
}


def _check_count(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a positive integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")


def _check_options(dims: int, kernel_size: int, attention: str | None) -> None:
    if dims not in _CONV:
        raise ValueError(f"dims must be 1 or 2, got {dims!r}")
    _check_count(kernel_size=kernel_size)
    if kernel_size % 2 == 0:  # only odd kernels keep the lengths of both branches equal
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if attention is not None and attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(map(repr, ATTENTION))} or None, got {attention!r}")


def _check_input(x: torch.Tensor, channels: int, dims: int) -> None:
    if x.dim() != dims + 2 or x.shape[1] != channels:
        lengths = ", ".join(("length",) if dims == 1 else ("height", "width"))
        raise ValueError(f"x must have shape (N, {channels}, {lengths}), got {tuple(x.shape)}")


class ResidualShrinkageUnit(nn.Module):
    """BN, ReLU, Conv, BN, ReLU, Conv, shrinkage, plus the identity: the paper's building unit (figures 4 and 5).

    The shortcut has no weights: it takes every stride-th element of each spatial dimension and pads the channels
    with zeros, half of them (rounded down) in front. ``attention=None`` is the unit of a ResNet, and
    ``shortcut=False`` with it the unit of a plain ConvNet.

    Args:
        in_channels, out_channels: channels of input and output; a unit with a shortcut cannot lose channels.
        stride: stride of the first convolution and of the shortcut.
        dims: 1 for (N, C, length), 2 for (N, C, height, width).
        kernel_size: of both convolutions, odd.
        attention: "cw" (a threshold for each channel), "cs" (one for the sample) or None.
        shortcut: add the identity.

    Shapes:
        (N, in_channels, *lengths) -> (N, out_channels, *ceil(lengths / stride)).

    Raises:
        TypeError, ValueError: an argument outside the above; in forward, an x of another rank or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        dims: int = 1,
        kernel_size: int = 3,
        attention: str | None = "cw",
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        _check_count(in_channels=in_channels, out_channels=out_channels, stride=stride)
        _check_options(dims, kernel_size, attention)
        if shortcut and out_channels < in_channels:
            raise ValueError(
                f"out_channels must be at least in_channels, {in_channels}, because the shortcut "
                f"only pads channels; got {out_channels}"
            )
        conv = partial(_CONV[dims], kernel_size=kernel_size, padding=kernel_size // 2)
        self.in_channels, self.out_channels, self.stride, self.dims = in_channels, out_channels, stride, dims
        self.shortcut = shortcut
        self.residual_function = nn.Sequential(
            _BATCH_NORM[dims](in_channels),
            nn.ReLU(),
            conv(in_channels, out_channels, stride=stride),
            _BATCH_NORM[dims](out_channels),
            nn.ReLU(),
            conv(out_channels, out_channels),
        )
        self.shrinkage = ATTENTION[attention](out_channels) if attention else None

    def identity(self, x: torch.Tensor) -> torch.Tensor:
        """The shortcut: (N, in_channels, *lengths) -> (N, out_channels, *ceil(lengths / stride))."""
        if self.stride > 1:
            x = x[(slice(None), slice(None)) + (slice(None, None, self.stride),) * self.dims]
        extra = self.out_channels - self.in_channels
        return F.pad(x, (0, 0) * self.dims + (extra // 2, extra - extra // 2)) if extra else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(x, self.in_channels, self.dims)
        identity = self.identity(x) if self.shortcut else None
        x = self.residual_function(x)
        if self.shrinkage is not None:
            return self.shrinkage(x, residual=identity)
        return x if identity is None else x + identity


class DRSN(nn.Module):
    """Deep residual shrinkage network: Conv, stages of units, BN, ReLU, global average pooling, FC.

    The defaults are the paper's network (Table II) for one input channel: Conv(4, stride 2), then stages of four
    units with 4, 8 and 16 channels, each halving the length. See :func:`paper_network` for it by name, and
    :func:`resnet` and :func:`convnet` for the same network without shrinkage, and without shortcuts.

    Weights are drawn from a normal distribution of std sqrt(2 / fan_in) truncated at two std; biases start at 0.

    Args:
        in_channels: channels of the input.
        classes: number of outputs (logits).
        stages: (channels, units, stride of the first unit) for each stage.
        stem: (channels, stride) of the first convolution.
        dims, kernel_size, attention, shortcut: as in :class:`ResidualShrinkageUnit`.

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
        stages: Sequence[tuple[int, int, int]] = ((4, 4, 2), (8, 4, 2), (16, 4, 2)),
        stem: tuple[int, int] = (4, 2),
        dims: int = 1,
        kernel_size: int = 3,
        attention: str | None = "cw",
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        _check_count(in_channels=in_channels, classes=classes)
        _check_options(dims, kernel_size, attention)
        if len(stem) != 2:
            raise ValueError(f"stem must be (channels, stride), got {stem!r}")
        if not stages or any(len(stage) != 3 for stage in stages):
            raise ValueError(f"stages must be a sequence of (channels, units, stride), got {stages!r}")
        self.in_channels, self.dims = in_channels, dims
        channels, stride = stem
        _check_count(stem_channels=channels, stem_stride=stride)
        self.stem = _CONV[dims](in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2)
        layers = []
        for stage_channels, units, stage_stride in stages:
            _check_count(units=units)
            layer = []
            for index in range(units):
                layer.append(
                    ResidualShrinkageUnit(
                        channels,
                        stage_channels,
                        stage_stride if index == 0 else 1,
                        dims=dims,
                        kernel_size=kernel_size,
                        attention=attention,
                        shortcut=shortcut,
                    )
                )
                channels = stage_channels
            layers.append(nn.Sequential(*layer))
        self.stages = nn.Sequential(*layers)
        self.norm = _BATCH_NORM[dims](channels)
        self.fc = nn.Linear(channels, classes)
        self.apply(_initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(x, self.in_channels, self.dims)
        x = F.relu(self.norm(self.stages(self.stem(x))))
        return self.fc(x.flatten(2).mean(2))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        std = math.sqrt(2 / module.weight[0].numel())
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(module.bias)


def resnet(in_channels: int = 1, classes: int = 8, **options) -> DRSN:
    """The DRSN without shrinkage: a pre-activation ResNet. Takes the other keyword arguments of :class:`DRSN`."""
    return DRSN(in_channels, classes, attention=None, **options)


def convnet(in_channels: int = 1, classes: int = 8, **options) -> DRSN:
    """The ResNet without shortcuts: a plain ConvNet. Takes the other keyword arguments of :class:`DRSN`."""
    return DRSN(in_channels, classes, attention=None, shortcut=False, **options)


_PAPER = {"drsn-cw": DRSN, "drsn-cs": partial(DRSN, attention="cs"), "resnet": resnet, "convnet": convnet}


def paper_network(name: str = "drsn-cw", classes: int = 8) -> DRSN:
    """A network of Table II of the paper, for input (N, 1, 2048); returns logits (N, classes).

    Trainable parameters with 8 classes: "convnet" and "resnet" 8,416, "drsn-cs" 10,220, "drsn-cw" 11,552.

    Raises ValueError for another name.
    """
    if name not in _PAPER:
        raise ValueError(f"name must be one of {', '.join(_PAPER)}, got {name!r}")
    return _PAPER[name](1, classes)


def parameter_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict]:
    """Optimizer parameter groups with weight decay on the weights of convolutions and linear layers only.

    Biases and normalisation parameters get none, as in the paper's recipe. Parameters that do not require a
    gradient are left out.

    Example::

        torch.optim.SGD(parameter_groups(model), lr=0.1, momentum=0.9)
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in weights], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in weights], "weight_decay": 0.0},
    ]
