"""What counts as the standard gate, which a backend may compute itself, and what must be called."""

import copy
import pickle

import pytest
import torch
from oracle import gate_of
from torch import nn

import drsn_kernels as dk
from drsn_kernels import checked, gates
from drsn_kernels.backends import BACKENDS, cpu
from drsn_kernels.gates import StandardGate, standard_gate
from drsn_kernels.ops import gated_shrink


class Renamed(nn.ReLU):
    pass


class Named(torch.Tensor):
    pass


def changed(change) -> nn.Sequential:
    gate = gate_of(4, "norm", "channel")
    change(gate)
    return gate


OTHERS = {
    "hook": lambda gate: gate[0].register_forward_hook(lambda *a: None),
    "pre-hook of the gate": lambda gate: gate.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda gate: gate[3].register_full_backward_hook(lambda *a: None),
    "parametrized": lambda gate: nn.utils.parametrizations.weight_norm(gate[0]),
    "subclass": lambda gate: gate.__setitem__(2, Renamed()),
    "other activation": lambda gate: gate.__setitem__(2, nn.GELU()),
    "cumulative average": lambda gate: setattr(gate[1], "momentum", None),
    "no statistics": lambda gate: gate.__setitem__(1, nn.BatchNorm1d(4, track_running_stats=False)),
    "not affine": lambda gate: gate.__setitem__(1, nn.BatchNorm1d(4, affine=False)),
    "SyncBatchNorm": lambda gate: gate.__setitem__(1, nn.SyncBatchNorm(4)),
    "statistics switched off": lambda gate: setattr(gate[1].train(), "track_running_stats", False),
    "no norm bias": lambda gate: setattr(gate[1], "bias", None),
    "no counter": lambda gate: setattr(gate[1], "num_batches_tracked", None),
    "counter of floats": lambda gate: setattr(gate[1], "num_batches_tracked", torch.zeros(())),
    "momentum in a tensor": lambda gate: setattr(gate[1], "momentum", torch.tensor(0.1)),
    "fast weights": lambda gate: (delattr(gate[0], "weight"), setattr(gate[0], "weight", torch.randn(4, 4))),
    "fast norm": lambda gate: (delattr(gate[1], "weight"), setattr(gate[1], "weight", torch.ones(4))),
    "DataParallel's replica": lambda gate: gate._modules.update(
        {name: child._replicate_for_data_parallel() for name, child in gate.named_children()}
    ),
    "no bias": lambda gate: gate.__setitem__(0, nn.Linear(4, 4, bias=False)),
    "bfloat16": lambda gate: gate.bfloat16(),
    "wrong size": lambda gate: gate.__setitem__(3, nn.Linear(4, 3)),
    "own forward": lambda gate: setattr(gate[0], "forward", gate[0].forward),
    "transposed weight": lambda gate: setattr(gate[0], "weight", nn.Parameter(torch.randn(4, 4).t())),
    "no hidden units": lambda gate: (gate.__setitem__(0, nn.Linear(4, 0)), gate.__setitem__(1, nn.BatchNorm1d(0)),
                                     gate.__setitem__(3, nn.Linear(0, 4))),  # fmt: skip
    "longer": lambda gate: gate.append(nn.Identity()),
}


@pytest.fixture(params=["extension", "python"])
def reader(request, monkeypatch) -> str:
    """Who reads a gate."""
    if request.param == "python":
        monkeypatch.setattr(gates, "_reader", None)
    elif gates._reader is None:
        pytest.skip("no compiled extension")
    return request.param


@pytest.mark.parametrize("change", OTHERS)
def test_other_gates_are_called(change, reader):
    reason = standard_gate(changed(OTHERS[change]), torch.randn(3, 4, 9))
    assert isinstance(reason, str) and reason


