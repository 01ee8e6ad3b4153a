"""The residual shrinkage building unit: two convolutions, a shrinkage, a shortcut."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..batch_norm import FusedSequential
from ..modules import Shrinkage, SqueezeExcite, check_gate_bias
from ..ops import checks
from ..reference import SOFT

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}

# What a unit applies to its last convolution's output: (channels, reduction=, norm=) -> module with
# forward(x, residual=None). The gates are the same, so that networks differ in what the gate's output does to x.
# Those of THRESHOLDS also take threshold=, slope= and gate_bias=.
ATTENTION: dict[str, Callable[..., nn.Module]] = {
    "cw": partial(Shrinkage, average="channel"),
    "cs": partial(Shrinkage, average="sample"),
    "se": SqueezeExcite,
}
THRESHOLDS = ("cw", "cs")
ORDERS = ("pre", "post")
SHORTCUTS = ("pad", "projection")


def check_choice(name: str, value: object, choices: tuple[str, ...], none: bool = False) -> None:
    if not (value in choices if isinstance(value, str) else none and value is None):
        accepted = ", ".join(map(repr, choices)) + (" or None" if none else "")
        raise ValueError(f"{name} must be one of {accepted}, got {value!r}")


def check_options(
    dims: int,
    kernel_size: int,
    attention: str | None,
    order: str,
    shortcut: str | None,
    reduction: int,
    threshold: str,
    slope: float,
    gate_bias: float | None,
) -> None:
    if not isinstance(dims, int) or isinstance(dims, bool) or dims not in CONV:
        raise ValueError(f"dims must be 1 or 2, got {dims!r}")
    checks.positive(kernel_size=kernel_size, reduction=reduction)
    if kernel_size % 2 == 0:  # only odd kernels keep the lengths of both branches equal
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    check_choice("attention", attention, tuple(ATTENTION), none=True)
    check_choice("order", order, ORDERS)
    check_choice("shortcut", shortcut, SHORTCUTS, none=True)
    if checks.rule(threshold, slope) != SOFT and attention not in THRESHOLDS:
        raise ValueError(
            f"threshold and slope need a threshold, attention 'cw' or 'cs'; "
            f"got attention={attention!r}, threshold={threshold!r}, slope={slope}"
        )
    check_gate_bias(gate_bias)
    if gate_bias is not None and attention not in THRESHOLDS:
        raise ValueError(f"gate_bias needs a threshold, attention 'cw' or 'cs'; got {attention!r}")


def check_input(x: torch.Tensor, channels: int, dims: int) -> None:
    if x.dim() != dims + 2 or x.shape[1] != channels:
        lengths = ", ".join(("length",) if dims == 1 else ("height", "width"))
        raise ValueError(f"x must have shape (N, {channels}, {lengths}), got {tuple(x.shape)}")


class PadShortcut(nn.Module):
    """Every stride-th element of each spatial dimension, and zero channels, half of them (rounded down) in front.

    Shapes: (N, in_channels, *lengths) -> (N, out_channels, *ceil(lengths / stride)). No weights: the paper's shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels must be at least in_channels, {in_channels}, because the shortcut 'pad' "
                f"only adds channels; got {out_channels}"
            )
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spatial = x.dim() - 2
        if self.stride > 1:
            x = x[(slice(None), slice(None)) + (slice(None, None, self.stride),) * spatial]
        return F.pad(x, (0, 0) * spatial + (self.front, self.back)) if self.front + self.back else x

    def extra_repr(self) -> str:
        return f"stride={self.stride}, zero channels {self.front} in front, {self.back} behind"


def _projection(in_channels: int, out_channels: int, stride: int, dims: int) -> nn.Module:
    """The ports' shortcut: a 1x1 convolution and BN where the shape changes, the input itself where not."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = CONV[dims](in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(conv, BATCH_NORM[dims](out_channels))


class ResidualShrinkageUnit(nn.Module):
    """Two convolutions, a shrinkage and the identity: the paper's building unit (figures 4 and 5), and its relatives.

    Args:
        in_channels, out_channels: channels of input and output; with the shortcut "pad" a unit cannot lose channels.
        stride: stride of the first convolution and of the shortcut.
        dims: 1 for (N, C, length), 2 for (N, C, height, width).
        kernel_size: of both convolutions, odd.
        attention: "cw" (a threshold for each channel, DRSN-CW), "cs" (one for the sample, DRSN-CS), "se" (a factor
            for each channel, the unit of a SENet) or None (the unit of a ResNet).
        order: "pre" (the paper): BN, ReLU, Conv, BN, ReLU, Conv, shrinkage, + identity, and nothing after the sum.
            "post" (the public ports): Conv, BN, ReLU, Conv, BN, shrinkage, + identity, ReLU. Convolutions in front of
            a BN have no bias there, as in the ports.
        shortcut: "pad" (the paper): subsampling and channels of zeros, no weights. "projection" (the ports): 1x1
            convolution and BN where the shape changes. None: no shortcut, with ``attention=None`` a plain ConvNet's.
        reduction, norm: of the attention's gate: hidden width channels // reduction, with BN or without.
        threshold, slope: as in :func:`drsn_kernels.soft_threshold`, for "cw" and "cs": "hard", or leaky.
        gate_bias: of :class:`drsn_kernels.Shrinkage`, for "cw" and "cs".
        fused: each BN with the ReLU behind it is one operator (:class:`drsn_kernels.FusedSequential`); the same
            parameters, state_dict and numbers to rounding. False: torch's modules, one after the other.

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
        checks.positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        check_options(dims, kernel_size, attention, order, shortcut, reduction, threshold, slope, gate_bias)
        self.in_channels, self.out_channels, self.stride, self.dims = in_channels, out_channels, stride, dims
        self.attention, self.order = attention, order
        conv = partial(CONV[dims], kernel_size=kernel_size, padding=kernel_size // 2, bias=order == "pre")
        first, second = conv(in_channels, out_channels, stride=stride), conv(out_channels, out_channels)
        batch_norm = BATCH_NORM[dims]
        if order == "pre":
            layers = [batch_norm(in_channels), nn.ReLU(), first, batch_norm(out_channels), nn.ReLU(), second]
        else:
            layers = [first, batch_norm(out_channels), nn.ReLU(), second, batch_norm(out_channels)]
        self.residual_function = (FusedSequential if fused else nn.Sequential)(*layers)
        options = {"reduction": reduction, "norm": norm}
        if attention in THRESHOLDS:
            options |= {"threshold": threshold, "slope": slope, "gate_bias": gate_bias}
        self.shrinkage = ATTENTION[attention](out_channels, **options) if attention else None
        self.shortcut: nn.Module | None = None
        if shortcut == "pad":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        elif shortcut == "projection":
            self.shortcut = _projection(in_channels, out_channels, stride, dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_channels, self.dims)
        identity = None if self.shortcut is None else self.shortcut(x)
        x = self.residual_function(x)
        if self.shrinkage is not None:
            x = self.shrinkage(x, residual=identity)
        elif identity is not None:
            x = x + identity
        return F.relu(x) if self.order == "post" else x

    def extra_repr(self) -> str:
        added = "no shortcut" if self.shortcut is None else "+ shortcut"
        relu = ", ReLU" if self.order == "post" else ""
        return (
            f"{self.in_channels} -> {self.out_channels}, stride={self.stride}, order={self.order!r}: "
            f"residual_function, attention={self.attention!r}, {added}{relu}"
        )
