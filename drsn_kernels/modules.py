"""Drop-in modules: thin shells around the operators, with the names and state_dict keys of the public ports."""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .ops import shrink, soft_threshold


class Shrinkage(nn.Module):
    r"""The shrinkage step of a residual shrinkage building unit, in place of the ports' ``Shrinkage``.

    A gate of two linear layers turns the pooled \|x\| into a threshold for each channel (DRSN-CW) or for the sample
    (DRSN-CS), and x is soft-thresholded with it (Zhao et al. 2020, equations 5 to 11, figures 4 and 5).

    Args:
        channels: C of the input (N, C, \*spatial).
        gap_size: accepted for the ports' signature; the average is global, so 1, (1,) or (1, 1) only.
        average: "channel" (DRSN-CW), "sample" (DRSN-CS, the gate ends in one neuron) or None (tau = gate(A)).
        reduction: the gate's hidden width is channels // reduction (at least 1).
        norm: BatchNorm1d between the gate's layers, as in the paper; without it the keys are ``fc.0`` and ``fc.2``.
        activation: the class of the gate's activation.
        rd_ratio, rd_channels, rd_divisor: timm's way to say the hidden width, so that the class fits its ``attn_layer``
            slot: channels * rd_ratio rounded to a multiple of rd_divisor (8 unless given), or rd_channels itself.
            Instead of reduction. Such networks need ``zero_init_last=False`` (docs/deploy.md says why).
        device, dtype: of the gate's parameters, as in torch.nn.

    Shapes:
        x (N, C, \*spatial), residual of the same shape -> (N, C, \*spatial).

    Raises:
        TypeError, ValueError: channels, reduction, rd_channels or rd_divisor not a positive integer, rd_ratio not a
        positive number, reduction beside rd_ratio or rd_channels, gap_size not 1, unknown average; in forward what
        :func:`drsn_kernels.shrink` raises.

    Equivalent to::

        A = x.abs().mean(dim=spatial)
        tau = fc(A) * A                               # average="sample": fc(A) * A.mean(1, keepdim=True)
        y = x.sign() * (x.abs() - tau).relu()         # tau broadcast over the spatial dimensions
        y = y + residual                              # where one is given
    """

    def __init__(
        self,
        channels: int,
        gap_size: int | tuple[int, ...] = 1,
        *,
        average: str | None = "channel",
        reduction: int = 1,
        norm: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
        rd_ratio: float | None = None,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden(channels, reduction, rd_ratio, rd_channels, rd_divisor)
        if gap_size not in (1, (1,), (1, 1), [1], [1, 1]) or isinstance(gap_size, bool):
            raise ValueError(f"gap_size must be 1, (1,) or (1, 1), because the average is global; got {gap_size!r}")
        if average not in ("channel", "sample", None):
            raise ValueError(f"average must be 'channel', 'sample' or None, got {average!r}")
        where = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = [nn.Linear(channels, hidden, **where)]
        if norm:
            layers.append(nn.BatchNorm1d(hidden, **where))
        layers += [activation(), nn.Linear(hidden, 1 if average == "sample" else channels, **where), nn.Sigmoid()]
        self.channels = channels
        self.average = average
        self.fc = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        sink = self.__dict__.get("_tau_sink")
        if sink is None:
            return shrink(x, self.fc, average=self.average, residual=residual)
        y, tau = shrink(x, self.fc, average=self.average, residual=residual, return_tau=True)
        sink(tau.detach())
        return y

    def __getstate__(self) -> dict:
        """Without a running record_tau: a copy or pickle made inside the block does not record."""
        return {key: value for key, value in self.__dict__.items() if key != "_tau_sink"}

    def extra_repr(self) -> str:
        return f"{self.channels}, average={self.average!r}"


def _hidden(channels: int, reduction: int, rd_ratio: float | None, rd_channels: int | None, rd_divisor: int) -> int:
    """The width of the gate's hidden layer, by reduction or by timm's arguments."""
    given = {"channels": channels, "reduction": reduction, "rd_divisor": rd_divisor}
    if rd_channels is not None:
        given["rd_channels"] = rd_channels
    for name, value in given.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a positive integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    if rd_ratio is None and rd_channels is None:
        return max(channels // reduction, 1)
    if reduction != 1:
        raise ValueError(f"the gate's width is said twice: reduction={reduction} and rd_ratio or rd_channels")
    if rd_channels is not None:
        return rd_channels
    if not isinstance(rd_ratio, numbers.Real) or isinstance(rd_ratio, bool):
        raise TypeError(f"rd_ratio must be a positive number, got {rd_ratio!r}")
    if not 0 < rd_ratio < math.inf:
        raise ValueError(f"rd_ratio must be a positive number, got {rd_ratio}")
    return max(int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor, rd_divisor)  # timm's rounding


class SoftThreshold(nn.Module):
    """``sign(x) * relu(|x| - tau)`` with a fixed or a learnable threshold (Zhao et al. 2020, equation 3).

    Args:
        tau: the threshold, a number, or one number a channel as a sequence or tensor (C,).
        learnable: make tau a parameter; otherwise it is a buffer. Both are in the state_dict.

    Shapes:
        x of any shape for a single tau; (N, C, *spatial) for one a channel. The result has x's shape.
    """

    def __init__(self, tau: float | torch.Tensor = 0.0, *, learnable: bool = False) -> None:
        super().__init__()
        value = torch.as_tensor(tau)
        value = value.detach().clone() if value.is_floating_point() else value.to(torch.get_default_dtype())
        if value.dim() > 1:
            raise ValueError(f"tau must be a number or have shape (C,), got shape {tuple(value.shape)}")
        if learnable:
            self.tau = nn.Parameter(value)
        else:
            self.register_buffer("tau", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return soft_threshold(x, self.tau if self.tau.dim() == 0 else self.tau.view(1, -1, *[1] * (x.dim() - 2)))

    def extra_repr(self) -> str:
        return f"tau={self.tau.tolist()}" if self.tau.numel() <= 4 else f"tau=({self.tau.numel()} channels)"


@contextlib.contextmanager
def record_tau(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inside the block, the threshold of every :class:`Shrinkage` and converted module in `model`, by module name.

    Yields a dict that each forward pass updates: name -> tau of the latest pass, (N, C) or (N, 1), detached, float32
    (float64 for float64). A module registered under several names appears under each; `model` itself is named "".
    Recording ends with the block.

    Example::

        with dk.record_tau(model) as taus:
            model(x)
        taus["layer1.0.shrinkage"].mean()
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Shrinkage) or "_drsn_plans" in module.__dict__:  # of convert
            names.setdefault(module, []).append(name)
    if not names:
        raise ValueError(f"record_tau found no drsn_kernels.Shrinkage in {type(model).__name__}, and nothing converted")
    taus: dict[str, torch.Tensor] = {}
    outer = {module: module.__dict__.get("_tau_sink") for module in names}

    def make_sink(keys: list[str], then: Callable[[torch.Tensor], None] | None) -> Callable[[torch.Tensor], None]:
        def sink(tau: torch.Tensor) -> None:
            for key in keys:
                taus[key] = tau
            if then is not None:  # a surrounding record_tau goes on recording
                then(tau)

        return sink

    try:
        for module, keys in names.items():
            module.__dict__["_tau_sink"] = make_sink(keys, outer[module])
        yield taus
    finally:
        for module in names:
            if outer[module] is None:
                module.__dict__.pop("_tau_sink", None)
            else:
                module.__dict__["_tau_sink"] = outer[module]
