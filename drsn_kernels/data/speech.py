"""Spoken words: a reader for folders of .wav files, and the log-mel spectrogram that a network sees.

The names are those of the Free Spoken Digit Dataset, LABEL_SPEAKER_TAKE.wav: 7_jackson_32.wav.
Source of the data: https://github.com/Jakobovski/free-spoken-digit-dataset
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ._dataset import Dataset, Windows, absent, check_counts, existing_folder, files_below, listed, logged, standardise
from ._wav import read_wav

_NAME = re.compile(r"(?P<label>.+)_(?P<speaker>[^_]+)_(?P<take>\d+)$")
_FLOOR = 1e-5


def mel_filters(mels: int, bins: int, sampling_rate: float) -> torch.Tensor:
    """Triangular filters (mels, bins), evenly spaced on the mel scale from 0 to half the sampling rate.

    The scale is mel = 2595 log10(1 + f / 700). Neighbouring triangles overlap by half, and each sums to 1, so that
    white noise has the same level in all of them. ``bins`` are those of a one-sided spectrum.

    Raises:
        ValueError: so many filters that one falls between two bins.
    """
    top = 2595 * torch.log10(torch.tensor(1 + sampling_rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, float(top), mels + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.linspace(0, sampling_rate / 2, bins, dtype=torch.float64)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((frequency - low) / (centre - low), (high - frequency) / (high - centre)).clamp_min(0)
    total = filters.sum(1, keepdim=True)
    if (total == 0).any():
        raise ValueError(f"mels must leave a frequency bin in every filter, got {mels} filters for {bins} bins")
    return (filters / total).float()


class LogMel(nn.Module):
    """Log-mel spectrogram of a waveform: (N, 1, samples) -> (N, 1, mels, samples / hop).

    The power of a short-time Fourier transform (Hann window of 2 * hop samples, twice as long a transform, zeros beyond
    both ends) is averaged by :func:`mel_filters`, and ``log(power + 1e-5)`` is taken. Power 1 is that of white noise of
    unit variance, so the floor lies 50 dB below a waveform of that variance. Then ``(value - offset) / scale``: two
    numbers that :meth:`fit` takes from clean training data, so that what noise adds stays visible.

    Args:
        sampling_rate: Hz.
        hop: samples from one frame to the next.
        mels: filters, the height of the image.

    Raises:
        ValueError: more filters than the transform can resolve; in forward, an x of another rank, or whose length is
            not a multiple of hop.
    """

    def __init__(self, sampling_rate: float, hop: int, mels: int) -> None:
        super().__init__()
        self.hop, self.mels = hop, mels
        window = torch.hann_window(2 * hop)
        self.register_buffer("window", window / window.square().sum().sqrt())
        self.register_buffer("filters", mel_filters(mels, 2 * hop + 1, sampling_rate))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def extra_repr(self) -> str:
        return f"hop={self.hop}, mels={self.mels}, offset={float(self.offset):.3f}, scale={float(self.scale):.3f}"

    @torch.no_grad()
    def fit(self, x: torch.Tensor) -> "LogMel":
        """Set offset and scale so that the images of waveforms x (N, 1, samples) have zero mean and unit variance."""
        self.offset.zero_(), self.scale.fill_(1)
        images = torch.cat([self(part) for part in x.split(256)])
        self.offset.copy_(images.mean()), self.scale.copy_(images.std())
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] % self.hop:
            raise ValueError(f"x must have shape (N, 1, a multiple of {self.hop}), got {tuple(x.shape)}")
        if x.shape[0] == 0:  # an FFT of nothing is an error; len(x) would fix the batch of an exported graph
            return x.new_empty(0, 1, self.mels, x.shape[2] // self.hop)
        # Frame k is centred on the middle of hop k: half a hop of zeros on both sides.
        padded = F.pad(x.squeeze(1), (self.hop // 2, self.hop - self.hop // 2))
        frames = padded.unfold(-1, 2 * self.hop, self.hop) * self.window
        power = torch.fft.rfft(frames, 4 * self.hop).abs().square()
        return ((power @ self.filters.T + _FLOOR).log() - self.offset).div(self.scale).transpose(1, 2).unsqueeze(1)


def _read(path: Path) -> tuple[torch.Tensor, float]:
    """The waveform of one file, float32 (samples,), channels averaged; and its sampling rate in Hz."""
    samples, rate = read_wav(path)
    signal = torch.from_numpy(samples.astype("float32")).mean(1)
    if not signal.isfinite().all():
        raise ValueError(f"{path} holds NaN or Inf")
    return signal, rate


def fit_length(signal: torch.Tensor, length: int) -> torch.Tensor:
    """The middle of a longer signal, a shorter one between zeros; zero mean, unit power over the whole length."""
    start = max(len(signal) - length, 0) // 2
    signal = standardise(signal[start : start + length])
    missing = length - len(signal)
    return F.pad(signal, (missing // 2, missing - missing // 2)) * (length / len(signal)) ** 0.5


def _select(folder: Path) -> tuple[dict[Path, re.Match], list[str]]:
    """The files to read with their names' parts, and a note on what is left out."""
    chosen: dict[Path, re.Match] = {}
    seen: dict[str, Path] = {}
    other = []
    for path in files_below(folder, ".wav"):
        match = _NAME.match(path.stem)
        if match is None:
            other.append(path.name)
        elif path.stem in seen:
            raise ValueError(f"folder must hold one recording of each name, but holds {seen[path.stem]} and {path}")
        else:
            seen[path.stem] = path
            chosen[path] = match
    if not chosen:
        raise ValueError(
            f"folder must hold recordings named LABEL_SPEAKER_TAKE.wav, such as 7_jackson_32.wav, "
            f"but {folder} has none among its {len(other)} .wav files, hidden ones not counted"
        )
    return chosen, [f"Skipped {listed(other)}: not named LABEL_SPEAKER_TAKE.wav."] if other else []


