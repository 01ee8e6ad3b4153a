"""The class that the operators call. It imports the kernels, and with them Triton, at the first call."""

import functools

import torch

from ...gates import StandardGate
from .. import cost
from ..step import Backend, Cost, Plan, Step, Strides
from . import describe, native, tuned, unsupported


class Gpu(Backend):
    name = "triton"
    fuses_gates = True

    @functools.cached_property
    def _stream(self):
        from . import stream

        return stream

    @functools.cached_property
    def _sequence(self):
        from . import sequence

        return sequence

    @functools.cached_property
    def _norm(self):
        from . import norm_passes

        return norm_passes

    def unsupported(self, x: torch.Tensor) -> str | None:
        return unsupported(x)

    def describe(self) -> str:
        return describe()

    def launcher(self) -> str:
        """Who launches the kernels: one line for `python -m drsn_kernels info`."""
        return native.describe()

    # ---- the kernels

    def reduce_into(self, out, planes, x, layout, kind, times) -> None:
        self._stream.reduce_into(out, planes, x, layout, kind, times)

    def map_into(self, y, planes, x, layout, t, kind, rule, residual, shift) -> None:
        self._stream.map_into(y, planes, x, layout, t, kind, rule, residual, shift)

    def grad_into(self, dx, dtau, layout, dtype, planes, g, dA, rule) -> None:
        self._stream.grad_into(dx, dtau, layout, dtype, planes, g, dA, rule)

    # ---- the standard gate, computed together with the step

    def gate_unsupported(self, x: torch.Tensor, parts: StandardGate) -> str | None:
        n, (hidden, c) = x.shape[0], parts.w1.shape
        if max(c, hidden) > tuned.MOST_CHANNELS:
            return f"{c} channels and {hidden} hidden units, the fused gate takes at most {tuned.MOST_CHANNELS} of each"
        if n * c * hidden > tuned.MOST_PRODUCTS:
            return f"{n} samples x {c} channels x {hidden} hidden units are more than {tuned.MOST_PRODUCTS} products"
        return None

    def gated(self, step):
        return self._sequence.Gated(self, step)

    # ---- batch normalisation and an activation

    def norm(self, x, layout, norm, weight, bias, given=None, running=None):
        return self._norm.norm(self, x, layout, norm, weight, bias, given, running)

    def norm_statistics(self, x, layout):
        return self._norm.statistics(self, x, layout)

    def norm_grad(self, g, x, layout, norm, weight, bias, stats, want_x, want_sums, given=None):
        return self._norm.norm_grad(self, g, x, layout, norm, weight, bias, stats, want_x, want_sums, given)

    def norm_cost(self, step: Step) -> tuple[Cost, Cost]:
        return self._norm.costs(step)

    # ---- costs and plans

    def plan(self, step: Step) -> Plan:
        if step.gate is not None:
            return self._sequence.plan(step)
        if step.norm is not None:
            found = [launch for each in self._norm.of_step(step) if each is not None for launch in each.launches]
            why = "; ".join(dict.fromkeys(launch.plan.why for launch in found))
            name = "statistics given" if not step.norm.batch else "on chip" if found[0].plan.on_chip else "two passes"
            return self._sequence.described(name, why, (), *self.norm_cost(step), tuple(found))
        found = _Launches(self)
        forward, backward = cost.of_streams(found, step)
        why = "; ".join(dict.fromkeys(launch.plan.why for launch in found.launches))
        if step.op in ("shrink", "squeeze_excite"):
            name, why = "two launches each way", f"a gate of torch's stands between them; {why}"
        else:
            added = any(name.startswith("aten::") for name in forward.kernels + backward.kernels)
            name = "one launch each way" + (", and torch adds up pieces" if added else "")
        return self._sequence.described(name, why, (), forward, backward, tuple(found.launches))


class _Launches:
    """What cost.of_streams asks a backend, answered from launches that are prepared for it and listed in order."""

    def __init__(self, backend: Gpu):
        self._stream, self.launches = backend._stream, []

    def reduce_cost(self, step: Step, strides: Strides, *, kind="magnitude", keep=False) -> Cost:
        times = step.strides if kind == "product" else None
        launch = self._stream.prepare_reduce(step.layout, strides, times, step.dtype, step.device, kind, keep)
        self.launches.append(launch)
        return launch.cost + cost.added_up(cost.sums_bytes(step), launch.plan.splits)

    def map_cost(
        self, step: Step, strides: Strides, *, columns, kind="threshold", residual=False, shift=False, keep=0
    ) -> Cost:  # fmt: skip
        dense = step.layout.strides
        launch = self._stream.prepare_map(
            step.layout, strides, dense, (step.residual or dense) if residual else None,
            (1, 0) if columns == 1 else (columns, 1), step.dtype, step.device, kind, step.rule, shift, keep,
        )  # fmt: skip
        self.launches.append(launch)
        return launch.cost

    def grad_cost(self, step: Step, *, g=True, dA=False, dx=True, dtau=False) -> Cost:
        dense, rows = step.layout.strides, (0, 1, 2) if g else (None, 0, 1)
        launch = self._stream.prepare_grad(
            step.layout, dense if g else None, step.dtype, step.device, rows, dA, dx, dtau, step.rule
        )  # fmt: skip
        self.launches.append(launch)
        parts = launch.plan.splits if dtau else 1
        return launch.cost + cost.added_up(cost.sums_bytes(step), parts)
