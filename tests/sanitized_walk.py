"""Run by test_sanitize.py under ASan and UBSan: every kernel, instruction set, dtype and layout, against PyTorch.

python sanitized_walk.py PATH_OF_THE_SANITIZED_EXTENSION
"""

import importlib.util
import itertools
import random
import sys
import threading

import torch
from oracle import AVERAGES, DTYPES, standard_gate, varied, wide

import drsn_kernels.backends.cpu as cpu
from drsn_kernels import gates
from drsn_kernels.backends.cpu_extension import torch_parallel_for
from drsn_kernels.backends.cpu_plan import BatchPlan
from drsn_kernels.backends.eager import Eager
from drsn_kernels.backends.step import GateShape, Step, Want
from drsn_kernels.layout import layout, thresholded
from drsn_kernels.reference import SOFT, Rule, threshold

ours, eager = cpu.Cpu(), Eager()

SHAPES = (
    (2, 3, 1),
    (2, 3, 7),
    (3, 70, 1),
    (2, 5, 16),
    (2, 3, 63),
    (2, 4, 129),
    (2, 3, 513),
    (3, 65, 7, 9),
    (1, 2, 32771),
)
# Rows and columns of the gate's products on both sides of a tile of 6, a vector, a panel, 64 and 128.
GATES = (  # x, hidden units
    ((2, 1, 1), 1),
    ((7, 5, 9), 3),
    ((13, 33, 3), 17),
    ((5, 70, 4, 5), 66),
    ((131, 3, 2), 2),
    ((3, 130, 2), 131),
    ((2, 2, 32771), 1),
)


def layouts(x: torch.Tensor):
    yield x
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield torch.cat([x, x], -1)[..., 1::2]
    yield x[:, :1].expand_as(x)


def check(a: torch.Tensor | None, b: torch.Tensor | None, low: bool) -> None:
    if a is not None:
        torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-4, atol=1e-3)


def steps(dtype: torch.dtype) -> int:
    """reduce, map and grad: how often the last was called."""
    low, acc, calls = dtype.itemsize == 2, wide(dtype), 0
    for shape in SHAPES:
        for x in layouts(torch.randn(shape).to(dtype)):
            of, tau = layout(x), torch.rand(shape[:2], dtype=acc)
            pooled, of_abs_mean = ours.reduce(x, of, keep=True)
            check(pooled, eager.reduce(x, of)[0], low)
            check(ours.reduce(x, of, kind="value")[0], eager.reduce(x, of, kind="value")[0], low)
            for g in layouts(torch.randn(shape).to(dtype)):
                y, planes = ours.map(x, of, tau, residual=g, keep=3)
                check(y, eager.map(x, of, tau, residual=g)[0], low)
                for rule in (Rule(0.0, 0.0), Rule(0.3, 0.7)):  # hard, leaky
                    for added, keep in ((g, 2), (None, 0)):
                        options = dict(rule=rule, residual=added, keep=keep)
                        check(ours.map(x, of, tau, **options)[0], eager.map(x, of, tau, **options)[0], low)
                for options in ({"residual": g}, {}, {"shift": tau}):
                    scaled = [on.map(x, of, tau, kind="scale", **options)[0] for on in (ours, eager)]
                    check(*scaled, low)
                sums, size = (eager.reduce(a, of, kind="product", times=b)[0] for a, b in ((g, x), (g.abs(), x.abs())))
                assert ((ours.reduce(g, of, kind="product", times=x)[0] - sums).abs() <= 1e-5 * size).all()
                asked = [(of_abs_mean, None, {"dA": tau})]
                for rule in (SOFT, Rule(0.3, 0.7)):
                    for options in ({}, {"want_dtau": True}, {"want_dx": False, "want_dtau": True}, {"dA": tau}):
                        asked.append((planes, g, {"rule": rule, **options}))
                for kept, given, options in asked:
                    made = [on.grad(of, dtype, kept, given, **options) for on in (ours, eager)]
                    for a, b in zip(*made, strict=True):
                        check(a, b, low)
                    calls += 1
    return calls


