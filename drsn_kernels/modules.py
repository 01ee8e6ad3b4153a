"""Drop-in modules: thin shells around the operators, with the names and state_dict keys of the public ports."""

import contextlib
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

    Shapes:
        x (N, C, \*spatial), residual of the same shape -> (N, C, \*spatial).

    Raises:
        TypeError, ValueError: channels or reduction not a positive integer, gap_size not 1, unknown average; in
        forward what :func:`drsn_kernels.shrink` raises.

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
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction)):
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be a positive integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if gap_size not in (1, (1,), (1, 1), [1], [1, 1]) or isinstance(gap_size, bool):
            raise ValueError(f"gap_size must be 1, (1,) or (1, 1), because the average is global; got {gap_size!r}")
        if average not in ("channel", "sample", None):
            raise ValueError(f"average must be 'channel', 'sample' or None, got {average!r}")
        hidden = max(channels // reduction, 1)
        layers: list[nn.Module] = [nn.Linear(channels, hidden)]
        if norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers += [activation(), nn.Linear(hidden, 1 if average == "sample" else channels), nn.Sigmoid()]
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
    """Inside the block, the threshold of every :class:`Shrinkage` in `model`, by module name.

    Yields a dict that each forward pass updates: name -> tau of the latest pass, (N, C) or (N, 1), detached, float32
    (float64 for float64). A module registered under several names appears under each; `model` itself is named "".
    Recording ends with the block.

    Example::

        with dk.record_tau(model) as taus:
            model(x)
        taus["layer1.0.shrinkage"].mean()
    """
    names: dict[Shrinkage, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Shrinkage):
            names.setdefault(module, []).append(name)
    if not names:
        raise ValueError(f"record_tau found no drsn_kernels.Shrinkage in {type(model).__name__}")
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
