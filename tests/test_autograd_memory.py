"""What a forward pass keeps (three bits an element), and when it is freed."""

import gc
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from oracle import AVERAGES, smooth_gate
from processes import python
from torch import nn

import drsn_kernels as dk
from drsn_kernels.layout import row_bits

pytestmark = pytest.mark.usefixtures("planes")  # what is different where x is kept: at the end of the file


class Saved:
    """Context: every tensor that autograd saves inside, and their bytes, each storage once, parameters left out."""

    class Box:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor

    def __init__(self, module: nn.Module | None = None):
        owned = [] if module is None else [*module.parameters(), *module.buffers()]
        self.owned = {t.untyped_storage().data_ptr() for t in owned}

    def __enter__(self) -> "Saved":
        self.storages: dict[int, int] = {}
        self.boxes: list[weakref.ref] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._hooks.__exit__(*exc)

    def _pack(self, tensor: torch.Tensor) -> "Saved.Box":
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.owned:
            self.storages[storage.data_ptr()] = storage.nbytes()
        box = Saved.Box(tensor.detach())  # a tensor with its grad_fn would make a cycle of its own
        self.boxes.append(weakref.ref(box))
        return box

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    @property
    def alive(self) -> int:
        return sum(box() is not None for box in self.boxes)


def plane_bytes(n: int, c: int, length: int, channels_last: bool = False) -> int:
    rows, row = (n * length, c) if channels_last else (n * c, length)
    return (rows * row_bits(row) + 31) // 32 * 4


SHAPES = [(4, 8, 999), (4, 8, 1024), (16, 16, 49), (2, 4, 56, 56), (64, 32, 7), (2, 64, 3001), (3, 70, 30, 34)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_saved_bytes_of_shrink(kernels, shape, average, channels_last, dtype):
    if kernels.interpreted and (average is None or dtype is torch.float64):
        pytest.skip("long in the interpreter, and nothing else is kept")
    if channels_last and len(shape) == 3:
        x = torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2).to(dtype).requires_grad_()
    else:
        x = torch.randn(shape).to(dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format)
        x.requires_grad_()
    n, c, length = x.shape[0], x.shape[1], x[0, 0].numel()
    unit = 8 if dtype is torch.float64 else 4
    with Saved() as saved:
        y = kernels.shrink(x, nn.Sigmoid(), average=average, residual=torch.zeros_like(x))
    assert saved.bytes <= 3 * plane_bytes(n, c, length, channels_last) + 8 * n * c * unit
    if length >= 999 and unit == 4 and not channels_last:
        assert saved.bytes < 0.42 * x.numel()
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.any() and saved.alive == 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("shape", [(16, 8, 999), (16, 8, 5000), (8, 16, 34, 31)], ids=str)
def test_saved_bytes_of_the_module(kernels, shape, average, training):
    module = dk.Shrinkage(shape[1], average=average).train(training)
    x = torch.randn(shape, requires_grad=True)
    n, c, length = shape[0], shape[1], x[0, 0].numel()
    with Saved(module) as saved:
        y = module(x)
    assert saved.bytes <= 3 * plane_bytes(n, c, length) + 8 * n * c * 4
    y.backward(torch.randn_like(y))


@pytest.mark.parametrize("wants", ["x", "tau", "both"])
def test_saved_bytes_of_soft_threshold(kernels, wants):
    x, tau = torch.randn(4, 8, 999), torch.rand(4, 8)
    x.requires_grad_(wants != "tau"), tau.requires_grad_(wants != "x")
    with Saved() as saved:
        y = kernels.soft_threshold(x, tau)
    assert 0 < saved.bytes <= 2 * plane_bytes(4, 8, 999) + 4 * 8 * 4
    y.backward(torch.randn_like(y))
    assert saved.alive == 0


def test_saved_bytes_of_abs_mean(kernels):
    x = torch.randn(4, 8, 999, requires_grad=True)
    with Saved() as saved:
        pooled = kernels.abs_mean(x)
    assert saved.bytes <= 2 * plane_bytes(4, 8, 999)
    assert torch.equal(torch.autograd.grad(pooled, x, torch.ones(4, 8))[0], (x.detach().sign() / 999))


def test_nothing_is_saved_without_a_gradient(kernels):
    x, frozen = torch.randn(4, 8, 99), smooth_gate(8).requires_grad_(False)
    with Saved() as saved:
        assert not kernels.shrink(x, frozen).requires_grad
        with torch.no_grad():
            kernels.shrink(x.clone().requires_grad_(), smooth_gate(8))
        assert kernels.shrink(x, frozen, residual=torch.randn_like(x).requires_grad_()).requires_grad
    assert saved.bytes == 0