def step_with_gate(x, residual, g, gate, average, block: int, want_tau: bool, want_dx: bool) -> None:
    """gated_forward and gated_backward, each stage against PyTorch on what the stage before it gave."""
    cpu.batch_plan = lambda step: BatchPlan("", block, "")
    of, parts, low = layout(x), gates.standard_gate(gate, x), x.dtype.itemsize == 2
    assert isinstance(parts, gates.StandardGate), parts
    shape, added = GateShape.of(parts), None if residual is None else residual.stride()
    step = Step("shrink", of, x.stride(), x.dtype, x.device, average=average, outputs=shape.outputs, gate=shape,
                residual=added, keep=True, want=Want(x=want_dx, threshold=True, tau=True))  # fmt: skip
    y, tau, kept = ours.gated_forward(step, x, parts, residual=residual)
    pooled = eager.reduce(x, of)[0].requires_grad_()
    expected = threshold(parts.alpha(pooled), pooled, average)
    torch.testing.assert_close(kept.pooled, pooled)
    torch.testing.assert_close(tau, expected, rtol=2e-4, atol=2e-5)
    check(y, eager.map(x, of, tau, residual=residual)[0], low)
    if not parts.batch_stats:  # without what is kept for backward, and in place
        light = step._replace(keep=False, want=Want())
        again = ours.gated_forward(light, x, parts, residual=residual, out=torch.empty_like(x))[0]
        assert torch.equal(again, y)

    tau_g = torch.randn_like(tau) if want_tau else None
    dx, *grads = ours.gated_backward(step, parts, kept, g, tau_g, (want_dx, *[True] * 6))
    planes = thresholded(kept.bits, nonzero=True)
    total = eager.grad(of, x.dtype, planes, g, want_dx=False, want_dtau=True)[1].sum_to_size(tau.shape)
    wanted = [pooled, *(p for p in parts[:6] if p is not None)]
    from_gate, *exact = torch.autograd.grad(expected, wanted, total if tau_g is None else total + tau_g)
    for made, right in zip((t for t in grads if t is not None), exact, strict=True):
        assert (made - right).norm() <= 1e-3 * right.norm() + 1e-4 * max(t.norm() for t in exact)
    if want_dx:
        right = eager.grad(of, x.dtype, planes, g, dA=from_gate)[0]
        assert (dx - right).double().norm() <= (2e-2 if low else 1e-3) * right.double().norm()


def steps_with_gates(dtype: torch.dtype) -> int:
    """Every average, number of alphas, sort of gate and layout of x; the rest in turns."""
    calls = 0
    added = itertools.cycle(range(6))
    options = itertools.cycle(itertools.product((0, 1, 2, 3), (False, True), (True, True, False)))
    for shape, hidden in GATES:
        residuals, gs = ([t for t in layouts(torch.randn(shape).to(dtype))] for _ in range(2))
        for x in layouts(varied(shape, dtype)):
            for average, outputs, kind in itertools.product(AVERAGES, {1, shape[1]}, ("plain", "norm", "batch norm")):
                if outputs == 1 < shape[1] and shape[2] == 32771:
                    continue  # seconds, and the gate is no other
                gate = standard_gate(shape[1], hidden, outputs, kind).to(wide(dtype))
                block, want_tau, want_dx = next(options)
                which = next(added)
                step_with_gate(x, None if which == 5 else residuals[which], gs[calls % 5], gate, average,
                               0 if kind == "batch norm" else block, want_tau, want_dx)  # fmt: skip
                calls += 1
    return calls


def outputs_from_the_arena(native) -> int:
    """Blocks taken and freed by several threads at a time, under limits that change."""
    held: list[torch.Tensor] = []
    failed: list[int] = []

    def run(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(40):
            made = torch.from_dlpack(native.empty(0, (order.randint(1, 3), 1 << 19), (1 << 19, 1))).fill_(seed)
            held.append(made)
            if len(held) > 6:
                other = held.pop(0)
                if not (other == other[0, 0]).all():
                    failed.append(seed)
            if order.random() < 0.2:
                native.set_cache_limit(order.randint(0, 5) << 20)
            native.empty(0, (1 << 19,), (1,))  # a capsule that nobody takes

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held.clear()
    native.set_cache_limit(0)
    assert not failed and native.cached_bytes() == 0
    return 160


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("drsn_kernels._cpu", path)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    cpu._cpu, cpu.MISSING = native, None
    native.set_parallel_for(torch_parallel_for())
    torch.manual_seed(0)
    calls = fused = 0
    for isa in native.available_isas():
        native.set_isa(isa)
        for dtype in DTYPES:
            calls += steps(dtype)
            fused += steps_with_gates(dtype)
    blocks = outputs_from_the_arena(native)
    print(f"sanitized walk: {calls} backward calls, {fused} with a fused gate and {2 * blocks} outputs ok on "
          f"{', '.join(native.available_isas())}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
