"""What a step costs, counted and not timed: bytes moved, launches, bytes allocated, bytes kept.

A backend counts its own launches (`reduce_cost`, `map_cost`, `grad_cost`); here they are put together as the operators
call them, with torch's small operations on (N, C) between them. What a tile reaches over the tensor's edge, and what
several programs read of the same weights, is not in it. The modules of a gate that is called are the user's: their
operations are not in it, nor is the add of the gate's gradient of A to the direct one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..layout import Layout
from ..reference import accumulate_dtype, threshold, threshold_grad
from .step import Backend, Cost, Step, Strides

# ---- sizes -----------------------------------------------------------------------------------------------------------


def _bytes_of_map(layout: Layout, dtype: torch.dtype) -> int:
    return layout.numel * dtype.itemsize


def _bytes_of_sums(layout: Layout, dtype: torch.dtype, columns: int | None = None) -> int:
    return layout.n * (layout.c if columns is None else columns) * accumulate_dtype(dtype).itemsize


def map_bytes(step: Step) -> int:
    """Of a tensor of x's shape."""
    return _bytes_of_map(step.layout, step.dtype)


def plane_bytes(layout: Layout) -> int:
    return 4 * layout.words


def sums_bytes(step: Step, columns: int | None = None) -> int:
    """Of a tensor (N, C), or (N, columns), in the dtype of sums."""
    return _bytes_of_sums(step.layout, step.dtype, columns)


# ---- the kernels of a compiled backend -------------------------------------------------------------------------------


def reduce(
    layout: Layout, dtype: torch.dtype, kernel: str, kind: str = "magnitude", keep: bool = False, parts: int = 1
) -> Cost:
    """Rows cut into `parts` give as many partial sums, to be added up."""
    read = (2 if kind == "product" else 1) * _bytes_of_map(layout, dtype)
    written = parts * _bytes_of_sums(layout, dtype) + (2 * plane_bytes(layout) if keep else 0)
    return Cost(read, written, (kernel,))


def map(
    layout: Layout, dtype: torch.dtype, kernel: str, columns: int, residual: bool = False, shift: bool = False,
    keep: int = 0,
) -> Cost:  # fmt: skip
    """columns: of the threshold or factor."""
    full = _bytes_of_map(layout, dtype)
    small = _bytes_of_sums(layout, dtype, columns) + (_bytes_of_sums(layout, dtype) if shift else 0)
    return Cost((1 + residual) * full + small, full + keep * plane_bytes(layout), (kernel,))


def grad(
    layout: Layout, dtype: torch.dtype, kernel: str, g: bool = True, dA: bool = False, dx: bool = True,
    dtau: bool = False, parts: int = 1,
) -> Cost:  # fmt: skip
    """A plane is read where its bits are needed."""
    full, sums = _bytes_of_map(layout, dtype), _bytes_of_sums(layout, dtype)
    direct = dA and dx
    planes = g + (dtau or direct) + direct  # kept, sign, nonzero
    read = g * full + planes * plane_bytes(layout) + direct * sums
    return Cost(read, dx * full + dtau * parts * sums, (kernel,))


def norm(step: Step) -> tuple[Cost, Cost]:
    """Batch normalisation, forward and backward, by a backend that makes each in one launch."""
    full, numbers = map_bytes(step), step.layout.c * step.sums.itemsize  # (C,)
    forward = Cost(full + 2 * numbers, full + 2 * numbers, ("norm",))  # weight and bias; mean and rstd
    if not step.keep:
        return forward, Cost()
    sums = step.want.threshold or step.norm.batch
    backward = Cost(2 * full + 4 * numbers, step.want.x * full + sums * 2 * numbers, ("norm_grad",))
    return forward + Cost(saved=full + 2 * numbers), backward


def added_up(size: int, parts: int) -> Cost:
    """torch adds partial sums of `size` bytes each, which are then of no more use."""
    return Cost() if parts == 1 else Cost(parts * size, size, ("aten::sum",), workspace=parts * size)


def kept_statistics(step: Step) -> Cost:
    """Of a gated step: running statistics are copied for the backward pass (ops/gated_shrink.py)."""
    if not step.keep or not step.gate.norm or step.gate.batch_stats:
        return Cost()
    size = 2 * step.gate.hidden * step.sums.itemsize
    return Cost(size, size, ("aten::clone", "aten::clone"))


# ---- the operators ---------------------------------------------------------------------------------------------------


def of_streams(backend: Backend, step: Step) -> tuple[Cost, Cost]:
    """Forward and backward of an operator whose gate, if it has one, is called. g lies as the layout says."""
    return {
        "abs_mean": _abs_mean, "soft_threshold": _soft_threshold, "shrink": _shrink, "squeeze_excite": _squeeze_excite,
    }[step.op](backend, step)  # fmt: skip


