"""tests/other_device.py finds what would fail on a GPU, and nothing else."""

import other_device
import pytest
import torch
from torch import nn

import drsn_kernels as dk
from drsn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")

AT_COLLECTION = torch.ones(2, 3, 4)


@pytest.fixture(autouse=True)
def on_other_device():
    with other_device.use():
        yield


def mixed():
    return torch.randn(3), torch.randn(3, device="cpu")


FAULTS = {
    "a tensor made while tests are collected": lambda: torch.ones(2, 3, 4) + AT_COLLECTION,
    "a view of it": lambda: torch.ones(3, 4) + AT_COLLECTION[0],
    "a device that is named": lambda: torch.add(*mixed()),
    "a comparison": lambda: torch.equal(*mixed()),
    "what was computed on the CPU": lambda: torch.randn(3) * mixed()[1].exp().sum(0, keepdim=True),
    "brought back to the CPU": lambda: torch.randn(3) + torch.randn(3).cpu(),
    "numpy's memory": lambda: torch.randn(3) + torch.from_numpy(pytest.importorskip("numpy").ones(3)),
    "read by numpy": lambda: torch.randn(3).numpy(),
    "a generator of the CPU": lambda: torch.randn(3, generator=torch.Generator()),
    "a module of the CPU": lambda: nn.Linear(3, 3, device="cpu")(torch.randn(2, 3)),
    "a module moved to the CPU": lambda: nn.Linear(3, 3).to("cpu")(torch.randn(2, 3)),
    "an operator of ours": lambda: dk.abs_mean(AT_COLLECTION),
    "tau": lambda: dk.soft_threshold(torch.ones(2, 3, 4), torch.ones(2, 3, device="cpu")),
    "the gate": lambda: dk.Shrinkage(3, device="cpu")(torch.randn(2, 3, 4)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_fail_on_a_gpu_fails(fault):
    with pytest.raises((AssertionError, ValueError)):
        FAULTS[fault]()


RIGHT = {
    "the default device": lambda: torch.randn(3) + torch.ones(3),
    "a number on the CPU": lambda: torch.randn(3) * torch.tensor(2.0, device="cpu"),
    "a copy": lambda: torch.randn(3).copy_(torch.randn(3, device="cpu")),
    "indices on the CPU": lambda: torch.randn(3)[torch.tensor([0, 2], device="cpu")],
    "moved": lambda: torch.ones(2, 3, 4) + AT_COLLECTION.to(other_device.NAME),
    "moved like another": lambda: torch.ones(3) + torch.randn(3, device="cpu").to(torch.ones(1)),
    "a module moved": lambda: nn.Linear(3, 3, device="cpu").to(other_device.NAME)(torch.randn(2, 3)),
    "a generator of the device": lambda: torch.randn(3, generator=torch.Generator(other_device.NAME)),
    "on the CPU throughout": lambda: torch.randn(3).cpu() + torch.randn(3, device="cpu"),
    "numpy after a copy": lambda: torch.randn(3).cpu().numpy(),
    "a training step": lambda: dk.Shrinkage(3)(torch.randn(4, 3, 5, requires_grad=True)).sum().backward(),
}


@pytest.mark.parametrize("use", RIGHT)
def test_what_runs_on_a_gpu_runs(use):
    RIGHT[use]()


def test_tensors_say_where_they_lie():
    here, there = torch.randn(3), torch.randn(3, device="cpu")
    assert here.device == torch.device(other_device.NAME) != there.device == torch.device("cpu")
    assert torch.empty_like(here).device == here.device and torch.empty_like(there).device == there.device
    assert here.cpu().device == there.device and there.to(here).device == here.device
    assert torch.randn(3, device="meta").device.type == "meta"
