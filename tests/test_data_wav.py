"""Kinds of .wav files: those that are read give the samples that are in them, the others are refused in a sentence."""

import struct
import sys

import pytest
import torch
from data_files import FLOAT, PCM, RATE, chunk, sound, wav, write_wav
from oracle import seeded

from drsn_kernels.data import load_speech

pytest.importorskip("scipy.io")
pytestmark = pytest.mark.usefixtures("one_thread")
COMPANION = b"\0\5\26\7" * 40  # as macOS writes them
WAVE = torch.randn(256, generator=seeded()).clamp(-1, 1) / 2


def encoded(signal, code, bits):
    """Samples between -1 and 1 as the file has them."""
    if code == FLOAT:
        return signal.to({32: torch.float32, 64: torch.float64}[bits]).numpy().tobytes()
    values = (signal.double() * 2 ** (bits - 1)).round()
    if bits == 8:
        return (values + 128).to(torch.uint8).numpy().tobytes()
    return values.to(torch.int64).view(torch.uint8).reshape(-1, 8)[:, : bits // 8].contiguous().numpy().tobytes()


def load(folder, content):
    """The test clip of a folder of this file and another."""
    (folder / "a_x_0.WAV").write_bytes(content)
    write_wav(folder / "a_x_5.wav", sound(500))
    return load_speech(folder, frames=2).test_x[0, 0]


def standard(signal):
    return (signal - signal.mean()) / signal.std(correction=0)


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("code, bits", [(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)])
def test_samples_of_every_format(tmp_path, code, bits, extensible):
    found = load(tmp_path, wav(encoded(WAVE, code, bits), bits, code=code, extensible=extensible))
    torch.testing.assert_close(found, standard(WAVE), atol=max(4 * 2.0**-bits, 1e-5) * 2, rtol=0)


@pytest.mark.parametrize("code, bits", [(PCM, 8), (PCM, 24), (FLOAT, 32)])
def test_channels_are_averaged(tmp_path, code, bits):
    other = torch.rand(256, generator=seeded(1)) - 0.5
    both = encoded(torch.stack([WAVE, other], 1).flatten(), code, bits)
    found = load(tmp_path, wav(both, bits, code=code, channels=2, extensible=True))
    torch.testing.assert_close(found, standard((WAVE + other) / 2), atol=max(8 * 2.0**-bits, 1e-5) * 2, rtol=0)


@pytest.mark.parametrize(
    "before", [chunk(b"LIST", b"INFOISFT\5\0\0\0Lavf\0"), chunk(b"bext", bytes(603)), chunk(b"id3 ", b"")]
)
def test_chunks_that_are_no_sound_are_passed_over(tmp_path, before, recwarn):
    content = wav(encoded(WAVE, PCM, 16), 16, before=before)
    torch.testing.assert_close(load(tmp_path, content), standard(WAVE), atol=1e-3, rtol=0)
    later = content + chunk(b"cue ", bytes(28))
    torch.testing.assert_close(load(tmp_path, later), standard(WAVE), atol=1e-3, rtol=0)
    longer = content[:4] + struct.pack("<I", len(content) + 100) + content[8:]  # by the header; the samples are there
    torch.testing.assert_close(load(tmp_path, longer), standard(WAVE), atol=1e-3, rtol=0)
    unknown = struct.pack("<I", 2**32 - 1)  # both lengths as ffmpeg writes them to a pipe
    piped = content[:4] + unknown + content[8:].replace(chunk(b"data", bytes(512))[:8], b"data" + unknown)
    torch.testing.assert_close(load(tmp_path, piped), standard(WAVE), atol=1e-3, rtol=0)
    assert piped.count(unknown) == 2 and not recwarn.list


@pytest.mark.parametrize("bits, extensible", [(16, False), (24, True)])
def test_a_truncated_file_is_named(tmp_path, bits, extensible):
    whole = wav(encoded(WAVE, PCM, bits), bits, extensible=extensible)
    for size in (0, 3, 4, 11, 12, 19, 30, 40, 44, 68, 100, len(whole) - 2, len(whole) - 1):
        with pytest.raises(ValueError, match=r"a_x_0.WAV cannot be read as a .wav file of PCM or float samples: .+"):
            load(tmp_path, whole[:size])


@pytest.mark.parametrize(
    "content, message",
    [
        (wav(bytes(300), 8, code=7), "cannot be read as a .wav file of PCM or float samples: .*MULAW"),
        (wav(bytes(300), 8, code=6, extensible=True), "cannot be read as a .wav file of PCM or float samples: .*ALAW"),
        (wav(bytes(300), 16, code=FLOAT), "cannot be read as a .wav file of PCM or float samples: .*16-bit float"),
        (wav(bytes(300), 16, channels=0), "cannot be read as a .wav file .*: it is empty, truncated or damaged"),
        (wav(encoded(WAVE, FLOAT, 32)[4:] + b"\0\0\xc0\x7f", 32, code=FLOAT), "holds NaN or Inf"),
        (b"fLaC" + bytes(300), "cannot be read as a .wav file of PCM or float samples: .*fLaC"),
        (COMPANION, "cannot be read as a .wav file of PCM or float samples"),
        (wav(b"", 16), "holds no samples"),
        (wav(bytes(600), 24), "is silent"),
    ],
)
def test_what_is_refused_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"a_x_0.WAV {message}") as refused:
        load(tmp_path, content)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["__MACOSX/x/._a_x_0.wav", "._a_x_0.wav", ".git/a_x_0.wav", "x/.ipynb_checkpoints/a_x_5.wav", "@eaDir/a_x_0.wav"],
)
def test_companion_and_hidden_files_are_passed_over(tmp_path, name):
    folder = tmp_path / ".cache" / "words"  # a hidden place of the folder itself is the user's choice
    for take in (0, 5):
        write_wav(folder / "x" / f"a_x_{take}.wav", sound(500 + take))
    (folder / "Thumbs.db").write_bytes(COMPANION)
    alone = load_speech(folder)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPANION)
    beside = load_speech(folder)
    assert torch.equal(beside.train_x, alone.train_x) and torch.equal(beside.test_x, alone.test_x)
    assert beside.notes == ()


def test_a_word_that_is_in_one_part_is_said(tmp_path, caplog):
    for name in ("a_x_0", "a_x_5", "b_x_5", "c_x_1"):
        write_wav(tmp_path / f"{name}.wav", sound(500))
    assert load_speech(tmp_path).notes == ("No samples to train on of c.", "No samples to test of b.")
    assert caplog.messages == ["No samples to train on of c.", "No samples to test of b."]


def test_of_many_files_the_first_are_named(tmp_path):
    for name in ("a_x_0", "a_x_5", *(f"noise{i:02d}" for i in range(45))):
        write_wav(tmp_path / f"{name}.wav", sound(500))
    (note,) = load_speech(tmp_path).notes
    assert note.startswith("Skipped noise00.wav, noise01.wav, ")
    assert note.endswith(", noise39.wav and 5 more: not named LABEL_SPEAKER_TAKE.wav.")


def test_without_scipy_it_is_named(tmp_path, monkeypatch):
    write_wav(tmp_path / "a_x_0.wav", sound(500))
    monkeypatch.setitem(sys.modules, "scipy.io.wavfile", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        load_speech(tmp_path)


def test_the_sampling_rate_is_that_of_the_file(tmp_path):
    for take in (0, 5):
        (tmp_path / f"a_x_{take}.wav").write_bytes(wav(encoded(WAVE, PCM, 16), 16, extensible=True))
    assert load_speech(tmp_path).sampling_rate == RATE
