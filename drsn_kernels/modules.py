"""Drop-in modules: thin shells around the operators, with the names and state_dict keys of the public ports."""

import contextlib
import functools
import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .ops import checks, scripted, shrink, soft_threshold, squeeze_excite


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
        threshold, slope: as in :func:`drsn_kernels.soft_threshold`; "hard", through which the gate does not learn (a
            warning says so once), or leaky. Both may be set on a trained module.
        gate_bias: what the bias of the gate's last layer starts at. -2 starts with tau near 0.12 A, where torch's own
            start, None, is near 0.5 A.
        rd_ratio, rd_channels, rd_divisor: timm's way to say the hidden width, so that the class fits its ``attn_layer``
            slot: channels * rd_ratio rounded to a multiple of rd_divisor (8 unless given), or rd_channels itself.
            Instead of reduction. Such networks need ``zero_init_last=False`` (docs/use.md says why).
        device, dtype: of the gate's parameters, as in torch.nn.

    Shapes:
        x (N, C, \*spatial), residual of the same shape -> (N, C, \*spatial).

    Raises:
        TypeError, ValueError: channels, reduction, rd_channels or rd_divisor not a positive integer, rd_ratio not a
        positive number, reduction beside rd_ratio or rd_channels, gap_size not 1, unknown average, a gate_bias that is
        no finite number; in forward what :func:`drsn_kernels.shrink` raises.

    Equivalent to::

        A = x.abs().mean(dim=spatial)
        tau = fc(A) * A                               # average="sample": fc(A) * A.mean(1, keepdim=True)
        y = x.sign() * (x.abs() - tau).relu()         # tau broadcast over the spatial dimensions
        y = y + residual                              # where one is given
    """

    __call__: Callable[..., torch.Tensor]  # nn.Module's own is of Any

    def __init__(
        self,
        channels: int,
        gap_size: int | tuple[int, ...] = 1,
        *,
        average: str | None = "channel",
        reduction: int = 1,
        norm: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
        threshold: str = "soft",
        slope: float = 0.0,
        gate_bias: float | None = None,
        rd_ratio: float | None = None,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden(channels, reduction, rd_ratio, rd_channels, rd_divisor)
        checks.flag(norm=norm)
        check_gate_bias(gate_bias)
        _check_gap_size(gap_size)
        checks.average(average)
        self.channels = channels
        self.average = average
        checks.rule(threshold, slope)
        self.threshold, self.slope = threshold, slope
        if threshold == "hard":
            _warn_of_hard_thresholds()
        outputs = 1 if average == "sample" else channels
        self.fc = _gate(channels, hidden, outputs, norm, activation, device=device, dtype=dtype)
        if gate_bias is not None:
            nn.init.constant_(self.fc[-2].bias, gate_bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if torch.jit.is_scripting():
            pooled = scripted.averages(x, True, self.fc[0].weight)
            alpha = self.fc(pooled)
            return scripted.shrink(x, alpha, pooled, self.average, residual, self.threshold, float(self.slope))
        else:  # which TorchScript does not look at
            sink = self.__dict__.get("_tau_sink")
            gate = self._modules.get("fc")  # self.fc goes through nn.Module.__getattr__
            y = shrink(
                x, self.fc if gate is None else gate, average=self.average, residual=residual,
                threshold=self.threshold, slope=self.slope, return_tau=sink is not None,
            )  # fmt: skip
            if sink is None:
                return y
            y, tau = y
            sink(tau.detach())
            return y

    def __getstate__(self) -> dict:
        """Without a running record_tau: a copy or pickle made inside the block does not record."""
        return {key: value for key, value in self.__dict__.items() if key != "_tau_sink"}

    def extra_repr(self) -> str:
        return f"{self.channels}, average={self.average!r}{_rule_repr(self)}"


class SqueezeExcite(nn.Module):
    r"""Squeeze-and-excitation: each channel scaled by a factor in (0, 1), which a gate computes from all averages.

    The paper's relative of :class:`Shrinkage`, and takes its place in a network: the same arguments but for `average`
    (Hu et al. 2018, equations 2 to 4, figure 2).

    Args:
        channels: C of the input (N, C, \*spatial).
        gap_size: as in :class:`Shrinkage`: 1, (1,) or (1, 1), because the average is global.
        reduction: the gate's hidden width is channels // reduction (at least 1).
        norm: BatchNorm1d between the gate's layers; without it, as in SENet, the keys are ``fc.0`` and ``fc.2``.
        activation: the class of the gate's activation.
        bias: of the linear layers; False for checkpoints of the ports' ``SELayer``, whose layers have none.
        rd_ratio, rd_channels, rd_divisor: timm's way to say the hidden width, instead of reduction: channels * rd_ratio
            rounded to a multiple of rd_divisor (8 unless given), or rd_channels itself.
        device, dtype: of the gate's parameters, as in torch.nn.

    Shapes:
        x (N, C, \*spatial), residual of the same shape -> (N, C, \*spatial).

    Raises:
        TypeError, ValueError: as in :class:`Shrinkage`; in forward what :func:`drsn_kernels.squeeze_excite` raises.

    Equivalent to::

        s = fc(x.mean(dim=spatial))
        y = x * s                                     # s broadcast over the spatial dimensions
        y = y + residual                              # where one is given
    """

    __call__: Callable[..., torch.Tensor]  # nn.Module's own is of Any

    def __init__(
        self,
        channels: int,
        gap_size: int | tuple[int, ...] = 1,
        *,
        reduction: int = 16,
        norm: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        bias: bool = True,
        rd_ratio: float | None = None,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden(channels, reduction, rd_ratio, rd_channels, rd_divisor, default=16)
        checks.flag(norm=norm, bias=bias)
        _check_gap_size(gap_size)
        self.channels = channels
        self.fc = _gate(channels, hidden, channels, norm, activation, bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if torch.jit.is_scripting():
            return scripted.squeeze_excite(x, self.fc(scripted.averages(x, False, self.fc[0].weight)), residual)
        else:
            return squeeze_excite(x, self.fc, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.channels}"


@functools.cache  # once
def _warn_of_hard_thresholds() -> None:
    warnings.warn(
        "threshold='hard': the gradient of y in tau is 0, so the gate, or a learnable tau, does not learn from y; "
        "train with threshold='soft' (a leaky one has slope > 0) and set module.threshold = 'hard' afterwards, or give "
        "tau a loss of its own (drsn_kernels.shrink with return_tau=True)",
        stacklevel=3,
    )


def _rule_repr(module: "Shrinkage | SoftThreshold") -> str:
    hard = f", threshold={module.threshold!r}" if module.threshold != "soft" else ""
    return hard + (f", slope={module.slope}" if module.slope else "")


def _check_gap_size(gap_size: int | tuple[int, ...]) -> None:
    if gap_size not in (1, (1,), (1, 1), [1], [1, 1]) or isinstance(gap_size, bool):
        raise ValueError(f"gap_size must be 1, (1,) or (1, 1), because the average is global; got {gap_size!r}")


def check_gate_bias(value: float | None) -> None:
    if value is None:
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"gate_bias must be a finite number or None, got {value!r}")


def _gate(channels: int, hidden: int, outputs: int, norm: bool, activation, bias=True, **where) -> nn.Sequential:
    """Linear, [BatchNorm1d], activation, Linear, Sigmoid."""
    norms = [nn.BatchNorm1d(hidden, **where)] if norm else []
    first, last = nn.Linear(channels, hidden, bias, **where), nn.Linear(hidden, outputs, bias, **where)
    return nn.Sequential(first, *norms, _made(activation), last, nn.Sigmoid())


def _made(activation: Any) -> nn.Module:
    try:
        made = None if isinstance(activation, nn.Module) else activation()
    except TypeError:
        made = None
    if not isinstance(made, nn.Module):
        raise TypeError(f"activation must make a module where it is called, as nn.ReLU does, got {activation!r}")
    return made


def _hidden(
    channels: int, reduction: int, rd_ratio: float | None, rd_channels: int | None, rd_divisor: int, default: int = 1
) -> int:
    """The width of the gate's hidden layer, by reduction (`default` unless given) or by timm's arguments."""
    given = {"channels": channels, "reduction": reduction, "rd_divisor": rd_divisor}
    if rd_channels is not None:
        given["rd_channels"] = rd_channels
    checks.positive(**given)
    if rd_ratio is None and rd_channels is None:
        return max(channels // reduction, 1)
    if reduction != default:
        raise ValueError(f"the gate's width is said twice: reduction={reduction} and rd_ratio or rd_channels")
    if rd_channels is not None:
        return rd_channels
    if not isinstance(rd_ratio, numbers.Real) or isinstance(rd_ratio, bool):
        raise TypeError(f"rd_ratio must be a positive number, got {rd_ratio!r}")
    if not 0 < rd_ratio < math.inf:
        raise ValueError(f"rd_ratio must be a positive number, got {rd_ratio}")
    return max(int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor, rd_divisor)  # timm's rounding


def _threshold_of(tau: Any) -> torch.Tensor:
    try:
        value = torch.as_tensor(tau)
    except (RuntimeError, TypeError, ValueError):
        value = None
    if value is None or value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"tau must be a number, or a sequence or tensor of one a channel, got {tau!r}")
    if value.dim() > 1 or not value.numel():
        raise ValueError(f"tau must be a number or have shape (C,), got shape {tuple(value.shape)}")
    return value


class SoftThreshold(nn.Module):
    """``sign(x) * relu(|x| - tau)`` with a fixed or a learnable threshold (Zhao et al. 2020, equation 3).

    Args:
        tau: the threshold, a number, or one number a channel as a sequence or tensor (C,).
        learnable: make tau a parameter; otherwise it is a buffer. Both are in the state_dict as ``tau``.
        threshold, slope: as in :func:`drsn_kernels.soft_threshold`; "hard", through which tau does not learn (a warning
            says so once), or leaky.
        nonnegative: compute with max(tau, 0) of a learnable tau. The gradient goes through, so that a parameter which
            the optimizer has taken below 0 rises again. False: with the parameter as it is; below 0 it expands x.

    Shapes:
        x of any shape for a single tau; (N, C, *spatial) for one a channel. The result has x's shape.

    Raises:
        TypeError, ValueError: tau of another shape, or below 0 where it is kept from it, unknown threshold or slope.
    """

    __call__: Callable[..., torch.Tensor]  # nn.Module's own is of Any
    nonnegative = False  # of modules that were pickled before there was a choice

    def __init__(
        self,
        tau: float | Sequence[float] | torch.Tensor = 0.0,
        *,
        learnable: bool = False,
        threshold: str = "soft",
        slope: float = 0.0,
        nonnegative: bool = True,
    ) -> None:
        super().__init__()
        checks.flag(learnable=learnable, nonnegative=nonnegative)
        checks.rule(threshold, slope)
        self.threshold, self.slope = threshold, slope
        self.nonnegative = learnable and nonnegative
        value = _threshold_of(tau)
        value = value.detach().clone() if value.is_floating_point() else value.to(torch.get_default_dtype())
        if learnable:
            if nonnegative and (value < 0).any():
                raise ValueError(f"a learnable tau must be at least 0, or have nonnegative=False; got {tau}")
            if threshold == "hard":
                _warn_of_hard_thresholds()
            self.tau = nn.Parameter(value)
        else:
            self.register_buffer("tau", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            tau = self.tau if self.tau.dim() == 0 else self.tau.view(1, -1)
            if self.nonnegative:
                tau = tau - tau.detach().clamp(max=0.0)
            return scripted.soft_threshold(x, tau, None, self.threshold, float(self.slope))
        else:
            tau = self._parameters.get("tau")
            tau = self.tau if tau is None else tau  # a buffer, or what a replica of DataParallel has
            if self.nonnegative:
                tau = tau - tau.detach().clamp(max=0.0)  # max(tau, 0), with the gradient of tau
            if tau.dim():
                if x.dim() < 2 or tau.numel() not in (1, x.shape[1]):
                    raise ValueError(f"x must have {tau.numel()} channels, as many as tau, got shape {tuple(x.shape)}")
                tau = tau.view(1, -1, *[1] * (x.dim() - 2))
            return soft_threshold(x, tau, threshold=self.threshold, slope=self.slope)

    def extra_repr(self) -> str:
        tau = self.tau.detach().relu() if self.nonnegative else self.tau
        shown = f"tau={tau.tolist()}" if tau.numel() <= 4 else f"tau=({tau.numel()} channels)"
        return shown + _rule_repr(self)


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
        plans = module.__dict__.get("_drsn_plans", {})  # of convert
        if isinstance(module, Shrinkage) or any(not fused.plan.scales for fused in plans.values()):
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