@pytest.mark.skipif(gates._reader is None, reason="no compiled extension")
@pytest.mark.parametrize("change", [*OTHERS, "batch norm", "norm", "plain", "no gate"])
def test_the_extension_reads_a_gate_as_python_does(change):
    gate = torch.relu
    if change != "no gate":
        gate = changed(OTHERS[change]) if change in OTHERS else gate_of(4, change, "channel")
    ours, pythons = gates._reader.read(gate), gates._read(gate)
    if ours is None:  # it leaves the reason to Python, and what is None
        assert isinstance(pythons, str) or any(part is None for part in pythons[0])
    else:
        (ours, norm), (parts, expected) = ours, pythons
        assert type(ours) is StandardGate and norm == expected
        assert all(a is b or a == b for a, b in zip(ours, parts, strict=True))


def test_the_standard_gate_is_recognised(reader):
    x = torch.randn(3, 4, 9)
    assert isinstance(standard_gate(gate_of(4, "norm", "channel"), x), StandardGate)
    assert standard_gate(gate_of(4, "plain", "sample"), x).gamma is None
    assert "one sample" in standard_gate(gate_of(4, "batch norm", "channel"), x[:1])
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert "global" in standard_gate(gate_of(4, "norm", "channel"), x)
    finally:
        handle.remove()


# ---- what a user could see of the fused gate ----


@pytest.mark.parametrize("eps", [0.0, -1e-5])
def test_an_eps_that_torch_refuses_raises_torchs_error(fusing, eps):
    module = dk.Shrinkage(4)
    module.fc[1].eps = eps
    with pytest.raises((RuntimeError, ValueError), match="eps"):
        module(torch.randn(3, 4, 5))


def test_a_tiny_eps_is_not_lost_in_float32(fusing):
    module = dk.Shrinkage(4)
    module.fc[1].eps = 1e-50
    torch.nn.init.zeros_(module.fc[0].weight)  # hidden units of variance 0
    assert module(torch.randn(3, 4, 5)).isfinite().all()


def test_a_training_step_between_an_eval_forward_and_its_backward(fusing):
    torch.manual_seed(0)
    module, x = dk.Shrinkage(4), torch.randn(6, 4, 9, requires_grad=True)
    evaluated = copy.deepcopy(module).eval()
    expected = torch.autograd.grad(evaluated(x).sum(), [x, *evaluated.parameters()])
    y = module.eval()(x)
    module.train()(x.detach() + 3).sum().backward()
    got = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    if fusing == "cpu":  # torch itself uses the statistics of the later step without a word
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [(), ("0.weight", "0.bias"), ("3.weight",), ("1.weight", "1.bias"), "all"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen):
    torch.manual_seed(0)
    module = dk.Shrinkage(5).double()
    x = torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True)
    for name, parameter in module.fc.named_parameters():
        parameter.requires_grad = frozen != "all" and name not in frozen
    grads = []
    for backend in ("cpu", "torch"):
        module.zero_grad()
        with dk.use_backend(backend):
            grads.append((torch.autograd.grad(module(x).square().sum(), x, retain_graph=True)[0],))
            module(x).square().sum().backward()
        grads[-1] += tuple(p.grad for p in module.parameters())
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_residual_alone_keeps_nothing_of_x(fusing):
    module, x = dk.Shrinkage(4).requires_grad_(False), torch.randn(3, 4, 50)
    residual = torch.randn(3, 4, 50, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y, tau = dk.shrink(x, module.fc, residual=residual, return_tau=True)
    g = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, residual, g)[0], g)
    if fusing == "cpu":
        assert not kept and not tau.requires_grad


