"""torch.compile, export, torch.func, forward AD, autocast, checkpointing, fake tensors, tracing, subclasses, copies."""

import copy

import other_device
import pytest
import torch
from oracle import AVERAGES, LAYOUTS, batch_norm_act, features, shrink, smooth_gate, soft_threshold
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import drsn_kernels as dk

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def aten_only(graph: torch.fx.Graph) -> bool:
    called = [n.target for n in graph.nodes if n.op == "call_function"]
    return {target.namespace for target in called if hasattr(target, "namespace")} == {"aten"}


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def gradients(run, x, residual, gate):
    y, tau = run(x, residual)
    torch.manual_seed(7)
    leaves = [x, residual, *gate.parameters()]
    return y, tau, *torch.autograd.grad([y, tau], leaves, [torch.randn_like(y), torch.randn_like(tau)])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_compiled_forward_and_backward(backend, average):
    gate = smooth_gate(6, norm=True).double()
    run = lambda x, r: dk.shrink(x, gate, average=average, residual=r, return_tau=True)  # noqa: E731
    with dk.use_backend(backend):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for shape in [(3, 6, 4, 10), (5, 6, 3, 11), (2, 6, 7, 10)]:  # the second compilation is for dynamic shapes
            x, residual = double(*shape).requires_grad_(), double(*shape).requires_grad_()
            expected = gradients(run, x, residual, gate)
            for a, b in zip(gradients(compiled, x, residual, gate), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_inductor_with_dynamic_shapes(backend):
    module = dk.Shrinkage(6).double()
    with dk.use_backend(backend):
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        for shape in [(4, 6, 40), (3, 6, 70)]:
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            g = torch.randn_like(x)
            results = []
            for run in (module, compiled):
                y = run(x)
                results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], g)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_no_graph_break():
    x = torch.randn(4, 6, 40, requires_grad=True)
    for run in (dk.Shrinkage(6), dk.SqueezeExcite(6), lambda x: dk.soft_threshold(dk.abs_mean(x)[..., None] + x, 0.1)):
        found = torch._dynamo.explain(run)(x)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize(
    "backend, expected",
    [
        ("auto", set()),
        ("torch", set()),
        pytest.param("cpu", {"abs_mean", "soft_threshold"}, marks=pytest.mark.skipif(
            not hasattr(torch.compiler, "is_exporting"), reason="before torch 2.7 a traced call is always the reference"
        )),
    ],  # fmt: skip
)
def test_what_the_compiled_graph_holds(backend, expected):
    held = set()

    def record(graph, inputs):
        held.update(n.target.__name__ for n in graph.graph.nodes if "drsn_kernels" in str(n.target))
        return graph.forward

    with dk.use_backend(backend):
        torch.compile(lambda x: dk.shrink(x, torch.sigmoid), fullgraph=True, backend=record)(torch.randn(2, 3, 40))
    assert {name.split(".")[0] for name in held} == expected


def test_compiled_around_inplace_and_mutation():
    gate = smooth_gate(6)
    x = torch.randn(3, 6, 40)
    expected = dk.shrink(x, gate)
    compiled = torch.compile(lambda x: dk.shrink(x, gate, inplace=True), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = compiled(x)
    torch.testing.assert_close(y, expected)
    assert torch.equal(x, y)


# ---- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("make", [dk.Shrinkage, dk.SqueezeExcite])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_holds_aten_ops_only(backend, strict, make):
    module = make(6).eval()
    x = torch.randn(3, 6, 40)
    batch = torch.export.Dim("batch", min=2, max=64)
    with dk.use_backend(backend):
        exported = torch.export.export(module, (x,), strict=strict, dynamic_shapes=({0: batch},))
    assert aten_only(exported.graph_module.graph)
    other = torch.randn(5, 6, 40)
    torch.testing.assert_close(exported.module()(other), module(other))
    assert aten_only(exported.run_decompositions().graph_module.graph)


# ---- torch.func ------------------------------------------------------------------------------------------------------

SHRINKS = {f"shrink {average}": {"average": average} for average in AVERAGES}
SHRINKS |= {"hard": {"average": "channel", "threshold": "hard"}, "leaky": {"average": "channel", "slope": 0.3}}
FUNCTIONS = ("abs_mean", "soft_threshold", "squeeze_excite", "batch_norm_relu", *SHRINKS)


def pair_of(function: str) -> tuple:
    """Ours and the oracle's, of x (2, 3, L)."""
    if function == "abs_mean":
        return dk.abs_mean, lambda x: x.abs().mean(2)
    if function == "soft_threshold":
        tau = torch.full((2, 3), 0.4, dtype=torch.float64)
        return lambda x: dk.soft_threshold(x, tau), lambda x: soft_threshold(x, tau)
    if function == "batch_norm_relu":
        weight, bias = torch.tensor([[0.5, -1, 2], [0.1, 0.2, -0.3]], dtype=torch.float64)
        options = {"weight": weight, "bias": bias, "activation": "leaky", "slope": 0.2}
        return lambda x: dk.batch_norm_relu(x, training=True, **options), lambda x: batch_norm_act(x, **options)
    gate = smooth_gate(3).double()
    if function == "squeeze_excite":
        return lambda x: dk.squeeze_excite(x, gate), lambda x: x * gate(x.mean(2))[..., None]
    return lambda x: dk.shrink(x, gate, **SHRINKS[function]), lambda x: shrink(x, gate, **SHRINKS[function])[0]


TRANSFORMS = {
    "grad": lambda f: grad(lambda x: f(x).square().sum()),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),)),
    "vjp": lambda f: lambda x: vjp(f, x)[1](f(x).cos()),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(lambda x: f(x).square().sum()),
    "grad of grad": lambda f: grad(lambda x: grad(lambda x: f(x).pow(3).sum())(x).square().sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms(kernels, function, transform):
    x = double(2, 3, 5)
    ours, exact = (TRANSFORMS[transform](f)(x) for f in pair_of(function))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_vmap(kernels, function):
    ours, exact = pair_of(function)
    many = double(4, 2, 3, 5)
    torch.testing.assert_close(vmap(ours)(many), torch.stack([exact(x) for x in many]))
    per_sample = vmap(grad(lambda x: ours(x).square().sum()))(many)
    torch.testing.assert_close(per_sample, torch.stack([grad(lambda x: exact(x).square().sum())(x) for x in many]))


def test_per_sample_gradients_of_the_parameters(kernels):
    module = dk.Shrinkage(3, norm=False).double()
    parameters, x = dict(module.named_parameters()), double(4, 3, 9)

    def loss(parameters, sample):
        return functional_call(module, parameters, (sample[None],)).square().sum()

    batched = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        for name, one in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(batched[name][i], one)


def test_forward_mode(kernels):
    x, tangent = double(2, 3, 5), double(2, 3, 5)
    for ours, exact in map(pair_of, FUNCTIONS):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, jvp(exact, (x,), (tangent,))[1])
        assert dual.tangent.any()


