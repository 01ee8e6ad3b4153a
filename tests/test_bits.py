"""The arithmetic on bits (backends/gpu/bits.py), interpreted, against pure PyTorch: planes bit for bit, y and dx equal.

Both ways that it is written: in Triton, and with the inline PTX that GPUs of NVIDIA get, run by tests/ptx_model.py.
"""

import numpy as np
import ptx_model
import pytest
import torch
from oracle import wide

from drsn_kernels import layout as layouts
from drsn_kernels.backends import gpu
from drsn_kernels.backends.eager import eager
from drsn_kernels.backends.gpu.backend import Gpu
from drsn_kernels.layout import averaged
from drsn_kernels.reference import SOFT, Rule

pytestmark = pytest.mark.skipif(
    not (gpu.missing() is None and gpu.interpreting()), reason="needs Triton, interpreted (no CUDA device)"
)

ours = Gpu()
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VALUES = [0.0, -0.0, INF, -INF, NAN, -NAN, 0.5, -0.5, 1e-40, -1e-40, 6e-8, 3e38, -60000.0]
TAUS = [0.5, 0.0, -0.0, -0.3, NAN, INF, -INF, 1e-40, 0.1, 65504.0, 65519.9, 65520.0, 3.4e38]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["Triton", "inline PTX"], autouse=True)
def written(request, monkeypatch):
    if request.param == "inline PTX":
        ptx_model.install(monkeypatch)
    return request.param


