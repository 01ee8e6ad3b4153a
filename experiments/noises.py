"""What hides the signal in the experiments: synthesised street and workshop noise, and content beside the point.

All of them are callables (x, generator) -> a new tensor of x's shape, as recipe.train_epoch takes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from drsn_kernels.noise import add_noise

Bank = Callable[[int, int, float, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class AtSNR:
    """drsn_kernels.noise.add_noise at one SNR: fresh noise for every sample and epoch."""

    kind: str
    snr_db: float

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return add_noise(x, self.snr_db, self.kind, generator)


def _unit(noise: torch.Tensor) -> torch.Tensor:
    return noise / noise.square().mean(-1, keepdim=True).sqrt()


def _shaped(count: int, length: int, weight: Callable[[torch.Tensor], torch.Tensor], rate: float, generator):
    """Gaussian noise (count, length) of unit power whose spectrum is weight(frequency in Hz)."""
    spectrum = torch.fft.rfft(torch.randn(count, length, generator=generator))
    return _unit(torch.fft.irfft(spectrum * weight(torch.fft.rfftfreq(length, 1 / rate)), n=length))


def _pink(f: torch.Tensor) -> torch.Tensor:
    return f.clamp_min(1e-9).rsqrt() * (f > 20)


def street(count: int, length: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Recordings (count, length) of a street: a pink background, and vehicles that pass.

    A vehicle is noise around 250 Hz (a Gaussian in log frequency, one octave wide to each side). Its level rises and
    falls as 1 / (1 + (t / w)^2), the power of a source that passes at constant speed, with w of 0.2 to 0.6 s, and is at
    the closest point 2 to 4 times the background's. One passes in every 1.5 s on average.
    """
    background = _shaped(count, length, _pink, rate, generator)
    engine = _shaped(count, length, lambda f: torch.exp(-(f.clamp_min(1) / 250).log2().square() / 2), rate, generator)
    time = torch.arange(length) / rate
    level = torch.zeros(count, length)
    for _ in range(max(1, round(length / rate / 1.5))):
        closest, width, loud = torch.rand(3, count, 1, generator=generator)
        passing = 1 / (1 + ((time - closest * length / rate) / (0.2 + 0.4 * width)).square())
        level += (2 + 2 * loud) * passing.sqrt()
    return _unit(background + level * engine)


def workshop(count: int, length: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Recordings (count, length) of a workshop: white hiss, a motor's hum, and hammer strokes.

    The hum has a fundamental of 45 to 55 Hz and eleven harmonics, the k-th at 1 / k with a random phase, and the power
    of the hiss times 4. Strokes come at 2 to 5 a second, each with two damped modes of steel (600 to 1,500 Hz and 1,500
    to 3,500 Hz, decaying by e in 20 to 60 ms), and together carry the power of the hiss times 8.
    """
    time = torch.arange(length) / rate
    hiss = torch.randn(count, length, generator=generator)
    fundamental = 45 + 10 * torch.rand(count, 1, generator=generator)
    phases = 2 * math.pi * torch.rand(12, count, 1, generator=generator)
    hum = sum(torch.sin(2 * math.pi * k * fundamental * time + phases[k - 1]) / k for k in range(1, 13))
    low, high, decay, often = torch.rand(4, count, 1, generator=generator)
    ring = torch.sin(2 * math.pi * (600 + 900 * low) * time) + torch.sin(2 * math.pi * (1500 + 2000 * high) * time)
    ring *= torch.exp(-time / (0.02 + 0.04 * decay))
    strikes = torch.rand(count, length, generator=generator) < (2 + 3 * often) / rate
    force = strikes * (0.5 + torch.rand(count, length, generator=generator))
    force[:, 0] += 1e-3  # a recording without a stroke has a power too
    strokes = torch.fft.irfft(torch.fft.rfft(force, 2 * length) * torch.fft.rfft(ring, 2 * length))[:, :length]
    return _unit(_unit(hiss) + 2 * _unit(hum) + math.sqrt(8) * _unit(strokes))


@dataclass(frozen=True)
class Recorded:
    """Noise at one SNR from recordings: for every sample a random piece of a random one.

    Training and testing use recordings of their own, as a microphone would hear another hour of the same place.
    """

    recordings: torch.Tensor  # (count, samples), more samples than x has
    snr_db: float

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, length = self.recordings.shape
        which = torch.randint(count, (len(x),), generator=generator)
        start = torch.randint(length - x.shape[-1] + 1, (len(x),), generator=generator)
        noise = self.recordings.unfold(1, x.shape[-1], 1)[which, start].view_as(x)
        power = x.square().mean(-1, keepdim=True) / noise.square().mean(-1, keepdim=True)
        return x + noise * (power * 10 ** (-self.snr_db / 10)).sqrt()


def uniform_offset(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images in [0, 1] plus 0.5 U[0, 1), as in the authors' code for MNIST."""
    return x + 0.5 * torch.rand(x.shape, generator=generator)


def pasted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (N, 1, H, W) with another one of x at half its size in a random corner, the brighter pixel winning.

    The large digit is the one to recognise; the small one is content without a meaning for it.
    """
    small = F.avg_pool2d(x[torch.randperm(len(x), generator=generator)], 2)
    height, width = small.shape[2:]
    canvas = torch.zeros(4, *x.shape)
    for corner, (rows, columns) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        top, left = rows * (x.shape[2] - height), columns * (x.shape[3] - width)
        canvas[corner, ..., top : top + height, left : left + width] = small
    corner = torch.randint(4, (len(x),), generator=generator)
    return torch.maximum(x, canvas[corner, torch.arange(len(x))])
