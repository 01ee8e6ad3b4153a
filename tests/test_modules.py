"""The drop-in modules: against a popular port, and as users treat them (pickle, hooks, dtypes, record_tau)."""

import copy
import io
import math
import pickle
import warnings
from functools import partial

import port_models as ports
import pytest
import torch
from oracle import AVERAGES, features, soft_threshold
from torch import nn

import drsn_kernels as dk


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_against_a_port(kernels, training, norm, residual):
    port, module = ports.Popular1d(6, norm=norm).double(), dk.Shrinkage(6, (1, 1), norm=norm).double()
    for buffer in port.buffers():  # a state that is not the initial one
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    module.load_state_dict(port.state_dict(), strict=True)
    module.train(training), port.train(training)
    x = features((5, 6, 63), torch.float64)
    added = torch.randn_like(x) if residual else None
    g = torch.randn_like(x)
    results = []
    for m in (module, port):
        for _ in range(3):  # running statistics go on over several steps
            leaf = x.clone().requires_grad_()
            y = m(leaf, added) if m is module else m(leaf) + (added if residual else 0)
        results.append([y, *torch.autograd.grad(y, [leaf, *m.parameters()], g), *m.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_state_dict_keys():
    assert list(dk.Shrinkage(4).state_dict()) == list(ports.Popular1d(4).state_dict())
    assert list(dk.Shrinkage(4, norm=False).state_dict()) == [f"fc.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]


@pytest.mark.parametrize("gap_size", [1, (1,), (1, 1), [1], [1, 1]])
def test_gap_sizes_that_are_one(gap_size):
    assert dk.Shrinkage(4, gap_size)(torch.randn(2, 4, 8)).shape == (2, 4, 8)


@pytest.mark.parametrize("average, outputs", [("channel", 12), ("sample", 1), (None, 12)])
@pytest.mark.parametrize("reduction, hidden", [(1, 12), (4, 3), (5, 2), (100, 1)])
def test_widths(average, outputs, reduction, hidden):
    module = dk.Shrinkage(12, average=average, reduction=reduction, activation=nn.GELU)
    assert [type(m) for m in module.fc] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear, nn.Sigmoid]
    assert module.fc[0].weight.shape == (hidden, 12) and module.fc[3].weight.shape == (outputs, hidden)
    x = features((3, 12, 40))
    with dk.record_tau(module) as taus:
        y = module(x)
    assert taus[""].shape == (3, outputs)
    torch.testing.assert_close(y, soft_threshold(x, taus[""]))


@pytest.mark.parametrize("average", ["channel", "sample", None])
@pytest.mark.parametrize("norm", [True, False])
def test_gate_bias(average, norm):
    """It is where the last layer's bias starts, and nothing else: with the same seed the other numbers stay."""
    torch.manual_seed(0)
    plain = dk.Shrinkage(12, average=average, norm=norm).state_dict()
    torch.manual_seed(0)
    module = dk.Shrinkage(12, average=average, norm=norm, gate_bias=-2)
    own = module.state_dict()
    last = "fc.3.bias" if norm else "fc.2.bias"
    assert own.keys() == plain.keys() and (own.pop(last) == -2).all() and (plain.pop(last) > -1).all()
    assert all(torch.equal(own[key], plain[key]) for key in plain)
    nn.init.zeros_(module.fc[-2].weight)
    x = features((3, 12, 40))
    with dk.record_tau(module) as taus:
        module(x)
    pooled = x.abs().mean(2)
    wanted = (pooled.mean(1, keepdim=True) if average == "sample" else pooled if average else 1.0) / (1 + math.exp(2))
    torch.testing.assert_close(taus[""], torch.as_tensor(wanted).expand_as(taus[""]))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"channels": 4, "gate_bias": math.inf}, ValueError, "gate_bias must be a finite number or None, got inf"),
        ({"channels": 4, "gate_bias": "-2"}, ValueError, "gate_bias must be a finite number or None, got '-2'"),
        ({"channels": 4, "gate_bias": True}, ValueError, "gate_bias must be a finite number or None, got True"),
        ({"channels": 0}, ValueError, "channels must be a positive integer, got 0"),
        ({"channels": 4.0}, TypeError, "channels must be a positive integer, got 4.0"),
        ({"channels": True}, TypeError, "channels must be a positive integer, got True"),
        ({"channels": 4, "reduction": 0}, ValueError, "reduction must be a positive integer, got 0"),
        ({"channels": 4, "reduction": "2"}, TypeError, "reduction must be a positive integer, got '2'"),
        ({"channels": 4, "gap_size": 2}, ValueError, "gap_size must be 1.*got 2"),
        ({"channels": 4, "gap_size": (1, 2)}, ValueError, r"gap_size must be 1.*got \(1, 2\)"),
        ({"channels": 4, "gap_size": (1, 1, 1)}, ValueError, r"gap_size must be 1.*got \(1, 1, 1\)"),
        ({"channels": 4, "gap_size": True}, ValueError, "gap_size must be 1.*got True"),
        ({"channels": 4, "gap_size": None}, ValueError, "gap_size must be 1.*got None"),
        ({"channels": 4, "norm": "layer"}, TypeError, "norm must be True or False, got 'layer'"),
        ({"channels": 4, "average": "cw"}, ValueError, "average must be 'channel', 'sample' or None, got 'cw'"),
    ],
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.Shrinkage(**arguments)


