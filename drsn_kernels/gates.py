"""The standard gate: what counts as one, and its formula.

Linear - [BatchNorm1d] - ReLU - Linear - Sigmoid in a Sequential, as in the paper and in `Shrinkage(...).fc`. A backend
may compute it together with the step around it, instead of calling the modules. That must change nothing a user can
see, so it is done only where nothing could: each child of exactly this type, no hooks (FSDP's and weight_norm's are
hooks), no parametrization (it changes the type), plain registered parameters of x's accumulate dtype on x's device
(replicas of DataParallel and swapped-in fast weights are not registered). One difference is left: under autocast the
modules would compute in bfloat16 or float16, the fused gate computes in float32.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from .reference import accumulate_dtype


class StandardGate(NamedTuple):
    """Parameters and buffers, w1 (H, C), w2 (O, H) with O = C or 1; the norm's are None without one."""

    w1: torch.Tensor
    b1: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    w2: torch.Tensor
    b2: torch.Tensor
    mean: torch.Tensor | None
    var: torch.Tensor | None
    batches: torch.Tensor | None
    eps: float
    momentum: float
    batch_stats: bool

    @property
    def parameters(self) -> tuple[torch.Tensor | None, ...]:
        """w1, b1, gamma, beta, w2, b2."""
        return self.w1, self.b1, self.gamma, self.beta, self.w2, self.b2

    def alpha(self, pooled: torch.Tensor) -> torch.Tensor:
        """The formula in ordinary PyTorch; running statistics are read in eval and left alone in training."""
        v = F.linear(pooled, self.w1, self.b1)
        if self.gamma is not None:
            mean, var = (None, None) if self.batch_stats else (self.mean, self.var)
            v = F.batch_norm(v, mean, var, self.gamma, self.beta, self.batch_stats, 0.0, self.eps)
        return F.linear(v.relu(), self.w2, self.b2).sigmoid()


_GLOBAL_HOOKS = [  # private, dictionaries that torch fills in place
    getattr(nn_module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
_PLAIN = (nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid)
_NORMED = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.Sigmoid)
STRUCTURES = (_PLAIN, _NORMED)


def _is_watched(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    ) or ("forward" in own)


def looks_standard(gate) -> bool:
    """Whether the gate has the standard structure, by whatever subclasses, hooks or parametrizations."""
    if not isinstance(gate, nn.Sequential):
        return False
    children = tuple(gate._modules.values())
    return any(len(children) == len(types) and all(map(isinstance, children, types)) for types in STRUCTURES)


def standard_gate(gate, x: torch.Tensor) -> StandardGate | str:
    """The parts of a standard gate for x (N, C, ...), or why its modules must be called.

    Asked at every call, so plain attribute reads: 11 us less a call than with module.weight and generators.
    """
    if type(gate) is not nn.Sequential:
        return "the gate is not an nn.Sequential"
    children = tuple(gate._modules.values())
    types = tuple(map(type, children))
    if types != _NORMED and types != _PLAIN:
        if nn.SyncBatchNorm in types:
            return "the gate's SyncBatchNorm takes its statistics from all ranks"
        return "the gate is not Linear, [BatchNorm1d], ReLU, Linear, Sigmoid"
    if any(_GLOBAL_HOOKS):
        return "global module hooks are set"
    if _is_watched(gate) or any(map(_is_watched, children)):
        return "the gate has hooks, or a forward of its own"
    first, last = children[0]._parameters, children[-2]._parameters
    w1, b1, w2, b2 = first.get("weight"), first.get("bias"), last.get("weight"), last.get("bias")
    if w1 is None or b1 is None or w2 is None or b2 is None:
        return "a linear layer of the gate has no bias, or its weight is no registered parameter"
    hidden, channels = w1.shape
    outputs, units = w2.shape
    if channels != x.shape[1] or units != hidden or (outputs != 1 and outputs != channels):
        return "the gate's sizes do not fit x"
    if not hidden:
        return "the gate has no hidden units"
    gamma = beta = mean = var = batches = None
    eps, momentum, training = 0.0, 0.0, False
    tensors = (w1, b1, w2, b2)
    if len(types) == 5:
        norm = children[1]
        gamma, beta = norm._parameters.get("weight"), norm._parameters.get("bias")
        mean, var, batches = map(norm._buffers.get, ("running_mean", "running_var", "num_batches_tracked"))
        eps, momentum, training = norm.eps, norm.momentum, norm.training
        if gamma is None or beta is None or mean is None or var is None:
            return "the gate's BatchNorm1d has no affine parameters or no running statistics"
        if type(momentum) is not float and type(momentum) is not int:
            return "the gate's BatchNorm1d has no fixed momentum"
        if training and not eps > 0:
            return "the gate's BatchNorm1d has an eps that torch refuses"  # with its own error
        if training and not norm.track_running_stats:
            return "the gate's BatchNorm1d does not track running statistics"
        if batches is None or batches.dtype != torch.int64 or batches.device != x.device:
            return "the gate's BatchNorm1d has no int64 num_batches_tracked on x's device"
        if norm.num_features != hidden:
            return "the gate's sizes do not fit each other"
        if training and x.shape[0] == 1:
            return "batch statistics of one sample"  # BatchNorm1d raises its own error
        tensors += (gamma, beta, mean, var)
    dtype, device = accumulate_dtype(x.dtype), x.device
    for t in tensors:
        if type(t) is not nn.Parameter and type(t) is not torch.Tensor:
            return "a parameter of the gate is a tensor subclass"
        if t.dtype != dtype:
            return f"the gate's parameters are {t.dtype}, the fused gate computes in {dtype}"
        if t.device != device or not t.is_contiguous():
            return "a parameter of the gate lies on another device, or is not contiguous"
    return StandardGate(w1, b1, gamma, beta, w2, b2, mean, var, batches, eps, momentum, training)