def same(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal, NaN equals NaN, -0.0 equals 0.0."""
    assert (actual is None) == (expected is None)
    if actual is not None:
        wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
        assert not wrong.any(), (wrong.nonzero()[:5].tolist(), actual[wrong][:5], expected[wrong][:5])


def same_bits(actual, expected, layout) -> None:
    """Every byte that belongs to a row, its padding too."""
    used = layout.rows * layout.row_bits // 8
    assert actual[1:] == expected[1:]
    for one, other in zip(actual.bits, expected.bits, strict=True):
        assert torch.equal(one.view(torch.uint8)[:used], other.view(torch.uint8)[:used])


def check_map(x, tau, rule=SOFT, residual=None, keep=3):
    layout = layouts.layout_of(x)
    y, planes = ours.map(x, layout, tau, rule=rule, residual=residual, keep=keep)
    expected, wanted = eager.map(x, layout, tau, rule=rule, residual=residual, keep=keep)
    same(y, expected)
    same_bits(planes, wanted, layout)
    return layout, planes


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every 16-bit value; of float32 and float64 those of VALUES and of every exponent, and their neighbours."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    middle = torch.cat([powers, -powers, 1.37 * powers, torch.tensor(VALUES + TAUS, dtype=torch.float64)]).to(dtype)
    bits = middle.view(torch.int32 if dtype == torch.float32 else torch.int64)
    return torch.cat([bits - 1, bits, bits + 1]).view(dtype)


def thresholds(dtype: torch.dtype) -> torch.Tensor:
    """TAUS, and values of x's dtype and what float32 has next to them."""
    some = numbers(dtype).to(wide(dtype))
    some = some[torch.randperm(len(some))[:6]].abs()
    beside = torch.cat([torch.nextafter(some, torch.tensor(to).to(some)) for to in (0.0, INF)])
    return torch.cat([torch.tensor(TAUS, dtype=some.dtype), some, beside])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("columns", [False, True], ids=["a tau a row", "a tau a column"])
@each_dtype
def test_every_value_against_thresholds(dtype, columns):
    x, tau = numbers(dtype), thresholds(dtype)
    x = x[: len(x) // 16 * 16]
    if columns:  # channels_last: neighbouring elements have thresholds of their own
        tau = torch.cat([tau, tau])[:32]
        check_map(x[None, :, None].expand(1, -1, 32).contiguous().transpose(1, 2), tau[None])
    else:
        check_map(x.expand(len(tau), 1, -1).contiguous(), tau[:, None])


def special(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape)
    where = torch.rand(shape) < 0.4
    x[where] = torch.tensor(VALUES)[torch.randint(0, len(VALUES), (int(where.sum()),))]
    return x.to(dtype)


def laid(x: torch.Tensor, where: str) -> torch.Tensor:
    """x (N, C, L) with its values, in another layout: rows of C, every second element, or off the 16-byte grid."""
    if where == "channels_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if where == "sliced":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if where == "shifted":
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    return x


@pytest.mark.sampled(4)
@pytest.mark.parametrize("where", ["rows", "channels_last", "sliced", "shifted"])
@each_dtype
def test_rows_of_every_length(dtype, where):
    some = [1, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 64, 70]
    lengths = torch.arange(1, 71) if where == "rows" else torch.tensor(some)
    start = int(torch.randint(0, 5, ()))
    for length in lengths[start::5].tolist():  # another fifth of them with another seed
        shape = (2, length, 3) if where == "channels_last" else (2, 3, length)
        n, c = shape[:2]
        x, added, g = (t.to(dtype) for t in (special(shape, dtype), torch.randn(shape), torch.randn(shape)))
        x, added, g = (laid(t, where) for t in (x, added, g))
        tau = torch.tensor(TAUS, dtype=wide(dtype))[torch.randint(0, len(TAUS), (n, c))]
        layout, planes = check_map(x, tau)
        check_map(x, tau[:, :1], residual=added, keep=2)
        torch.testing.assert_close(ours.reduce(added, layout)[0], eager.reduce(added, layout)[0])
        same_bits(ours.reduce(x, layout, keep=True)[1], eager.reduce(x, layout, keep=True)[1], layout)
        check_grad(layout, planes, g)


def check_grad(layout, planes, g, rule=SOFT):
    g = torch.where(layouts.unpack(planes.plane("kept"), layout), g, torch.tensor(INF, dtype=g.dtype))  # is masked
    for given, gradient, with_dA, options in (
        (planes, g, True, dict(want_dtau=True)),
        (planes._replace(nonzero=None), g, False, dict(want_dtau=True, want_dx=False)),
        (planes._replace(nonzero=None), g, False, {}),
        (averaged(planes.bits[1:]), None, True, {}),
    ):
        dA = torch.randn(layout.n, layout.c, dtype=wide(g.dtype)) if with_dA else None
        dx, dtau = ours.grad(layout, g.dtype, given, gradient, dA=dA, rule=rule, **options)
        expected, wanted = eager.grad(layout, g.dtype, given, gradient, dA=dA, rule=rule, **options)
        if with_dA and expected is not None:  # dA / L as a product with 1 / L
            torch.testing.assert_close(dx, expected)
        else:
            same(dx, expected)
        if dtau is not None:
            torch.testing.assert_close(dtau, wanted)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "rule", [Rule(0.25, 0.75), Rule(0.1, 0.0), Rule(0.0, 0.0)], ids=["leaky", "hard, leaky", "hard"]
)
@pytest.mark.parametrize("length", [64, 37])
@each_dtype
def test_other_rules(dtype, length, rule):
    x, g = special((2, 7, length), dtype), torch.randn(2, 7, length).to(dtype)
    tau = torch.tensor(TAUS, dtype=wide(dtype))[torch.randint(0, len(TAUS), (2, 7))]
    layout, planes = check_map(x, tau, rule)
    for dA in (None, torch.randn(2, 7, dtype=wide(dtype))):
        dx, dtau = ours.grad(layout, dtype, planes, g, dA=dA, want_dtau=True, rule=rule)
        expected, wanted = eager.grad(layout, dtype, planes, g, dA=dA, want_dtau=True, rule=rule)
        torch.testing.assert_close(dx, expected)
        torch.testing.assert_close(dtau, wanted)


# ---- the instructions by themselves ----------------------------------------------------------------------------------


def test_the_model_of_the_instructions():
    """By the examples of the PTX ISA, and sums of products by hand."""
    a, b = np.array([0x83828180], np.uint32), np.array([0x07060504], np.uint32)
    assert ptx_model.prmt(a, b, 0x3210)[0] == 0x83828180 and ptx_model.prmt(a, b, 0x7654)[0] == 0x07060504
    assert ptx_model.prmt(a, b, 0xFB80)[0] == 0x00FFFF80
    assert ptx_model.dp4a(np.array([0xFF00FF01], np.uint32), np.array([0x80020302], np.uint32), b)[0] == (
        0x07060504 + 128 - 3 + 2
    )
    assert ptx_model.funnel_left(np.array([0x80000000], np.uint32), np.array([5], np.uint32), np.uint32(1))[0] == 11