NO_MODULES = {"made": nn.ReLU(), "a name": "relu", "a function": nn.functional.relu, "a number": lambda: 3}


@pytest.mark.parametrize("activation", NO_MODULES.values(), ids=NO_MODULES)
@pytest.mark.parametrize("module", [dk.Shrinkage, dk.SqueezeExcite])
def test_an_activation_makes_a_module(module, activation):
    with pytest.raises(TypeError, match="activation must make a module where it is called, as nn.ReLU does, got "):
        module(8, activation=activation)


def test_forward_errors(kernels):
    with pytest.raises(ValueError, match="x must have shape"):
        dk.Shrinkage(4)(torch.randn(2, 4))
    for build in (dk.Shrinkage, dk.SqueezeExcite, partial(dk.Shrinkage, average="sample", norm=False)):
        message = r"x must have 4 channels, as many as the gate takes, got shape \(2, 5, 8\): mat1 and mat2"
        with pytest.raises(ValueError, match=message):
            build(4)(torch.randn(2, 5, 8))


@pytest.mark.parametrize("build", [dk.Shrinkage, partial(dk.Shrinkage, average="sample"), dk.SqueezeExcite])
def test_a_batch_of_one(kernels, build):
    message = (
        r"one sample has no batch statistics .*, got x of shape \(1, 4, 8\) in training; .*drop_last=True.*eval\(\).*"
        "norm=False"
    )
    x, module = torch.randn(1, 4, 8), build(4, norm=True)
    with pytest.raises(ValueError, match=message):
        module(x)
    (counted,) = (b for name, b in module.named_buffers() if name.endswith("num_batches_tracked"))
    assert counted == 0
    for module in (build(4, norm=True).eval(), build(4, norm=False)):
        assert module(x).shape == (1, 4, 8)


# ---- what users do with modules --------------------------------------------------------------------------------------


def through_pickle(m):
    return pickle.loads(pickle.dumps(m))


