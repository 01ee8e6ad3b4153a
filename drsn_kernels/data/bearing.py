r"""Simulated vibration of a rolling bearing, healthy or with a local fault.

The model is the usual one of bearing diagnostics (McFadden and Smith, J. Sound Vib. 96, 1984, for the impulse train
and its load-zone modulation; Antoni and Randall, J. Vib. Acoust. 125, 2003, for random slip; Sawalhi and Randall,
MSSP 25, 2011, for the two events of a spall):

- A spall is struck once for each passing of a rolling element, at a rate that is a fixed multiple of the shaft speed
  (its *order*, from the geometry). The outer race is struck ``outer`` times a revolution, the inner race ``inner``
  times, and a spalled ball twice for each turn about its own axis, alternately against the two races.
- Slip makes each interval between strikes vary by about 1 %, independently, so the train is not strictly periodic; the
  shaft speed itself wanders slowly by about 1 %.
- A strike is as strong as the load on the contact, Q(psi) ~ max(cos psi, 0)^1.5 (Stribeck, zero clearance, point
  contact), where psi is the angle to the centre of the load zone. The outer race's spall rests near that centre, the
  inner race's turns with the shaft and a ball's with the cage: this is the amplitude modulation seen in the spectra.
- An element drops into the spall and climbs out of it: a weaker entry event, then the exit, a delay apart that is
  proportional to the spall's width.
- Every event rings two damped modes of the structure, how much of each depending on the way from race to sensor.
- Shaft harmonics (unbalance, misalignment) and white sensor noise are added.
"""

import math
from dataclasses import dataclass

import torch

from ._dataset import Dataset, Windows, check_counts, standardise

SAMPLING_RATE = 12_000.0
MODES_HZ = (2_150.0, 3_300.0)
DAMPING = 0.05
BACKGROUND = 0.05  # RMS of the white sensor noise; a fault of 0.5 mm at full load strikes with amplitude 1


@dataclass(frozen=True)
class Geometry:
    """A rolling bearing with a fixed outer race; orders are events for each revolution of the shaft.

    The defaults are the SKF 6205 of the CWRU test rig's drive end. Diameters are in mm, the contact angle in radians.
    """

    elements: int = 9
    element_diameter: float = 7.94
    pitch_diameter: float = 39.04
    contact_angle: float = 0.0

    @property
    def ratio(self) -> float:
        return self.element_diameter / self.pitch_diameter * math.cos(self.contact_angle)

    @property
    def cage(self) -> float:
        """Fundamental train frequency."""
        return (1 - self.ratio) / 2

    @property
    def outer(self) -> float:
        """Ball pass frequency of the outer race."""
        return self.elements * self.cage

    @property
    def inner(self) -> float:
        """Ball pass frequency of the inner race."""
        return self.elements * (1 + self.ratio) / 2

    @property
    def ball(self) -> float:
        """Strikes of a spalled ball: twice its spin frequency."""
        return self.pitch_diameter / self.element_diameter * (1 - self.ratio**2)

    def order(self, element: str) -> float:
        """The fault order of "outer", "inner" or "ball"."""
        return getattr(self, element)

    def exit_angle(self, width: float) -> float:
        """Shaft angle in radians between entry into a spall of this width in mm and the exit event.

        In pure rolling the contact moves over both races and the ball at the same speed, pitch_diameter / 4 *
        (1 - ratio^2) for each radian of the shaft; the exit event comes when the element is half way across.
        """
        return width / 2 / (self.pitch_diameter / 4 * (1 - self.ratio**2))


@dataclass(frozen=True)
class Fault:
    """A spall on "outer", "inner" or "ball"; width in mm along the rolling direction."""

    element: str
    width: float


CLASSES: dict[str, tuple[Fault, ...]] = {
    "healthy": (),
    "inner 0.5 mm": (Fault("inner", 0.5),),
    "inner 1.5 mm": (Fault("inner", 1.5),),
    "outer 0.5 mm": (Fault("outer", 0.5),),
    "outer 1.5 mm": (Fault("outer", 1.5),),
    "ball 0.5 mm": (Fault("ball", 0.5),),
    "ball 1.5 mm": (Fault("ball", 1.5),),
    "inner + outer 0.5 mm": (Fault("inner", 0.5), Fault("outer", 0.5)),
}

# How much of each mode a strike on this element rings at the sensor.
_PATH = {"outer": (1.0, 0.6), "inner": (0.6, 0.8), "ball": (0.8, 0.3)}


