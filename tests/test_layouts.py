"""Any strides of x, g and residual: right results without a hidden copy, nothing written outside; planes, threads."""

import itertools
import sys

import pytest
import torch
from oracle import DTYPES, LAYOUTS, cast_gate, check, shrink, smooth_gate, wide, without_ties
from processes import python
from torch.profiler import ProfilerActivity, profile

import drsn_kernels as dk
from drsn_kernels.backends import cpu
from drsn_kernels.layout import layout_of, pack, row_bits, unpack

SHAPE = (3, 5, 6, 7)
native = pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")


@pytest.mark.parametrize("x_layout, g_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_pair_of_layouts(kernels, x_layout, g_layout):
    """x in one layout, residual and g in the other."""
    x, residual, g = (LAYOUTS[layout](*SHAPE) for layout in (x_layout, g_layout, g_layout))
    gate = smooth_gate(5)
    with torch.no_grad():
        clear = without_ties(g, x, shrink(x.double(), cast_gate(gate, torch.float64), "channel")[1])
    if not torch.equal(clear, g):  # taking a tie out costs g its strides
        g = clear

    check(
        lambda x, r: kernels.shrink(x, gate, residual=r),
        lambda d, x, r: shrink(x, cast_gate(gate, d), "channel", r)[0],
        {"x": x.requires_grad_(), "residual": residual.requires_grad_()},
        [g],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_rows_longer_than_a_staging_buffer(kernels, layout, dtype):
    """Rows of 1,333 elements: chunks of 512 where a layout is strided."""
    shape = (1, 1333, 1, 3) if "channels_last" in layout else (1, 2, 31, 43)
    x = LAYOUTS[layout](*shape).to(dtype).requires_grad_()
    residual = LAYOUTS["sliced"](*shape).to(dtype)
    tau = torch.rand(shape[:2], dtype=wide(dtype)).requires_grad_()
    g = LAYOUTS["image transposed"](*shape).to(dtype)
    y = kernels.soft_threshold(x, tau)
    flat = kernels.soft_threshold(x.detach().contiguous().requires_grad_(), tau)
    assert torch.equal(y, flat)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.where(y.detach() != 0, g, 0))
    torch.testing.assert_close(kernels.abs_mean(x), kernels.abs_mean(x.detach().contiguous()), rtol=1e-5, atol=0)
    y, average = kernels.shrink(x, torch.sigmoid, residual=residual, return_tau=True)
    expected = kernels.soft_threshold(x.to(wide(dtype)), average) + residual
    assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (2, 3, 2, 2, 3, 2, 2, 3)], ids=str)
def test_more_spatial_dimensions_in_any_order(kernels, shape):
    for _ in range(6):
        stored = torch.randperm(len(shape))
        x = torch.randn([shape[d] for d in stored]).permute(stored.argsort().tolist()).requires_grad_()
        tau = torch.rand(2, 3)
        y = kernels.soft_threshold(x, tau)
        assert y.shape == shape and torch.equal(y, kernels.soft_threshold(x.detach().contiguous(), tau))
        g = torch.randn(shape)
        assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.where(y.detach() != 0, g, 0))
        torch.testing.assert_close(kernels.abs_mean(x), x.detach().abs().mean(list(range(2, len(shape)))))


# ---- no hidden copies ------------------------------------------------------------------------------------------------