def through_torch_save(m):
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [through_pickle, through_torch_save, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("recorded", [False, True])
def test_copies(kernels, through, recorded):
    model = nn.Sequential(nn.Conv1d(2, 6, 3), dk.Shrinkage(6), dk.SoftThreshold(0.1)).eval()
    x = torch.randn(3, 2, 40)
    if recorded:
        with dk.record_tau(model):
            model(x)
    assert torch.equal(through(model)(x), model(x))


@pytest.mark.parametrize("through", [through_pickle, through_torch_save, copy.deepcopy])
def test_a_copy_made_while_recording_does_not_record(kernels, through):
    model, x = nn.Sequential(dk.Shrinkage(6)).eval(), torch.randn(3, 6, 40)
    with dk.record_tau(model) as taus:
        model(x)
        tau = taus["0"]
        through(model)(2 * x)
        assert taus["0"] is tau


def test_hooks_on_the_gate_fire(kernels):
    module, fired = dk.Shrinkage(6), []
    for name, child in [("fc", module.fc), *((f"fc.{n}", c) for n, c in module.fc.named_children())]:
        child.register_forward_pre_hook(lambda m, i, name=name: fired.append(("pre", name)))
        child.register_forward_hook(lambda m, i, o, name=name: fired.append(("forward", name)))
        child.register_full_backward_hook(lambda m, i, o, name=name: fired.append(("backward", name)))
    module(torch.randn(3, 6, 40, requires_grad=True)).sum().backward()
    names = ["fc", *(f"fc.{i}" for i in range(5))]
    assert sorted(fired) == sorted((kind, name) for kind in ("pre", "forward", "backward") for name in names)


def test_a_hook_may_change_the_threshold(kernels):
    module, x = dk.Shrinkage(6).eval(), torch.randn(3, 6, 40)
    module.fc[4].register_forward_hook(lambda m, i, alpha: torch.zeros_like(alpha))
    assert torch.equal(module(x), x)


def test_replaced_children_are_called(kernels):
    module, x = dk.Shrinkage(6).eval(), torch.randn(3, 6, 40)
    module.fc[4] = nn.Hardsigmoid()
    pooled = x.abs().mean(2)
    torch.testing.assert_close(module(x), soft_threshold(x, module.fc(pooled) * pooled))
    nn.utils.parametrizations.weight_norm(module.fc[0])
    torch.testing.assert_close(module(x), soft_threshold(x, module.fc(pooled) * pooled))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("average", AVERAGES)
def test_a_training_step_in_another_dtype(kernels, dtype, average):
    module = dk.Shrinkage(6, average=average).to(dtype)
    x = features((5, 6, 40), dtype).requires_grad_()
    before = [p.detach().clone() for p in module.parameters()]
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    y = module(x, residual=torch.randn_like(x))
    assert y.dtype is dtype
    y.float().square().mean().backward()
    optimiser.step()
    assert x.grad.dtype is dtype and x.grad.isfinite().all()
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert any(moved) and all(p.isfinite().all() for p in module.parameters())


# ---- record_tau ------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """The same module object registered twice, as in the ports."""

    def __init__(self):
        super().__init__()
        self.shrinkage = dk.Shrinkage(6, average="sample")
        self.residual_function = nn.Sequential(nn.Conv1d(6, 6, 1), self.shrinkage)
        self.last = nn.ModuleList([dk.Shrinkage(6)])

    def forward(self, x):
        return self.last[0](self.residual_function(x))


def test_record_tau_by_every_name(kernels):
    model, x = Nested().eval(), torch.randn(3, 6, 40)
    with dk.record_tau(model) as taus:
        assert taus == {}
        y = model(x)
        assert set(taus) == {"shrinkage", "residual_function.1", "last.0"}
        assert taus["shrinkage"] is taus["residual_function.1"]
        assert taus["shrinkage"].shape == (3, 1) and taus["last.0"].shape == (3, 6)
        first = taus["last.0"]
        model(2 * x)
        assert not torch.equal(taus["last.0"], first)  # the latest pass
        latest = dict(taus)
    assert torch.equal(model(x), y)
    assert all(taus[k] is v for k, v in latest.items())  # nothing after the block
    h = model.residual_function[0](2 * x)
    pooled = h.abs().mean(2)
    torch.testing.assert_close(taus["shrinkage"], model.shrinkage.fc(pooled).detach() * pooled.mean(1, keepdim=True))
    assert not taus["shrinkage"].requires_grad and taus["shrinkage"].dtype is torch.float32


def test_record_tau_nested_and_after_an_error(kernels):
    model, x = Nested().eval(), torch.randn(3, 6, 40)
    with dk.record_tau(model) as outer:
        with dk.record_tau(model.last) as inner:
            model(x)
        assert set(inner) == {"0"} and inner["0"] is outer["last.0"]
        model(2 * x)
        assert inner["0"] is not outer["last.0"]
    before = dict(outer)
    with pytest.raises(ZeroDivisionError), dk.record_tau(model):
        1 / 0  # noqa: B018
    model(3 * x)
    assert all(outer[k] is v for k, v in before.items())


def test_record_tau_changes_nothing_in_training(kernels):
    model, x, g = Nested().double(), torch.randn(4, 6, 40).double(), torch.randn(4, 6, 40).double()
    state = copy.deepcopy(model.state_dict())
    plain = torch.autograd.grad(model(x), list(model.parameters()), g)
    model.load_state_dict(state)
    with dk.record_tau(model) as taus:
        recorded = torch.autograd.grad(model(x), list(model.parameters()), g)
    assert taus["last.0"].dtype is torch.float64
    for a, b in zip(plain, recorded, strict=True):
        assert torch.equal(a, b)


def test_record_tau_without_a_shrinkage():
    message = "record_tau found no drsn_kernels.Shrinkage in Linear"
    with pytest.raises(ValueError, match=message), dk.record_tau(nn.Linear(2, 2)):
        pass


# ---- a warning of hard thresholds ------------------------------------------------------------------------------------


def test_a_hard_threshold_is_warned_of_once():
    from drsn_kernels.modules import _warn_of_hard_thresholds

    def hard(build, *args, **options) -> list[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            build(*args, threshold="hard", **options)
        assert all(one.filename == __file__ for one in said)  # the line that has to change
        return [str(one.message) for one in said]

    for build, options in ((dk.Shrinkage, {}), (dk.SoftThreshold, {"learnable": True})):
        _warn_of_hard_thresholds.cache_clear()
        (message,) = hard(build, 4, **options)
        assert "does not learn from y" in message and "module.threshold = 'hard' afterwards" in message
        assert hard(build, 4, **options) == [] and hard(dk.SoftThreshold, 0.1) == []


def test_what_the_warning_advises_works(kernels):
    """Trained soft, set to hard; and a leaky gate learns."""
    module, x = dk.Shrinkage(4, norm=False), torch.randn(3, 4, 20)
    hard = dk.Shrinkage(4, norm=False, threshold="hard")
    hard.load_state_dict(module.state_dict())
    module.threshold = "hard"
    assert torch.equal(module(x), hard(x))
    leaky = dk.Shrinkage(4, norm=False, slope=0.1)
    assert all(p.any() for p in torch.autograd.grad(leaky(x).square().sum(), list(leaky.parameters())))


def test_an_infinite_threshold_that_is_learnable():
    x = torch.randn(2, 3, 5)
    for learnable in (False, True):
        assert not dk.SoftThreshold(float("inf"), learnable=learnable)(x).any()
