"""BatchNormReLU, FusedSequential and the networks that use it: PyTorch's modules, run as one operator."""

import copy
import pickle

import pytest
import torch
from oracle import close
from rank_jobs import Normed, group_of_one, normed, refused, trained, unequal_shares
from test_autograd_memory import Saved
from test_scripting import same
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import drsn_kernels as dk
from drsn_kernels.backends import cpu
from drsn_kernels.models import NAMES, ORDERS, network

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.unpoisoned]
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SIZES = {2: (8, 6), 3: (4, 6, 9), 4: (4, 6, 5, 4), 5: (3, 6, 2, 3, 4)}
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.fixture(autouse=True)
def on_cpu():
    if cpu._cpu is None:
        pytest.skip(f"no compiled CPU kernels: {cpu.MISSING}")


def varied(norm: nn.Module) -> nn.Module:
    """Parameters and statistics that are not trivial."""
    for name, t in [*norm.named_parameters(), *norm.named_buffers()]:
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5) if "weight" in name or "var" in name else nn.init.normal_(t, std=0.3)
    return norm


def ran(module: nn.Module, x: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
    """y, the gradients and the state after some steps of a copy."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.dtype)
    for _ in range(steps):
        y = module(x)
    dense = g.flatten()[: y.numel()].view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dense), *module.state_dict().values()]


def assert_same(ours: nn.Module, torchs: nn.Module, x: torch.Tensor) -> None:
    ours, torchs = ran(ours, x), ran(torchs, x)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def called(module: nn.Module, x: torch.Tensor) -> list[str]:
    return [call.op for call in dk.explain(module, x)]


# ---- BatchNormReLU ---------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"momentum": None}, {"momentum": 1.0, "eps": 0.1}, {"affine": False}, {"track_running_stats": False}]


@MODES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rank", SIZES)
def test_the_module_is_batch_norm_and_an_activation(rank, options, training):
    x = torch.randn(SIZES[rank], dtype=torch.float64)
    norm = varied(NORMS[rank](6, **options).double())
    for activation, behind in (("relu", nn.ReLU()), ("leaky", nn.LeakyReLU(0.2)), (None, nn.Identity())):
        ours = dk.BatchNormReLU(6, **options, activation=activation, slope=0.2, dtype=torch.float64)
        assert list(ours.state_dict()) == list(norm.state_dict())
        ours.load_state_dict(norm.state_dict())
        assert_same(ours.train(training), nn.Sequential(norm, behind).train(training), x)


def test_checkpoints_both_ways():
    norm, ours = varied(nn.BatchNorm2d(6)), varied(dk.BatchNormReLU(6))
    norm.load_state_dict(ours.state_dict())
    old = {name: t for name, t in norm.state_dict().items() if name != "num_batches_tracked"}
    ours.load_state_dict(old)  # of before PyTorch 0.4.1, and without a version
    ours.num_batches_tracked.fill_(3)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        x = torch.randn(SIZES[3])
        assert torch.equal(again(x), copy.deepcopy(ours)(x)) and int(again.num_batches_tracked) == 4


def test_arguments_and_repr():
    shown = repr(dk.BatchNormReLU(6, activation="leaky", slope=0.3, sync=True))
    assert shown.startswith("BatchNormReLU(6, eps=1e-05, momentum=0.1")
    assert shown.endswith("activation='leaky', slope=0.3, sync=True)")
    for arguments, error, message in (
        ({"activation": "gelu"}, ValueError, "activation must be 'relu', 'leaky' or None, got 'gelu'"),
        ({"activation": "leaky", "slope": "0.1"}, TypeError, "slope must be a number, got '0.1'"),
    ):
        with pytest.raises(error, match=message):
            dk.BatchNormReLU(6, **arguments)
    with pytest.raises(ValueError, match=r"num_features must be a positive integer, got -4"):
        dk.BatchNormReLU(-4)
    for module in (dk.BatchNormReLU(6), dk.FusedSequential(nn.BatchNorm1d(6), nn.ReLU())):
        with pytest.raises(ValueError, match=r"x must have 6 channels, got shape \(4, 5, 3\)"):
            module(torch.randn(4, 5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_modules_and_inputs_of_less_precision(dtype):
    """As PyTorch's own: a module of that dtype, and a float32 module under autocast or with such an input."""
    x = torch.randn(SIZES[3])
    for module in (nn.BatchNorm1d, dk.BatchNormReLU):
        low, high = module(6).to(dtype), module(6)
        assert low(x.to(dtype)).dtype is high(x.to(dtype)).dtype is dtype
        assert low.running_mean.dtype is dtype and low.running_mean.any() and high.running_mean.dtype is torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert high(x).dtype is torch.float32
    exact = dk.BatchNormReLU(6).double()(x.to(dtype).double())
    close(dk.BatchNormReLU(6)(x.to(dtype)), exact, dk.BatchNormReLU(6)(x.to(dtype).float()))


# ---- what is fused ---------------------------------------------------------------------------------------------------


def test_a_layer_that_is_replaced_while_the_one_before_runs():
    x, found = torch.randn(4, 6, 9), []
    for cls in (nn.Sequential, dk.FusedSequential):
        model = cls(nn.Identity(), nn.Identity(), nn.BatchNorm1d(6), nn.ReLU())
        model[0].register_forward_hook(lambda *a, model=model: model.__setitem__(1, nn.Hardtanh(-0.1, 0.1)))
        found.append(model(x))
    torch.testing.assert_close(*found)


def layers() -> list[nn.Module]:
    """Two norms with an activation, one without, and activations without a norm."""
    torch.manual_seed(2)
    conv = [nn.Conv1d(6, 6, 3, padding=1) for _ in range(3)]
    norm = [varied(nn.BatchNorm1d(6)) for _ in range(3)]
    made = [norm[0], nn.ReLU(), conv[0], norm[1], nn.LeakyReLU(0.2, inplace=True), conv[1], norm[2], conv[2], nn.ReLU()]
    return [layer.double() for layer in made]


X = torch.randn(4, 6, 9, dtype=torch.float64)


@MODES
def test_fused_sequential_is_sequential(training):
    ours, torchs = dk.FusedSequential(*layers()).train(training), nn.Sequential(*layers()).train(training)
    assert list(ours.state_dict()) == list(torchs.state_dict()) and type(ours[1:3]) is dk.FusedSequential
    assert repr(ours) == repr(torchs).replace("Sequential", "FusedSequential", 1)
    assert_same(ours, torchs, X)
    assert called(ours, X) == ["batch_norm_relu"] * 3
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(ours)  # without a process group it is BatchNorm
    assert type(synced[0]) is nn.SyncBatchNorm and synced is ours
    assert_same(synced, torchs, X)
    assert called(synced, X) == ["batch_norm_relu"] * 3


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class Leakier(nn.LeakyReLU):
    def forward(self, x):
        return 3 * super().forward(x)


def hook(which: str, effect, child: int = 0):
    return lambda model: getattr(model[child], f"register_{which}")(effect)


def replace(child: int, module: nn.Module):
    return lambda model: model.__setitem__(child, copy.deepcopy(module).double())


def parametrised(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())


TRIPLED = {"forward": lambda x: x * 3}
# What is done to layers 0 and 1, and whether the norm is still fused.
CHANGES = {
    "a forward hook": (hook("forward_hook", lambda m, x, y: 2 * y), False),
    "a forward pre-hook": (hook("forward_pre_hook", lambda m, x: (x[0].abs(),)), False),
    "a backward hook": (hook("full_backward_hook", lambda m, gx, gy: (2 * gx[0],)), False),
    "a backward pre-hook": (hook("full_backward_pre_hook", lambda m, gy: (2 * gy[0],)), False),
    "a forward of its own": (lambda model: model[0].__dict__.update(TRIPLED), False),
    "a subclass of BatchNorm": (replace(0, Doubled(6)), False),
    "parametrised": (parametrised, False),
    "pruned": (lambda model: prune.l1_unstructured(model[0], "weight", 0.5), False),
    "an activation with a hook": (hook("forward_hook", lambda m, x, y: 2 * y, child=1), True),
    "an activation with a forward of its own": (lambda model: model[1].__dict__.update(TRIPLED), True),
    "a subclass of LeakyReLU": (replace(1, Leakier()), True),
    "another activation": (replace(1, nn.GELU()), True),
    "another leaky": (replace(1, nn.LeakyReLU(-2)), True),
    "one more buffer": (lambda model: model[0].register_buffer("mine", torch.ones(1)), True),
    "no weight": (lambda model: setattr(model[0], "weight", None), True),
    "frozen": (lambda model: model[0].requires_grad_(False).eval(), True),
    "no statistics": (replace(0, nn.BatchNorm1d(6, track_running_stats=False)), True),
    "no count": (lambda model: setattr(model[0], "num_batches_tracked", None), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_child_has_its_effect(change):
    """Results, gradients and state as of Sequential."""
    apply, fused = CHANGES[change]
    results = []
    for kind in (dk.FusedSequential, nn.Sequential):
        model = kind(*layers())
        apply(model)
        x = X.clone().requires_grad_()
        y = model(x)
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)
        results.append([y, *gradients, *model.state_dict().values()])
        if kind is dk.FusedSequential:
            assert called(model, X) == ["batch_norm_relu"] * (2 + fused)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_on_all_modules_see_every_child():
    seen, model = [], dk.FusedSequential(*layers())
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(module))
    try:
        model(X)
    finally:
        handle.remove()
    assert seen == [*model, model]


def test_tensors_in_the_place_of_parameters():
    """As meta-learning does it: deleted, and set to what a step made of them."""
    ours, torchs = dk.FusedSequential(*layers()), nn.Sequential(*layers())
    results = []
    for model in (ours, torchs):
        leaf = torch.ones(6, dtype=torch.float64, requires_grad=True)
        del model[0].weight
        model[0].weight = leaf * 2
        results.append((y := model(X), *torch.autograd.grad(y.square().sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    module = dk.BatchNormReLU(6).double()
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    norm = nn.BatchNorm1d(6).double()
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    torch.testing.assert_close(module(X), norm(X).relu())


def test_a_wrong_input_is_the_norms_own_error():
    model = dk.FusedSequential(nn.BatchNorm2d(6), nn.ReLU())
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.randn(4, 6, 9))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 6, 1, 1))
    assert int(model[0].num_batches_tracked) == 0


# ---- every other way -------------------------------------------------------------------------------------------------

WAYS = {
    "BatchNormReLU": lambda: varied(dk.BatchNormReLU(6, activation="leaky", slope=0.2)).double(),
    "FusedSequential": lambda: dk.FusedSequential(*layers()),
}


@pytest.fixture(params=WAYS)
def module(request) -> nn.Module:
    return WAYS[request.param]()


@MODES
def test_compiled(module, training):
    torch._dynamo.reset()
    module.train(training)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for a, b in zip(ran(compiled, X), ran(module, X), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported(module, strict):
    exported = torch.export.export(module.eval(), (X,), strict=strict, dynamic_shapes=({0: torch.export.Dim("n")},))
    targets = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert {t.namespace for t in targets if hasattr(t, "namespace")} == {"aten"}
    torch.testing.assert_close(exported.module()(X[:3]), module(X[:3]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_and_traced(module):
    same(module.eval(), torch.jit.script(module), X)
    same(module, torch.jit.trace(module, X), X)
    for training in (module.train(), dk.BatchNormReLU(6, momentum=None).double()):
        ours, scripted = copy.deepcopy(training), torch.jit.script(copy.deepcopy(training))
        for _ in range(2):
            torch.testing.assert_close(scripted(X), ours(X))
        for a, b in zip(scripted.state_dict().values(), ours.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)


def test_traced_by_fx():
    model = dk.FusedSequential(*layers()).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == [str(i) for i in range(len(model))]
    torch.testing.assert_close(traced(X), model(X))


def test_per_sample_gradients(module):
    module.eval()
    parameters = dict(module.named_parameters())

    def one(parameters, sample):
        return functional_call(module, parameters, (sample[None],)).square().sum()

    found = vmap(grad(one), in_dims=(None, 0))(parameters, X)
    for i in range(len(X)):
        expected = torch.autograd.grad(module(X[i : i + 1]).square().sum(), list(module.parameters()))
        for name, right in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], right)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_activation_checkpointing(module, reentrant):
    """The statistics move a second time where the forward pass is run again, as with PyTorch's modules."""
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip([x, *module.parameters()], expected, strict=True):
        assert torch.equal(a.grad, b)


# ---- networks --------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_networks_are_the_same_with_plain_modules(name, order, dims, training):
    layout = {"order": order, "dims": dims, "stages": ((4, 1, 1), (6, 1, 2)), "stem": (4, 1)}
    ours, torchs = (network(name, **layout, fused=fused).double().train(training) for fused in (True, False))
    torchs.load_state_dict(ours.state_dict())
    for model in (ours, torchs):
        torch.manual_seed(5)
        for module in model.modules():
            if type(module) is NORMS[dims + 2]:
                varied(module)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    x = torch.randn(3, 1, *[12] * dims, dtype=torch.float64)
    results = []
    for model in (ours, torchs):
        y = model(x)
        gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        results.append([y, *gradients, *model.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    norms = [name for name, m in ours.named_modules() if type(m) is NORMS[dims + 2] and ".fc." not in name]
    assert called(ours, x).count("batch_norm_relu") == len(norms) == 5 and "batch_norm_relu" not in called(torchs, x)


@pytest.mark.parametrize("name", ["resnet", "drsn-cw"])
def test_networks_keep_less(name):
    kept = []
    for fused in (True, False):
        model, x = network(name, fused=fused, stages=((8, 2, 1),), stem=(8, 1)), torch.randn(4, 1, 100)
        with Saved(model) as saved:
            model(x)
        kept.append(saved.bytes)
    assert kept[0] < kept[1]


def test_a_network_calls_a_norm_that_is_hooked():
    model, seen = network("resnet", stages=((4, 1, 1),), stem=(4, 1)), []
    before = called(model, torch.randn(2, 1, 20))
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    assert called(model, torch.randn(2, 1, 20)) == before[1:] and seen


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FusedSequential", "BatchNormReLU"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_statistics_of_all_ranks(ranks, backend, kind):
    """Two processes equal one on the whole batch."""
    expected = trained(Normed())
    for found, calls in ranks.run(normed, backend, kind):
        assert list(found) == list(expected) and calls == ["batch_norm_relu"]
        for name, t in found.items():
            torch.testing.assert_close(t, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sizes", [(3, 5), (1, 8), (0, 4)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ranks_with_other_numbers_of_samples(ranks, backend, sizes):
    found, expected = ranks.run(unequal_shares, backend, sizes), unequal_shares(-1, backend, sizes)
    for i, whole in enumerate(expected):
        parts = [torch.cat([one[i] for one in found])] if i < 2 else [one[i] for one in found]
        for part in parts:
            torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_group_of_one_process_is_none(ranks, backend):
    for found in ranks.run(group_of_one, backend):
        for alone, expected in zip(found[4:], found[:4], strict=True):
            assert torch.equal(alone, expected)


def test_what_ranks_refuse(ranks):
    for found in ranks.run(refused):
        assert found == [
            "batch_norm_relu over several processes has first derivatives only",
            "batch_norm_relu over several processes takes eager calls only; "
            "a torch.func transform (grad, vmap, jvp, ...) is active",
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_statistics_move_as_often_as_torchs_under_a_checkpoint(backend, dtype):
    """Its second run ends as soon as it has what was saved: whatever stands behind that is not done."""
    found, x = [], (1 + torch.randn(4, 6, 9)).to(dtype).requires_grad_()
    with dk.use_backend(backend):
        for of in (nn.Sequential, dk.FusedSequential):
            norm = of(nn.BatchNorm1d(6), nn.ReLU()).to(dtype)
            checkpoint(norm, x, use_reentrant=False).sum().backward()
            found.append(norm[0])
    torch_own, fused = found
    assert torch_own.num_batches_tracked == fused.num_batches_tracked == 2
    torch.testing.assert_close(fused.running_mean, torch_own.running_mean)