def traffic(run) -> tuple[list[str], list[int]]:
    """Names of the full-size copies and adds that torch made in run(), and the bytes of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as recorded:
        keep = run()
    del keep
    copying = {f"aten::{op}" for op in ("clone", "contiguous", "copy_", "_to_copy", "add", "add_", "mul")}
    events, numel = recorded.events(), torch.Size(BIG).numel()
    full = [e for e in events if any(torch.Size(s).numel() == numel for s in e.input_shapes if s)]
    names = [e.name for e in full if e.name in copying]
    return names, [e.self_cpu_memory_usage for e in events if e.self_cpu_memory_usage > 0]


BIG = (3, 16, 30, 34)


OPERATORS = {
    "abs_mean": lambda x, gate, residual: dk.abs_mean(x),
    "soft_threshold": lambda x, gate, residual: dk.soft_threshold(x, torch.rand(BIG[:2])),
    "shrink": lambda x, gate, residual: dk.shrink(x, gate, residual=residual),
    "shrink, sample": lambda x, gate, residual: dk.shrink(x, gate, average="sample", residual=residual),
    "squeeze_excite": lambda x, gate, residual: dk.squeeze_excite(x, gate, residual=residual),
}


@native
@pytest.mark.unpoisoned
@pytest.mark.sampled(4)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("g_layout", ["contiguous", "channels_last", "sliced", "expanded space"])
@pytest.mark.parametrize("op", OPERATORS)
def test_one_allocation_each_way_and_no_copy(x_layout, g_layout, op):
    """Forward writes y, backward writes dx, and nothing else of that size is allocated, copied or added."""
    gate, results = smooth_gate(16), []
    leaf, residual = LAYOUTS[x_layout](*BIG).requires_grad_(), LAYOUTS[g_layout](*BIG).requires_grad_()
    size, planes = torch.Size(BIG).numel() * 4, 3 * layout_of(leaf).words * 4
    x = leaf.view_as(leaf)  # not a leaf: its gradient is accumulated by autograd, in place
    with dk.use_backend("cpu", strict=True):
        OPERATORS[op](x, gate, residual)
        copies, allocations = traffic(lambda: results.append(OPERATORS[op](x, gate, residual)))
        assert copies == [] and sum(allocations) < size + planes + 40 * 16 * 4 * 3
        assert [a for a in allocations if a > size // 8] == ([size] if results[0].shape == BIG else [])
        g = LAYOUTS[g_layout](*BIG) if results[0].shape == BIG else torch.rand(BIG[:2])
        wanted = [leaf] if op in ("abs_mean", "soft_threshold") else [leaf, residual, *gate.parameters()]
        copies, allocations = traffic(lambda: results.append(torch.autograd.grad(results[0], wanted, g)))
        assert copies == [] and [a for a in allocations if a > size // 8] == [size]


@native
@pytest.mark.unpoisoned
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "sliced"])
def test_inplace_in_eval_allocates_nothing(x_layout):
    x, residual, gate = LAYOUTS[x_layout](*BIG), LAYOUTS["sliced"](*BIG), smooth_gate(16).eval()
    with dk.use_backend("cpu", strict=True), torch.no_grad():
        copies, allocations = traffic(lambda: dk.shrink(x, gate, residual=residual, inplace=True))
    assert copies == [] and max(allocations) <= 4096


# ---- nothing outside ------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(kernels, monkeypatch):
    """Every tensor that an operator allocates ends in 64 guard bytes; they are checked when the test is over."""
    if kernels.backend == "torch":
        pytest.skip("torch's own kernels write there")
    guards = []

    def guard(factory):
        def make(*args, **kwargs):
            t = factory(*args, **kwargs)
            if t.is_meta:
                return t
            used = t.untyped_storage().nbytes()
            room = plain(used + 64, dtype=torch.uint8, device=t.device).fill_(0xA5)
            guards.append(room[used:])
            return plain(0, dtype=t.dtype, device=t.device).set_(room.untyped_storage(), 0, t.shape, t.stride())

        return make

    plain = torch.empty
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    yield
    assert guards and all((g == 0xA5).all() for g in guards)


@native
@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("length", [1, 7, 9, 16, 17, 31, 33, 65, 95, 129, 513, 545, 32769, 32799, 32801, 65537])
def test_nothing_is_written_past_the_end(kernels, guarded, length, channels_last, dtype):
    x = torch.randn(1, 3, length, dtype=dtype)
    x = (x.transpose(1, 2) if channels_last else x).requires_grad_()
    y, tau = kernels.shrink(x, torch.sigmoid, residual=x.detach(), return_tau=True)
    torch.autograd.grad((y, tau), x, (torch.randn_like(y), torch.randn_like(tau)))
    tau = tau.detach().requires_grad_()
    torch.autograd.grad(kernels.soft_threshold(x, tau), (x, tau), torch.randn_like(x))


# ---- planes: test_backends.py compares those of all backends ---------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 1, 9), (5, 9, 2, 2), (1, 70, 37, 1)], ids=str)
def test_pack_and_unpack(layout, shape):
    x = LAYOUTS[layout](*shape)
    layout, mask = layout_of(x), LAYOUTS["contiguous"](*shape) > 0
    plane = pack(mask, layout)
    assert plane.dtype is torch.int32 and plane.shape == (layout.words,)
    assert torch.equal(unpack(plane, layout), mask)
    assert layout.strides == torch.empty_like(x).stride()


@pytest.mark.parametrize("length, bits", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (999, 1024)])
def test_row_bits(length, bits):
    assert row_bits(length) == bits


# ---- threads ---------------------------------------------------------------------------------------------------------

COUNT_THREADS = """
import os, torch
import drsn_kernels as dk
torch.set_num_threads(1)
x = torch.randn(64, 64, 512)
before = len(os.listdir("/proc/self/task"))
for threads in (1, 3):
    torch.set_num_threads(threads)
    with dk.use_backend("cpu", strict=True):
        dk.soft_threshold(x, torch.zeros(64, 64))
    print(len(os.listdir("/proc/self/task")) - before)
"""


@native
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_the_kernels_use_as_many_threads_as_torch_may():
    done = python(COUNT_THREADS)
    alone, three = map(int, done.stdout.split())
    assert alone == 0 and three == (2 if cpu._cpu.has_parallel_for() else 0), done.stderr
