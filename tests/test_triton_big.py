"""Tensors beyond 2^31 elements, offsets and rows: the first program of a grid, on memory that is never committed."""

import pytest
import torch

import drsn_kernels as dk
from drsn_kernels.backends import gpu

pytestmark = [
    pytest.mark.skipif(not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted"),
    pytest.mark.unpoisoned,
]
if gpu.missing() is None:
    from drsn_kernels.backends.gpu import launch, plans, tuned


@pytest.fixture(autouse=True)
def strictly_triton():
    with dk.use_backend("triton", strict=True):
        yield


@pytest.fixture
def one_program(monkeypatch):
    """Grids of one program: at the first tile, as the reversed order counts from the grid that is left."""
    prepare = launch.Prepared.__init__

    def first_only(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        self.grid = (1, 1, 1)

    monkeypatch.setattr(launch.Prepared, "__init__", first_only)


@pytest.mark.parametrize("shape", [(65536, 32768, 2), (1, 1, 2**31 + 16), (1, 1, 2**31 + 5)], ids=str)
def test_many_rows_and_a_long_one(one_program, shape):
    """One program, at the first tile whatever the order: it must be written, whatever the product of sizes."""
    x = torch.full((1,), 3.0, dtype=torch.float16).expand(shape)
    y = dk.soft_threshold(x, 0.5)
    assert y.view(-1)[:16].tolist() == [2.5] * 16


@pytest.mark.parametrize("plan", ["any gate", "one pass", "launches"])
def test_a_stride_whose_multiples_do_not_fit_32_bits(plan, monkeypatch):
    """(N, C, L) stored as (C, N, L), C four times 2^30 elements apart."""
    stride = 2**30 - 3
    base = torch.empty(3 * stride + 64, dtype=torch.float16)
    x = base.as_strided((2, 4, 16), (16, stride, 1)).copy_(torch.randn(2, 4, 16))
    gate = torch.nn.Sigmoid() if plan == "any gate" else dk.Shrinkage(4, norm=False).fc
    if plan == "launches":
        monkeypatch.setattr(plans, "one_pass", lambda *args: "not here")
    tuned.forget()
    y = dk.shrink(x, gate)
    tuned.forget()
    with dk.use_backend("torch"):
        torch.testing.assert_close(y, dk.shrink(x.contiguous(), gate), rtol=1e-3, atol=1e-3)