def test_create_graph_under_autocast_gives_the_same_gradient(fusing):
    torch.manual_seed(0)
    module, x = dk.Shrinkage(16), torch.randn(8, 16, 30, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        plain, recorded = (torch.autograd.grad(y.sum(), x, create_graph=create, retain_graph=True)[0]
                           for create in (False, True))  # fmt: skip
    torch.testing.assert_close(plain, recorded)


def test_beyond_the_limit_of_products_the_gate_is_called():
    if cpu._cpu is None:
        pytest.skip("no compiled CPU kernels")
    x = torch.randn(3, 8, 5)
    parts = standard_gate(dk.Shrinkage(8).fc, x)
    assert BACKENDS["cpu"].gate_unsupported(x, parts) is None
    huge = x[:1].expand(1 << 30, 8, 5)
    assert "products in the gate" in BACKENDS["cpu"].gate_unsupported(huge, parts)


@pytest.mark.parametrize("isa", cpu._cpu.available_isas() if cpu._cpu else [])
def test_the_first_weights_gradient_is_exact_where_its_sum_cancels(isa):
    """Behind batch statistics; plain PyTorch is 2e-5 off here, and summing A as it is came out at 1e-4."""
    torch.manual_seed(0)
    x, exact, before = torch.randn(32, 24, 333), dk.Shrinkage(24).double(), cpu._cpu.isa()
    fused = copy.deepcopy(exact).float()
    exact.load_state_dict(fused.state_dict())
    grads = []
    try:
        cpu._cpu.set_isa(isa)
        for module, dtype in ((fused, torch.float32), (exact, torch.float64)):
            with dk.use_backend("cpu", strict=True):
                y = module(x.to(dtype))
            grads.append(torch.autograd.grad(y.square().sum(), module.fc[0].weight)[0].double())
    finally:
        cpu._cpu.set_isa(before)
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()


# ---- a change between two calls ----


def to_meta(gate: nn.Sequential) -> None:
    torch.utils.swap_tensors(gate[3].weight, nn.Parameter(gate[3].weight.detach().to("meta")))


def assigned(gate: nn.Sequential, **changed: torch.Tensor) -> None:
    gate.load_state_dict({**gate.state_dict(), **changed}, assign=True)


def as_buffer(gate: nn.Sequential, name: str, tensor: torch.Tensor) -> None:
    gate[1]._buffers[name] = tensor


# All of OTHERS, and changes that leave every parameter the object that it was, or that are none of the gate's own.
LATER = {
    **OTHERS,
    "data of another dtype": lambda gate: setattr(gate[0].weight, "data", gate[0].weight.data.double()),
    "data that is transposed": lambda gate: setattr(gate[0].weight, "data", gate[0].weight.data.t()),
    "another device, the same object": to_meta,
    "transposed in place": lambda gate: gate[0].weight.requires_grad_(False).t_(),
    "statistics of another dtype": lambda gate: as_buffer(gate, "running_var", torch.ones(4, dtype=torch.float64)),
    "statistics of another size": lambda gate: as_buffer(gate, "running_mean", torch.zeros(1)),
    "state_dict of another dtype, assigned": lambda gate: assigned(gate, **{"0.bias": torch.zeros(4).double()}),
    "bias of one number": lambda gate: setattr(gate[3], "bias", nn.Parameter(torch.zeros(1))),
    "eps in a tensor": lambda gate: setattr(gate[1], "eps", torch.tensor(1e-5)),
    "hook dictionary replaced": lambda gate: gate[2].__dict__.update(_forward_hooks={0: lambda *a: None}),
    "class changed in place": lambda gate: setattr(gate[2], "__class__", Renamed),
    "parameter becomes a subclass": lambda gate: setattr(
        gate[0], "bias", nn.Parameter(torch.zeros(4).as_subclass(Named), requires_grad=False)),
    "global hook": lambda gate: None,
}  # fmt: skip


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("change", LATER)
def test_a_change_after_a_call_is_seen_by_the_next(change, guarded, monkeypatch):
    """Warm first: whatever is kept of the call before must not answer for the changed gate."""
    monkeypatch.setattr(checked, "calls", {})
    if not guarded:
        monkeypatch.setattr(checked, "TensorGuards", None)
    gate, x = gate_of(4, "norm", "channel"), torch.randn(3, 4, 9)
    for _ in range(2):
        assert isinstance(standard_gate(gate, x), StandardGate)
    assert bool(checked.calls) == guarded
    handle = None
    if change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    LATER[change](gate)
    try:
        assert isinstance(standard_gate(gate, x), str)
    finally:
        if handle is not None:
            handle.remove()


def looked_up(gate, x, residual=None):
    """What is known of a call on these."""
    read = gates.read(gate)
    return None if isinstance(read, str) else gated_shrink.look_up(x, residual, *read, "channel", False)[1]


@pytest.fixture
def remembering(monkeypatch):
    """Calls are looked up, and this test's are the first."""
    if cpu._cpu is None or checked.TensorGuards is None:
        pytest.skip("no compiled CPU kernels, or a torch without guards")
    monkeypatch.setattr(checked, "calls", {})
    with dk.use_backend("cpu", strict=True):
        yield


@pytest.mark.parametrize("change", LATER)
def test_a_change_after_a_checked_call_is_seen_by_the_next(change, remembering):
    gate, x = gate_of(4, "norm", "channel"), torch.randn(3, 4, 9)
    for _ in range(2):
        dk.shrink(x, gate)
    assert looked_up(gate, x).step.gate is not None
    handle = None
    if change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    LATER[change](gate)
    try:
        assert looked_up(gate, x) is None
    finally:
        if handle is not None:
            handle.remove()


def test_another_call_is_checked_anew(remembering):
    gate, x = gate_of(4, "norm", "channel"), torch.randn(3, 4, 8)
    r = torch.randn(3, 4, 8)
    dk.shrink(x, gate, residual=r)
    assert looked_up(gate, x, r) and looked_up(gate, x.clone(), r.clone())
    others = {
        "no residual": (x, None), "a gradient of x": (x.clone().requires_grad_(), r), "dtype of x": (x.double(), r),
        "gradient of the residual": (x, r.clone().requires_grad_()), "dtype of the residual": (x, r.double()),
        "shape of the residual": (x, r[:1]), "strides of x": (x.mT.contiguous().mT, r), "batch": (x[:2], r[:2]),
        "strides of the residual": (x, r.mT.contiguous().mT), "a subclass": (x.as_subclass(Named), r),
        "a residual that is none": (x, r.as_subclass(Named)), "sparse": (x.to_sparse(), r), "device": (x.to("meta"), r),
    }  # fmt: skip
    for name, (a, b) in others.items():
        assert looked_up(gate, a, b) is None, name
    known = dict(checked.calls)
    dk.shrink(x, gate, residual=x)  # a guard would refuse it every time
    assert checked.calls == known
    with torch.no_grad():
        assert looked_up(gate, x, r) is None
    with dk.use_backend("torch"):
        assert looked_up(gate, x, r) is None
    gate[3].weight.requires_grad_(False)
    assert looked_up(gate, x, r) is None


def test_a_gate_that_is_called_and_then_fused_in_one_graph(fusing):
    """Its BatchNorm1d saves the running statistics when it is called, and the fused one moves them."""
    x, gradients, same = torch.randn(3, 4, 9, requires_grad=True), [], gate_of(4, "norm", "channel")
    for backend in (fusing, "torch"):
        gate = copy.deepcopy(same)
        with dk.use_backend(backend):
            handle = gate[1].register_forward_hook(lambda *a: None)
            first = dk.shrink(x, gate)
            handle.remove()
            loss = first.square().sum() + dk.shrink(x, gate).pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [x, gate[0].weight]))
    torch.testing.assert_close(*gradients)


