"""The shrinkage step around a called gate on the cpu backend: prepared once for small tensors.

Large tensors take the way of every operator (step.py), which keeps the memory of freed ones; beside their elements its
microseconds do not count.
"""

import torch

from . import step as steps
from .cpu_gated import walk
from .cpu_memory import _INNER_BYTES, _OUTPUT_BYTES


class Called(steps.Called):
    def __init__(self, backend, layout, dtype, rule, average):
        super().__init__(backend, layout, dtype, rule, average)
        self._walk, self._sums = walk(layout, dtype), {} if dtype.itemsize >= 4 else {"dtype": torch.float32}
        self._map = {"kind": "threshold", "shift": None, **rule._asdict()}
        self._grad = rule._asdict()

    @staticmethod
    def takes(layout, dtype) -> bool:
        """Whether torch makes every tensor of such a step sooner than cpu_memory does."""
        between = max(3 * layout.words * 4, layout.n * layout.c * 8)
        return layout.numel * dtype.itemsize < _OUTPUT_BYTES and between < _INNER_BYTES

    def pool(self, x):
        layout = self.layout
        pooled = x.new_empty(layout.n, layout.c, **self._sums)
        self._walk.reduce(kind="magnitude", x=x, times=None, out=pooled)
        return pooled

    def shrink(self, x, tau, residual=None, out=None, keep=0):
        y = self._like(x) if out is None else out
        bits = kept = sign = nonzero = None
        if keep:
            bits, kept, sign = x.new_empty(keep, self.layout.words, dtype=torch.int32), 0, 1
            nonzero = 2 if keep == 3 else None
        self._walk.map(
            x=x, y=y, t=tau, residual=residual, planes=bits, kept=kept, sign=sign, nonzero=nonzero, **self._map
        )
        return y, bits

    def dtau(self, bits, g):
        layout = self.layout
        dtau = g.new_empty(layout.n, layout.c, **self._sums)
        self._walk.grad(g=g, dA=None, dx=None, dtau=dtau, planes=bits, kept=0, sign=1, nonzero=None, **self._grad)
        return dtau

    def dx(self, bits, g, dA):
        if g is None:
            return super().dx(bits, g, dA)
        dx, nonzero = self._like(g), None
        if dA is not None:
            dA, nonzero = dA.contiguous(), 2
        self._walk.grad(g=g, dA=dA, dx=dx, dtau=None, planes=bits, kept=0, sign=1, nonzero=nonzero, **self._grad)
        return dx

    def _like(self, x):
        """x may be a gradient, and lie otherwise."""
        layout = self.layout
        if x.stride() == layout.strides:
            return torch.empty_like(x)
        return torch.empty_strided(layout.shape, layout.strides, dtype=x.dtype, device=x.device)
