"""Large CPU outputs take memory that is kept when they are freed (csrc/cpu/arena.h): nobody may see a difference."""

import copy
import gc
import io
import pickle
import random

import pytest
import torch
from oracle import seeded
from processes import in_threads, python

import drsn_kernels as dk
from drsn_kernels.backends import cpu, cpu_memory

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")
SHAPE = (8, 64, 1024)  # 2 MiB


@pytest.fixture
def x():
    gc.collect()
    with dk.use_backend("cpu", strict=True):
        yield torch.randn(SHAPE)


def _expected(x):
    return x.sign() * (x.abs() - 0.5).relu()


def test_a_freed_output_is_used_again(x):
    y = dk.soft_threshold(x, 0.5)
    at, before = y.data_ptr(), cpu._cpu.cached_bytes()
    del y
    assert cpu._cpu.cached_bytes() == before + (2 << 20)
    assert dk.soft_threshold(x, 0.5).data_ptr() == at


@pytest.mark.parametrize(
    "hold",
    [
        lambda y: y[3:4, :, ::2],
        lambda y: y.untyped_storage(),
        lambda y: y.numpy(),
        lambda y: y.detach(),
        lambda y: memoryview(y.numpy()),
        lambda y: torch.utils.dlpack.to_dlpack(y),
    ],
    ids=["view", "storage", "numpy", "detached", "memoryview", "dlpack"],
)
def test_memory_that_anyone_holds_is_not_given_away(x, hold):
    y = dk.soft_threshold(x, 0.5)
    at = y.data_ptr()
    held = hold(y)
    del y
    assert dk.soft_threshold(-x, 0.25).data_ptr() != at
    del held
    gc.collect()
    assert dk.soft_threshold(x, 0.5).data_ptr() == at


def test_what_a_graph_keeps_is_not_overwritten(x):
    leaf = x.clone().requires_grad_()
    y = dk.soft_threshold(leaf, 0.5)
    loss = y.square().sum()  # keeps y
    del y
    for _ in range(3):
        dk.soft_threshold(torch.randn(SHAPE), 0.1)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * _expected(x) * (x.abs() > 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outputs_look_like_torchs_own(dtype, layout):
    x = torch.randn(8, 64, 32, 64).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    y, own = dk.soft_threshold(x, 0.5), torch.empty_like(x)
    assert y.dtype == own.dtype and y.stride() == own.stride() and y.device == own.device
    assert y.untyped_storage().nbytes() == own.untyped_storage().nbytes() and y._version == own._version
    assert not y._is_view() and y.is_leaf and y.data_ptr() % 64 == 0
    saved = io.BytesIO()
    torch.save(y, saved)
    assert len(saved.getvalue()) < y.nbytes + 4096
    for same in (pickle.loads(pickle.dumps(y)), copy.deepcopy(y), torch.load(io.BytesIO(saved.getvalue()))):
        assert torch.equal(same, y) and same.stride() == y.stride()
    y.add_(1).requires_grad_()
    with torch.inference_mode():
        assert dk.soft_threshold(x, 0.5).is_inference()


def test_sent_to_another_process_it_stays_what_it_was():
    code = """
import torch, torch.multiprocessing as mp, drsn_kernels as dk
torch.set_num_threads(1)

def read(pipe):
    assert pipe.recv() == "go"
    pipe.send(float(pipe.recv().double().sum()))

context = mp.get_context("fork")
here, there = context.Pipe()
worker = context.Process(target=read, args=(there,))
worker.start()
y = dk.soft_threshold(torch.randn(8, 64, 1024), 0.5)
total = float(y.double().sum())
here.send("go")
here.send(y)  # moves it to shared memory
del y
for _ in range(3):
    dk.soft_threshold(torch.randn(8, 64, 1024), 0.1)
assert here.poll(600) and here.recv() == total
worker.join()
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_freed_from_many_threads(x):
    def run(seed):
        mine = torch.randn(SHAPE, generator=seeded(seed))
        expected = _expected(mine)
        return all(torch.equal(dk.soft_threshold(mine, 0.5), expected) for _ in range(10))

    assert all(in_threads(run))


def test_blocks_of_several_threads_under_limits_that_change():
    held = []

    def run(seed):
        order = random.Random(seed)
        for _ in range(40):
            shape = order.randint(1, 3), 1 << 19
            held.append(torch.from_dlpack(cpu._cpu.empty(0, shape, (1 << 19, 1))).fill_(seed))
            if len(held) > 6:
                other = held.pop(0)
                assert (other == other[0, 0]).all()
            if order.random() < 0.2:
                cpu._cpu.set_cache_limit(order.randint(0, 5) << 20)
            cpu._cpu.empty(0, (1 << 19,), (1,))  # a capsule that nobody takes

    try:
        in_threads(run)
        held.clear()
        cpu._cpu.set_cache_limit(0)
        assert cpu._cpu.cached_bytes() == 0
    finally:
        cpu._cpu.set_cache_limit(cpu_memory.CACHE_BYTES)


def test_a_forked_child_computes():
    code = """
import os, sys, torch, drsn_kernels as dk
torch.set_num_threads(1)
x = torch.randn(8, 64, 1024)
y = dk.soft_threshold(x, 0.5)
del y
child = os.fork()
if child == 0:
    z = dk.soft_threshold(x, 0.5)
    os._exit(0 if torch.equal(z, x.sign() * (x.abs() - 0.5).relu()) else 1)
sys.exit(os.waitpid(child, 0)[1] != 0)
"""
    assert python(code).returncode == 0


def test_the_storage_of_a_large_output_cannot_be_resized(x):
    """The one difference, said in docs/use.md: DLPack gives no way to."""
    y = dk.soft_threshold(x, 0.5)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.untyped_storage().resize_(0)
    assert torch.equal(y, _expected(x))
    dk.soft_threshold(x[:1, :1], 0.5).untyped_storage().resize_(0)  # small: torch's own


def test_no_more_is_kept_than_the_limit(x):
    try:
        cpu._cpu.set_cache_limit(5 << 20)
        outputs = [dk.soft_threshold(x, 0.5) for _ in range(6)]
        outputs.clear()
        assert cpu._cpu.cached_bytes() == 4 << 20
    finally:
        cpu._cpu.set_cache_limit(cpu_memory.CACHE_BYTES)


def test_gradients_of_a_large_gate_are_gradients_like_others():
    """256 KiB each, in kept memory: saved, shared, clipped, stepped over, and used again once they are freed."""
    module, x = dk.Shrinkage(256), torch.randn(16, 256, 8)
    weight = module.fc[0].weight
    with dk.use_backend("cpu", strict=True):
        module(x).square().sum().backward()
        at, gradient = weight.grad.data_ptr(), weight.grad.clone()
        file = io.BytesIO()
        torch.save(weight.grad, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), gradient)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        torch.optim.AdamW(module.parameters(), foreach=True).step()
        torch.testing.assert_close(weight.grad / weight.grad.norm(), gradient / gradient.norm())
        before = cpu._cpu.cached_bytes()
        module.zero_grad()
        assert cpu._cpu.cached_bytes() >= before + 2 * (256 << 10)
        module(x).square().sum().backward()
        assert at in {p.grad.data_ptr() for p in module.parameters()}
        weight.grad.share_memory_()
        assert weight.grad.is_shared()
