"""batch_norm_relu: batch normalisation and the activation behind it, in one operator.

    z  = weight (x - mean) rstd + bias             mean, rstd = 1 / sqrt(var + eps), by channel
    y  = act(z)                                    z where z > 0, slope z elsewhere: slope 0 is ReLU, 1 none
    g' = act'(z) g                                 z is computed again
    dbias = sum g'            dweight = sum g' (x - mean) rstd
    dx = weight rstd (g' - (dbias + (x - mean) rstd dweight) / M)         M = N L; in eval weight rstd g'

Forward reads x for the statistics, and to write y; backward reads g and x for the two sums, and to write dx. Kept for
it are x, and mean and rstd (2, C): no plane, and no y, which ReLU alone would keep. The torch backend is PyTorch's own
batch_norm and activation, in ordinary autograd (reference.py).

With a process group the statistics, and in the backward pass the two sums, are those of all its processes.
"""

import numbers
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import backends, checked, recording, reference
from ..backends.eager import eager
from ..backends.step import Backend, Norm, Running, Step, Want
from ..layout import Layout, layout_of
from ..reference import accumulate_dtype
from . import checks
from .dispatch import as_saved, direct_apply, is_eager_grad, not_eager, overwritten, restored


class NormAct(torch.autograd.Function):
    """(x, weight, bias) -> y. given: mean and var where they are not this batch's."""

    @staticmethod
    def forward(ctx, x, weight, bias, given, running, call, group):
        y, stats, share = _forward(x, weight, bias, given, running, call, group)
        ctx.as_saved = as_saved(x, weight, bias, stats, share)
        ctx.save_for_backward(x, weight, bias, stats, share)
        ctx.call, ctx.group = call, group
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, g):
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        if g is None or not (want_x or want_weight or want_bias):
            return (None,) * 7
        x, weight, bias, stats, share = restored(ctx)
        backend, layout, norm = ctx.call[:3]
        rest = x, layout, norm, weight, bias, stats
        if share is not None and g._is_zerotensor():
            g = torch.zeros(g.shape, dtype=g.dtype, device=g.device)
        if not is_eager_grad(g):
            if share is not None:
                raise RuntimeError("batch_norm_relu over several processes has first derivatives only")
            dx, sums = eager.norm_grad(g, *rest, want_x, True)
        elif share is None:
            dx, sums = backend.norm_grad(g, *rest, want_x, want_weight or want_bias)
        else:
            _, sums = backend.norm_grad(g, *rest, False, True)
            dx = None
            if want_x:
                of_all = sums.clone()
                dist.all_reduce(of_all, group=ctx.group)
                dx, _ = backend.norm_grad(g, *rest, True, False, (of_all * share, layout.n * layout.l))
        dbias, dweight = (None, None) if sums is None else sums.unbind()
        return dx, dweight if want_weight else None, dbias if want_bias else None, *[None] * 4


_apply = direct_apply(NormAct)


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    given: tuple[torch.Tensor, torch.Tensor] | None, running: Running | None, call: "Planned", group: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """y, the statistics used, and with a group this process's share of the elements."""
    backend, layout, norm, _ = call
    share = None
    if norm.batch and group is not None:
        mean, var, share = _of_all(x, layout, backend, running, group)
        norm, given, running = norm._replace(batch=False), (mean, var), None
    return *backend.norm(x, layout, norm, weight, bias, given, running), share


