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
    "empty length": lambda: torch.randn(2, 3, 0),
}
LEAKY = 0.25, 0.75  # inside, offset


def planes_of(x: torch.Tensor, keep: int) -> torch.Tensor:
    with torch.no_grad():
        return ops.soft_threshold(x, torch.full(x.shape[:2], 0.4), keep=keep)[1]


def meta(x: torch.Tensor) -> tuple[list[int], list[int], torch.dtype]:
    return list(x.shape), list(torch.empty_like(x).stride()), x.dtype


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Every bit, where the mean of nothing is NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def tau(x: torch.Tensor) -> torch.Tensor:
    return torch.full(x.shape[:2], 0.4, requires_grad=True)


ARGUMENTS = {
    "abs_mean": lambda x: (x.requires_grad_(),),
    "abs_mean, no planes": lambda x: (x.requires_grad_(), 0),
    "soft_threshold": lambda x: (x.requires_grad_(), tau(x)),
    "soft_threshold, one tau, leaky, a residual, of a shrink": lambda x: (
        x.requires_grad_(), tau(x[:, :1]), torch.randn_like(x).requires_grad_(), leaf(*x.shape[:2]), *LEAKY, 3,
    ),
    "soft_threshold, no planes": lambda x: (x, tau(x).detach(), None, None, 0.0, 1.0, 0),
    "abs_mean_grad": lambda x: (leaf(*x.shape[:2]), ops.abs_mean(x)[1], *meta(x)),
    "soft_threshold_grad": lambda x: (leaf(*x.shape), planes_of(x, 2), *meta(x)),
    "soft_threshold_grad, leaky, three planes": lambda x: (leaf(*x.shape), planes_of(x, 3), *meta(x), *LEAKY),
    "tau_grad": lambda x: (leaf(*x.shape), planes_of(x, 2), *meta(x), LEAKY[1]),
    "shrink_grad": lambda x: (leaf(*x.shape), planes_of(x, 3), *meta(x), LEAKY[0], leaf(*x.shape[:2])),
    "shrink_grad, of y only": lambda x: (leaf(*x.shape), planes_of(x, 3), *meta(x)),
}  # fmt: skip
OF_NOTHING = ("abs_mean", "abs_mean, no planes", "abs_mean_grad", "shrink_grad")  # with NaN, also in the 2nd derivative


@pytest.mark.sampled(4)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("case", CHECKED)
def test_opcheck(arguments, case):
    if case == "empty length" and arguments in OF_NOTHING:
        pytest.skip("opcheck takes NaN, which the mean of nothing is, for a difference")
    with dk.use_backend("cpu"):
        op = getattr(ops, arguments.partition(",")[0]).default
        torch.library.opcheck(op, ARGUMENTS[arguments](CHECKED[case]()))


def test_every_registered_op_is_checked():
    checked = {name.partition(",")[0] for name in ARGUMENTS}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("drsn_kernels::")}
    assert registered == {f"drsn_kernels::{name}" for name in checked}


@pytest.mark.parametrize("case", CHECKED)
def test_registered_ops_compute_what_the_operators_do(kernels, case):
    x = CHECKED[case]().requires_grad_()
    tau = torch.rand(x.shape[:2], requires_grad=True)
    pooled, planes = ops.abs_mean(x)
    same(pooled, dk.abs_mean(x))
    assert planes.shape == (2, layout_of(x).words)
    y, planes = ops.soft_threshold(x, tau)
    same(y, dk.soft_threshold(x, tau))
    assert not planes.requires_grad
    g = torch.randn(x.shape)
    for a, b in zip(*(torch.autograd.grad(o, (x, tau), g) for o in (y, dk.soft_threshold(x, tau))), strict=True):
        same(a, b)


@pytest.mark.parametrize("case", CHECKED)
def test_the_ops_of_a_shrink_compute_what_shrink_does(kernels, case):
    """Bit for bit, forward and backward, with one pass over g for dx."""
    x, w = CHECKED[case]().requires_grad_(), torch.randn(3, 3, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_()

    def of_ops():
        A, _ = ops.abs_mean(x, 0)
        return ops.soft_threshold(x, (A @ w).sigmoid() * A, residual, A, 0.0, 1.0, 3)[0]

    g, found = torch.randn(x.shape), []
    for y in (of_ops(), dk.shrink(x, lambda a: (a @ w).sigmoid(), residual=residual)):
        found.append([y, *torch.autograd.grad(y, (x, w, residual), g)])
    for a, b in zip(*found, strict=True):
        same(a, b)


def test_registered_ops_numerical_derivatives(kernels):
    x = (torch.randn(2, 3, 4).double().sign() * (0.6 + torch.rand(2, 3, 4).double())).requires_grad_()
    tau = torch.full((2, 3), 0.4, dtype=torch.float64, requires_grad=True)

    def shrunk(x, tau):
        A, _ = ops.abs_mean(x, 0)
        return ops.soft_threshold(x, tau * A, None, A, *LEAKY, 3)[0]

    for run, inputs in (
        (lambda x: ops.abs_mean(x)[0], (x,)),
        (lambda x: ops.abs_mean(x, 0)[0], (x,)),
        (lambda x, tau: ops.soft_threshold(x, tau)[0], (x, tau)),
        (shrunk, (x, tau)),
    ):
        assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


def test_planes_are_gone_after_a_backward_pass_that_keeps_no_graph():
    x = torch.randn(2, 3, 4, requires_grad=True)
    A, _ = ops.abs_mean(x, 0)
    y, _ = ops.soft_threshold(x, A * 0.5, None, A, 0.0, 1.0, 3)
    y.sum().backward(retain_graph=True)
    assert A.grad_fn.planes is not None
    y.sum().backward()
    assert A.grad_fn.planes is None


def test_a_gradient_without_planes_is_an_error():
    x = torch.randn(2, 3, 4, requires_grad=True)
    y, _ = ops.soft_threshold(x, torch.rand(2, 3), keep=0)
    with pytest.raises(RuntimeError, match="keep=0, which keeps no planes for a gradient"):
        y.sum().backward()
