"""One file of a person's own: every format, and a sentence for what is no signal."""

import pytest
import torch
from data_files import FLOAT, PCM, wav
from test_own_data import SIGNAL, lines, save, sentence, write

from drsn_kernels.data._recordings import read_recording

np = pytest.importorskip("numpy")


STEPS = np.arange(40) / 8
TEXTS = {
    "plain": lines("", SIGNAL),
    "blank lines": "\n\n" + lines("", SIGNAL) + "\n",
    "a name": "value\n" + lines("", SIGNAL),
    "byte order mark": "\ufeffvalue\n" + lines("", SIGNAL),
    "time": "time [s],value\n" + lines(",", STEPS, SIGNAL),
    "semicolons": "Time;value\n" + lines(";", STEPS, SIGNAL),
    "an index without a name": ",value\n" + lines(",", range(40), SIGNAL),
    "dates": "date,value\n" + lines(",", [f"2024-01-01 00:00:{i}" for i in range(40)], SIGNAL),
    "tabs, time without a name": lines("\t", STEPS, SIGNAL).replace("\n", "\r\n"),
    "blanks, a comment": "# made by hand\n" + lines("  ", STEPS, SIGNAL),
    "a mark at the end": "value,\n" + lines(",", SIGNAL, [""] * 40),
    "a remark after each number": "value\n" + lines(" # ", SIGNAL, SIGNAL),
    "a spreadsheet's first line": "sep=;\ntime;value\n" + lines(";", STEPS, SIGNAL),
    "quotes": '"value"\n' + lines("", [f'"{value}"' for value in SIGNAL]),
    "one row": ",".join(map(str, SIGNAL)),
    "Latin-1": "Gr\u00f6\u00dfe\n".encode("latin-1") + lines("", SIGNAL).encode(),
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("suffix", [".csv", ".TXT"])
def test_text(tmp_path, content, suffix):
    found = read_recording(write(tmp_path / f"r{suffix}", content), centre=False)
    assert found.signal.tolist() == [SIGNAL.tolist()] and found.rate is None and found.signal.dtype == torch.float32


def test_numbered_columns_are_no_sample(tmp_path):
    """As pandas writes an array; whole numbers below may be samples, and so may be the line."""
    columns = np.array([[0.5, 1.25], [0.25, 1.0], [0.125, 0.75]])
    found = read_recording(write(tmp_path / "p.csv", "0,1\n" + lines(",", *columns.T)), centre=False)
    assert found.signal.tolist() == columns.T.tolist() and found.names == ()
    whole = read_recording(write(tmp_path / "w.csv", "0,1\n2,3\n9,6\n"), centre=False)
    assert whole.signal.tolist() == [[0, 2, 9], [1, 3, 6]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("shape", ["row", "column", "flat", "Fortran", "reversed"])
def test_arrays(tmp_path, dtype, shape):
    values = np.abs(SIGNAL).astype(dtype)
    form = {"row": values[None], "column": values[:, None], "flat": values, "reversed": values[::-1][::-1]}
    form["Fortran"] = np.asfortranarray(np.stack([values, values]))
    found = read_recording(save(tmp_path / "r.npy", form[shape]), centre=False)
    assert found.signal.tolist() == [np.abs(SIGNAL).tolist()] * (2 if shape == "Fortran" else 1)


def test_archives_and_matlab_files(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    two = {"x": SIGNAL, "y": 2 * SIGNAL, "fs": 50.0, "t": STEPS}
    save(tmp_path / "r.npz", **two)
    scipy_io.savemat(tmp_path / "r.mat", two)
    for name in ("r.npz", "r.mat"):
        found = read_recording(tmp_path / name)
        assert found.names == ("x", "y") and found.rate == 50 and found.signal.shape == (2, 40)
        assert found.notes == (f"Left the column t out of {tmp_path / name}.",)
        for channels in (["y"], [1]):
            assert read_recording(tmp_path / name, channels).signal.tolist() == [(2 * SIGNAL).tolist()]
    found = read_recording(save(tmp_path / "s.npz", signal=np.stack([SIGNAL, SIGNAL], 1), other=SIGNAL[:7]), ["signal"])
    assert found.signal.shape == (2, 40) and found.names == ("signal[0]", "signal[1]")


def test_wav_files_have_channels_and_a_rate(tmp_path):
    pytest.importorskip("scipy.io")
    stereo = np.stack([SIGNAL, -SIGNAL], 1)
    found = read_recording(write(tmp_path / "r.wav", wav(stereo.tobytes(), 16, code=PCM, channels=2)))
    assert found.signal.tolist() == stereo.T.tolist() and found.rate == 8000
    content = wav(stereo.astype("float32").tobytes(), 32, code=FLOAT, channels=2)
    found = read_recording(write(tmp_path / "f.wav", content))
    assert found.signal.tolist() == stereo.T.tolist()


def test_columns_by_number_and_by_name(tmp_path):
    path = write(tmp_path / "r.csv", "time,x,y,z\n" + lines(",", STEPS, SIGNAL, 2 * SIGNAL, 3 * SIGNAL))
    for channels, factors in (([0, 2], [1, 3]), (["z", "x"], [3, 1]), (None, [1, 2, 3])):
        assert read_recording(path, channels, centre=False).signal.tolist() == [(k * SIGNAL).tolist() for k in factors]
    assert "channel w of --channels, but its channels are x, y, z" in sentence(read_recording, path, ["w"])
    path = save(tmp_path / "r.npy", SIGNAL)
    assert "channel 1 of --channels, but its channels are 1, numbered from 0" in sentence(read_recording, path, [1])


def test_a_small_signal_on_a_large_offset_is_kept(tmp_path):
    path = save(tmp_path / "r.npy", 1e9 + SIGNAL.astype("float64"))
    found = read_recording(path).signal
    torch.testing.assert_close(found - found.mean(), torch.tensor(SIGNAL - SIGNAL.mean())[None].float())
    assert read_recording(path, centre=False).signal.unique().numel() < 10


BROKEN = {
    "nan.npy": np.r_[SIGNAL[:7], np.nan, SIGNAL],
    "inf.npy": np.r_[SIGNAL.astype("float32"), np.inf],
    "big.npy": SIGNAL * 1e300,
    "complex.npy": SIGNAL + 1j,
    "truth.npy": SIGNAL > 0,
    "text.npy": SIGNAL.astype(str),
    "empty.npy": SIGNAL[:0],
    "number.npy": np.array(3.0),
    "cube.npy": np.zeros((3, 4, 5)),
    "square.npy": np.zeros((9, 9)),
    "object.npy": np.array([[1], [1, 2]], object),
}
REASONS = {
    "nan.npy": "holds NaN or Inf: the first in channel 0 at sample 7",
    "inf.npy": "holds NaN or Inf",
    "big.npy": "holds numbers beyond those of float32",
    "complex.npy": "must hold real numbers, but it holds complex numbers",
    "truth.npy": "must hold real numbers, but it holds truth values",
    "text.npy": "must hold real numbers, but it holds <U",
    "empty.npy": "holds no samples",
    "number.npy": "in one or two dimensions, but it has shape ()",
    "cube.npy": "in one or two dimensions, but it has shape (3, 4, 5)",
    "square.npy": "it has shape (9, 9): which dimension is time cannot be told",
    "object.npy": "cannot be read as a .npy file of numbers: it holds Python objects",
}


@pytest.mark.parametrize("name", BROKEN)
def test_arrays_that_are_no_signal_are_named(tmp_path, name):
    path = save(tmp_path / name, BROKEN[name])
    said = sentence(read_recording, path)
    assert str(path) in said and REASONS[name] in said


CONTENTS = {
    "comma.csv": ("1,5;2,5\n2,5;3,5\n", "must have decimal points, but has decimal commas, as in '2,5;3,5'"),
    "one comma.csv": ("0,05\n-0,51\n0,17\n", "must have decimal points, but has decimal commas, as in '0,17'"),
    "blank comma.txt": ("1,5 2,5\n3,5 2,5\n", "must have decimal points, but has decimal commas, as in '3,5 2,5'"),
    "words.txt": ("These are the recordings of May.\n", "holds no numbers, but the line 'These are the recordings"),
    "nothing.csv": ("\n# nothing\n", "holds no numbers"),
    "ragged.csv": ("1,2\n3,4\n5\n", "cannot be read as columns of numbers"),
    "gap.csv": ("1,2\n3,\n5,6\n", "cannot be read as columns of numbers: could not convert string ''"),
    "unit.csv": ("a,b\n1,2\n3,4 V\n", "cannot be read as columns of numbers: could not convert string '4 V'"),
    "only time.csv": ("time,index\n1,2\n3,4\n", "holds no signal, but the columns time, index"),
    "excel.csv": ("1\n2\n".encode("utf-16"), "must be text in UTF-8 or ASCII, but holds zero bytes"),
    "nan.csv": ("1\n2\nnan\n", "holds NaN or Inf: the first in channel 0 at sample 2"),
    "damaged.npy": (b"\x93NUMPY\1\0", "cannot be read as a .npy file of numbers"),
    "damaged.npz": (b"PK\3\4 and more", "cannot be read as a .npz file of numbers"),
    "sound.mp3": (b"ID3", "must be one of .npy, .npz, .csv, .txt, .mat, .wav"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    content, reason = CONTENTS[name]
    path = write(tmp_path / name, content)
    said = sentence(read_recording, path)
    assert str(path) in said and reason in said


def test_archives_that_hold_no_one_signal_are_named(tmp_path):
    for named, reason in (
        ({"a": SIGNAL, "b": SIGNAL[:9]}, "of as many samples, but holds a (40,), b (9,): choose with --channels"),
        ({"fs": 9.0}, "holds no signal, but nothing"),
        ({"x": SIGNAL, "fs": 0.0}, "must hold a positive number as its sampling rate fs"),
        ({"x": SIGNAL * 1j}, "must hold real numbers, but x holds complex numbers"),
    ):
        path = save(tmp_path / "r.npz", **named)
        said = sentence(read_recording, path)
        assert str(path) in said and reason in said
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(tmp_path / "s.mat", {"s": {"q": SIGNAL}})
    assert "holds no signal, but s (a struct or cell, not read)" in sentence(read_recording, tmp_path / "s.mat")
    assert sentence(read_recording, tmp_path / "no.npy") == f"file does not exist: {tmp_path / 'no.npy'}"
