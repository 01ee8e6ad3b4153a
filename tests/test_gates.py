"""What counts as the standard gate, which a backend may compute itself, and what must be called."""

import pytest
import torch
from oracle import gate_of
from torch import nn

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
