"""Readers of speech and images: what they read, what they refuse, and that training and test share nothing."""

import gzip
import math
import sys

import pytest
import torch
from data_files import RATE, idx, sound, write_wav
from oracle import seeded

from drsn_kernels.data import LogMel, load_digits, load_idx, load_speech
from drsn_kernels.data.speech import mel_filters
from drsn_kernels.noise import add_noise

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- speech ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path):
    """Two words by two speakers in six takes, each recording with a pitch of its own."""
    pytest.importorskip("scipy.io")
    pitch = 200
    for word in ("one", "two_b"):
        for speaker in ("ann", "bob"):
            for take in range(6):
                write_wav(tmp_path / speaker / f"{word}_{speaker}_{take}.wav", sound(pitch))
                pitch += 100
    return tmp_path


def pitches(x):
    """The strongest frequency of each clip in Hz, to the bin."""
    return (torch.fft.rfft(x[:, 0]).abs().argmax(1) * RATE / x.shape[2]).tolist()


def test_speech_clips_and_official_split(digits):
    data = load_speech(digits, frames=10)
    assert data.class_names == ("one", "two_b") and data.sampling_rate == RATE
    assert data.train_x.shape == (4, 1, 1280) and data.test_x.shape == (20, 1, 1280)
    assert data.train_y.bincount().tolist() == [2, 2] and data.test_y.bincount().tolist() == [10, 10]
    # Take 5 of each is for training; no recording is on both sides.
    wanted = [200 + 100 * (6 * recording + 5) for recording in range(4)]
    assert all(abs(a - b) < RATE / 1280 for a, b in zip(sorted(pitches(data.train_x)), wanted, strict=True))
    assert not set(pitches(data.train_x)) & set(pitches(data.test_x))
    for x in (data.train_x, data.test_x):
        assert x.mean(-1).abs().max() < 1e-5
        torch.testing.assert_close(x.square().mean(-1), torch.ones(len(x), 1), rtol=1e-4, atol=0)
    # 400 samples in the middle of 1,280
    assert not data.train_x[..., :440].any() and not data.train_x[..., 840:].any()


def test_speech_holds_speakers_out(digits):
    data = load_speech(digits, test_speakers=["bob"], frames=10)
    low = {200 + 100 * (6 * recording + take) for recording in (0, 2) for take in range(6)}
    assert all(min(abs(pitch - p) for p in low) < RATE / 1280 for pitch in pitches(data.train_x))
    assert len(data.train_x) == len(data.test_x) == 12 and not set(pitches(data.train_x)) & set(pitches(data.test_x))
    with pytest.raises(ValueError, match="recordings of the test speakers carl, but .* has those of ann, bob"):
        load_speech(digits, test_speakers=["bob", "carl"])
    with pytest.raises(ValueError, match="none with speakers ann, bob held out"):
        load_speech(digits, test_speakers=["ann", "bob"])
    with pytest.raises(ValueError, match="recordings to test, but .* has none with takes 7 held out"):
        load_speech(digits, test_takes=[7])


def test_speech_long_recordings_and_channels(tmp_path):
    pytest.importorskip("scipy.io")
    left, right = sound(500, 2000), sound(1500, 2000)
    stereo = [value for pair in zip(left, right, strict=True) for value in pair]
    for take in (0, 5):
        write_wav(tmp_path / f"a_x_{take}.wav", stereo, channels=2)
    data = load_speech(tmp_path, frames=5)
    middle = (torch.tensor(left) + torch.tensor(right))[680:1320] / 2
    torch.testing.assert_close(data.test_x[0, 0], (middle - middle.mean()) / middle.std(correction=0))


def test_mel_filters_average():
    filters = mel_filters(20, 257, RATE)
    assert filters.shape == (20, 257) and (filters >= 0).all()
    torch.testing.assert_close(filters.sum(1), torch.ones(20))
    frequency = torch.linspace(0, RATE / 2, 257)
    mel = lambda f: 2595 * torch.log10(1 + f / 700)  # noqa: E731
    centre = mel(frequency[filters.argmax(1)])
    assert (centre - mel(torch.tensor(RATE / 2)) * torch.arange(1, 21) / 21).abs().max() < 15
    with pytest.raises(ValueError, match="got 200 filters for 257 bins"):
        mel_filters(200, 257, RATE)


