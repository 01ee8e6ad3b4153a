"""Batch normalisation and the activation behind it as modules: PyTorch's own run fused, and one module for both.

What is fused is read from the modules at each call, and changes nothing that a user can see: their parameters, buffers,
state_dict and classes stay. A norm or activation that is a subclass, has hooks or a forward of its own is called.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # private; of _BatchNorm, convert_sync_batchnorm would drop the ReLU

from . import hooks
from .ops import checks, scripted
from .ops.batch_norm_relu import normalise, slope_of
from .ops.dispatch import not_eager

# The ranks of x that a norm takes; what it raises for others is its own business.
_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,), nn.SyncBatchNorm: tuple(range(2, 9)),
}  # fmt: skip
_END = object()  # of a Sequential's layers, among which None would be an error
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def is_norm(module: nn.Module) -> bool:
    """A batch normalisation of PyTorch's that nobody has hooked into."""
    return type(module) in _NORMS and _is_plain(module)


def slope_behind(module: nn.Module | None) -> float | None:
    """Of an activation that nobody has hooked into: 0 of ReLU, of LeakyReLU its own; None of any other module."""
    if type(module) is nn.ReLU:
        return 0.0 if _is_plain(module) else None
    return float(module.negative_slope) if type(module) is nn.LeakyReLU and _is_plain(module) else None


def _is_plain(module: nn.Module) -> bool:
    return not (any(hooks.OF_ALL_MODULES) or hooks.is_listened_to(module))


def run(norm: nn.Module, x: torch.Tensor, slope: float, asked: bool = False) -> torch.Tensor:
    """What a norm (is_norm) and an activation of this slope behind it make of x. asked: of normalise."""
    ranks = _NORMS.get(type(norm))
    if ranks is not None and x.dim() not in ranks:
        return norm(x)  # raises its own error
    own = norm.__dict__
    parameters, buffers = own["_parameters"], own["_buffers"]
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # parametrised, pruned, or set to a tensor
        weight, bias, mean, var, batches = (getattr(norm, name) for name in _TENSORS)
    training, momentum = own["training"], own["momentum"]
    if training and not own["track_running_stats"]:
        mean = var = batches = None
    if not training:
        batches = None
    of_batch = training or mean is None
    group = _group(norm) if training else None
    buffers = mean, var, batches
    average = momentum is None and batches is not None and mean is not None  # of all batches
    if average:  # first of this one: how many there were stays on the device, and no launch is prepared for each number
        momentum, buffers = 1.0, (torch.zeros_like(mean), torch.zeros_like(var), None)
    try:
        y = normalise(x, weight, bias, buffers, of_batch, momentum or 0.0, own["eps"], slope, group, asked)
    except ValueError as error:
        if x.dim() > 1 and x.shape[1] != own["num_features"]:  # it names a buffer, which the caller has not given
            raise ValueError(f"x must have {own['num_features']} channels, got shape {tuple(x.shape)}") from error
        raise
    if average:
        share = (batches + 1).to(mean.dtype).reciprocal()
        mean.data.lerp_(buffers[0], share)  # .data: without a word to autograd, as torch
        var.data.lerp_(buffers[1], share.to(var.dtype))
        batches.add_(1)
    return y


def _group(norm: nn.Module) -> Any:
    """The processes that share statistics; None where there is but this one."""
    if type(norm) is not nn.SyncBatchNorm and not norm.__dict__.get("sync"):  # getattr takes 7 us where it is not there
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return norm.process_group or dist.group.WORLD


def run_layers(sequential: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """What its layers make of x in an eager call, each batch normalisation with the activation behind it."""
    layers = iter(sequential._modules.values())
    layer = next(layers, _END)
    while layer is not _END:
        if is_norm(layer):
            behind = next(layers, _END)
            slope = slope_behind(behind)
            x = run(layer, x, 1.0 if slope is None else slope, True)
            layer = behind if slope is None else next(layers, _END)
        else:
            x = layer(x)
            layer = next(layers, _END)
    return x


class FusedSequential(nn.Sequential):
    """nn.Sequential, in which each batch normalisation, with the ReLU or LeakyReLU behind it, is one operator.

    The same arguments, children, state_dict and results. Fused are BatchNorm1d, 2d, 3d and SyncBatchNorm without hooks,
    in eager calls; in what torch.compile, torch.export and torch.fx trace, the children are called.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name for it
        if torch.jit.is_scripting():
            for layer in self:
                input = layer(input)
            return input
        else:  # which TorchScript does not look at
            return super().forward(input) if not_eager(input) is not None else run_layers(self, input)


class BatchNormReLU(_NormBase):
    r"""Batch normalisation and an activation in one module, of any number of spatial dimensions.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in torch.nn.BatchNorm1d. momentum
            None: the running statistics are the average of all batches.
        activation: "relu", "leaky" or None.
        slope: of "leaky".
        sync: in training, statistics over all processes of `process_group` (None: all there are), as in
            torch.nn.SyncBatchNorm.

    It is no _BatchNorm of torch's: convert_sync_batchnorm, swa_utils.update_bn and whatever else looks for those passes
    over it. FusedSequential has torch's own norms.

    Shapes:
        (N, C) or (N, C, \*spatial) -> the same.

    Raises:
        What :func:`drsn_kernels.batch_norm_relu` raises; ValueError: unknown activation.

    The state_dict has the keys of torch.nn.BatchNorm1d: weight, bias, running_mean, running_var, num_batches_tracked.
    Source: Ioffe and Szegedy 2015, algorithm 1. Equivalent to::

        nn.Sequential(nn.BatchNorm1d(C), nn.ReLU())           # BatchNorm2d, BatchNorm3d by x's rank
    """

    __call__: Callable[..., torch.Tensor]  # nn.Module's own is of Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = "relu",
        slope: float = 0.01,
        sync: bool = False,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        slope_of(activation, slope)
        checks.positive(num_features=num_features)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation, self.slope, self.sync, self.process_group = activation, slope, sync, process_group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return scripted.batch_norm_act(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked, self.training,
                self.track_running_stats, self.momentum, self.eps, self.activation, float(self.slope),
            )  # fmt: skip
        else:  # which TorchScript does not look at
            return run(self, x, slope_of(self.activation, self.slope))

    def extra_repr(self) -> str:
        slope = f", slope={self.slope}" if self.activation == "leaky" else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{slope}" + (", sync=True" if self.sync else "")
