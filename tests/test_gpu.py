"""Triton kernels on a CUDA device: results, gradients, streams, graphs. The first two also without one, interpreted."""

import copy

import pytest
import torch
from oracle import AVERAGES, DTYPES, cast_gate, check, gate_of, shrink, smooth_gate, varied, wide, without_ties
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import drsn_kernels as dk
from drsn_kernels.backends import gpu

ON_GPU = [
    (16, 64, 1024), (64, 256, 64), (512, 64, 256), (1024, 32, 512), (4096, 16, 128), (128, 4, 512), (16, 16, 9600),
    (128, 64, 512), (33, 7, 49), (8, 130, 196), (3, 1, 5), (8, 64, 56, 56), (16, 512, 7, 7), (2, 3, 100_003),
]  # fmt: skip


def _where() -> list:
    return [
        pytest.param("cpu", (3, 6, 7), id="cpu-(3, 6, 7)", marks=pytest.mark.sampled(4)),  # interpreted
        *(pytest.param("cuda", shape, id=f"cuda-{shape}", marks=pytest.mark.gpu) for shape in ON_GPU),
    ]


@pytest.fixture(autouse=True)
def on_triton(request):
    """On CPU tensors Triton is interpreted."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    missing = gpu.missing()
    if missing is None and not on_gpu and not gpu.interpreting():
        missing = "this process has Triton for the GPU"
    if missing is not None:
        pytest.skip(missing)
    with dk.use_backend("triton", strict=True):
        yield


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["any gate", "plain", "norm", "batch norm"])
@pytest.mark.parametrize("device, shape", _where())
def test_shrink(device, shape, kind, dtype, layout):
    """y, tau, dx, dresidual and the gate's gradients (as inputs of the step) against the oracle in float64."""
    x, residual, g = (varied(shape, dtype) for _ in range(3))
    if layout == "channels_last":
        x, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual))
    if layout == "sliced":
        x, g = (torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (x, g))
    gate = smooth_gate(shape[1]) if kind == "any gate" else gate_of(shape[1], kind)
    gate = gate.to(wide(dtype))
    with torch.no_grad():
        clear = without_ties(g, x, shrink(x.double(), cast_gate(copy.deepcopy(gate), torch.float64), "channel")[1])

    def step(*t):
        own = copy.deepcopy(gate).to(device)
        y, tau = dk.shrink(t[0].to(device), own, residual=t[1].to(device), return_tau=True)
        return y.cpu(), tau.cpu()

    check(
        step,
        lambda d, x, r: shrink(x, cast_gate(copy.deepcopy(gate), d), "channel", r),
        {"x": x.requires_grad_(), "residual": residual.requires_grad_()},
        [clear, torch.randn(shape[:2], dtype=wide(dtype))],
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["any gate", "plain", "norm", "batch norm"])
@pytest.mark.parametrize("device, shape", _where()[:1] + [pytest.param("cuda", (5, 6, 20), marks=pytest.mark.gpu)])
def test_gradients_of_every_order(device, shape, kind, average):
    if device == "cpu" and kind != "any gate":
        pytest.skip("test_triton.py has the standard gate's, interpreted")
    gate = smooth_gate(shape[1], 1 if average == "sample" else None) if kind == "any gate" else None
    gate = (gate or gate_of(shape[1], kind, average)).double().to(device)
    x = torch.randn(shape[0], shape[1], 5, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (x, *gate.parameters())
    step = lambda x, *parameters: dk.shrink(x, gate, average=average, return_tau=True)  # noqa: E731
    assert (type(step(*inputs)[0].grad_fn).__name__ == "GatedShrinkBackward") == (kind != "any gate")
    assert gradcheck(step, inputs, fast_mode=True)
    assert gradgradcheck(step, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["any gate", "norm", "batch norm"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 40, 33), (2, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("device", [pytest.param(p.values[0], id=p.values[0], marks=p.marks) for p in _where()[:2]])
def test_a_small_step(device, shape, kind, dtype):
    """Every kernel on ragged rows, few programs: what benchmarks/gpu_suite.py runs under compute-sanitizer."""
    x, gate = varied(shape, dtype, device), smooth_gate(shape[1]) if kind == "any gate" else gate_of(shape[1], kind)
    gate = gate.to(device)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for name in ("triton", "torch"):
        own, leaf = copy.deepcopy(gate), x.clone().requires_grad_()
        with dk.use_backend(name, strict=True):
            y, tau = dk.shrink(leaf, own, residual=leaf, return_tau=True)
            (y.float().square().sum() + tau.sum() + dk.abs_mean(leaf).sum()).backward()
        assert torch.isfinite(leaf.grad).all()
        results.append([y, tau, *own.buffers()])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2 if ours.dtype is torch.bfloat16 else 1e-4, atol=1e-5)


def network(kind: str) -> nn.Module:
    model = nn.Sequential(
        nn.Conv1d(1, 16, 3, padding=1), dk.Shrinkage(16, norm=kind != "plain"), nn.Conv1d(16, 4, 3), dk.Shrinkage(4),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return model.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_a_training_step_in_a_cuda_graph(kind):
    """Captured forward, backward and update: the same weights and running statistics as without a graph."""
    model = network(kind)
    plain = copy.deepcopy(model)
    x = torch.randn(8, 1, 256, device="cuda")
    batches = [torch.randn_like(x) for _ in range(4)]

    def step(model, x):
        model(x).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
                p.grad.zero_()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, x)
            step(plain, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, x)
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        step(plain, batch)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_inference_in_a_cuda_graph(kind):
    model = network(kind).eval()
    x = torch.randn(8, 1, 256, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = model(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(y, model(x))


@pytest.mark.gpu
def test_graphed_callables():
    """torch.cuda.make_graphed_callables captures forward and backward as two graphs."""
    plain, x = network("plain"), torch.randn(8, 1, 256, device="cuda")
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(plain), (x,))
    for _ in range(3):
        x = torch.randn_like(x)
        results = []
        for model in (graphed, plain):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            results.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("forced", [False, True])
def test_reduced_overhead(forced):
    """torch.compile's own CUDA graphs, around the reference and around the opaque ops."""
    plain = network("norm")
    model = copy.deepcopy(plain)
    with dk.use_backend("triton" if forced else "auto"):
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            x = torch.randn(8, 1, 256, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            results = []
            for run, own in ((compiled, model), (plain, plain)):
                y = run(x)
                gradients = torch.autograd.grad(y.square().sum(), list(own.parameters()))
                results.append([t.clone() for t in (y.detach(), *gradients)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    model, x = network("norm"), torch.randn(8, 1, 256, device="cuda", requires_grad=True)
    model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_current_stream_is_used():
    x = torch.randn(64, 64, 4096, device="cuda")
    gate, stream = gate_of(64, "norm").cuda(), torch.cuda.Stream()
    expected = dk.shrink(x, gate)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x * 2
        y = dk.shrink(late, gate)
    stream.synchronize()
    torch.testing.assert_close(y, dk.shrink(x * 2, gate))
    torch.testing.assert_close(dk.shrink(x, gate), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one():
    x, gate = torch.randn(8, 16, 100, device="cuda:1", requires_grad=True), gate_of(16, "norm").to("cuda:1")
    y = dk.shrink(x, gate)
    y.sum().backward()
    assert torch.cuda.current_device() == 0 and y.device == x.device == x.grad.device
    with dk.use_backend("torch"):
        torch.testing.assert_close(y, dk.shrink(x, gate))


@pytest.mark.gpu
def test_runs_give_the_same_bits():
    x, g = (torch.randn(16, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last) for _ in range(2))
    gate = gate_of(64, "batch norm").cuda()
    results = []
    for _ in range(3):
        leaf, own = x.clone().requires_grad_(), copy.deepcopy(gate)
        y = dk.shrink(leaf, own)
        results.append([y, *torch.autograd.grad(y, [leaf, *own.parameters()], g)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def kernels_of(run) -> list[str]:
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        run()
        torch.cuda.synchronize()
    return [e.name for e in watched.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, forward, backward",
    [("norm", 1, 2), ("batch norm", 4, 4), ("any gate", 2, 2)],
)
def test_launches(kind, forward, backward):
    """What the profiler sees, the gate's own kernels apart (`any gate` is one sigmoid and its derivative)."""
    shape = (128, 16, 512)
    gate = nn.Sigmoid() if kind == "any gate" else gate_of(shape[1], kind).cuda()
    x, g = torch.randn(shape, device="cuda", requires_grad=True), torch.randn(shape, device="cuda")
    ours = lambda names: [n for n in names if "_kernel" in n and "at::" not in n]  # noqa: E731
    assert len(ours(kernels_of(lambda: dk.shrink(x, gate)))) == forward
    both = kernels_of(lambda: torch.autograd.grad(dk.shrink(x, gate), [x, *gate.parameters()], g))
    assert len(ours(both)) == forward + backward


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 64, 16), (128, 512, 8), (64, 128, 8), (4096, 16, 8)], ids=str)
def test_a_gate_is_as_exact_as_torch(shape):
    """tau and the gradients of the gate's parameters: at most 4 times the error of torch in float32 without TF32.

    Its products on tensor cores are of parts of float32 numbers; with TF32 alone errors would be 1000 times as large.
    """
    n, c = shape[:2]
    x, gate = varied(shape, torch.float32).cuda(), gate_of(c, "batch norm").cuda()
    d = torch.randn(n, c, device="cuda")

    def step(dtype, backend):
        own, given = copy.deepcopy(gate).to(dtype), x.detach().to(dtype, copy=True).requires_grad_()
        with dk.use_backend(backend):
            _, tau = dk.shrink(given, own, return_tau=True)
        return [tau, *torch.autograd.grad(tau, [given, *own.parameters()], d.to(dtype))]

    exact = step(torch.float64, "torch")
    for ours, plain, t in zip(step(torch.float32, "triton"), step(torch.float32, "torch"), exact, strict=True):
        error = lambda found: float((found.double() - t).norm() / t.norm())  # noqa: B023, E731
        if t.norm() > 1e-6 * d.norm():  # the gradient of the first bias is 0 behind batch statistics
            assert error(ours) <= 4 * error(plain) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_compiled_with_the_standard_gate(training):
    model = network("norm").train(training)
    x = torch.randn(8, 1, 256, device="cuda")
    with dk.use_backend("auto"):
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    x = torch.ones(2, 1, 2**30 + 64, dtype=torch.bfloat16, device="cuda")
    x[1, 0, -1] = 3
    y = dk.soft_threshold(x, 0.5)
    assert y[1, 0, -1] == 2.5 and y[1, 0, -2] == 0.5
    assert torch.allclose(dk.abs_mean(x), torch.ones(2, 1, device="cuda"), rtol=1e-5)