RESIDENT = """
import sys, torch
import drsn_kernels as dk
page = 4096
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * page
shape, count = (8, 32, 1 << 13), 24                       # 8 MiB each in float32
x = torch.randn(shape, requires_grad=True)
with dk.use_backend(sys.argv[1], strict=True, save="memory"):
    graphs = [dk.shrink(x, torch.sigmoid)[:1, :1, :1].sum()]  # warm; the sum keeps the graph, not y
    before = resident()
    graphs += [dk.shrink(x, torch.sigmoid)[:1, :1, :1].sum() for _ in range(count)]
print((resident() - before) / count / x.numel())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_resident_memory_of_kept_graphs(name):
    """Nothing large hides where saved_tensors_hooks do not look: on ctx, in closures, in the extension."""
    if name == "cpu" and dk.backends.cpu._cpu is None:
        pytest.skip("no compiled CPU kernels")
    # every large block mapped on its own: otherwise small blocks that live on keep the holes between them resident
    run = python(RESIDENT, name, MALLOC_MMAP_THRESHOLD_="65536")
    assert float(run.stdout) < 0.5  # bytes an element: 0.375 for the planes, and what the allocator rounds up


# ---- when it is freed ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "how", ["dropped", "backward", "gradients of the gate only", "retained, then dropped", "double"]
)
@pytest.mark.parametrize("average", AVERAGES)
def test_the_graph_is_freed_without_the_garbage_collector(kernels, average, how):
    gate, x = smooth_gate(8), torch.randn(4, 8, 99, requires_grad=True)
    g = torch.randn_like(x)
    gc.collect()
    gc.disable()
    try:
        with Saved() as saved:
            y, tau = kernels.shrink(x * 1, gate, average=average, return_tau=True)
            assert saved.alive > 0
            if how == "backward":
                y.backward(g)
            elif how == "gradients of the gate only":
                torch.autograd.grad(y, list(gate.parameters()), g)
            elif how == "retained, then dropped":
                y.backward(g, retain_graph=True)
            elif how == "double":
                (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
                dx.square().sum().backward()
                del dx
        del y, tau
        assert saved.alive == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("average", AVERAGES)
def test_backward_frees_the_planes_while_the_output_lives(kernels, average):
    x = torch.randn(4, 8, 99, requires_grad=True)
    with Saved() as saved:
        y = kernels.shrink(x, smooth_gate(8), average=average)
    y.backward(torch.randn_like(y))
    assert saved.alive == 0 and y.grad_fn is not None


def planes_alive(node) -> bool:
    """Whether anything but the saved tensors of the graph still holds the planes."""
    return node.planes is not None


@pytest.mark.parametrize("average", AVERAGES)
def test_a_loss_on_the_average_alone(kernels, average):
    """Its gradient needs planes that only the rest of the step can write: before that runs, after, and without it."""
    gate, x, seen, early = smooth_gate(8), torch.randn(4, 8, 99, requires_grad=True), [], []

    def watched(pooled):
        seen.append(pooled)
        early.append(torch.autograd.grad(pooled.sum(), x, retain_graph=True)[0])
        return gate(pooled)

    y = kernels.shrink(x, watched, average=average)
    right = x.detach().sign() / 99
    torch.testing.assert_close(early[0], right)
    torch.testing.assert_close(torch.autograd.grad(seen[0].sum(), x, retain_graph=True)[0], right)
    del y
    torch.testing.assert_close(torch.autograd.grad(seen[0].sum(), x)[0], right)


def test_planes_kept_for_the_average_go_with_the_graph(kernels):
    """Outside of saved tensors they are held for a loss on A alone: not longer, and not where hooks move tensors."""
    x, gate, pools = torch.randn(4, 8, 99, requires_grad=True), smooth_gate(8), []

    def run():
        return kernels.shrink(x, lambda pooled: (pools.append(pooled.grad_fn), gate(pooled))[1])

    y = run()
    assert pools[0].source is None and planes_alive(pools[0])
    y.sum().backward(retain_graph=True)
    assert planes_alive(pools[0])
    y.sum().backward()
    assert not planes_alive(pools[0])
    y = run()
    torch.autograd.grad(y.sum(), list(gate.parameters()))
    assert not planes_alive(pools[1])
    with torch.autograd.graph.save_on_cpu():
        y = run()
    assert not planes_alive(pools[2])
    y.sum().backward()


def test_a_loss_on_the_average_alone_says_what_it_lacks(kernels):
    """What was freed, overwritten, or is held by hooks only is an error, and never a wrong gradient."""
    gate, leaf, seen = smooth_gate(8), torch.randn(4, 8, 99, requires_grad=True), []

    def watched(pooled):
        seen.append(pooled)
        return gate(pooled)

    y = kernels.shrink(leaf, watched)
    y.sum().backward()
    del y
    with pytest.raises(RuntimeError, match="second time"):
        seen.pop().sum().backward()
    with torch.autograd.graph.save_on_cpu():
        y = kernels.shrink(leaf, watched)
    right = leaf.detach().sign() / 99
    torch.testing.assert_close(torch.autograd.grad(seen[0].sum(), leaf, retain_graph=True)[0], right)
    del y
    with pytest.raises(RuntimeError, match="where saved tensors are hooked; keep y"):
        seen.pop().sum().backward()

    def failing(pooled):
        seen.append(pooled)
        raise ZeroDivisionError

    x = leaf * 1
    with pytest.raises(ZeroDivisionError):
        kernels.shrink(x, failing)
    with torch.no_grad():
        x.neg_()
    with pytest.raises(RuntimeError, match="was modified by an inplace"):
        seen.pop().sum().backward()


def test_a_loss_on_the_average_behind_a_gate_of_subclasses_in_place(kernels):
    class Mine(torch.Tensor):
        pass

    leaf, seen = torch.randn(4, 8, 99, requires_grad=True), []
    x = leaf * 1
    dk.shrink(x, lambda pooled: (seen.append(pooled), torch.sigmoid(pooled).as_subclass(Mine))[1], inplace=True)
    torch.testing.assert_close(torch.autograd.grad(seen[0].sum(), leaf)[0], leaf.detach().sign() / 99)


# ---- the torch backend where it keeps x instead of planes ------------------------------------------------------------


@pytest.fixture
def keeping_x(planes):
    with dk.use_backend("torch", strict=True):
        yield


@pytest.mark.parametrize("average", AVERAGES)
def test_keeping_x_keeps_nothing_else(keeping_x, average):
    x, gate = torch.randn(4, 8, 99, requires_grad=True), smooth_gate(8)
    small = 2 * 4 * 8 * 4
    with Saved(gate) as saved:
        y = dk.shrink(x, torch.sigmoid, average=average)
    assert x.nbytes < saved.bytes <= x.nbytes + 2 * small
    y.backward(torch.randn_like(y))
    assert saved.alive == 0
    for op, more in ((lambda: dk.soft_threshold(x, torch.rand(4, 8)), small), (lambda: dk.abs_mean(x), 0)):
        with Saved() as saved:
            y = op()
        assert x.nbytes <= saved.bytes <= x.nbytes + more
        y.sum().backward()
        assert saved.alive == 0


def test_keeping_x_lets_go_of_it(keeping_x):
    gate, gone = smooth_gate(8), []

    def run(*wanted):
        x = torch.randn(4, 8, 99, requires_grad=True) * 1
        gone.append(weakref.ref(x))
        y = dk.shrink(x, gate)
        del x
        if wanted:
            torch.autograd.grad(y.sum(), wanted)
        return y

    gc.collect()
    gc.disable()
    try:
        y = [run(*gate.parameters())]
        assert gone[-1]() is None
        run()
        assert gone[-1]() is None and y
    finally:
        gc.enable()


def test_keeping_x_notices_that_it_was_changed(keeping_x):
    leaf, seen = torch.randn(4, 8, 99, requires_grad=True), []
    for op in (
        lambda x: dk.shrink(x, lambda pooled: (seen.append(pooled), torch.sigmoid(pooled))[1]), dk.abs_mean,
        lambda x: dk.soft_threshold(x, 0.5),
    ):  # fmt: skip
        x = leaf * 1
        y = op(x)
        x.detach().neg_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        seen.pop().sum().backward()


@pytest.mark.parametrize("average", AVERAGES)
def test_in_place_the_torch_backend_keeps_planes(keeping_x, average):
    leaf, gate = torch.randn(4, 8, 99, requires_grad=True), smooth_gate(8)
    with Saved(gate) as saved:
        y = dk.shrink(leaf * 1, torch.sigmoid, average=average, inplace=True)
    assert saved.bytes < 0.6 * leaf.nbytes
    expected = torch.autograd.grad(dk.shrink(leaf, torch.sigmoid, average=average).square().sum(), leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaf)[0], expected)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("options", [{}, {"slope": 0.2}, {"threshold": "hard", "slope": 0.2}], ids=str)
def test_x_and_planes_give_the_same_gradients(keeping_x, average, options):
    """Of first and second order, for a loss on A alone too, and where saved tensors are hooked."""
    gate, x = smooth_gate(8).double(), torch.randn(4, 8, 9, 11).double()
    x[0, 0, 0, 0] = 0
    found = []
    for save in ("time", "memory"):
        for hooked in (False, True):
            leaf, seen = x.clone().requires_grad_(), []
            with dk.use_backend("torch", save=save), torch.autograd.graph.save_on_cpu() if hooked else nullcontext():
                y = dk.shrink(leaf, lambda a: (seen.append(a), gate(a))[1], average=average, **options)  # noqa: B023
                alone = torch.autograd.grad(seen[0].square().sum(), leaf, create_graph=True)[0]
                dx = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)[0]
                found.append([y, alone, dx, *torch.autograd.grad((dx + alone).square().sum(), [leaf])])
    for others in zip(*found, strict=True):
        for one in others[1:]:
            torch.testing.assert_close(one, others[0])
