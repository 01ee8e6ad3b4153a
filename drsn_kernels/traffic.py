"""What a kernel call costs, counted and not timed: bytes moved, launches, bytes allocated, bytes kept.

The kernels' budgets stand next to the kernels (backends/, triton/) and are made of these parts; budgets.py adds them up
to whole operators. Every operand counts once a launch, at its own size: what a tile reaches over the tensor's edge, and
what several programs read of the same weights, is not in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .planes import Geometry, geometry, words
from .reference import accumulate_dtype


@dataclass(frozen=True)
class Budget:
    """The cost of a call, or of several: budgets add up."""

    read: int = 0  # bytes
    written: int = 0
    kernels: tuple[str, ...] = ()  # one name for each launch, in order; operations of torch's are aten::...
    workspace: int = 0  # bytes allocated that are neither returned nor kept, as if none were freed before the end
    saved: int = 0  # bytes kept for the backward pass, parameters and buffers left out

    @property
    def launches(self) -> int:
        return len(self.kernels)

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Budget") -> "Budget":
        return Budget(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Plan(NamedTuple):
    """How a call runs, and for each plan that may be faster, why it is not taken."""

    name: str
    why: str
    not_taken: tuple[tuple[str, str], ...] = ()  # (plan, reason)
    index_bits: int | None = 64  # None: PyTorch's or the compiler's business
    launches: tuple[Any, ...] = ()  # the plan objects that the launches are made from, where there are such


# ---- sizes -----------------------------------------------------------------------------------------------------------


def geometry_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Geometry:
    return geometry(torch.empty_strided(shape, strides, device="meta"))


def is_dense(geo: Geometry, strides: tuple[int, ...]) -> bool:
    """Whether a tensor of these strides lies in memory as geo's does, without gaps."""
    return all(size == 1 or a == b for size, a, b in zip(*geo, strides, strict=True))


def map_bytes(geo: Geometry, dtype: torch.dtype) -> int:
    """Of a tensor of x's shape."""
    return math.prod(geo[0]) * dtype.itemsize


def plane_bytes(geo: Geometry) -> int:
    return 4 * words(geo)


def sums_bytes(geo: Geometry, dtype: torch.dtype, columns: int | None = None) -> int:
    """Of a tensor (N, C), or (N, columns), in the dtype of sums."""
    n, c = geo[0][:2]
    return n * (c if columns is None else columns) * accumulate_dtype(dtype).itemsize


# ---- the kernels of every backend ------------------------------------------------------------------------------------


def reduce(geo: Geometry, dtype: torch.dtype, planes: bool, kernel: str, parts: int = 1) -> Budget:
    """x -> A and, with `planes`, sign and nonzero. Rows cut into `parts` give as many partial sums."""
    written = parts * sums_bytes(geo, dtype) + (2 * plane_bytes(geo) if planes else 0)
    return Budget(map_bytes(geo, dtype), written, (kernel,))


def apply(geo: Geometry, dtype: torch.dtype, tau: int, residual: bool, planes: int, kernel: str) -> Budget:
    """x, tau (`tau` bytes) and the residual -> y and `planes` planes."""
    full = map_bytes(geo, dtype)
    return Budget((1 + residual) * full + tau, full + planes * plane_bytes(geo), (kernel,))


def grad(
    geo: Geometry, dtype: torch.dtype, masked: bool, pooled: bool, dx: bool, dtau: bool, kernel: str, parts: int = 1
) -> Budget:
    """g (`masked`: if there is one) and dA (`pooled`) -> dx and/or dtau. A plane is read where its bits are needed."""
    full, sums = map_bytes(geo, dtype), sums_bytes(geo, dtype)
    pooled = pooled and dx
    planes = masked + (dtau or pooled) + pooled  # kept, sign, nonzero
    read = masked * full + planes * plane_bytes(geo) + pooled * sums
    return Budget(read, dx * full + dtau * parts * sums, (kernel,))


def products(geo: Geometry, dtype: torch.dtype, kernel: str, parts: int = 1) -> Budget:
    """Two tensors of x's shape -> the sums of their product, or as many partial ones."""
    return Budget(2 * map_bytes(geo, dtype), parts * sums_bytes(geo, dtype), (kernel,))


def added_up(size: int, parts: int) -> Budget:
    """torch adds partial sums of `size` bytes each, which are then of no more use."""
    return Budget() if parts == 1 else Budget(parts * size, size, ("aten::sum",), workspace=parts * size)


# ---- the standard gate -----------------------------------------------------------------------------------------------


class StandardCall(NamedTuple):
    """A shrink whose standard gate the backend computes: all that its plan and budget depend on. Sizes are bytes."""

    geometry: Geometry
    strides: tuple[tuple[int, ...], ...]  # of x, y and the residual
    dtype: torch.dtype
    device: torch.device
    hidden: int
    outputs: int
    average: str | None
    norm: bool
    coupled: bool  # batch statistics
    eps: float = 1e-5
    momentum: float = 0.1
    residual: bool = False
    keep: bool = True
    want_tau: bool = False
    want_dx: bool = True

    @property
    def full(self) -> int:
        return map_bytes(self.geometry, self.dtype)

    @property
    def plane(self) -> int:
        return plane_bytes(self.geometry)

    def sums(self, columns: int | None = None) -> int:
        return sums_bytes(self.geometry, self.dtype, columns)

    @property
    def tau(self) -> int:
        return self.sums(1 if self.outputs == 1 and self.average != "channel" else None)

    def _numbers(self, count: int) -> int:
        return count * accumulate_dtype(self.dtype).itemsize

    @property
    def first_layer(self) -> int:
        return self._numbers(self.hidden * (self.geometry[0][1] + 1))

    @property
    def second_layer(self) -> int:
        return self._numbers(self.outputs * (self.hidden + 1))

    @property
    def statistics(self) -> int:
        return self._numbers(2 * self.hidden)

    @property
    def norm_read(self) -> int:
        """gamma, beta, mean and var."""
        return 2 * self.statistics if self.norm else 0

    @property
    def parameter_grads(self) -> int:
        return self.first_layer + self.second_layer + (self.statistics if self.norm else 0)

    @property
    def saved(self) -> int:
        """Three planes, A, the hidden units, alpha, and the statistics, of running ones a copy."""
        if not self.keep:
            return 0
        gate = self.sums() + self.sums(self.hidden) + self.sums(self.outputs)
        return 3 * self.plane + gate + (self.statistics if self.norm else 0)


def standard(backend, call: StandardCall) -> tuple[Budget, Budget]:
    """Forward and backward of ops/standard_shrink.py: the backend's, and the copies of running statistics in eval."""
    forward, backward = backend.standard_budgets(call)
    if call.keep and call.norm and not call.coupled:
        forward += Budget(call.statistics, call.statistics, ("aten::clone", "aten::clone"))
    return forward, backward


# ---- anything in PyTorch ---------------------------------------------------------------------------------------------


class _Counting(TorchDispatchMode):
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
        if "empty" not in func.__name__:
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
        return sum(map(_bytes_in, value))
    return sum(map(_bytes_in, value.values())) if isinstance(value, dict) else 0


def traced(fn: Callable, *arguments: Any, inner: bool = False) -> Budget:
    """The budget of PyTorch code, counted on tensors without memory. What fn returns is workspace only if `inner`."""
    with torch.no_grad(), _Counting() as mode:
        out = fn(*arguments)
    returned = 0 if inner else _bytes_in(out)
    return Budget(mode.read, mode.written, tuple(mode.kernels), mode.allocated - returned)


def like(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory, for `traced`."""
    return torch.empty(shape, dtype=dtype, device="meta")
