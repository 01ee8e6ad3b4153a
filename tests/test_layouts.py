"""Any strides of x, g and residual: right results without a hidden copy, the same planes in every backend, and the same
bits for any number of threads."""

import itertools
import subprocess
import sys

import pytest
import torch
from oracle import DTYPES, LAYOUTS, cast_gate, check, features, shrink, smooth_gate, wide, without_ties
from torch.profiler import ProfilerActivity, profile

import drsn_kernels as dk
from drsn_kernels.backends import BACKENDS, cpu
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


@native
@pytest.mark.unpoisoned
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("g_layout", ["contiguous", "channels_last", "sliced", "expanded space"])
@pytest.mark.parametrize("average", ["channel", "sample"])
def test_one_allocation_each_way_and_no_copy(x_layout, g_layout, average):
    """Forward writes y, backward writes dx, and nothing else of that size is allocated, copied or added."""
    gate = smooth_gate(16)
    leaf_x, residual = LAYOUTS[x_layout](*BIG).requires_grad_(), LAYOUTS[g_layout](*BIG).requires_grad_()
    g, size = LAYOUTS[g_layout](*BIG), torch.Size(BIG).numel() * 4
    planes = 3 * layout_of(leaf_x).words * 4
    x = leaf_x.view_as(leaf_x)  # not a leaf: its gradient is accumulated by autograd, in place
    with dk.use_backend("cpu", strict=True):
        dk.shrink(x, gate, average=average, residual=residual)
        results = []
        copies, allocations = traffic(lambda: results.append(dk.shrink(x, gate, average=average, residual=residual)))
        assert copies == []
        assert [a for a in allocations if a > size // 8] == [size] and sum(
            allocations
        ) < size + planes + 40 * 16 * 4 * 3
        wanted = [leaf_x, residual, *gate.parameters()]
        copies, allocations = traffic(lambda: results.append(torch.autograd.grad(results[0], wanted, g)))
        assert copies == []
        assert [a for a in allocations if a > size // 8] == [size]


@native
@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", ["abs_mean", "soft_threshold"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "sliced", "expanded space"])
def test_one_allocation_each_way_single_ops(op, x_layout):
    x, g, size = LAYOUTS[x_layout](*BIG).requires_grad_(), LAYOUTS["sliced"](*BIG), torch.Size(BIG).numel() * 4
    tau = torch.rand(BIG[:2])
    results = []
    with dk.use_backend("cpu", strict=True):
        run = (lambda: dk.abs_mean(x)) if op == "abs_mean" else (lambda: dk.soft_threshold(x, tau))
        copies, allocations = traffic(lambda: results.append(run()))
        assert copies == [] and [a for a in allocations if a > size // 8] == ([] if op == "abs_mean" else [size])
        g = torch.rand(BIG[:2]) if op == "abs_mean" else g
        copies, allocations = traffic(lambda: results.append(torch.autograd.grad(results[0], x, g)))
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
            used = t.untyped_storage().nbytes()
            room = plain(used + 64, dtype=torch.uint8).fill_(0xA5)
            guards.append(room[used:])
            return plain(0, dtype=t.dtype).set_(room.untyped_storage(), 0, t.shape, t.stride())

        return make

    plain = torch.empty
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, guard(getattr(torch, name)))
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


# ---- planes ----------------------------------------------------------------------------------------------------------


def every_plane(backend, x, tau) -> dict[str, torch.Tensor]:
    """By who writes it, and what it is."""
    layout = layout_of(x)
    of_average, of_threshold = backend.reduce(x, layout, keep=True)[1], backend.map(x, layout, tau, keep=3)[1]
    used = layout.rows * layout.row_bits // 8  # the last word may end in bytes of no row
    found = {f"reduce {name}": of_average.plane(name) for name in ("sign", "nonzero")}
    found |= {f"map {name}": of_threshold.plane(name) for name in ("kept", "sign", "nonzero")}
    return {name: plane.view(torch.uint8)[:used] for name, plane in found.items()}


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 1, 9), (5, 9, 2, 2), (2, 40, 5, 20), (1, 70, 37, 1)], ids=str)
def test_planes_are_the_same_bits_in_every_backend(kernels, shape, layout, dtype):
    x = LAYOUTS[layout](*shape).to(dtype)
    if "expanded" not in layout and layout != "scalar":
        x[x.abs() < 0.2] = 0.0
        x[x > 2] = -0.0
    tau = torch.rand(shape[:2], dtype=wide(dtype))
    kept = ~(x.to(wide(dtype)).abs() <= tau[..., None, None]) & (x != 0)
    masks = {"sign": torch.signbit(x), "nonzero": x != 0, "kept": kept}
    for name, plane in every_plane(BACKENDS[kernels.backend], x, tau).items():
        right = pack(masks[name.split()[1]], layout_of(x)).view(torch.uint8)[: plane.numel()]
        assert torch.equal(plane, right), name


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

THREADED = {
    "many rows": lambda: features((64, 33, 129)),
    "long rows": lambda: features((1, 2, 100_003)),
    "one row": lambda: features((1, 1, 300_001)),
    "channels_last": lambda: features((4, 900, 65)).transpose(1, 2),
    "wide channels_last": lambda: features((3, 5, 40_001)).transpose(1, 2),
    "strided": lambda: features((16, 33, 1026))[..., ::2],
}


@pytest.mark.parametrize("case", THREADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(kernels, case, dtype):
    if kernels.backend != "cpu":
        pytest.skip("no threads of ours")
    x = THREADED[case]().to(dtype).requires_grad_()
    tau, g = torch.rand(x.shape[:2], requires_grad=True), torch.randn_like(x)
    ga = torch.randn(x.shape[:2])

    def results():
        y, pooled = kernels.soft_threshold(x, tau), kernels.abs_mean(x)
        return y, pooled, *torch.autograd.grad((y, pooled), (x, tau), (g, ga))

    torch.set_num_threads(1)
    expected = results()
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for a, b in zip(results(), expected, strict=True):
            assert torch.equal(a, b)


COUNT_THREADS = """
import os, sys, torch
torch.set_num_threads(int(sys.argv[1]))
import drsn_kernels as dk
x = torch.randn(64, 64, 512, requires_grad=True)
before = len(os.listdir("/proc/self/task"))
with dk.use_backend("cpu", strict=True):
    y = dk.soft_threshold(x, torch.zeros(64, 64))
    print(len(os.listdir("/proc/self/task")) - before)
"""


@native
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_the_kernels_use_as_many_threads_as_torch_may():
    def started(threads: int) -> int:
        command = [sys.executable, "-P", "-c", COUNT_THREADS, str(threads)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert started(1) == 0
    if cpu._cpu.has_parallel_for():
        assert started(3) == 2