def _abs_mean(on: Backend, step: Step) -> tuple[Cost, Cost]:
    forward = on.reduce_cost(step, step.strides, keep=step.keep)
    if not step.keep:
        return forward, Cost()
    return forward + Cost(saved=2 * plane_bytes(step.layout)), on.grad_cost(step, g=False, dA=True)


def _soft_threshold(on: Backend, step: Step) -> tuple[Cost, Cost]:
    forward = on.map_cost(step, step.strides, columns=step.outputs, keep=2 if step.keep else 0)
    if not step.keep:
        return forward, Cost()
    backward = on.grad_cost(step, dx=step.want.x, dtau=step.want.threshold)
    if step.want.threshold and step.outputs != step.layout.c:
        backward += traced(lambda t: t.sum_to_size(step.layout.n, step.outputs), small(step, step.layout.c))
        backward += Cost(workspace=sums_bytes(step))
    return forward + Cost(saved=2 * plane_bytes(step.layout)), backward


def _shrink(on: Backend, step: Step) -> tuple[Cost, Cost]:
    c = step.layout.c
    alpha, pooled = small(step, step.outputs), small(step, c)
    tau = traced(threshold, alpha, pooled, step.average, inner=not step.want.tau)
    if step.want.tau and step.average is None:
        tau = traced(torch.clone, alpha)
    planes = 0 if not step.keep else 3 if step.want.x else 2
    columns = c if step.average == "channel" else step.outputs
    forward = on.reduce_cost(step, step.strides) + tau
    forward += on.map_cost(step, step.strides, columns=columns, residual=step.residual is not None, keep=planes)
    if not step.keep:
        return forward + Cost(workspace=sums_bytes(step)), Cost()
    forward += Cost(saved=planes * plane_bytes(step.layout) + sums_bytes(step) + sums_bytes(step, step.outputs))
    backward = on.grad_cost(step, dx=False, dtau=True) + Cost(workspace=sums_bytes(step))
    backward += traced(threshold_grad, small(step, c), None, alpha, pooled, step.average, True, step.want.x, inner=True)
    if step.want.x:
        backward += on.grad_cost(step, dA=True)
    return forward, backward


def _squeeze_excite(on: Backend, step: Step) -> tuple[Cost, Cost]:
    """A and ds go to the gate and its gradient: what it keeps of them is the gate's."""
    pooled, backward = Cost(workspace=sums_bytes(step)), Cost()
    forward = on.reduce_cost(step, step.strides, kind="value") + pooled
    forward += on.map_cost(
        step, step.strides, columns=step.outputs, kind="scale", residual=step.residual is not None
    )  # fmt: skip
    if step.keep and step.want.threshold:
        forward += Cost(saved=map_bytes(step))
        backward += on.reduce_cost(step, step.layout.strides, kind="product") + pooled
        if step.outputs != step.layout.c:
            backward += traced(lambda t: t.sum(1, keepdim=True), small(step, step.layout.c), inner=True)
    if step.keep and step.want.x:
        forward += Cost(saved=sums_bytes(step, step.outputs))
        backward += on.map_cost(
            step, step.layout.strides, columns=step.outputs, kind="scale", shift=step.want.threshold
        )  # fmt: skip
    return forward, backward


# ---- anything in PyTorch ---------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Adds up the operations it sees; views and empty tensors cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.written, self.allocated, self.kernels = 0, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if any(a is not None and not a.is_write for a in aliases):
            return out
        size = _bytes_in(out)
        if not any(a is not None and a.is_write for a in aliases):
            self.allocated += size
        if "empty" not in func.__name__ and "_local_scalar_dense" not in func.__name__:  # which answers an `if`
            self.read += _bytes_in((args, kwargs))
            self.written += size
            self.kernels.append(f"aten::{func.__name__.split('.')[0]}")
        return out


def _bytes_in(value: Any) -> int:
    """Of all tensors in nested containers; what an expanded one repeats counts once."""
    if isinstance(value, torch.Tensor):
        sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
        return math.prod(sizes) * value.dtype.itemsize
    if isinstance(value, (tuple, list)):
        return sum(_bytes_in(item) for item in value)
    return sum(_bytes_in(item) for item in value.values()) if isinstance(value, dict) else 0


def traced(fn: Callable, *arguments: Any, inner: bool = False) -> Cost:
    """The cost of PyTorch code, counted on tensors without memory. What fn returns is workspace only if `inner`."""
    with torch.no_grad(), Counting() as mode:
        out = fn(*arguments)
    returned = 0 if inner else _bytes_in(out)
    return Cost(mode.read, mode.written, tuple(mode.kernels), mode.allocated - returned)


def like(shape: Strides, strides: Strides, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory, for `traced`."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def small(step: Step, columns: int) -> torch.Tensor:
    """(N, columns) in the dtype of sums, without memory."""
    return torch.empty((step.layout.n, columns), dtype=accumulate_dtype(step.dtype), device="meta")
