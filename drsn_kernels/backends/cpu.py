"""The `cpu` backend: the C++ kernels of csrc/cpu on tensors of any strides, torch's own thread pool."""

import torch

from ..layout import Planes, is_dense
from . import cost, cpu_called, cpu_gated
from .cpu_extension import MISSING, _cpu
from .cpu_gated import walk
from .cpu_memory import _INNER_BYTES, _empty, empty_cache
from .cpu_plan import batch_plan, gated_cost
from .step import Backend, Called, Cost, Plan, Running

__all__ = ["MISSING", "Cpu", "empty_cache"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Beyond this many products torch's own matrix products win back what fusing saves. Time of the called gate over that of
# the fused one, a training step. AVX-512: (128, 512, 16) 1.14, (128, 1024, 16) 1.05, (512, 1024, 4) 0.91,
# (128, 2048, 4) 0.85. AVX2: (128, 256, 16) 1.04, (512, 256, 16) 0.94, (128, 512, 16) 0.86.
# Portable: (128, 64, 32) 1.01, (128, 128, 16) 0.91, (128, 512, 16) 0.70.
_MOST_PRODUCTS = {"avx512": 1 << 29, "avx2": 1 << 24, "portable": 1 << 20}
_STAGED = "x is not dense: its elements are gathered, 512 at a time, into a buffer"


_NO_PLANES = Planes(None, None, None, None)
_NOT_RUNNING = Running(None, None, 0.0, None)


class Cpu(Backend):
    name = "cpu"
    fuses_gates = True
    own_from = _INNER_BYTES
    empty = staticmethod(_empty)

    def unsupported(self, x):
        if x.is_cpu and _cpu is not None and x.dtype in _FLOATS and x.dim() <= 8:
            return None
        if _cpu is None:
            return MISSING
        if not x.is_cpu:
            return f"x is on {x.device}, the cpu kernels take CPU tensors"
        if x.dtype not in _FLOATS:
            return f"x is {x.dtype}, the cpu kernels take float32, float64, bfloat16 and float16"
        return f"x has {x.dim()} dimensions, the cpu kernels take at most 8"

    def gate_unsupported(self, x, parts):
        outputs, hidden = parts.w2.shape
        products = x.shape[0] * hidden * (x.shape[1] + outputs)
        if products > (most := _MOST_PRODUCTS[_cpu.isa()]):
            return f"{products} products in the gate: beyond {most} torch's matrix products are faster"
        return None

    def describe(self):
        if _cpu is None:
            return f"not available: {MISSING}"
        threads = (
            "torch's thread pool"
            if _cpu.has_parallel_for()
            else "one thread, because torch before 2.10 does not offer its thread pool; a newer torch does"
        )
        return f"available: {_cpu.isa()} (of {', '.join(_cpu.available_isas())}), {threads}"

    # ---- kernels

    def reduce_into(self, out, planes, x, layout, kind, times):
        if planes is None:
            walk(layout, x.dtype).reduce(kind=kind, x=x, times=times, out=out)
        else:
            bits, _, sign, nonzero = planes
            walk(layout, x.dtype).reduce(kind=kind, x=x, out=out, planes=bits, sign=sign, nonzero=nonzero)

    def map_into(self, y, planes, x, layout, t, kind, rule, residual, shift):
        bits, kept, sign, nonzero = planes or _NO_PLANES
        walk(layout, x.dtype).map(
            kind=kind, x=x, y=y, t=t, inside=rule.inside, offset=rule.offset, residual=residual, shift=shift,
            planes=bits, kept=kept, sign=sign, nonzero=nonzero,
        )  # fmt: skip

    def grad_into(self, dx, dtau, layout, dtype, planes, g, dA, rule):
        if dA is not None and dtau is not None:
            raise ValueError("the cpu backend makes dtau without dA, not both at once")
        bits, kept, sign, nonzero = planes
        walk(layout, dtype).grad(
            g=g, dA=dA, dx=dx, dtau=dtau, planes=bits, kept=kept, sign=sign, nonzero=nonzero,
            inside=rule.inside, offset=rule.offset,
        )  # fmt: skip

    def called(self, layout, dtype, rule, average):
        kind = cpu_called.Called if cpu_called.Called.takes(layout, dtype) else Called
        return kind(self, layout, dtype, rule, average)

    # ---- the standard gate, computed together with the step

    def gated(self, step):
        return cpu_gated.prepared(self, step)

    # ---- batch normalisation and an activation

    def norm(self, x, layout, norm, weight, bias, given=None, running=None):
        y, stats = self.like(x, layout), self.pair(x, layout)
        mean, var = given or (None, None)
        moved = running or _NOT_RUNNING
        walk(layout, x.dtype).norm(
            batch=norm.batch, slope=norm.slope, eps=norm.eps, x=x, y=y, weight=weight, bias=bias, stats=stats,
            mean=mean, var=var, running_mean=moved.mean, running_var=moved.var, factor=moved.factor,
            batches=moved.batches,
        )  # fmt: skip
        return y, stats

    def norm_statistics(self, x, layout):
        stats = self.pair(x, layout)
        walk(layout, x.dtype).norm(x=x, stats=stats)
        return stats

    def norm_grad(self, g, x, layout, norm, weight, bias, stats, want_x, want_sums, given=None):
        dx = self.like(g, layout) if want_x else None
        sums, count = given or (self.pair(x, layout) if want_sums or norm.batch else None, 0)
        walk(layout, x.dtype).norm_grad(
            batch=norm.batch, slope=norm.slope, g=g, x=x, dx=dx, weight=weight, bias=bias, stats=stats, sums=sums,
            count=count,
        )  # fmt: skip
        return dx, sums if want_sums else None

    def norm_cost(self, step):
        return cost.norm(step)

    # ---- costs and plans: bytes of tensors; what the extension allocates for the gate is not in

    def reduce_cost(self, step, strides, *, kind="magnitude", keep=False) -> Cost:
        return cost.reduce(step.layout, step.dtype, "reduce", kind, keep)

    def map_cost(self, step, strides, *, columns, kind="threshold", residual=False, shift=False, keep=0) -> Cost:
        return cost.map(step.layout, step.dtype, "map", columns, residual, shift, keep)

    def grad_cost(self, step, *, g=True, dA=False, dx=True, dtau=False) -> Cost:
        return cost.grad(step.layout, step.dtype, "grad", g, dA, dx, dtau)

    def plan(self, step):
        not_taken = () if is_dense(step.layout, step.strides) else (("contiguous runs", _STAGED),)
        why = "C is innermost" if step.layout.channels_last else "the spatial dimensions are innermost"
        if step.norm is not None:
            forward, backward = self.norm_cost(step)
            return Plan("statistics, then x", why, not_taken, forward=forward, backward=backward)
        if step.gate is None:
            forward, backward = cost.of_streams(self, step)
            return Plan("passes over x", why, not_taken, forward=forward, backward=backward)
        (forward, backward), batch = gated_cost(step), batch_plan(step)
        if batch.block:
            return Plan(batch.name, batch.why, not_taken, forward=forward, backward=backward)
        not_taken += (("blocks", batch.why),)
        return Plan(batch.name, "each stage takes the whole batch", not_taken, forward=forward, backward=backward)
