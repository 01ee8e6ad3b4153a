"""The `cpu` backend: the C++ kernels of csrc/cpu through raw addresses, any strides, torch's own thread pool."""

import functools

import torch

from ..gates import StandardGate
from ..layout import Layout, is_dense
from . import cost
from .cpu_extension import MISSING, _cpu
from .cpu_memory import DTYPES, _empty, empty_cache
from .cpu_plan import batch_plan, gated_cost
from .step import Backend, Cost, Plan, Step

__all__ = ["MISSING", "Cpu", "empty_cache"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Beyond this many products torch's own matrix products win back what fusing saves. Time of the called gate over that of
# the fused one, a training step. AVX-512: (128, 512, 16) 1.14, (128, 1024, 16) 1.05, (512, 1024, 4) 0.91,
# (128, 2048, 4) 0.85. AVX2: (128, 256, 16) 1.04, (512, 256, 16) 0.94, (128, 512, 16) 0.86.
# Portable: (128, 64, 32) 1.01, (128, 128, 16) 0.91, (128, 512, 16) 0.70.
_MOST_PRODUCTS = {"avx512": 1 << 29, "avx2": 1 << 24, "portable": 1 << 20}
_STAGED = "x is not dense: its elements are gathered, 512 at a time, into a buffer"


@functools.lru_cache(maxsize=4096)
def _walk(layout: Layout, dtype: torch.dtype):
    """The kernels for tensors of this layout and dtype, which parse them once."""
    return _cpu.Walk(dtype=DTYPES[dtype], shape=layout.shape, strides=layout.strides)


def _address(t: torch.Tensor | None) -> int:
    """0 where there is none. Memory of another device would be read as this process's own."""
    if t is None:
        return 0
    if not t.is_cpu:
        raise ValueError(f"the cpu kernels take CPU tensors, got one of shape {tuple(t.shape)} on {t.device}")
    return t.data_ptr()


def _strides(t: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


class Cpu(Backend):
    name = "cpu"
    fuses_gates = True

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
        products, most = x.shape[0] * hidden * (x.shape[1] + outputs), _MOST_PRODUCTS[_cpu.isa()]
        if products > most:
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

    def empty(self, shape, strides, dtype, device):
        return _empty(shape, strides, dtype, device)

    # ---- kernels

    def reduce_into(self, out, planes, x, layout, kind, times):
        _walk(layout, x.dtype).reduce(
            kind=kind, x=_address(x), x_strides=x.stride(), times=_address(times), times_strides=_strides(times),
            out=out.data_ptr(), planes=0 if planes is None else planes.bits.data_ptr(),
        )  # fmt: skip

    def map_into(self, y, planes, x, layout, t, kind, rule, residual, shift):
        _walk(layout, x.dtype).map(
            kind=kind, x=_address(x), x_strides=x.stride(), y=y.data_ptr(), y_strides=y.stride(),
            t=_address(t), t_shape=t.shape, t_strides=t.stride(), inside=rule.inside, offset=rule.offset,
            residual=_address(residual), residual_strides=_strides(residual), shift=_address(shift),
            planes=0 if planes is None else planes.bits.data_ptr(), count=0 if planes is None else len(planes.bits),
        )  # fmt: skip

    def grad_into(self, dx, dtau, layout, dtype, planes, g, dA, rule):
        _walk(layout, dtype).grad(
            g=_address(g), g_strides=_strides(g), dA=_address(dA), dx=_address(dx), dtau=_address(dtau),
            planes=_address(planes.bits), kept=planes.kept, sign=planes.sign, nonzero=planes.nonzero,
            inside=rule.inside, offset=rule.offset,
        )  # fmt: skip

    def gated_forward_into(self, y, tau, kept, step, x, parts, residual):
        layout = step.layout
        pooled, state = kept.pooled, kept.state
        if not step.keep:
            pooled, state = self.sums(layout, step.dtype, step.device), self.gate_state(step)
        _walk(layout, step.dtype).gated_forward(
            x=_address(x), x_strides=x.stride(), y=y.data_ptr(), y_strides=y.stride(),
            residual=_address(residual), residual_strides=_strides(residual), tau=_address(tau),
            planes=_address(kept.bits), block=batch_plan(step).block,
            **_gate(step, parts, pooled, state, parts.mean, parts.var),
        )  # fmt: skip

    def gated_backward_into(self, dx, step, parts, kept, g, tau_grad, want):
        grads = [
            _empty(tuple(p.shape), p.stride(), p.dtype, step.device) if wanted and p is not None else None
            for p, wanted in zip(parts[:6], want, strict=True)
        ]
        dw1, db1, dgamma, dbeta, dw2, db2 = map(_address, grads)
        _walk(step.layout, step.dtype).gated_backward(
            g=_address(g), g_strides=g.stride(), planes=_address(kept.bits), dx=_address(dx),
            tau_grad=_address(tau_grad), **_gate(step, parts, kept.pooled, kept.state, kept.mean, kept.var),
            dw1=dw1, db1=db1, dgamma=dgamma, dbeta=dbeta, dw2=dw2, db2=db2,
        )  # fmt: skip
        return tuple(grads)

    # ---- costs and plans: bytes of tensors; what the extension allocates for the gate is not in

    def reduce_cost(self, step, strides, *, kind="magnitude", keep=False) -> Cost:
        return cost.reduce(step, "reduce", kind, keep)

    def map_cost(self, step, strides, *, columns, kind="threshold", residual=False, shift=False, keep=0) -> Cost:
        return cost.map(step, "map", columns, residual, shift, keep)

    def grad_cost(self, step, *, g=True, dA=False, dx=True, dtau=False) -> Cost:
        return cost.grad(step, "grad", g, dA, dx, dtau)

    def plan(self, step):
        not_taken = () if is_dense(step.layout, step.strides) else (("contiguous runs", _STAGED),)
        if step.gate is None:
            forward, backward = cost.of_streams(self, step)
            why = "C is innermost" if step.layout.channels_last else "the spatial dimensions are innermost"
            return Plan("passes over x", why, not_taken, forward=forward, backward=backward)
        (forward, backward), batch = gated_cost(step), batch_plan(step)
        if batch.block:
            return Plan(batch.name, batch.why, not_taken, forward=forward, backward=backward)
        not_taken += (("blocks", batch.why),)
        return Plan(batch.name, "each stage takes the whole batch", not_taken, forward=forward, backward=backward)


def _gate(step: Step, parts: StandardGate, pooled, state, mean, var) -> dict:
    """The gate's part of the arguments. mean and var: the running statistics, or what was kept of them."""
    shape = step.gate
    return dict(
        average=step.average, hidden=shape.hidden, outputs=shape.outputs, batch_stats=shape.batch_stats,
        eps=shape.eps, momentum=shape.momentum, w1=_address(parts.w1), b1=_address(parts.b1),
        gamma=_address(parts.gamma), beta=_address(parts.beta), w2=_address(parts.w2), b2=_address(parts.b2),
        mean=_address(mean), var=_address(var), batches=_address(parts.batches),
        pooled=pooled.data_ptr(), state=state.data_ptr(),
    )  # fmt: skip