def load_speech(
    folder: str | Path,
    *,
    test_takes: Sequence[int] = range(5),
    test_speakers: Sequence[str] = (),
    frames: int = 64,
    mels: int = 32,
    hop_seconds: float = 0.016,
) -> Dataset:
    """Spoken words as waveforms of one length, with the transform that makes log-mel images (1, mels, frames) of them.

    Training and test data share no recording: either the test takes are held out, for every word and speaker (0 to 4 in
    the Free Spoken Digit Dataset's official split), or whole speakers are.

    Args:
        folder: searched with its sub-folders for files LABEL_SPEAKER_TAKE.wav of one sampling rate: PCM of 8, 16, 24
            or 32 bits or float samples, also with the extensible header. Channels are averaged. Hidden files are passed
            over.
        test_takes: numbers of the takes that are for testing. Without effect where speakers are named.
        test_speakers: speakers all of whose recordings are for testing.
        frames, mels: width and height of the images.
        hop_seconds: from one frame to the next. A clip lasts frames * hop_seconds, 1.024 s by default; of a longer
            recording the middle is taken, and a shorter one stands between zeros.

    Returns:
        Dataset with x (N, 1, samples), zero mean and unit power each, classes in the order of their names, and
        ``transform``, a :class:`LogMel` fitted to the clean training clips. Noise belongs on x; its SNR then refers to
        the mean power of the whole clip, silence included. What was left out, and words that are not in both parts,
        are said in notes, which are logged as well.

    Raises:
        ImportError: scipy is missing.
        FileNotFoundError, NotADirectoryError: `folder`.
        ValueError: no such files; a file that is truncated, silent, compressed or of another sampling rate (the message
            names the file); a speaker who is not there; nothing left to train on or to test; a number out of range.
    """
    check_counts(1, frames=frames, mels=mels)
    chosen, notes = _select(existing_folder(folder, "recordings LABEL_SPEAKER_TAKE.wav"))
    speakers = sorted({match["speaker"] for match in chosen.values()})
    unknown = sorted(set(test_speakers) - set(speakers))
    if unknown:
        raise ValueError(
            f"folder must hold recordings of the test speakers {', '.join(unknown)}, "
            f"but {folder} has those of {', '.join(speakers)}"
        )

    class_names = tuple(sorted({match["label"] for match in chosen.values()}))
    clips: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    labels: dict[bool, list[int]] = {True: [], False: []}
    rate = hop = None
    for path, match in chosen.items():
        signal, found = _read(path)
        if rate is None:
            rate, hop = found, round(found * hop_seconds)
            if hop < 2:
                raise ValueError(
                    f"hop_seconds must be at least two samples at {rate} Hz, the rate of {path}, got {hop_seconds}"
                )
        if found != rate:
            raise ValueError(
                f"folder must hold recordings of one sampling rate, but {path} has {found} Hz, not {rate} "
                f"as {next(iter(chosen))}"
            )
        test = match["speaker"] in test_speakers if test_speakers else int(match["take"]) in test_takes
        clip = fit_length(signal, frames * hop)
        if not clip.any():
            raise ValueError(f"{path} is silent: all samples of its clip are equal")
        clips[test].append(clip)
        labels[test].append(class_names.index(match["label"]))
    held_out = f"speakers {', '.join(test_speakers)}" if test_speakers else f"takes {', '.join(map(str, test_takes))}"
    for test, what in ((False, "train on"), (True, "test")):
        if not clips[test]:
            raise ValueError(f"folder must hold recordings to {what}, but {folder} has none with {held_out} held out")
    train_x, test_x = (torch.stack(clips[test]).unsqueeze(1) for test in (False, True))
    train_y, test_y = (torch.tensor(labels[test]) for test in (False, True))
    return Dataset(
        train_x,
        train_y,
        test_x,
        test_y,
        class_names=class_names,
        sampling_rate=float(rate),
        description=f"{len(class_names)} spoken words by {len(speakers)} speakers at {rate / 1000:g} kHz, clips of "
        f"{frames * hop / rate:g} s as log-mel images of {mels} x {frames}: {len(train_x)} for training, "
        f"{len(test_x)} for testing ({held_out}).",
        notes=logged([*notes, *absent(class_names, train_y, test_y)]),
        transform=LogMel(rate, hop, mels).fit(train_x),
        windows=Windows(frames * hop, frames * hop, clip=True),
    )
