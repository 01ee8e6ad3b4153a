"""Tensors and offsets beyond 2^31 elements on the CPU, where an index of 32 bits would wrap; for Triton see
test_triton_big.py."""

import pytest
import torch
from oracle import shrink, smooth_gate, standard_gate

import drsn_kernels as dk
from drsn_kernels.backends import cpu
from drsn_kernels.backends.cpu_plan import BatchPlan

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(cpu._cpu is None, reason=f"no compiled CPU kernels: {cpu.MISSING}"),
]


@pytest.fixture(autouse=True)
def strictly_cpu():
    with dk.use_backend("cpu", strict=True):
        yield


def needs(gib: int) -> None:
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / (1 << 20)
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free memory, {free:.1f} are there")


# ---- whole tensors of more than 2^31 elements ------------------------------------------------------------------------

# Samples of half a million elements repeat with a period, so each of a result can be compared.
PERIOD, CHANNELS, LENGTH = 37, 64, 8195
SAMPLES = (1 << 31) // (CHANNELS * LENGTH) + 2


def repeated(walk: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x (SAMPLES, CHANNELS, LENGTH) in bfloat16, 4 GiB, and the PERIOD samples that it repeats."""
    few = torch.randn(PERIOD, CHANNELS, LENGTH).bfloat16()
    if walk == "channels_last":
        few = few.transpose(1, 2).contiguous()
    x = torch.empty(SAMPLES, *few.shape[1:], dtype=torch.bfloat16)
    for start in range(0, SAMPLES, PERIOD):
        x[start : start + PERIOD] = few[: SAMPLES - start]
    assert x.numel() > 1 << 31
    return (x.transpose(1, 2), few.transpose(1, 2)) if walk == "channels_last" else (x, few)


def assert_repeats(result: torch.Tensor, few: torch.Tensor) -> None:
    for start in range(0, len(result), len(few)):
        part = result[start : start + len(few)]
        assert torch.equal(part, few[: len(part)]), f"from {start} on"


def gate_of(kind: str):
    """Torch's own matrix products may depend on the number of samples: an element-wise gate, or ours."""
    return torch.nn.Sigmoid() if kind == "any gate" else standard_gate(CHANNELS, 16, CHANNELS, "norm")


WALKS = ["rows", "channels_last"]


@pytest.mark.slow
@pytest.mark.rotated(2)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("kind", ["any gate", "fused gate", "fused gate in blocks"])
def test_forward(walk, kind, monkeypatch):
    needs(10)
    block = 5 if kind.endswith("blocks") else 0
    monkeypatch.setattr(cpu, "batch_plan", lambda step: BatchPlan("", block, ""))
    (x, few), gate = repeated(walk), gate_of(kind)
    with torch.no_grad():
        assert_repeats(dk.shrink(x, gate), dk.shrink(few, gate))


@pytest.mark.slow
@pytest.mark.rotated(2)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("kind", ["any gate", "fused gate"])
def test_backward_with_an_expanded_gradient(walk, kind):
    needs(14)
    (x, few), gate = repeated(walk), gate_of(kind)
    column = torch.randn(PERIOD, CHANNELS, 1).bfloat16()
    column = column.repeat(SAMPLES // PERIOD + 1, 1, 1)[:SAMPLES]

    def gradients(x):
        y = dk.shrink(x.requires_grad_(), gate)
        g = column[: len(x)].expand(y.shape)
        if y.numel() > 1 << 31:
            y.untyped_storage().resize_(0)  # only the graph is needed
        return torch.autograd.grad(y, [x, *gate.parameters()], g)

    dx, *grads = gradients(x)
    x.untyped_storage().resize_(0)
    expected, *part = gradients(few)
    assert_repeats(dx, expected)
    rest = gradients(few.detach()[: SAMPLES % PERIOD])[1:]
    for whole, a, b in zip(grads, part, rest, strict=True):
        right = SAMPLES // PERIOD * a.double() + b.double()
        assert (whole - right).norm() <= 1e-4 * right.norm()


@pytest.mark.slow
def test_one_long_row():
    needs(10)
    few = torch.randn((1 << 31) // 37 + 9).bfloat16()
    x = few.repeat(37)
    assert x.numel() > 1 << 31
    torch.testing.assert_close(dk.abs_mean(x[None, None])[0, 0], few.double().abs().mean().float())
    y = dk.soft_threshold(x[None, None], 0.5)
    assert_repeats(y.view(37, -1), dk.soft_threshold(few[None], 0.5))


# ---- offsets beyond 2^31, on memory that is never committed ----------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("kind", ["any gate", "fused gate"])
def test_strides_whose_multiples_do_not_fit_32_bits(kind, walk, inplace):
    """x, the residual and g (2, 4, 16) lie 2^30 apart along a dimension, in 6 GiB of which a few pages are touched."""
    far = (1 << 30) - 3
    base = torch.empty(3 * far + 256, dtype=torch.bfloat16)
    shape, strides = ((2, 4, 16), (16, far, 1)) if walk == "rows" else ((2, 16, 4), (16, 1, far))
    x, residual, g = (base.as_strided(shape, strides, at).copy_(torch.randn(shape)) for at in (0, 64, 128))
    assert x.stride() == strides and 3 * far > 1 << 31
    gate = smooth_gate(shape[1]) if kind == "any gate" else standard_gate(shape[1], 5, shape[1], "norm")
    near, near_residual = (t.contiguous().float().requires_grad_() for t in (x, residual))
    expected, _ = shrink(near, gate, "channel", near_residual)
    right = torch.autograd.grad(expected, (near, near_residual), g.float())

    leaf, residual = x.requires_grad_(), residual.requires_grad_()
    if inplace:
        with torch.no_grad():
            y = dk.shrink(leaf, gate, residual=residual, inplace=True)
        assert y.data_ptr() == base.data_ptr() and y.stride() == strides
    else:
        y = dk.shrink(leaf, gate, residual=residual)
        for actual, exact in zip(torch.autograd.grad(y, (leaf, residual), g), right, strict=True):
            torch.testing.assert_close(actual, exact.bfloat16(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=2e-2, atol=2e-2)