def test_log_mel_of_noise_and_of_a_tone():
    transform = LogMel(RATE, 128, 32)
    noise = torch.randn(200, 1, 1024, generator=seeded())
    image = transform(noise)
    assert image.shape == (200, 1, 32, 8)
    # white noise of unit variance: power 1 in every filter and frame that sees no zeros beyond the ends
    torch.testing.assert_close(image.exp().mean((0, 1))[:, 1:-1], torch.ones(32, 6), atol=0.1, rtol=0.1)
    t = torch.arange(1024) / RATE
    ours = transform(torch.sin(2 * math.pi * 1000 * t)[None, None])[0, 0].mean(1).argmax()
    assert ours == transform.filters[:, round(1000 / RATE * 512)].argmax()
    for bad in (torch.zeros(2, 1024), torch.zeros(2, 2, 1024), torch.zeros(2, 1, 1000)):
        with pytest.raises(ValueError, match="x must have shape \\(N, 1, a multiple of 128\\), got"):
            transform(bad)
    assert transform(noise[:0]).shape == (0, 1, 32, 8)


def test_log_mel_is_fitted_to_clean_training_clips_and_noise_raises_it(digits):
    data = load_speech(digits, frames=10)
    clean = data.transform(data.train_x)
    assert clean.shape == (4, 1, 32, 10)
    assert clean.mean().abs() < 1e-4 and (clean.std() - 1).abs() < 1e-4
    assert not list(data.transform.parameters())
    noisy = data.transform(add_noise(data.train_x, 0.0, generator=seeded()))
    assert noisy.mean() > 0.5  # not standardised away


def test_speech_errors_name_the_file(digits):
    path = digits / "ann" / "one_ann_0.wav"
    whole = path.read_bytes()
    longer = whole[:17] + b"\1" + whole[18:]  # a format chunk beyond the end
    for content in (b"", b"RIFF", whole[:30], whole[:44], whole[:-100], b"not a wave file" * 20, longer):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="one_ann_0.wav .*\\w$"):
            load_speech(digits)
    for bad, message in (
        ({"signal": [7] * 400}, "one_ann_0.wav is silent"),
        ({"signal": sound(200), "rate": 16_000}, "one sampling rate, but .*has 8000 Hz, not 16000 as .*one_ann_0.wav"),
        ({"signal": []}, "one_ann_0.wav holds no samples"),
    ):
        write_wav(path, **bad)
        with pytest.raises(ValueError, match=message):
            load_speech(digits)
    path.rename(digits / "noise.wav")  # not a name of the layout
    assert load_speech(digits).notes == ("Skipped noise.wav: not named LABEL_SPEAKER_TAKE.wav.",)
    write_wav(digits / "again" / "one_ann_1.wav", sound(200))
    with pytest.raises(ValueError, match="one recording of each name, but holds .*one_ann_1.wav and .*one_ann_1.wav"):
        load_speech(digits)


def test_speech_folder_and_argument_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder does not exist: .*nowhere"):
        load_speech(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="LABEL_SPEAKER_TAKE.wav, such as 7_jackson_32.wav, .* among its 0 .wav files"):
        load_speech(tmp_path)
    for arguments, message in (
        ({"frames": 0}, "frames must be a whole number of at least 1, got 0"),
        ({"mels": "many"}, "mels must be a whole number of at least 1, got 'many'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_speech(tmp_path, **arguments)
    pytest.importorskip("scipy.io")
    write_wav(tmp_path / "a_b_0.wav", sound(200))
    with pytest.raises(ValueError, match="hop_seconds must be at least two samples at 8000 Hz, .*wav, got 0.0001"):
        load_speech(tmp_path, hop_seconds=1e-4)


# ---- idx -------------------------------------------------------------------------------------------------------------

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def images(tmp_path):
    """The four files packed, and what is in them."""
    draw = lambda high, *shape: torch.randint(high, shape, generator=seeded(), dtype=torch.uint8)  # noqa: E731
    tensors = dict(
        zip(NAMES, (draw(256, 7, 5, 4), draw(3, 7), draw(256, 3, 5, 4), torch.tensor([0, 3, 1])), strict=True)
    )
    for name, tensor in tensors.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(tensor)))
    return tmp_path, tensors


def test_idx_reads_the_official_split(images):
    folder, tensors = images
    packed = load_idx(folder)
    assert packed.class_names == ("0", "1", "2", "3") and packed.sampling_rate is None
    assert packed.train_x.shape == (7, 1, 5, 4) and packed.train_x.dtype == torch.float32
    assert torch.equal(packed.train_x[:, 0] * 255, tensors[NAMES[0]].float())
    assert torch.equal(packed.test_x[:, 0] * 255, tensors[NAMES[2]].float())
    assert packed.train_y.tolist() == tensors[NAMES[1]].tolist() and packed.train_y.dtype == torch.int64
    assert packed.test_y.tolist() == [0, 3, 1]
    for name, tensor in tensors.items():  # unpacked, with the dot some copies have
        (folder / f"{name}.gz").unlink()
        (folder / name.replace("-idx", ".idx")).write_bytes(idx(tensor))
    assert torch.equal(load_idx(folder).train_x, packed.train_x)