def test_numbers_and_tensors_are_those_of_this_call():
    """What a gate has now is returned, and another x asks anew."""
    gate, x = gate_of(4, "norm", "channel"), torch.randn(3, 4, 9)
    for _ in range(2):
        assert not standard_gate(gate, x).batch_stats
    gate.train()
    assert standard_gate(gate, x).batch_stats and "one sample" in standard_gate(gate, x[:1])
    gate[1].momentum, gate[1].eps = 0.5, 1e-3
    gate[0].weight = nn.Parameter(torch.randn(4, 4))
    assigned(gate, **{"3.bias": torch.full((4,), 7.0)})
    found = standard_gate(gate, x)
    assert (found.momentum, found.eps) == (0.5, 1e-3)
    assert found.w1 is gate[0].weight and found.b2 is gate[3].bias and bool((found.b2 == 7).all())
    assert isinstance(standard_gate(gate, x.double()), str) and isinstance(standard_gate(gate, x[:, :3]), str)
    assert isinstance(standard_gate(gate, x.to("meta")), str)
    other = copy.deepcopy(gate)
    assert standard_gate(other, x).w1 is other[0].weight
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert standard_gate(gate, x).w1 is gate[0].weight
    loaded = pickle.loads(pickle.dumps(gate))
    assert standard_gate(loaded, x).w1 is loaded[0].weight
    assert isinstance(standard_gate(gate.double(), x), str)
    assert isinstance(standard_gate(gate, x.double()), StandardGate)
    for p in gate.parameters():
        p.requires_grad = False
    assert isinstance(standard_gate(gate, x.double()), StandardGate)