def test_batched_gradients(kernels):
    x = double(2, 3, 5).requires_grad_()
    for ours, exact in map(pair_of, FUNCTIONS):
        y = ours(x)
        gs = double(5, *y.shape)
        (batched,) = torch.autograd.grad(y, x, gs, is_grads_batched=True)
        torch.testing.assert_close(batched, torch.stack([torch.autograd.grad(exact(x), x, g)[0] for g in gs]))


def test_vectorised_jacobian_and_hessian_of_autograd(kernels):
    x = double(2, 3, 5)
    for ours, exact in map(pair_of, FUNCTIONS):
        for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
            a, b = (f(lambda x, o=o: o(x).square().sum(), x, vectorize=True) for o in (ours, exact))
            torch.testing.assert_close(a, b)


# ---- autocast, checkpointing -----------------------------------------------------------------------------------------


def test_autocast(kernels):
    """Under autocast A goes to the gate as float32, the gate's layers run in bfloat16, tau is float32."""
    seen = []
    linear = nn.Linear(6, 6)

    def gate(pooled):
        seen.append(pooled.dtype)
        alpha = linear(pooled)
        seen.append(alpha.dtype)
        return alpha.sigmoid()

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        forward = staticmethod(gate)

    for dtype in (torch.float32, torch.bfloat16):
        for g in (gate, Gate(), Gate().bfloat16()):
            seen.clear()
            x = features((3, 6, 40), dtype).requires_grad_()
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                y, tau = dk.shrink(x, g, return_tau=True)
                assert dk.squeeze_excite(x, g).dtype is dtype
            assert seen == [torch.float32, torch.bfloat16] * 2 and (y.dtype, tau.dtype) == (dtype, torch.float32)
            y.sum().backward()
            assert x.grad.dtype is dtype and linear.weight.grad.any()
        linear.float()


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("average", AVERAGES)
def test_activation_checkpointing(kernels, average, reentrant):
    if kernels.device == other_device.NAME:
        pytest.skip("what runs inside torch's backward pass says the real device, and checkpoint compares the two")
    gate, x = smooth_gate(6).double(), double(3, 6, 40).requires_grad_()
    wanted, g = [x, *gate.parameters()], double(3, 6, 40)

    def block(x):
        return dk.shrink(x * 2, gate, average=average, residual=x)

    def run(y):
        for p in wanted:
            p.grad = None
        y.backward(g)
        return [p.grad for p in wanted]

    expected = run(block(x))
    for a, b in zip(run(checkpoint(block, x, use_reentrant=reentrant)), expected, strict=True):
        assert torch.equal(a, b)


def test_saved_tensors_on_another_place(kernels):
    """torch.autograd.graph.save_on_cpu and its kin unpack a saved tensor once, into another tensor."""
    x, gate, g = torch.randn(3, 6, 40, requires_grad=True), smooth_gate(6), torch.randn(3, 6, 40)
    expected = torch.autograd.grad(dk.shrink(x, gate), x, g)[0]
    with torch.autograd.graph.save_on_cpu():
        y = dk.shrink(x, gate)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], expected)


