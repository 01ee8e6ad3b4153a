"""The ops registered with torch.library: torch's own opcheck, values and derivatives against the operators."""

import pytest
import torch
from oracle import LAYOUTS

import drsn_kernels as dk
from drsn_kernels.layout import layout_of

pytestmark = pytest.mark.unpoisoned
ops = torch.ops.drsn_kernels

CHECKED = {
    "contiguous": lambda: LAYOUTS["contiguous"](2, 3, 4, 5),
    "channels_last": lambda: LAYOUTS["channels_last"](2, 3, 4, 5),
    "sliced": lambda: LAYOUTS["sliced"](2, 3, 4, 5),
    "empty batch": lambda: torch.randn(0, 3, 7),
}


def planes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        tau = torch.full(x.shape[:2], 0.4)
        return ops.abs_mean(x)[1], ops.soft_threshold(x, tau)[1]


@pytest.mark.parametrize("op", ["abs_mean", "soft_threshold", "abs_mean_grad", "soft_threshold_grad"])
@pytest.mark.parametrize("case", CHECKED)
def test_opcheck(op, case):
    x = CHECKED[case]()
    pooled_planes, planes = planes_of(x)
    meta = [list(x.shape), list(torch.empty_like(x).stride()), x.dtype]
    arguments = {
        "abs_mean": (x.requires_grad_(),),
        "soft_threshold": (x, torch.full(x.shape[:2], 0.4, requires_grad=True)),
        "abs_mean_grad": (torch.randn(x.shape[:2], requires_grad=True), pooled_planes, *meta),
        "soft_threshold_grad": (torch.randn(x.shape, requires_grad=True), planes, *meta),
    }
    with dk.use_backend("cpu"):
        torch.library.opcheck(getattr(ops, op).default, arguments[op])


@pytest.mark.parametrize("case", CHECKED)
def test_registered_ops_compute_what_the_operators_do(kernels, case):
    x = CHECKED[case]().requires_grad_()
    tau = torch.rand(x.shape[:2], requires_grad=True)
    pooled, planes = ops.abs_mean(x)
    assert torch.equal(pooled, dk.abs_mean(x)) and planes.shape == (2, layout_of(x).words)
    y, planes = ops.soft_threshold(x, tau)
    assert torch.equal(y, dk.soft_threshold(x, tau)) and not planes.requires_grad
    g = torch.randn(x.shape)
    for a, b in zip(*(torch.autograd.grad(o, (x, tau), g) for o in (y, dk.soft_threshold(x, tau))), strict=True):
        assert torch.equal(a, b)


def test_registered_ops_numerical_derivatives(kernels):
    x = (torch.randn(2, 3, 4).double().sign() * (0.6 + torch.rand(2, 3, 4).double())).requires_grad_()
    tau = torch.full((2, 3), 0.4, dtype=torch.float64, requires_grad=True)
    for run, inputs in ((lambda x: ops.abs_mean(x)[0], (x,)), (lambda x, tau: ops.soft_threshold(x, tau)[0], (x, tau))):
        assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)
