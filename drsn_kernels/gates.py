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

from . import checked, hooks
from .reference import accumulate_dtype

try:
    from ._cpu import GateReader
except ImportError:  # pure-Python install
    GateReader = None


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
        return self[:6]

    def alpha(self, pooled: torch.Tensor) -> torch.Tensor:
        """The formula in ordinary PyTorch; running statistics are read in eval and left alone in training."""
        v = F.linear(pooled, self.w1, self.b1)
        if self.gamma is not None:
            mean, var = (None, None) if self.batch_stats else (self.mean, self.var)
            v = F.batch_norm(v, mean, var, self.gamma, self.beta, self.batch_stats, 0.0, self.eps)
        return F.linear(v.relu(), self.w2, self.b2).sigmoid()


_PLAIN = (nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid)
_NORMED = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.Sigmoid)
STRUCTURES = (_PLAIN, _NORMED)


def looks_standard(gate) -> bool:
    """Whether the gate has the standard structure, by whatever subclasses, hooks or parametrizations."""
    if not isinstance(gate, nn.Sequential):
        return False
    children = tuple(gate._modules.values())
    return any(len(children) == len(types) and all(map(isinstance, children, types)) for types in STRUCTURES)


def standard_gate(gate, x: torch.Tensor, found=None) -> StandardGate | str:
    """The parts of a standard gate for x (N, C, ...), or why its modules must be called. found: read(gate).

    Asked at every call: hooks, children, parameters and a parameter's `.data` may change between any two of them, and
    nothing tells. So all is read anew: modules by plain attributes, tensors by what an equal gate left in checked.py.
    """
    found = read(gate) if found is None else found
    if isinstance(found, str):
        return found
    parts, norm = found
    tensors = tensors_of(parts, norm)
    key = "gate", x.shape[0] == 1, x.shape[1], x.dtype, x.device, parts.w1.shape, parts[9:], norm
    if checked.find(key, *tensors) is None:
        why = _unfit(parts, tensors, norm, x)
        if why is not None:
            return why
        checked.keep(key, True, *tensors)
    return parts


# The other numbers of a BatchNorm1d that a standard gate is asked for: track_running_stats and num_features.
Norm = tuple[bool, int]


def read(gate) -> tuple[StandardGate, Norm | None] | str:
    """The parts of a gate of the standard structure, fit for an x or not, or why its modules must be called."""
    return (_reader is not None and _reader.read(gate)) or _read(gate)


def tensors_of(parts: StandardGate, norm: Norm | None) -> tuple[torch.Tensor | None, ...]:
    """Parameters and buffers; None where the norm has none."""
    return parts[:2] + parts[4:6] if norm is None else parts[:9]


def _read(gate) -> tuple[StandardGate, Norm | None] | str:
    """The same in Python, with the reason."""
    if type(gate) is not nn.Sequential:
        return "the gate is not an nn.Sequential"
    children = (*gate._modules.values(),)
    types = (*map(type, children),)
    if types != _NORMED and types != _PLAIN:
        if nn.SyncBatchNorm in types:
            return "the gate's SyncBatchNorm takes its statistics from all ranks"
        return "the gate is not Linear, [BatchNorm1d], ReLU, Linear, Sigmoid"
    if any(hooks.OF_ALL_MODULES):
        return "global module hooks are set"
    if any(map(hooks.is_listened_to, (gate, *children))):
        return "the gate has hooks, or a forward of its own"
    first, last = children[0]._parameters, children[-2]._parameters
    w1, b1, w2, b2 = first.get("weight"), first.get("bias"), last.get("weight"), last.get("bias")
    if w1 is None or b1 is None or w2 is None or b2 is None:
        return "a linear layer of the gate has no bias, or its weight is no registered parameter"
    if len(types) == 4:
        return StandardGate(w1, b1, None, None, w2, b2, None, None, None, 0.0, 0.0, False), None
    own = children[1].__dict__
    affine, buffers = own["_parameters"], own["_buffers"]
    parts = StandardGate(
        w1, b1, affine.get("weight"), affine.get("bias"), w2, b2, buffers.get("running_mean"),
        buffers.get("running_var"), buffers.get("num_batches_tracked"), own["eps"], own["momentum"], own["training"],
    )  # fmt: skip
    return parts, (own["track_running_stats"], own["num_features"])


# The same by the extension in half the time; None where it finds anything unusual, and Python says what.
_reader = GateReader and GateReader(
    sequential=nn.Sequential, structures=STRUCTURES, global_hooks=hooks.OF_ALL_MODULES, parts=StandardGate
)


def _unfit(parts: StandardGate, tensors: tuple, norm: tuple | None, x: torch.Tensor) -> str | None:
    """Why tensors or numbers of this gate are not those of a standard one for x. norm: more of BatchNorm1d's."""
    w1, b1, gamma, beta, w2, b2, mean, var, batches, eps, momentum, training = parts
    hidden, channels = w1.shape
    outputs, units = w2.shape
    if channels != x.shape[1] or units != hidden or (outputs != 1 and outputs != channels):
        return "the gate's sizes do not fit x"
    if not hidden:
        return "the gate has no hidden units"
    of_hidden = (b1,)
    if norm is not None:
        track_running_stats, num_features = norm
        if gamma is None or beta is None or mean is None or var is None:
            return "the gate's BatchNorm1d has no affine parameters or no running statistics"
        if type(momentum) is not float and type(momentum) is not int:
            return "the gate's BatchNorm1d has no fixed momentum"
        if type(eps) is not float and type(eps) is not int:
            return "the gate's BatchNorm1d has no fixed eps"
        if training and not eps > 0:
            return "the gate's BatchNorm1d has an eps that torch refuses"  # with its own error
        if training and not track_running_stats:
            return "the gate's BatchNorm1d does not track running statistics"
        if batches is None or batches.dtype != torch.int64 or batches.device != x.device:
            return "the gate's BatchNorm1d has no int64 num_batches_tracked on x's device"
        if training and x.shape[0] == 1:
            return "batch statistics of one sample"  # BatchNorm1d raises its own error
        if num_features != hidden:
            return "the gate's sizes do not fit each other"
        of_hidden = (b1, gamma, beta, mean, var)
    if b2.shape != (outputs,) or any(t.shape != (hidden,) for t in of_hidden):
        return "the gate's sizes do not fit each other"
    dtype, device = accumulate_dtype(x.dtype), x.device
    for t in tensors:
        if type(t) is not nn.Parameter and type(t) is not torch.Tensor:
            return "a parameter of the gate is a tensor subclass"
        if t is batches:
            continue
        if t.dtype != dtype:
            return f"the gate's parameters are {t.dtype}, the fused gate computes in {dtype}"
        if t.device != device or not t.is_contiguous() or t.is_neg():
            return "a parameter of the gate lies on another device, or is not contiguous"
    return None