class _Draw:
    """Random (N, 1) columns from one generator: a value for each recording."""

    def __init__(self, recordings: int, generator: torch.Generator | None) -> None:
        self.recordings, self.generator = recordings, generator

    def uniform(self, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(self.recordings, 1, generator=self.generator)

    def normal(self, columns: int) -> torch.Tensor:
        return torch.randn(self.recordings, columns, generator=self.generator)


def _strikes(fault: Fault, geometry: Geometry, turns: float, draw: _Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Shaft angles (N, K) in radians of the exit events of one spall over this many turns, and their amplitudes."""
    order = geometry.order(fault.element)
    interval = 2 * math.pi / order
    count = math.ceil(turns * order * 1.05) + 2
    angle = (draw.uniform(-1, 0) + (1 + 0.01 * draw.normal(count)).cumsum(1) - 1) * interval
    phase = draw.uniform(0, 2 * math.pi)
    position = {
        "outer": 0.25 * phase.sub(math.pi) / math.pi,
        "inner": angle + phase,
        "ball": angle * geometry.cage + phase,
    }[fault.element]
    load = position.cos().clamp_min(0) ** 1.5
    if fault.element == "ball":  # against the inner race the way to the sensor is longer
        load = load * torch.where(torch.arange(count) % 2 == 0, 1.0, 0.7)
    strength = math.sqrt(fault.width / 0.5) * draw.uniform(0.7, 1.4)
    return angle, strength * load * (1 + 0.1 * draw.normal(count))


def _impulses(times: torch.Tensor, amplitudes: torch.Tensor, samples: int) -> torch.Tensor:
    """Impulses (N, K) at times in samples, each shared linearly between its two neighbours, on a grid (N, samples)."""
    left = times.floor()
    right_share = times - left
    train = torch.zeros(times.shape[0], samples + 1)
    for index, amplitude in ((left, amplitudes * (1 - right_share)), (left + 1, amplitudes * right_share)):
        outside = (index < 0) | (index >= samples)
        train.scatter_add_(1, torch.where(outside, samples, index).long(), amplitude)
    return train[:, :samples]


def _ring(train: torch.Tensor, mode_hz: torch.Tensor) -> torch.Tensor:
    """Response (N, samples) of a damped mode at mode_hz (N, 1) to an impulse train (N, samples)."""
    samples = train.shape[1]
    angle = 2 * math.pi * mode_hz / SAMPLING_RATE * torch.arange(samples)
    response = torch.exp(-DAMPING * angle) * angle.sin()
    spectrum = torch.fft.rfft(train, n=2 * samples) * torch.fft.rfft(response, n=2 * samples)
    return torch.fft.irfft(spectrum, n=2 * samples)[:, :samples]


def simulate_recordings(
    faults: tuple[Fault, ...],
    recordings: int,
    samples: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vibration recordings of one state of health, each with its own speed, phases, load and background.

    Args:
        faults: the spalls; empty for a healthy bearing.
        recordings: N.
        samples: length of each recording, at 12 kHz.
        generator: CPU torch.Generator; the default generator if None.

    Returns:
        The acceleration in arbitrary units, float32 (N, samples), and the mean shaft speed in Hz, float32 (N,).
    """
    geometry, draw = Geometry(), _Draw(recordings, generator)
    speed = draw.uniform(28.0, 30.5)
    wander, wander_hz, phase = 0.01, draw.uniform(0.5, 2.0), draw.uniform(0, 2 * math.pi)

    def drift(seconds: torch.Tensor) -> torch.Tensor:
        """Seconds by which a shaft of wandering speed is ahead of one of constant speed."""
        angle = 2 * math.pi * wander_hz
        return wander / angle * (phase.cos() - torch.cos(angle * seconds + phase))

    seconds = torch.arange(samples) / SAMPLING_RATE
    shaft = 2 * math.pi * speed * (seconds + drift(seconds))
    x = BACKGROUND * draw.uniform(0.7, 1.4) * draw.normal(samples)
    for harmonic, level in ((1, 0.20), (2, 0.12), (3, 0.06)):
        x += level * draw.uniform(0.5, 1.5) * torch.sin(harmonic * shaft + draw.uniform(0, 2 * math.pi))

    modes = [mode * draw.uniform(0.96, 1.04) for mode in MODES_HZ]
    turns = samples / SAMPLING_RATE * float(speed.max()) * (1 + wander)
    for fault in faults:
        angle, amplitude = _strikes(fault, geometry, turns, draw)
        gap = geometry.exit_angle(fault.width)
        train = 0
        for event, share in ((angle - gap, -0.5), (angle, 1.0)):
            ideal = event / (2 * math.pi * speed)
            time = ideal - drift(ideal - drift(ideal))  # inverts shaft(t); the error is below wander^3 / wander_hz
            train = train + _impulses(time * SAMPLING_RATE, share * amplitude, samples)
        for mode, share in zip(modes, _PATH[fault.element], strict=False):
            x += share * draw.uniform(0.7, 1.4) * _ring(train, mode)
    return x, speed.squeeze(1)


def simulate_bearing(
    train_recordings: int = 25,
    test_recordings: int = 12,
    windows_per_recording: int = 10,
    *,
    length: int = 2048,
    generator: torch.Generator | None = None,
) -> Dataset:
    """Windows of simulated bearing vibration at 12 kHz in eight states of health.

    Training and test windows come from different recordings, so from other speeds, phases, loads and resonances.
    Every class has the same number of windows; their order is by class.

    Args:
        train_recordings, test_recordings: recordings for each class.
        windows_per_recording: consecutive windows without overlap, cut from each recording.
        length: samples a window.
        generator: CPU torch.Generator; the same seed gives the same data. The default generator if None.

    Raises:
        ValueError: a count below 1, or a length below 2.
    """
    check_counts(
        1,
        train_recordings=train_recordings,
        test_recordings=test_recordings,
        windows_per_recording=windows_per_recording,
    )
    check_counts(2, length=length)
    splits = []
    for recordings in (train_recordings, test_recordings):
        windows = [
            simulate_recordings(faults, recordings, windows_per_recording * length, generator)[0]
            for faults in CLASSES.values()
        ]
        labels = torch.arange(len(CLASSES)).repeat_interleave(recordings * windows_per_recording)
        splits += [standardise(torch.cat(windows).reshape(-1, 1, length)), labels]
    return Dataset(
        *splits,
        class_names=tuple(CLASSES),
        sampling_rate=SAMPLING_RATE,
        description=f"Simulated bearing: {len(CLASSES)} states of health, {train_recordings} training and "
        f"{test_recordings} test recordings each, {windows_per_recording} windows of {length} samples "
        f"a recording at {SAMPLING_RATE / 1000:g} kHz.",
        windows=Windows(length, length),
    )