def _of_all(
    x: torch.Tensor, layout: Layout, backend: Backend, running: Running | None, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean and var (C,) over all processes, and this process's share of the elements. Merged without cancellation."""
    own = backend.norm_statistics(x, layout).double() if layout.numel else x.new_zeros(2, layout.c, dtype=torch.double)
    count = own.new_full((layout.c,), layout.n * layout.l)
    parts = [own.new_empty(3, layout.c) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, torch.stack([*own, count]), group=group)
    means, squares, counts = torch.stack(parts, 1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    m2 = (squares + counts * (means - mean).square()).sum(0)
    if running is not None:
        running.mean.data.lerp_(mean.to(running.mean.dtype), running.factor)
        running.var.data.lerp_((m2 / (total - 1)).to(running.var.dtype), running.factor)
        if running.batches is not None:
            running.batches.add_(1)
    sums = accumulate_dtype(x.dtype)
    return mean.to(sums), (m2 / total).to(sums), (count / total)[:1].to(sums)


def batch_norm_relu(
    x: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = "relu",
    slope: float = 0.01,
    num_batches_tracked: torch.Tensor | None = None,
    process_group: Any = None,
) -> torch.Tensor:
    r"""Batch normalisation and an activation in one: the arguments of torch.nn.functional.batch_norm, and which.

    Args:
        x: features (N, C) or (N, C, \*spatial), float32, float64, bfloat16 or float16; any strides.
        running_mean, running_var: (C,); in training moved towards the batch's by `momentum`, the variance unbiased.
        weight, bias: (C,), or None for 1 and 0.
        training: normalise with the batch's statistics; otherwise with the running ones.
        activation: "relu", "leaky" (slope * z where z <= 0; a NaN lets all of its gradient pass) or None.
        slope: of "leaky".
        num_batches_tracked: int64 scalar, raised by one in training.
        process_group: of torch.distributed; in training the statistics are those of all its processes, as in
            torch.nn.SyncBatchNorm.

    Returns:
        y with x's shape, dtype and memory format.

    Raises:
        TypeError: x is not floating point. ValueError: a shape or device does not fit, unknown activation, one value a
        channel in training, no running statistics in eval. Nothing is changed then.

    Statistics and sums are float32 (float64 for float64 x). Kept for the backward pass: x, and two numbers a channel.
    Source: Ioffe and Szegedy 2015, algorithm 1. Equivalent to::

        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y = {"relu": F.relu(z), "leaky": F.leaky_relu(z, slope), None: z}[activation]
    """
    slope = slope_of(activation, slope)
    buffers = running_mean, running_var, num_batches_tracked
    return normalise(x, weight, bias, buffers, training, momentum, eps, slope, process_group)


class Planned(NamedTuple):
    """What came of the checks of a call (checked.py)."""

    backend: Backend
    layout: Layout
    norm: Norm
    step: Step


Buffers = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def normalise(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, buffers: Buffers, training: bool,
    momentum: float, eps: float, slope: float, group: Any = None, asked: bool = False,
) -> torch.Tensor:  # fmt: skip
    """batch_norm_relu, the activation by its slope; buffers: running mean and variance, and the number of batches.

    asked: the caller has asked not_eager() already.
    """
    why, key, known = None if asked else not_eager(), None, None
    tensors = [t for t in (x, weight, bias, *buffers) if t is not None]
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    if why is None and group is None and type(momentum) is float and type(training) is bool:
        try:
            key = (
                "norm", x.shape, x.stride(), x.dtype, x.device, x.requires_grad, training, eps, slope,
                backends.choice.backend, torch.is_grad_enabled(), None if weight is None else weight.requires_grad,
                None if bias is None else bias.requires_grad, buffers[0] is None, buffers[2] is None,
            )  # fmt: skip
            known = checked.find(key, *tensors)
        except (AttributeError, RuntimeError, TypeError):  # a list, a sparse tensor: the checks say so
            key = None
    if known is None:
        _check(x, weight, bias, buffers, training, momentum, eps, group)
        momentum, eps = float(momentum), float(eps)  # numpy's and fractions are numbers too
        if any(not _is_ready(t, x) for t in (weight, bias, *buffers[:2])):
            return _converted(x, weight, bias, buffers, training, momentum, eps, slope, group)
        why = why or not_eager(*tensors)
        if group is not None and why is not None:
            raise RuntimeError(f"batch_norm_relu over several processes takes eager calls only; {why}")
        backend = backends.select(x) if why is None and (x.numel() or group is not None) else None
        if backend is None or (backend is eager and group is None):
            return _by_torch(x, weight, bias, buffers, training, momentum, eps, slope, why, backend)
        known = _known(x, weight, bias, training, eps, slope, backend)
        if key is not None:
            checked.keep(key, known, *tensors)
    return _run(x, weight, bias, buffers, momentum, known, group)


def _is_ready(t: torch.Tensor | None, x: torch.Tensor) -> bool:
    return t is None or (t.dtype == accumulate_dtype(x.dtype) and t.is_contiguous())


def _converted(x, weight, bias, buffers, training, *rest) -> torch.Tensor:
    """With parameters and statistics in the dtype of sums; the statistics are put back."""
    mean, var, batches = buffers
    own = weight, bias, mean, var
    sums = accumulate_dtype(x.dtype)
    weight, bias, *moved = (None if t is None else t.to(sums).contiguous() for t in own)
    try:
        return normalise(x, weight, bias, (*moved, batches), training, *rest)
    finally:  # a checkpoint's second run ends once it has what was saved, and has moved them
        for t, new in zip((mean, var), moved, strict=True):
            if training and new is not t:
                t.data.copy_(new)  # autograd is not told, as by torch


def _run(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, buffers: Buffers, momentum: float,
    known: Planned, group: Any,
) -> torch.Tensor:  # fmt: skip
    backend, _, norm, step = known
    mean, var, batches = buffers
    given, running = None, None
    if not norm.batch:
        given = mean, var
    elif mean is not None:
        running = Running(mean, var, momentum, batches)
    elif batches is not None:
        batches.add_(1)
    told = recording.active
    if told is not None:
        told(step, x, backend)
    if step.keep:
        y = _apply(x, weight, bias, given, running, known, group)
    else:
        y, *_ = _forward(x, weight, bias, given, running, known, group)
    if running is not None and batches is not None:
        overwritten(batches)
    return y


def _known(x, weight, bias, training, eps, slope, backend) -> Planned:
    layout, norm = layout_of(x), Norm(slope, training, eps)
    parameters = any(t is not None and t.requires_grad for t in (weight, bias))
    keep = torch.is_grad_enabled() and (x.requires_grad or parameters)
    want = Want(x=x.requires_grad, threshold=parameters)
    step = Step("batch_norm_relu", layout, x.stride(), x.dtype, x.device, keep=keep, want=want, norm=norm)
    return Planned(backend, layout, norm, step)


def _by_torch(x, weight, bias, buffers, training, momentum, eps, slope, why, backend) -> torch.Tensor:
    """PyTorch's own operations, in ordinary autograd: right under every transform, compiler, subclass."""
    told = recording.active
    if backend is None:
        recording.elsewhere("batch_norm_relu", x, why)
    elif told is not None:
        told(_known(x, weight, bias, training, eps, slope, backend).step, x, backend)
    mean, var, batches = buffers
    if training and batches is not None:
        batches.add_(1)  # first, as torch: a checkpoint's second run ends once it has what was saved
    return reference.batch_norm_act(x, mean, var, weight, bias, training, momentum, eps, slope)


def _check(x, weight, bias, buffers, training, momentum, eps, group) -> None:
    checks.features(x, rank=2)
    mean, var, batches = buffers
    checks.flag(training=training)
    for name, value in {"momentum": momentum, "eps": eps}.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if training and not eps > 0:
        raise ValueError(f"eps must be a positive number in training, got {eps}")
    for name, t in {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a floating-point tensor of shape ({x.shape[1]},) or None, got {got}")
        if t.shape != (x.shape[1],):
            raise ValueError(f"{name} must have shape ({x.shape[1]},), one number a channel of x, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
        if (t is mean or t is var) and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require grad, because batch_norm_relu has no gradient for it")
    if batches is not None and not isinstance(batches, torch.Tensor):
        raise TypeError(f"num_batches_tracked must be a tensor or None, got {type(batches).__name__}")
    if batches is not None and (batches.dtype != torch.int64 or batches.numel() != 1 or batches.device != x.device):
        got = f"{batches.dtype} of shape {tuple(batches.shape)} on {batches.device}"
        raise ValueError(f"num_batches_tracked must be one int64 number on x's device {x.device}, got {got}")
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must be given together, got one of them")
    if training and group is None and 0 < x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if not training and mean is None:
        raise ValueError("batch_norm_relu needs running_mean and running_var, or training=True; got neither")


def slope_of(activation: str | None, slope: float) -> float:
    """The slope below 0 of an activation by name: 0 of "relu", 1 of None, of "leaky" the one given."""
    if activation == "relu":
        return 0.0
    if activation is None:
        return 1.0
    if activation != "leaky":
        raise ValueError(f"activation must be 'relu', 'leaky' or None, got {activation!r}")
    if not isinstance(slope, numbers.Real) or isinstance(slope, bool):
        raise TypeError(f"slope must be a number, got {slope!r}")
    return float(slope)