# ---- fake tensors, tracing, subclasses, copies -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_fake_tensors(kernels, layout):
    with FakeTensorMode() as mode:
        x = mode.from_tensor(LAYOUTS[layout](2, 6, 5, 4)).requires_grad_()
        gate = nn.Linear(6, 6)
        y, tau = dk.shrink(x, gate, return_tau=True)
        assert (y.shape, tau.shape, dk.abs_mean(x).shape) == (x.shape, (2, 6), (2, 6))
        assert y.stride() == torch.empty_like(x).stride() and dk.soft_threshold(x, 0.5).shape == x.shape
        assert torch.autograd.grad(y, x, torch.ones_like(y))[0].shape == x.shape


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(kernels, mode):
    f = lambda x: torch.autograd.grad(dk.shrink(x, torch.sigmoid).square().sum(), x)[0]  # noqa: E731
    x = torch.randn(2, 3, 20, requires_grad=True)
    traced = make_fx(f, tracing_mode=mode)(x)
    other = torch.randn(2, 3, 20, requires_grad=True)
    torch.testing.assert_close(traced(other), f(other))
    assert aten_only(traced.graph)


def test_meta_tensors():
    x = torch.empty(2, 3, 20, device="meta", requires_grad=True)
    y, tau = dk.shrink(x, torch.sigmoid, return_tau=True)
    assert (y.device.type, y.shape, tau.shape, dk.abs_mean(x).shape) == ("meta", x.shape, (2, 3), (2, 3))
    y.sum().backward()
    assert x.grad.device.type == "meta"


def test_a_tensor_subclass_stays_one(kernels):
    class Mine(torch.Tensor):
        pass

    x = torch.randn(2, 3, 20)
    y = dk.shrink(x.as_subclass(Mine), torch.sigmoid)
    assert type(y) is Mine and type(dk.soft_threshold(x.as_subclass(Mine), 0.5)) is Mine
    torch.testing.assert_close(y.as_subclass(torch.Tensor), dk.shrink(x, torch.sigmoid))
    gate = lambda a: torch.sigmoid(a).as_subclass(Mine)  # noqa: E731
    torch.testing.assert_close(torch.Tensor(dk.shrink(x, gate)), dk.shrink(x, torch.sigmoid))


def test_lazily_negated_tensors(kernels):
    """The imaginary part of a conjugate carries a minus that its memory does not."""
    z = torch.randn(2, 3, 20, dtype=torch.complex64)
    x, plain = z.conj().imag, -z.imag
    assert x.is_neg()
    torch.testing.assert_close(dk.abs_mean(x), dk.abs_mean(plain))
    assert torch.equal(dk.soft_threshold(x, 0.3), dk.soft_threshold(plain, 0.3))
    for a in (x, plain):
        y = dk.shrink(a, torch.sigmoid, residual=x)
        torch.testing.assert_close(y, dk.shrink(plain, torch.sigmoid, residual=plain))
    tau = torch.complex(torch.rand(2, 3), -torch.rand(2, 3)).conj().imag
    assert tau.is_neg() and torch.equal(dk.soft_threshold(plain, tau), dk.soft_threshold(plain, tau.resolve_neg()))
    leaf = plain.clone().requires_grad_()
    y = dk.shrink(leaf, torch.sigmoid)
    (dx,) = torch.autograd.grad(y, leaf, x, retain_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(y, leaf, plain)[0])


ALPHAS = {
    "repeated": lambda one: one.repeat(4, 1),
    "expanded": lambda one: one.expand(4, 6),
    "transposed": lambda one: one.T.repeat(1, 4).T,
    "strided": lambda one: one.repeat(4, 2)[:, ::2] * 0 + one,
    "negated": lambda one: torch.complex(torch.zeros(4, 6), -one.expand(4, 6)).conj().imag,
    "subclass": lambda one: one.repeat(4, 1).as_subclass(type("Mine", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_of_any_sort(kernels, alpha, average):
    x, g, one = torch.randn(4, 6, 40, requires_grad=True), torch.randn(4, 6, 40), torch.rand(1, 6)
    given = ALPHAS[alpha](one)
    results = []
    for value in (given, one.repeat(4, 1)):
        y = dk.shrink(x, lambda a, value=value: value, average=average)
        results.append([t.as_subclass(torch.Tensor) for t in (y.detach(), torch.autograd.grad(y, x, g)[0])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_mode(kernels):
    x, gate = torch.randn(4, 6, 40), smooth_gate(6)
    with torch.inference_mode():
        y, z = dk.shrink(x, gate), dk.soft_threshold(x.clone(), 0.5)
        w = dk.shrink(x * 1, gate, inplace=True)
    with torch.no_grad():
        expected = dk.shrink(x, gate)
    assert y.is_inference() and torch.equal(y, expected) and torch.equal(w, expected)
    assert torch.equal(z, dk.soft_threshold(x, 0.5))


def test_models_are_copied_after_a_backward_pass(kernels):
    model = nn.Sequential(nn.Conv1d(2, 6, 3), dk.Shrinkage(6))
    x = torch.randn(4, 2, 40)
    model(x).sum().backward()
    other = copy.deepcopy(model).eval()
    assert torch.equal(other(x), model.eval()(x)) and other[1].fc[0].weight is not model[1].fc[0].weight
