"""Noise at an exact signal-to-noise ratio.

The noise experiments of Zhao et al., "Deep Residual Shrinkage Networks for Fault Diagnosis", IEEE TII 2020
(DOI 10.1109/TII.2019.2943898), use Gaussian, Laplacian and pink noise at SNRs from -5 to 5 dB.
"""

import numbers

import torch

from .ops import checks


def _gaussian(shape: torch.Size, like: dict, generator: torch.Generator | None) -> torch.Tensor:
    return torch.empty(shape, **like).normal_(generator=generator)


def _laplace(shape: torch.Size, like: dict, generator: torch.Generator | None) -> torch.Tensor:
    # The difference of two exponentials is Laplacian; the inverse-CDF form would meet log(0) once in 2^24 draws.
    first, second = torch.empty((2, *shape), **like).exponential_(generator=generator)
    return first - second


def _uniform(shape: torch.Size, like: dict, generator: torch.Generator | None) -> torch.Tensor:
    return torch.empty(shape, **like).uniform_(-1, 1, generator=generator)


def _pink(shape: torch.Size, like: dict, generator: torch.Generator | None) -> torch.Tensor:
    spectrum = torch.fft.rfft(_gaussian(shape, like, generator))
    frequency = torch.arange(spectrum.shape[-1], **like)
    weight = frequency.rsqrt()
    weight[0] = 0  # takes the zero bin out; a complex number over inf is NaN in older torch
    return torch.fft.irfft(spectrum * weight, n=shape[-1])


KINDS = {"gaussian": _gaussian, "laplace": _laplace, "pink": _pink, "uniform": _uniform}


def _rms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square and peak of every row of (N, K); scaled by the peak so that no square over- or underflows."""
    peak = x.abs().amax(1, keepdim=True)
    return peak * (x / peak).square().mean(1, keepdim=True).sqrt(), peak


def _decibels(snr_db: float | torch.Tensor, samples: int, like: dict) -> torch.Tensor:
    """snr_db as an (N, 1) or (1, 1) tensor."""
    if isinstance(snr_db, torch.Tensor):
        if snr_db.is_complex() or snr_db.dtype == torch.bool:
            raise TypeError(f"snr_db must hold real numbers, got a tensor of {snr_db.dtype}")
        if snr_db.dim() > 1 or (snr_db.dim() == 1 and snr_db.numel() != samples):
            raise ValueError(
                f"snr_db must be a number or a tensor of {samples} values, one for each sample of x, "
                f"got shape {tuple(snr_db.shape)}"
            )
    elif isinstance(snr_db, bool) or not isinstance(snr_db, numbers.Real):
        raise TypeError(f"snr_db must be a number or a tensor of decibels, got {type(snr_db).__name__}")
    return torch.as_tensor(snr_db, **like).reshape(-1, 1)


def _check(x: torch.Tensor, kind: str, generator: torch.Generator | None) -> None:
    checks.floating(x)
    if x.dim() < 2 or (x.shape[0] and not x[0].numel()):
        raise ValueError(
            f"x must be (N, *shape) with at least two dimensions and non-empty samples, got shape {tuple(x.shape)}"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "pink" and x.shape[-1] < 2:
        raise ValueError(f"kind 'pink' needs a last dimension of at least 2, got x of shape {tuple(x.shape)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(f"generator must be on the device of x, {x.device}, got one on {generator.device}")


def add_noise(
    x: torch.Tensor,
    snr_db: float | torch.Tensor,
    kind: str = "gaussian",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return x plus random noise with exactly the given signal-to-noise ratio in every sample.

    ``SNR_dB = 10 log10(mean(x[i]^2) / mean(n[i]^2))``: the realised noise n[i] is rescaled, so the ratio holds for
    each sample and not only on average (up to the rounding of x.dtype). The mean of x counts as signal.

    Args:
        x: (N, *shape) floating-point tensor of rank 2 or more; each x[i] is one sample, whatever its shape.
            float16 and bfloat16 are computed in float32.
        snr_db: decibels: a number, or a tensor of N values, one for each sample. ``inf`` adds nothing.
        kind: "gaussian"; "laplace"; "pink" (the spectrum of white noise over sqrt(f) along the last dimension,
            without its zero bin, so a power that falls by 3 dB an octave); "uniform" (centred, U[-a, a): an
            offset, as in the U[0, 1) of some image experiments, would be undone by any normalisation and would
            count as noise power here).
        generator: torch.Generator on the device of x; the default generator if None.

    Returns:
        A new tensor with the shape, dtype and device of x. A gradient with respect to x sees the noise as constant.

    Raises:
        TypeError: x is not a floating-point tensor, or snr_db or generator has the wrong type.
        ValueError: a sample is silent (all zeros: no ratio is defined) or holds NaN or Inf (the message gives its
            index); snr_db is NaN, so low that the noise overflows, or of the wrong length; kind is unknown.
    """
    _check(x, kind, generator)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    like = {"dtype": dtype, "device": x.device}
    decibels = _decibels(snr_db, x.shape[0], like)
    if not x.shape[0]:  # an FFT of nothing is an error
        return x.clone()
    with torch.no_grad():
        signal, peak = _rms(x.detach().to(dtype).flatten(1))
        for bad, why in ((~peak.isfinite(), "holds NaN or Inf"), (peak == 0, "is silent (all zeros)")):
            if bad.any():
                raise ValueError(
                    f"x must hold finite samples that are not silent to define an SNR, "
                    f"but sample {int(bad.flatten().nonzero()[0])} {why}"
                )
        noise = KINDS[kind](x.shape, like, generator)
        gain = signal / _rms(noise.flatten(1))[0] * 10 ** (-decibels / 20)
        if not gain.isfinite().all():
            raise ValueError(f"snr_db must give noise of finite power, got {snr_db}")
        noise *= gain.reshape(-1, *[1] * (x.dim() - 1))
    return (x.to(dtype) + noise).to(x.dtype)
