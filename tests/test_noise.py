"""drsn_kernels.noise: exact SNR, and each kind's own distribution or spectrum."""

import math

import pytest
import torch
from oracle import seeded

from drsn_kernels.noise import KINDS, add_noise


def snr_of(x, noise):
    power = [t.double().flatten(1).square().mean(1) for t in (x, noise)]
    return 10 * torch.log10(power[0] / power[1])


def noise_of(kind, shape, seed=0):
    """The noise alone at 0 dB against a constant of 1, so of RMS 1; float64, so that nothing is rounded away."""
    x = torch.ones(shape, dtype=torch.float64)
    return add_noise(x, 0.0, kind, seeded(seed)) - x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 33), (5, 1, 2048), (5, 3, 8, 7)])
def test_snr_is_exact_in_every_sample(kind, shape):
    scales = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e3]).view(-1, *[1] * (len(shape) - 1))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        x = torch.randn(shape, generator=seeded(), dtype=dtype) * scales.to(dtype)
        snr = torch.tensor([-10.0, -5.0, 0.0, 3.0, 10.0])
        for wanted in (snr, -5.0):
            noisy = add_noise(x, wanted, kind, seeded(1))
            assert noisy.dtype == dtype and noisy.shape == x.shape
            error = snr_of(x, noisy.double() - x.double()) - torch.as_tensor(wanted)
            assert error.abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype):
    x = torch.randn(4, 1, 2048, generator=seeded()).to(dtype)
    noisy = add_noise(x, -5.0, generator=seeded(1))
    assert noisy.dtype == dtype
    assert torch.equal(noisy, add_noise(x.float(), -5.0, generator=seeded(1)).to(dtype))


def test_extreme_scales_neither_overflow_nor_vanish():
    for scale in (1e-30, 1e30):
        x = scale * torch.randn(2, 100, generator=seeded())
        noisy = add_noise(x, 0.0, generator=seeded(1))
        error = snr_of(x.double() / scale, (noisy.double() - x.double()) / scale)
        assert error.abs().max() < 1e-4


def test_gaussian_and_laplace_and_uniform_distributions():
    count = 200_000
    for kind, kurtosis, tolerance in (("gaussian", 3.0, 0.08), ("laplace", 6.0, 0.4), ("uniform", 1.8, 0.02)):
        noise = noise_of(kind, (1, count))
        assert abs(noise.mean()) < 5 / math.sqrt(count), kind
        assert abs((noise**4).mean() - kurtosis) < tolerance, kind
    assert noise.abs().max() < 1.001 * math.sqrt(3)  # the uniform one is bounded
    laplace = noise_of("laplace", (1, count))
    assert abs(laplace.abs().mean() - math.sqrt(0.5)) < 0.01  # b = sqrt(P / 2)


def test_power_spectrum_slopes():
    for kind, slope in (("gaussian", 0.0), ("laplace", 0.0), ("uniform", 0.0), ("pink", -1.0)):
        power = torch.fft.rfft(noise_of(kind, (256, 2048))).abs().square().mean(0)[1:-1]
        x, y = torch.arange(1, len(power) + 1).double().log(), power.log()
        fitted = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        assert abs(fitted - slope) < 0.02, kind


def test_pink_has_no_zero_bin_along_the_last_dimension():
    noise = noise_of("pink", (2, 3, 5, 64))
    assert noise.mean(-1).abs().max() < 1e-12
    assert noise.mean(-2).abs().max() > 0.01


def test_reproducible_from_a_generator_and_fresh_without_a_seed():
    x = torch.randn(3, 1, 64, generator=seeded())
    for kind in KINDS:
        one, same, other = (add_noise(x, 0.0, kind, seeded(s)) for s in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)
        generator = seeded(1)
        assert not torch.equal(add_noise(x, 0.0, kind, generator), add_noise(x, 0.0, kind, generator))
        torch.manual_seed(5)
        default = add_noise(x, 0.0, kind)
        torch.manual_seed(5)
        assert torch.equal(default, add_noise(x, 0.0, kind))


def test_the_input_is_left_alone_and_layout_does_not_matter():
    x = torch.randn(4, 6, 5, generator=seeded())
    before = x.clone()
    plain = add_noise(x.transpose(1, 2).contiguous(), 0.0, generator=seeded(1))
    strided = add_noise(x.transpose(1, 2), 0.0, generator=seeded(1))
    assert torch.equal(x, before)
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-6)


def test_infinite_snr_and_empty_batch_and_gradient():
    x = torch.randn(2, 1, 16, generator=seeded(), requires_grad=True)
    assert torch.equal(add_noise(x, math.inf), x)
    add_noise(x, 0.0).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert add_noise(torch.empty(0, 1, 16), 0.0, "pink").shape == (0, 1, 16)


OK = torch.ones(3, 8)
BAD_SAMPLE = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, float("nan")]])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0, 2.0], 0.0), TypeError, "x must be a floating-point tensor, got list"),
        ((torch.ones(3, 8, dtype=torch.int64), 0.0), TypeError, "x must be .* got torch.int64"),
        ((torch.ones(3, 8, dtype=torch.complex64), 0.0), TypeError, "x must be .* got torch.complex64"),
        ((torch.ones(8), 0.0), ValueError, r"x must be \(N, \*shape\).* got shape \(8,\)"),
        ((torch.ones(3, 0), 0.0), ValueError, r"non-empty samples, got shape \(3, 0\)"),
        ((BAD_SAMPLE[:2], 0.0), ValueError, "sample 1 is silent"),
        ((BAD_SAMPLE[[0, 2]], 0.0), ValueError, "sample 1 holds NaN"),
        ((OK, "5"), TypeError, "snr_db must be a number .* got str"),
        ((OK, True), TypeError, "snr_db must be a number .* got bool"),
        ((OK, torch.ones(3, dtype=torch.bool)), TypeError, "snr_db must hold real numbers, got .* torch.bool"),
        ((OK, torch.zeros(2)), ValueError, r"snr_db must be .* 3 values.* got shape \(2,\)"),
        ((OK, torch.zeros(3, 1)), ValueError, r"snr_db must be .* got shape \(3, 1\)"),
        ((OK, math.nan), ValueError, "snr_db must give noise of finite power, got nan"),
        ((OK, -math.inf), ValueError, "snr_db must give noise of finite power, got -inf"),
        ((OK, -1000.0), ValueError, "snr_db must give noise of finite power, got -1000"),
        ((OK, 0.0, "brown"), ValueError, "kind must be one of gaussian, laplace, pink, uniform, got 'brown'"),
        ((OK[:, :1], 0.0, "pink"), ValueError, "kind 'pink' needs a last dimension of at least 2"),
        ((OK, 0.0, "pink", 3), TypeError, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        add_noise(*arguments)
