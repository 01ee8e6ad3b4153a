"""What is recognised under which noise: the sizes, noises and networks of every task. None is tuned to a model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from drsn_kernels.data import Dataset, load_cwru, load_idx, load_speech, simulate_bearing
from drsn_kernels.train.recipe import Noise

from . import noises

EPOCHS = 40
LONG, DENSE = 12, 96  # epochs of about 23,900 windows of 512 samples, whose starts are 96 apart
SNR_DB = (-5.0, -3.0, 0.0, 3.0, 5.0)
RECORDINGS, SECONDS = 200, 3.0  # of street and workshop noise, for training and again for testing


@dataclass(frozen=True)
class Condition:
    """A noise and its SNR in dB; None where the noise has no SNR."""

    noise: str
    snr_db: float | None = None

    def __str__(self) -> str:
        return self.noise if self.snr_db is None else f"{self.noise} {self.snr_db:g} dB"


@dataclass(frozen=True)
class Task:
    """Data, the conditions they are seen under, and the network's layout.

    Attributes:
        load: folder -> Dataset.
        conditions: of the grid, in order.
        network: options of drsn_kernels.models.network.
        source: the option of the command that gives the folder; None where no files are needed.
        epochs: unless the command says how many.
        protocol: "fresh", other noise in every epoch; "fixed", the paper's: noise is added to the training data once.
        paired: networks are compared seed by seed, with their training accuracy and learning curves: paired.py.
        draws: times that the test set is tested, each with noise of its own; small test sets need several.
    """

    load: Callable[[Path | None], Dataset]
    conditions: tuple[Condition, ...]
    network: dict = field(default_factory=dict)
    draws: int = 1
    source: str | None = None
    epochs: int = EPOCHS
    protocol: str = "fresh"
    paired: bool = False


def _vibration(folder: Path) -> Dataset:
    return load_cwru(folder, length=512, stride=512)


def _cwru(folder: Path) -> Dataset:
    return load_cwru(folder, length=512, stride=DENSE)


def _whole(folder: Path) -> Dataset:
    return load_cwru(folder, stride=DENSE)


def _other_load(folder: Path) -> Dataset:
    """Training windows of loads 0 and 1, and as test nearly all of load 2, which no training window is from."""
    train = load_cwru(folder, length=512, stride=DENSE, loads=(0, 1))
    test = load_cwru(folder, length=512, train_fraction=0.05, loads=(2,))
    description = f"{train.description} They are of loads 0 and 1; for testing {len(test.test_x)} windows of load 2."
    return replace(train, test_x=test.test_x, test_y=test.test_y, description=description)


def _bearings(_: None) -> Dataset:
    return simulate_bearing(100, 12, 30, length=512, generator=torch.Generator().manual_seed(0))


def _speech(folder: Path) -> Dataset:
    return load_speech(folder, test_takes=range(15))  # the official five leave 300 recordings, too few to compare


def _simulated(_: None) -> Dataset:
    return simulate_bearing(length=512, generator=torch.Generator().manual_seed(0))


def _images(folder: Path) -> Dataset:
    data = load_idx(folder)
    data = replace(data, train_x=data.train_x[:10_000], train_y=data.train_y[:10_000])
    return replace(data, description=f"{data.description} The first {len(data.train_x)} are used for training.")


_KINDS = ("gaussian", "laplace", "pink")
_SIGNALS = tuple(Condition(kind, snr) for kind in _KINDS for snr in SNR_DB)
_HARD = (Condition("gaussian", -5.0),)
_BURIED = tuple(Condition("gaussian", snr) for snr in (-10.0, -15.0))
_THREE = tuple(Condition(kind, snr) for kind in _KINDS for snr in (-5.0, 0.0, 5.0))
# The layout of the authors' CIFAR network at half its width and a quarter of its area, which two cores can train.
_SMALL_IMAGES = {"dims": 2, "stem": (8, 1), "stages": ((8, 1, 2), (16, 1, 2), (16, 1, 2))}
TASKS = {
    "cwru": Task(_cwru, _THREE, source="vibration", epochs=LONG, protocol="fixed", paired=True),
    "cwru-load": Task(_other_load, _THREE, source="vibration", epochs=LONG, protocol="fixed", paired=True),
    "bearings": Task(_bearings, _THREE, epochs=LONG, protocol="fixed", paired=True),
    "cwru-paper": Task(_cwru, _HARD, source="vibration", epochs=109, protocol="fixed", paired=True),
    "cwru-2048": Task(_whole, _HARD, source="vibration", epochs=LONG, protocol="fixed", paired=True),
    "vibration": Task(_vibration, _SIGNALS, source="vibration"),
    "speech": Task(
        _speech,
        tuple(Condition(kind, snr) for kind in ("street", "workshop") for snr in (-10.0, -5.0)),
        _SMALL_IMAGES,
        draws=2,
        source="speech",
    ),
    "speech-long": Task(
        _speech, (Condition("street", -10.0),), _SMALL_IMAGES, draws=2, source="speech", epochs=4 * EPOCHS, paired=True
    ),
    "image": Task(_images, (Condition("uniform"), Condition("pasted")), _SMALL_IMAGES, source="image"),
    "image-noise": Task(_images, _BURIED, _SMALL_IMAGES, source="image", epochs=16, paired=True),
    "simulated": Task(_simulated, _SIGNALS),
}
_PLACES = {"street": noises.street, "workshop": noises.workshop}
_CONTENT = {"uniform": noises.uniform_offset, "pasted": noises.pasted}


@functools.lru_cache(maxsize=1)
def data(task: str, folder: Path | None, quick: bool) -> Dataset:
    """The task's data, kept by the process for its next run."""
    loaded = TASKS[task].load(folder)
    return _part(loaded) if quick else loaded


def _part(full: Dataset, train: int = 512, test: int = 256) -> Dataset:
    """About so many samples, evenly spaced, so that every class keeps its share."""
    parts = {}
    for name, count in (("train", train), ("test", test)):
        x, y = getattr(full, f"{name}_x"), getattr(full, f"{name}_y")
        index = torch.linspace(0, len(x) - 1, min(count, len(x))).round().long()
        parts |= {f"{name}_x": x[index], f"{name}_y": y[index]}
    return replace(full, **parts)


@functools.lru_cache(maxsize=1)
def _recordings(place: str, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """For training and for testing; the same in all runs."""
    generator = torch.Generator().manual_seed(0)
    make = functools.partial(_PLACES[place], RECORDINGS, round(SECONDS * rate), rate, generator)
    return make(), make()


def noise(condition: Condition, rate: float | None) -> tuple[Noise, Noise]:
    """The noise for training and for testing."""
    if condition.noise in _PLACES:
        train, test = _recordings(condition.noise, rate)
        return noises.Recorded(train, condition.snr_db), noises.Recorded(test, condition.snr_db)
    if condition.noise in _CONTENT:
        return (_CONTENT[condition.noise],) * 2
    return (noises.AtSNR(condition.noise, condition.snr_db),) * 2
