"""experiments/noises.py: street, workshop and what is beside the point on an image."""

import math
import sys
from pathlib import Path

import torch
from oracle import seeded

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind the installed package

from experiments import noises, tasks  # noqa: E402
from experiments.tasks import Condition  # noqa: E402

RATE = 8000.0


def power(noise: torch.Tensor, low: float, high: float) -> float:
    """Share of the power between two frequencies."""
    spectrum = torch.fft.rfft(noise).abs().square().mean(0)
    f = torch.fft.rfftfreq(noise.shape[1], 1 / RATE)
    return float(spectrum[(f >= low) & (f < high)].sum() / spectrum.sum())


def kurtosis(noise: torch.Tensor) -> float:
    """3 for Gaussian noise; more where rare events carry the power."""
    return float(noise.pow(4).mean() / noise.square().mean() ** 2)


def test_street_and_workshop():
    street = noises.street(12, 24_000, RATE, seeded())
    workshop = noises.workshop(12, 24_000, RATE, seeded())
    for noise in (street, workshop):
        assert noise.shape == (12, 24_000)
        torch.testing.assert_close(noise.square().mean(1), torch.ones(12))
    assert power(street, 125, 500) > 0.6 and power(street, 2000, 4000) < 0.05  # engines at 250 Hz
    level = street.unfold(1, 2400, 2400).square().mean(2)  # of 0.3 s each: vehicles come and go
    changes = level.amax(1) / level.amin(1)
    assert changes.median() > 5 and (changes > 1.5).all()
    assert kurtosis(workshop) > 6  # strokes
    hum = power(workshop, 44, 56) + power(workshop, 89, 111)
    assert 0.15 < hum < 0.35  # of 4 / 13 of the power in 12 harmonics, the first two have 0.31 * 1.25 / 1.56
    assert torch.equal(noises.street(2, 800, RATE, seeded(3)), noises.street(2, 800, RATE, seeded(3)))


def test_recorded_noise_has_the_snr_and_pieces_of_the_recordings():
    recordings = torch.randn(3, 300)
    x = torch.randn(50, 1, 64) * torch.linspace(0.1, 3, 50).view(-1, 1, 1)
    added = noises.Recorded(recordings, -7.0)(x, seeded()) - x
    snr = 10 * (x.square().mean((1, 2)) / added.square().mean((1, 2))).log10()
    torch.testing.assert_close(snr, torch.full((50,), -7.0), atol=1e-3, rtol=0)
    pieces = recordings.unfold(1, 64, 1).flatten(0, 1)
    alike = torch.nn.functional.normalize(added.squeeze(1)) @ torch.nn.functional.normalize(pieces).T
    found = alike.amax(1)
    torch.testing.assert_close(found, torch.ones(50), atol=1e-3, rtol=0)
    assert len(alike.argmax(1).unique()) > 40
    whole = noises.Recorded(recordings, 0.0)(torch.ones(2, 1, 300), seeded())  # no more samples than x has
    assert whole.shape == (2, 1, 300)


def test_training_and_testing_hear_other_recordings():
    train, test = tasks.noise(Condition("street", -5.0), 800.0)
    assert train.snr_db == test.snr_db == -5.0
    assert train.recordings.shape == test.recordings.shape == (tasks.RECORDINGS, 2400)
    alike = torch.nn.functional.normalize(train.recordings) @ torch.nn.functional.normalize(test.recordings).T
    assert alike.abs().max() < 0.9


def test_uniform_offset():
    x = torch.rand(20, 1, 28, 28)
    added = noises.uniform_offset(x, seeded()) - x
    assert added.min() > -1e-6 and added.max() < 0.5
    assert abs(float(added.mean()) - 0.25) < 0.01 and abs(float(added.std()) - 0.5 / math.sqrt(12)) < 0.01


def test_pasted_content():
    x = torch.rand(60, 1, 8, 8)
    y = noises.pasted(x, seeded())
    assert (y >= x).all()
    small = torch.nn.functional.avg_pool2d(x, 2)
    corners = set()
    for sample, before in zip(y, x, strict=True):
        matches = []
        for row, column in ((0, 0), (0, 4), (4, 0), (4, 4)):
            inside = torch.zeros(8, 8, dtype=torch.bool)
            inside[row : row + 4, column : column + 4] = True
            candidates = torch.maximum(before[0, row : row + 4, column : column + 4], small[:, 0])
            same = (candidates == sample[0, row : row + 4, column : column + 4]).flatten(1).all(1)
            if same.any() and torch.equal(sample[0][~inside], before[0][~inside]):
                matches.append((row, column))
        assert matches
        corners.update(matches)
    assert len(corners) == 4
