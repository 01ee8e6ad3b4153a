"""The CUDA kernels on the CPU (emulated.py): every plan under many schedules against the oracle, and without a barrier.

The general suite runs on them too, by the variant `cuda-emulated` of conftest.py; here the plans are chosen, not found.
"""

import copy
import math
from pathlib import Path
from typing import NamedTuple

import emulated
import pytest
import torch
from oracle import check_step, gate_of, varied

import drsn_kernels as dk
from drsn_kernels.backends import cuda, cuda_plans
from drsn_kernels.backends.cuda_plans import StandardPlan
from drsn_kernels.planes import geometry, order

pytestmark = [
    pytest.mark.cuda_emu,
    pytest.mark.skipif(emulated.unavailable() is not None, reason=str(emulated.unavailable())),
]
SCHEDULES = range(8)
BLOCKS = 2 * emulated.MULTIPROCESSORS


class Case(NamedTuple):
    """A plan, and a step that it runs."""

    kind: str  # launches, one pass, training
    shape: tuple[int, ...]
    parts: int = 1  # of a sample
    held: int = 0
    channels_last: bool = False
    average: str | None = "channel"
    norm: bool = False
    dtype: torch.dtype = torch.float32
    shares: int = 1
    row_parts: int = 1
    residual: bool = False

    def __str__(self) -> str:
        told = [self.kind, "x".join(map(str, self.shape)), str(self.average), str(self.dtype).removeprefix("torch.")]
        counts = {"parts": self.parts, "held": self.held, "shares": self.shares, "row parts": self.row_parts}
        told += [f"{name} {value}" for name, value in counts.items() if value > 1]
        return "-".join(told + ["channels last"] * self.channels_last + ["norm"] * self.norm)

    @property
    def coupled(self) -> bool:
        return self.kind == "training" or self.norm

    def x(self) -> torch.Tensor:
        x = varied(self.shape, self.dtype)
        x = x * (0.5 + torch.rand(self.shape[0], *[1] * (len(self.shape) - 1)).to(self.dtype))  # samples that differ
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.channels_last else x

    def plan(self) -> StandardPlan:
        walk = order(geometry(self.x()))
        rows = math.prod(self.shape[2:]) if walk.channels_last else self.shape[1]
        cut = cuda_plans._slice(rows, walk.length * self.dtype.itemsize, self.parts)
        kind = ("launches", "one pass", "training").index(self.kind)
        return StandardPlan(
            self.kind, "chosen by a test", (), kind, *cut, self.held, BLOCKS if kind == 2 else 0, self.row_parts, 3,
            self.shares,
        )  # fmt: skip

    def gate(self) -> torch.nn.Sequential:
        gate = gate_of(self.shape[1], "batch norm" if self.coupled else "plain", self.average)
        if self.coupled:
            gate[1].eps = 0.1  # nearly equal samples are not amplified, which would show rounding only
        return gate


def one_pass(*shape: int, **options) -> Case:
    return Case("one pass", shape, **options)


def training(*shape: int, **options) -> Case:
    return Case("training", shape, **options)


def launches(*shape: int, **options) -> Case:
    return Case("launches", shape, **options)