@pytest.mark.parametrize("change", ["hook", "other activation", "data of another dtype", "statistics switched off"])
def test_a_module_computes_what_its_changed_gate_says(change, fusing):
    torch.manual_seed(0)
    module, x = dk.Shrinkage(4).eval(), torch.randn(3, 4, 9)
    module(x)
    if change == "hook":
        module.fc[0].register_forward_hook(lambda module, inputs, out: out + 1)
    elif change == "other activation":
        module.fc[2] = nn.GELU()
    elif change == "statistics switched off":
        module.fc[1].track_running_stats, module.fc[1].training = False, True
    else:
        module.double().fc[0].weight.data.mul_(2)
        x = x.double()
    expected = copy.deepcopy(module)
    with dk.use_backend("torch"):
        expected = expected(x)
    torch.testing.assert_close(module(x), expected)


# ---- numbers at the ends ---------------------------------------------------------------------------------------------


def plainly(gate, x):
    pooled = x.abs().mean(2)
    return x.sign() * (x.abs() - (gate(pooled) * pooled)[..., None]).relu()


@pytest.mark.parametrize("kind", ["plain", "norm", "batch norm"])
def test_a_nan_comes_to_the_same_gradients_as_in_torch(kind, kernels):
    """Not a finite gradient of a poisoned sample: relu lets the gradient of a NaN pass."""
    gate, x = gate_of(8, kind, "channel").to(kernels.device), torch.randn(4, 8, 9, device=kernels.device)
    x[1, 2, 3] = torch.nan
    x.requires_grad_()
    found = []
    for run in (lambda same: kernels.shrink(x, same), lambda same: plainly(same, x)):
        same = copy.deepcopy(gate)
        y = run(same)
        found.append([t.isnan() for t in torch.autograd.grad(y, [x, *same.parameters()], torch.ones_like(y))])
    assert all(map(torch.equal, *found)) and found[0][1].any()


def test_a_gate_that_is_shut_gives_a_threshold_of_zero(kernels):
    gate = gate_of(8, "plain", "channel").to(kernels.device)
    nn.init.constant_(gate[-2].bias, -200.0)
    nn.init.zeros_(gate[-2].weight)
    x = 1e10 * torch.randn(4, 8, 9, device=kernels.device)
    y, tau = kernels.shrink(x, gate, return_tau=True)
    assert not tau.any() and torch.equal(y, x)


def test_batch_statistics_of_units_whose_square_overflows(kernels):
    gate = gate_of(8, "batch norm", "channel").to(kernels.device)
    nn.init.constant_(gate[0].bias, 2e19)
    nn.init.normal_(gate[0].weight, std=1e18)
    plain, x = copy.deepcopy(gate), torch.randn(6, 8, 9, device=kernels.device)
    torch.testing.assert_close(kernels.shrink(x, gate), plainly(plain, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gate[1].running_var, plain[1].running_var, rtol=1e-3, atol=0)
