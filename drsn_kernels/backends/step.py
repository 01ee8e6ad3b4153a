"""What a call is, and what a backend is.

A `Step` describes one operator call but for its tensors: what backends plan by, what costs are counted for, what
explain prints. A `Backend` has three kernels that stream over x, batch normalisation with an activation, and may have
the standard gate computed together with the streams:

    reduce   A (N, C) = mean |x|, or mean x, or sum x * times
    map      y = soft_threshold(x, t) by a rule, or x * t, plus a residual; and the bit planes
    grad     dx = kept * g + s * dA / L and dtau = -sum s * kept * g, from the planes

The streams take thresholds and dA as tensors (N, C) and know no gate. What they fill is allocated here, once for every
backend.
"""

import sys
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from ..gates import StandardGate
from ..layout import Layout, Planes, averaged, thresholded
from ..reference import SOFT, Rule, accumulate_dtype

Strides = tuple[int, ...]


class GateShape(NamedTuple):
    """A standard gate but for its tensors."""

    hidden: int
    outputs: int
    norm: bool
    batch_stats: bool  # BatchNorm in training: statistics of the batch
    eps: float
    momentum: float

    @classmethod
    def of(cls, parts: StandardGate) -> "GateShape":
        outputs, hidden = parts.w2.shape
        return cls(hidden, outputs, parts.gamma is not None, parts.batch_stats, parts.eps, parts.momentum)


class Kept(NamedTuple):
    """What a backward pass of a fused gate needs: 3 bits an element, and tensors of the gate's size."""

    bits: torch.Tensor | None  # planes and the gate's state; Gated.unpacked makes layout.thresholded's of them
    pooled: torch.Tensor | None  # A (N, C)
    mean: torch.Tensor | None  # (H,), running; None where they are of the batch, and in bits
    var: torch.Tensor | None


NOTHING_KEPT = Kept(None, None, None, None)


class Want(NamedTuple):
    """Which gradients a backward pass has to make, if there is one, and whether tau is returned."""

    x: bool = False
    threshold: bool = False  # of tau, the gate's output, squeeze_excite's factors, or the norm's weight and bias
    tau: bool = False  # returned


class Norm(NamedTuple):
    """batch_norm_relu but for its tensors."""

    slope: float  # of the activation below 0: 0 ReLU, 1 none
    batch: bool  # statistics of the batch; else given ones, the running
    eps: float


class Running(NamedTuple):
    """Running statistics, which a forward pass moves towards those of the batch, in place."""

    mean: torch.Tensor  # (C,), in the dtype of sums, as var
    var: torch.Tensor  # towards the unbiased one, M2 / (M - 1) with M = N * L
    factor: float  # how far: new = old + factor * (batch's - old)
    batches: torch.Tensor | None  # their number, int64, raised by one