def test_idx_labels_that_occur_are_the_classes(images, caplog):
    """A stray label of 255, for "ignore" say, makes one class more, not 252; and it is said where it is."""
    folder, tensors = images
    train, test = (f"{name}.gz" for name in (NAMES[1], NAMES[3]))
    (folder / train).write_bytes(gzip.compress(idx(torch.tensor([0, 1, 2, 255, 1, 0, 2]))))
    (folder / test).write_bytes(gzip.compress(idx(torch.tensor([0, 2, 1]))))
    data = load_idx(folder)
    assert data.class_names == ("0", "1", "2", "255")
    assert data.train_y.tolist() == [0, 1, 2, 3, 1, 0, 2] and data.test_y.tolist() == [0, 2, 1]
    assert data.notes == (
        f"Labels apart from 0 to 2: 255 (1 in {train}, 0 in {test}); every label that occurs is a class, 4 in all.",
        "No samples to test of 255.",
    )
    assert caplog.messages == list(data.notes)
    (folder / train).write_bytes(gzip.compress(idx(torch.tensor([1, 2, 3, 4, 1, 2, 3]))))
    (folder / test).write_bytes(gzip.compress(idx(torch.tensor([4, 9, 7]))))
    data = load_idx(folder)
    assert data.class_names == ("1", "2", "3", "4", "7", "9") and data.test_y.tolist() == [3, 5, 4]
    assert f"apart from 1 to 4: 7 (0 in {train}, 1 in {test}), 9 (0 in {train}, 1 in {test});" in data.notes[0]
    (folder / test).write_bytes(gzip.compress(idx(torch.tensor([4, 1, 2]))))  # from 1, as some sets are
    data = load_idx(folder)
    assert data.class_names == ("1", "2", "3", "4") and data.train_y.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert data.notes == ("No samples to test of 3.",)


def test_idx_names_in_capitals_among_companion_files(images):
    folder, tensors = images
    for name in NAMES:
        (folder / f"{name}.gz").rename(folder / f"{name}.gz".upper())
        (folder / f"._{name}.gz").write_bytes(b"\0\5\26\7" * 40)
    assert torch.equal(load_idx(folder).train_x[:, 0] * 255, tensors[NAMES[0]].float())


@pytest.mark.parametrize("name", NAMES)
def test_idx_errors_name_the_file(images, name):
    folder, tensors = images
    path = folder / f"{name}.gz"
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:9],
        whole[: len(whole) // 2],
        whole[:-5],
        b"no gzip" * 9,
        whole[:20] + b"?" + whole[21:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.gz"):
            load_idx(folder)
    raw = idx(tensors[name])
    empty = bytes((0, 0, 8, raw[3])) + bytes(4 * raw[3])
    for content in (raw[:-1], raw + b"0", raw[:3], b"\0\0\x0d" + raw[3:], raw[:3] + b"\2" + raw[4:], empty):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=f"{name}.gz"):
            load_idx(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"folder must hold {name} or {name}.gz, but .* has neither"):
        load_idx(folder)


def test_idx_files_must_belong_together(images):
    folder, tensors = images
    path = folder / f"{NAMES[3]}.gz"
    path.write_bytes(gzip.compress(idx(torch.zeros(4, dtype=torch.uint8))))
    with pytest.raises(ValueError, match=f"{NAMES[3]}.gz must hold a label for each image, but has 4 for 3"):
        load_idx(folder)
    path.write_bytes(gzip.compress(idx(torch.zeros(3, dtype=torch.uint8))))
    (folder / f"{NAMES[2]}.gz").write_bytes(gzip.compress(idx(torch.zeros(3, 5, 5, dtype=torch.uint8))))
    with pytest.raises(ValueError, match="images of one size, but .* has 5 x 4 in train, 5 x 5 in t10k"):
        load_idx(folder)
    with pytest.raises(FileNotFoundError, match="folder does not exist: .*nowhere"):
        load_idx(folder / "nowhere")
    with pytest.raises(NotADirectoryError, match="folder must be a directory with idx files, got the file"):
        load_idx(path)


# ---- the digits of scikit-learn --------------------------------------------------------------------------------------


def test_digits_split_by_position():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    data = load_digits(0.25)
    assert data.train_x.shape == (1348, 1, 8, 8) and data.test_x.shape == (449, 1, 8, 8)
    assert data.train_x.min() == 0 and data.train_x.max() == 1
    assert torch.equal(torch.cat([data.train_x, data.test_x])[:, 0] * 16, torch.tensor(source.images).float())
    assert torch.cat([data.train_y, data.test_y]).tolist() == source.target.tolist()
    with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1, got 1"):
        load_digits(1)


def test_digits_without_scikit_learn_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digits()