BF16, F16 = torch.bfloat16, torch.float16
CASES = [
    one_pass(3, 8, 64),
    one_pass(2, 7, 49, average="sample"),  # ragged rows, that begin anywhere within 16 bytes
    one_pass(2, 20, 33, parts=2, residual=True),
    one_pass(2, 8, 128, parts=4, average=None, dtype=BF16),
    one_pass(1, 17, 40, parts=8, dtype=F16),  # three channels each, and ranks without any
    one_pass(5, 6, 8, average="sample", shares=2),  # rows of a byte
    one_pass(2, 5, 13, parts=3, dtype=BF16),  # of two
    one_pass(2, 24, 5, 7, channels_last=True),
    one_pass(3, 40, 9, parts=2, channels_last=True, average="sample"),
    one_pass(2, 8, 6, 6, parts=8, channels_last=True, dtype=BF16, residual=True),
    one_pass(2, 3, 10, parts=5, channels_last=True, average=None),
    one_pass(2, 5, 1400, average="sample"),  # several warps a row, several rows a block
    training(9, 8, 64, held=2),
    training(6, 7, 49, held=1, average="sample", residual=True),  # 1 of 1
    training(12, 6, 40, parts=2, held=1, dtype=BF16),  # 1 of 3, the others read again
    training(4, 9, 100, parts=3, average=None),  # nothing on chip
    training(10, 16, 5, 5, held=2, channels_last=True),
    training(5, 8, 23, parts=3, held=1, channels_last=True, average="sample", dtype=F16),
    training(33, 4, 8, held=5, shares=3),
    launches(6, 8, 64, norm=True),
    launches(20, 12, 33, average="sample", row_parts=2, shares=2),
    launches(3, 5, 2100, norm=True, row_parts=3),
    launches(5, 40, 30, channels_last=True, row_parts=2, dtype=BF16),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def emulation():
    with emulated.in_place() as extension, dk.use_backend("cuda", strict=True):
        yield extension
        extension.schedule(0)
        extension.watch_barriers(False)
    cuda._planned.cache_clear()


def choose(monkeypatch, case: Case) -> None:
    plan = case.plan()
    cuda._planned.cache_clear()
    monkeypatch.setattr(cuda_plans, "standard", lambda *_: plan)


@each_case
def test_every_plan_agrees_with_the_oracle(emulation, case, monkeypatch):
    choose(monkeypatch, case)
    x, residual = case.x(), case.x() if case.residual else None

    def ours(x, gate, average, residual):
        return dk.shrink(x, gate, average=average, residual=residual, return_tau=True)

    emulation.launches()
    check_step(ours, x, residual, case.gate(), case.average, torch.randn_like(x), units=128)
    expected = {
        "one pass": ["one_pass_forward", "one_pass_backward", "gate_backward"],
        "training": ["training_forward", "training_backward"],
        "launches": ["reduce", "gate_forward", "apply", "grad", "gate_backward", "grad"],
    }
    assert [name for name in emulation.launches() if name != "sum_parts"] == expected[case.kind]


def step(case: Case, x, residual, gate, g) -> list[torch.Tensor]:
    """Results, gradients, planes and running statistics of a step."""
    gate, x = copy.deepcopy(gate), x.detach().requires_grad_()
    y, tau = dk.shrink(x, gate, average=case.average, residual=residual, return_tau=True)
    kept = y.grad_fn.saved_tensors
    gradients = torch.autograd.grad(y, [x, *gate.parameters()], g)
    return [y, tau, kept[0], *gradients, *gate.buffers()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def operands(case: Case) -> tuple:
    x = case.x()
    return case, x, case.x() if case.residual else None, case.gate(), torch.randn_like(x)


@each_case
def test_every_schedule_gives_the_same_bits(emulation, case, monkeypatch):
    choose(monkeypatch, case)
    given = operands(case)
    first = step(*given)
    for schedule in SCHEDULES:
        emulation.schedule(schedule)
        assert same(first, step(*given)), f"schedule {schedule}"


@pytest.mark.parametrize("parts", range(1, 9))
def test_clusters_of_every_size(emulation, parts, monkeypatch):
    case = one_pass(3, 17, 24, parts=parts)
    choose(monkeypatch, case)
    given = operands(case)
    choose(monkeypatch, case._replace(parts=1))
    alone = step(*given)
    choose(monkeypatch, case)
    emulation.schedule(parts)
    for ours, right in zip(step(*given), alone, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


NEEDED = [CASES[i] for i in (2, 6, 8, 11, 13, 15, 17, 18, 19, 20, 21, 22)]


def notices(emulation, given: tuple, right: list[torch.Tensor]) -> bool:
    """Whether a schedule gives other results, or something that CUDA leaves undefined."""
    for schedule in SCHEDULES:
        emulation.schedule(schedule)
        try:
            if not same(right, step(*given)):
                return True
        except RuntimeError:
            return True
    return False


def test_no_barrier_can_be_left_out(emulation, monkeypatch):
    """Each barrier is taken out, in turn each time that a thread comes to it: at one of these some schedule shows it.

    Not at all of them: a barrier that keeps scratch memory from being overwritten has nothing to keep the first time.
    """
    seen, needed = set(), set()
    for case in NEEDED:
        choose(monkeypatch, case)
        given = operands(case)
        emulation.schedule(0)
        emulation.watch_barriers(False)
        right = step(*given)
        emulation.watch_barriers(True)
        step(*given)
        for file, line, times in emulation.barriers():
            site = Path(file).name, line
            seen.add(site)
            for nth in range(times):
                emulation.remove_barrier(file, line, nth)
                if site not in needed and notices(emulation, given, right):
                    needed.add(site)
    assert len(seen) > 15 and seen == needed, sorted(seen - needed)