class Step(NamedTuple):
    """One operator call. `strides`, `residual`: as they lie; the residual's are None without one."""

    op: str  # abs_mean, soft_threshold, shrink, squeeze_excite or batch_norm_relu
    layout: Layout
    strides: Strides
    dtype: torch.dtype
    device: torch.device
    average: str | None = None  # of shrink: what the gate's output is multiplied by
    rule: Rule = SOFT
    outputs: int = 1  # columns of tau, of alpha, or of squeeze_excite's factors: C or 1
    gate: GateShape | None = None  # the standard gate, where the backend computes it
    residual: Strides | None = None
    keep: bool = False  # something is kept for a backward pass
    want: Want = Want()
    norm: Norm | None = None  # of batch_norm_relu

    @property
    def one_tau(self) -> bool:
        """tau is (N, 1): one alpha, and an average that is shared or none."""
        return self.outputs == 1 and self.average != "channel"

    @property
    def sums(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    @property
    def state(self) -> int:
        """Numbers in the gate's state: u (N, H), alpha (N, O) and, of the batch, mean and variance (H,)."""
        gate = self.gate
        return self.layout.n * (gate.hidden + gate.outputs) + (2 * gate.hidden if gate.batch_stats else 0)


# ---- cost and plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of a launch, or of several: counted and not timed. Every operand counts once a launch, at its own size."""

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

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Plan:
    """How a step runs, what it costs, and for each plan that may be faster, why it is not taken."""

    name: str
    why: str
    not_taken: tuple[tuple[str, str], ...] = ()  # (plan, reason)
    index_bits: int | None = 64  # None: PyTorch's or the compiler's business
    forward: Cost | None = None  # None where PyTorch or a compiler decides what the reference becomes
    backward: Cost | None = None
    launches: tuple[Any, ...] = field(default=(), compare=False)  # described, where a backend prepares them


# ---- backends --------------------------------------------------------------------------------------------------------


class Gated:
    """The step with the standard gate on a backend: all that does not depend on tensors is worked out once."""

    def __init__(self, backend: "Backend", step: Step):
        self.backend, self.step = backend, step

    def forward(
        self, x: torch.Tensor, parts: StandardGate, residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Kept]:  # fmt: skip
        """y, tau where step.want.tau, and what a backward pass needs where step.keep (else nothing)."""
        raise NotImplementedError

    def backward(
        self, saved: tuple[torch.Tensor | None, ...], g: torch.Tensor, tau_grad: torch.Tensor | None,
        want: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        """dx, and the gradients of w1, b1, gamma, beta, w2, b2: at least those wanted. saved: Kept, and these."""
        raise NotImplementedError

    def unpacked(self, kept: Kept) -> Kept:
        """kept with its planes as layout.thresholded has them, for differentiable code over them."""
        raise NotImplementedError


class Called:
    """The step around a gate that is called, on a backend. One that prepares its passes has a subclass.

    bits: the planes kept, sign and, where A wants a gradient, nonzero (layout.thresholded).
    """

    def __init__(self, backend: "Backend", layout: Layout, dtype: torch.dtype, rule: Rule, average: str | None):
        self.backend, self.layout, self.dtype, self.rule, self.average = backend, layout, dtype, rule, average

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """A (N, C)."""
        return self.backend.reduce(x, self.layout)[0]

    def shrink(
        self, x: torch.Tensor, tau: torch.Tensor, residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None, keep: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """y and bits; out, keep: as Backend.map has them."""
        y, planes = self.backend.map(x, self.layout, tau, rule=self.rule, residual=residual, out=out, keep=keep)
        return y, None if planes is None else planes.bits

    def dtau(self, bits: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """(N, C)."""
        planes = thresholded(bits, nonzero=False)
        return self.backend.grad(
            self.layout, self.dtype, planes, g, want_dx=False, want_dtau=True, rule=self.rule
        )[1]  # fmt: skip

    def dx(self, bits: torch.Tensor, g: torch.Tensor | None, dA: torch.Tensor | None) -> torch.Tensor:
        """Of g, of dA (N, C), which needs the plane nonzero, or of both."""
        planes = thresholded(bits, nonzero=dA is not None)
        return self.backend.grad(self.layout, self.dtype, planes, g, dA=dA, rule=self.rule)[0]


class Backend:
    """Who computes eager calls. A subclass has a name, the first two methods, `plan`, and three parts: the streams'
    kernels with their costs, batch normalisation, and, where it fuses gates, the standard gate."""

    name: str
    fuses_gates = False  # has the part on the standard gate, below
    own_from = sys.maxsize  # bytes from which fresh tensors are `empty`'s: of fewer, torch's are made sooner

    def unsupported(self, x: torch.Tensor) -> str | None:
        """Why this backend has no kernels for x; None where it has."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for `python -m drsn_kernels info`."""
        raise NotImplementedError

    def empty(self, shape: Strides, strides: Strides, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def like(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """A fresh tensor with x's shape and dtype and the layout's strides; x may be a gradient, and lie otherwise."""
        if x.nbytes < self.own_from and x.stride() == layout.strides:
            return torch.empty_like(x)  # 0.6 us less than `empty`
        return self.empty(layout.shape, layout.strides, x.dtype, x.device)

    # ---- what the operators call: the kernels below on fresh outputs

    def reduce(
        self, x: torch.Tensor, layout: Layout, *, kind: str = "magnitude", times: torch.Tensor | None = None,
        keep: bool = False,
    ) -> tuple[torch.Tensor, Planes | None]:  # fmt: skip
        """A (N, C). kind: "magnitude", mean |x|; "value", mean x; "product", sum x * times. keep: the planes too."""
        out = self.sums(x, layout)
        planes = averaged(self.planes(2, layout, x.device)) if keep else None
        self.reduce_into(out, planes, x, layout, kind, times)
        return out, planes

    def map(
        self, x: torch.Tensor, layout: Layout, t: torch.Tensor, *, kind: str = "threshold", rule: Rule = SOFT,
        residual: torch.Tensor | None = None, shift: torch.Tensor | None = None, out: torch.Tensor | None = None,
        keep: int = 0,
    ) -> tuple[torch.Tensor, Planes | None]:  # fmt: skip
        """y = x thresholded at t, or "scale": x * t, + residual or shift / L. t (N | 1, C | 1), shift (N, C).

        out: written to instead of a fresh y, x itself for one. keep: 0, or planes: 2 for kept and sign, 3 for nonzero
        too.
        """
        if residual is not None and shift is not None:
            raise ValueError("map adds a residual or a shift, not both")
        y = self.like(x, layout) if out is None else out
        planes = thresholded(self.planes(keep, layout, x.device), keep == 3) if keep else None
        self.map_into(y, planes, x, layout, t, kind, rule, residual, shift)
        return y, planes

    def grad(
        self, layout: Layout, dtype: torch.dtype, planes: Planes, g: torch.Tensor | None, *,
        dA: torch.Tensor | None = None, want_dx: bool = True, want_dtau: bool = False, rule: Rule = SOFT,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        """dx and dtau (N, C), each if wanted. g may be absent (abs_mean alone), and so may dA (N, C), which the cpu
        backend takes without dtau only: every operator wants dtau before dA is there."""
        dx = None
        if want_dx and g is None:
            dx = self.empty(layout.shape, layout.strides, dtype, dA.device)
        elif want_dx:
            dx = self.like(g, layout)
        dtau = self.sums(g, layout) if want_dtau else None
        self.grad_into(dx, dtau, layout, dtype, planes, g, None if dA is None else dA.contiguous(), rule)
        return dx, dtau

    def called(self, layout: Layout, dtype: torch.dtype, rule: Rule, average: str | None) -> Called:
        return Called(self, layout, dtype, rule, average)

    def plan(self, step: Step) -> Plan:
        raise NotImplementedError

    # ---- the standard gate, computed together with the step

    def gate_unsupported(self, x: torch.Tensor, parts: StandardGate) -> str | None:
        """Why this gate is called instead; None where it is fused."""
        return None if self.fuses_gates else f"the {self.name} backend calls every gate"

    def gated(self, step: Step) -> "Gated":
        """The passes of a step with the standard gate, prepared."""
        raise NotImplementedError

    # ---- batch normalisation and an activation: y = act(weight * (x - mean) * rstd + bias), by channel

    def norm(
        self, x: torch.Tensor, layout: Layout, norm: Norm, weight: torch.Tensor | None, bias: torch.Tensor | None,
        given: tuple[torch.Tensor, torch.Tensor] | None = None, running: Running | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """y and the statistics used, (2, C): mean and rstd = 1 / sqrt(var + eps).

        weight, bias, given: (C,), contiguous, in the dtype of sums. given: mean and var, unless norm.batch.
        """
        raise NotImplementedError

    def norm_statistics(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(2, C): mean and M2, the sum of squared deviations from it."""
        raise NotImplementedError

    def norm_grad(
        self, g: torch.Tensor, x: torch.Tensor, layout: Layout, norm: Norm, weight: torch.Tensor | None,
        bias: torch.Tensor | None, stats: torch.Tensor, want_x: bool, want_sums: bool,
        given: tuple[torch.Tensor, int] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        """dx and sums (2, C), dbias and dweight, each if wanted. stats: norm's.

            g' = act'(z) g                     z is computed from x again, as forward did
            dbias = sum g'                     dweight = sum g' (x - mean) rstd
            dx = weight rstd (g' - (dbias + (x - mean) rstd dweight) / M)        norm.batch; else weight rstd g'

        given: sums and M of all processes, in the place of this one's.
        """
        raise NotImplementedError

    def norm_cost(self, step: Step) -> tuple[Cost, Cost]:
        """Forward and backward."""
        raise NotImplementedError

    # ---- fresh memory

    def sums(self, x: torch.Tensor, layout: Layout, columns: int | None = None) -> torch.Tensor:
        """(N, C), or (N, columns), in the dtype of sums, where x is."""
        n, c, dtype = layout.n, layout.c if columns is None else columns, x.dtype
        if dtype is torch.float32 and n * c * 4 < self.own_from:
            return x.new_empty(n, c)  # 0.5 us less
        return self.empty((n, c), (c, 1), accumulate_dtype(dtype), x.device)

    def pair(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(2, C) in the dtype of sums, where x is: two numbers for each channel."""
        if x.dtype is torch.float32:
            return x.new_empty(2, layout.c)  # 1 us less
        return x.new_empty(2, layout.c, dtype=accumulate_dtype(x.dtype))

    def planes(self, count: int, layout: Layout, device: torch.device) -> torch.Tensor:
        return self.empty((count, layout.words), (layout.words, 1), torch.int32, device)

    # ---- the kernels

    def reduce_into(self, out, planes, x, layout, kind, times) -> None:
        raise NotImplementedError

    def map_into(self, y, planes, x, layout, t, kind, rule, residual, shift) -> None:
        raise NotImplementedError

    def grad_into(self, dx, dtau, layout, dtype, planes, g, dA, rule) -> None:
        raise NotImplementedError

    # ---- their costs (cost.py), for tensors of these strides

    def reduce_cost(self, step: Step, strides: Strides, *, kind: str = "magnitude", keep: bool = False) -> Cost:
        raise NotImplementedError

    def map_cost(
        self, step: Step, strides: Strides, *, columns: int, kind: str = "threshold", residual: bool = False,
        shift: bool = False, keep: int = 0,
    ) -> Cost:  # fmt: skip
        raise NotImplementedError

    def grad_cost(self, step: Step, *, g: bool = True, dA: bool = False, dx: bool = True, dtau: bool = False) -> Cost:
        raise NotImplementedError
