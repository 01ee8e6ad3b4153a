"""batch_norm_relu: batch normalisation and the activation behind it, in one operator.

    z  = weight (x - mean) rstd + bias             mean, rstd = 1 / sqrt(var + eps), by channel
    y  = act(z)                                    z where z > 0, slope z elsewhere: slope 0 is ReLU, 1 none
    g' = act'(z) g                                 z is computed again
    dbias = sum g'            dweight = sum g' (x - mean) rstd
    dx = weight rstd (g' - (dbias + (x - mean) rstd dweight) / M)         M = N L; in eval weight rstd g'

Forward reads x for the statistics, and to write y; backward reads g and x for the two sums, and to write dx. Kept for it
are x, and mean and rstd (2, C): no plane, and no y, which ReLU alone would keep. The torch backend is PyTorch's own
batch_norm and activation, in ordinary autograd (reference.py).

With a process group the statistics, and in the backward pass the two sums, are those of all its processes.
"""

import numbers
from typing import Any

import torch
import torch.distributed as dist

from .. import backends, recording, reference
from ..backends.eager import eager
from ..backends.step import Backend, Norm, Running, Step, Want
from ..layout import Layout, layout_of
from ..reference import accumulate_dtype
from . import checks
from .dispatch import direct_apply, is_eager_grad, not_eager, overwritten

ACTIVATIONS = ("relu", "leaky", None)


class NormAct(torch.autograd.Function):
    """(x, weight, bias) -> y. given: mean and var where they are not this batch's."""

    @staticmethod
    def forward(ctx, x, weight, bias, given, running, norm, layout, backend, group):
        if norm.batch and group is not None:
            *given, share = _of_all(x, layout, backend, running, group)
            y, stats = backend.norm(x, layout, norm._replace(batch=False), weight, bias, tuple(given))
        else:
            share = None
            y, stats = backend.norm(x, layout, norm, weight, bias, given, running)
        ctx.save_for_backward(x, weight, bias, stats, share)
        ctx.norm, ctx.layout, ctx.backend, ctx.group = norm, layout, backend, group
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, g):
        want_x, *want_parameters = ctx.needs_input_grad[:3]
        if g is None or not (want_x or any(want_parameters)):
            return (None,) * 9
        x, weight, bias, stats, share = ctx.saved_tensors
        call = x, ctx.layout, ctx.norm, weight, bias, stats
        if not is_eager_grad(g):
            if share is not None:
                raise RuntimeError("batch_norm_relu over several processes has first derivatives only")
            dx, sums = eager.norm_grad(g, *call, want_x, True)
        elif share is None:
            dx, sums = ctx.backend.norm_grad(g, *call, want_x, any(want_parameters) or ctx.norm.batch)
        else:
            _, sums = ctx.backend.norm_grad(g, *call, False, True)
            dx = None
            if want_x:
                of_all = sums.clone()
                dist.all_reduce(of_all, group=ctx.group)
                dx, _ = ctx.backend.norm_grad(g, *call, True, False, (of_all * share, ctx.layout.n * ctx.layout.l))
        dbias, dweight = (None, None) if sums is None else sums
        return dx, dweight if want_parameters[0] else None, dbias if want_parameters[1] else None, *[None] * 6


_apply = direct_apply(NormAct)


def _of_all(
    x: torch.Tensor, layout: Layout, backend: Backend, running: Running | None, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean and var (C,) over all processes, and this process's share of the elements. Merged without cancellation."""
    own = backend.norm_statistics(x, layout).double() if layout.numel else x.new_zeros(2, layout.c, dtype=torch.double)
    count = own.new_full((layout.c,), layout.n * layout.l)
    parts = [torch.empty_like(own.new_empty(3, layout.c)) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, torch.stack([*own, count]), group=group)
    means, squares, counts = torch.stack(parts, 1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    m2 = (squares + counts * (means - mean).square()).sum(0)
    if running is not None:
        running.mean.lerp_(mean.to(running.mean.dtype), running.factor)
        running.var.lerp_((m2 / (total - 1)).to(running.var.dtype), running.factor)
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
        activation: "relu", "leaky" (slope * z where z <= 0) or None.
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
    checks.features(x, rank=2)
    slope = _slope(activation, slope)
    tensors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, t in tensors.items():
        _check_channels(name, t, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, got one of them")
    if training and process_group is None and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if not training and running_mean is None:
        raise ValueError("batch_norm_relu needs running_mean and running_var, or training=True; got neither")
    if process_group is not None and dist.get_world_size(process_group) == 1:
        process_group = None

    why = not_eager(x, *tensors.values())
    if why is None and x.numel():
        backend, layout = backends.select(x), layout_of(x)
    if why is not None or not x.numel() or (backend is eager and process_group is None):
        if why is not None or not x.numel():
            recording.elsewhere("batch_norm_relu", x, why)
        elif recording.active is not None:
            recording.active(_step(x, layout, Norm(slope, training, eps), weight, bias), x, eager)
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return reference.batch_norm_act(
            x, running_mean, running_var, weight, bias, training, momentum, eps, slope
        )  # fmt: skip

    sums = accumulate_dtype(x.dtype)
    weight, bias = (None if t is None else t.to(sums).contiguous() for t in (weight, bias))
    norm, given, running = Norm(slope, training, eps), None, None
    buffers = None if running_mean is None else (running_mean, running_var)
    if buffers is not None:
        given = tuple(t.to(sums).contiguous() for t in buffers)
    if training:
        if buffers is not None:
            running = Running(*given, momentum, num_batches_tracked)
        given = None
    told = recording.active
    if told is not None:
        told(_step(x, layout, norm, weight, bias), x, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y = _apply(x, weight, bias, given, running, norm, layout, backend, process_group)
    elif norm.batch and process_group is not None:
        *given, _ = _of_all(x, layout, backend, running, process_group)
        y, _ = backend.norm(x, layout, norm._replace(batch=False), weight, bias, tuple(given))
    else:
        y, _ = backend.norm(x, layout, norm, weight, bias, given, running)
    if running is not None:
        for own, moved in zip(buffers, running[:2], strict=True):
            if moved is not own:  # of another dtype, or with gaps
                own.copy_(moved)
        overwritten(*buffers, *([] if num_batches_tracked is None else [num_batches_tracked]))
    return y


def _slope(activation: str | None, slope: float) -> float:
    if activation == "relu":
        return 0.0
    if activation is None:
        return 1.0
    if activation != "leaky":
        raise ValueError(f"activation must be 'relu', 'leaky' or None, got {activation!r}")
    if not isinstance(slope, numbers.Real) or isinstance(slope, bool):
        raise TypeError(f"slope must be a number, got {slope!r}")
    return float(slope)


def _check_channels(name: str, t: torch.Tensor | None, x: torch.Tensor) -> None:
    if t is None:
        return
    if not isinstance(t, torch.Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating-point tensor of shape ({x.shape[1]},) or None, got {got}")
    if t.shape != (x.shape[1],):
        raise ValueError(f"{name} must have shape ({x.shape[1]},), one number a channel of x, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")


def _step(x, layout, norm, weight, bias) -> Step:
    parameters = any(t is not None and t.requires_grad for t in (weight, bias))
    keep = torch.is_grad_enabled() and (x.requires_grad or parameters)
    want = Want(x=x.requires_grad, threshold=parameters)
    return Step("batch_norm_relu", layout, x.stride(), x.dtype, x.device, keep=keep, want=want, norm=norm)
