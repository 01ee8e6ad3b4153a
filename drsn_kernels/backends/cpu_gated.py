"""The shrinkage step with the standard gate on the cpu backend: prepared for a step, then called with tensors only.

A pass forward allocates y, A, which is an output of its autograd node, and `kept`, which holds all else that a backward
pass needs: the gate's state, then the bit planes. Where nothing is kept, A and the state are the extension's own.
"""

import functools

import torch

from ..layout import Layout
from . import step as steps
from .cpu_extension import _cpu
from .cpu_memory import _INNER_BYTES, _OUTPUT_BYTES, DTYPES, _empty
from .cpu_plan import batch_plan
from .step import NOTHING_KEPT, Backend, Kept, Step

_AVERAGES = {"channel": 0, "sample": 1, None: 2}  # Average in csrc/cpu/args.h


@functools.lru_cache(maxsize=4096)
def walk(layout: Layout, dtype: torch.dtype):
    """The kernels for tensors of this layout and dtype, which parse them once."""
    return _cpu.Walk(dtype=DTYPES[dtype], shape=layout.shape, strides=layout.strides)


class Gated(steps.Gated):
    def __init__(self, backend: Backend, step: Step):
        super().__init__(backend, step)
        layout, gate, item = step.layout, step.gate, step.sums.itemsize
        self._gate = _cpu.Gate(
            walk=walk(layout, step.dtype), average=_AVERAGES[step.average], hidden=gate.hidden, outputs=gate.outputs,
            norm=gate.norm, batch_stats=gate.batch_stats, eps=gate.eps, momentum=gate.momentum,
            block=batch_plan(step).block, keep=step.keep,
        )  # fmt: skip
        # the state, and behind it the planes kept, sign and nonzero: int32, as hooks may round what is saved in floats
        self._kept = -(-self._gate.kept_bytes // 4)
        self._tau_columns = 1 if step.one_tau else layout.c
        # where none of a pass's tensors is so large that its memory is kept mapped, torch makes them sooner than _empty
        largest = max(4 * self._kept, item * layout.n * layout.c, item * gate.hidden * max(layout.c, gate.outputs))
        self._small = layout.numel * step.dtype.itemsize < _OUTPUT_BYTES and largest < _INNER_BYTES

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        layout = self.step.layout
        if self._small and x.stride() == layout.strides:
            return torch.empty_like(x)
        return _empty(layout.shape, layout.strides, self.step.dtype, x.device)

    def _sums(self, columns: int, w1: torch.Tensor) -> torch.Tensor:
        """(N, columns) in w1's dtype, that of sums."""
        n = self.step.layout.n
        return w1.new_empty(n, columns) if self._small else _empty((n, columns), (columns, 1), w1.dtype, w1.device)

    def forward(self, x, parts, residual=None, out=None):
        step = self.step
        w1, b1, gamma, beta, w2, b2, mean, var, batches, *_ = parts
        y = self._like(x) if out is None else out
        tau = self._sums(self._tau_columns, w1) if step.want.tau else None
        pooled = bits = None
        if step.keep:
            pooled = self._sums(step.layout.c, w1)
            if self._small:
                bits = w1.new_empty(self._kept, dtype=torch.int32)
            else:
                bits = _empty((self._kept,), (1,), torch.int32, w1.device)
        self._gate.forward(x, y, residual, tau, pooled, bits, w1, b1, gamma, beta, w2, b2, mean, var, batches)
        if bits is None:
            return y, tau, NOTHING_KEPT
        if step.gate.batch_stats:
            mean = var = None
        return y, tau, Kept(bits, pooled, mean, var)

    def backward(self, saved, g, tau_grad, want):
        """Each gradient is a tensor of its own: six views of one tensor would take longer."""
        bits, pooled, mean, var, w1, _, gamma, beta, w2, _ = saved
        dx = self._like(g) if want[0] else None
        new = torch.empty_like if self._small else _empty_like
        wanted = zip(saved[4:], want[1:], strict=True)
        grads = [new(p) if wants and p is not None else None for p, wants in wanted]
        tau_grad = None if tau_grad is None else tau_grad.contiguous()
        self._gate.backward(g, dx, tau_grad, pooled, bits, w1, gamma, beta, w2, mean, var, *grads)
        return dx, *grads

    def unpacked(self, kept):
        words, start = self.step.layout.words, self.step.state * self.step.sums.itemsize // 4
        return kept._replace(bits=kept.bits[start : start + 3 * words].view(3, words))


def _empty_like(p: torch.Tensor) -> torch.Tensor:
    return _empty(tuple(p.shape), p.stride(), p.dtype, p.device)


prepared = functools.lru_cache(maxsize=4096)(Gated)
