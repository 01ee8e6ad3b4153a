"""What counts as the standard gate, which a backend may compute itself, and what must be called."""

import copy

import pytest
import torch
from oracle import gate_of
from torch import nn

import drsn_kernels as dk
from drsn_kernels.backends import BACKENDS, cpu
from drsn_kernels.gates import StandardGate, standard_gate


class Renamed(nn.ReLU):
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


@pytest.mark.parametrize("change", OTHERS)
def test_other_gates_are_called(change):
    reason = standard_gate(changed(OTHERS[change]), torch.randn(3, 4, 9))
    assert isinstance(reason, str) and reason


def test_the_standard_gate_is_recognised():
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
