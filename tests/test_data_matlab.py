"""MATLAB files of version 7.3, which are HDF5, and the companion files beside any of them."""

import sys

import pytest
import torch
from oracle import seeded

from drsn_kernels.data import load_cwru

pytestmark = pytest.mark.usefixtures("one_thread")
SIGNAL = torch.randn(1000, generator=seeded(), dtype=torch.float64)
HEAD = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan  1 00:00:00 2024 HDF5 schema 1.00 ."


@pytest.fixture
def write():
    """write(path, {name: (values as HDF5 has them, class)}): a file as MATLAB saves with -v7.3."""
    h5py, numpy = pytest.importorskip("h5py"), pytest.importorskip("numpy")

    def write(path, variables, head=HEAD):
        with h5py.File(path, "w", userblock_size=512 if head else 0) as file:
            for name, (values, kind) in variables.items():
                if kind == "struct":
                    file.create_group(name).create_dataset("field", data=values)
                elif kind == "cell":
                    inside = file.create_dataset("#refs#/a", data=values)
                    file.create_dataset(name, data=[[inside.ref]], dtype=h5py.ref_dtype)
                else:
                    file.create_dataset(name, data=values, compression="gzip" if values.ndim else None)
                file[name].attrs["MATLAB_class"] = numpy.bytes_(kind.removeprefix("empty "))
                if kind.startswith("empty "):
                    file[name].attrs["MATLAB_empty"] = numpy.uint8(1)
        if head:
            with open(path, "r+b") as file:
                file.write(head.ljust(508) + b"\0\2IM")
        return path

    return write


def test_version_7_3_is_read_as_the_others_are(tmp_path, write):
    savemat = pytest.importorskip("scipy.io").savemat
    for name in ("old", "new", "bare"):
        (tmp_path / name).mkdir()
    column = SIGNAL.reshape(-1, 1).numpy()
    savemat(tmp_path / "old" / "IR007_0.mat", {"X105_DE_time": column, "X105_FE_time": 0 * column, "X105RPM": 1797})
    variables = {  # a column is a row of the file
        "X105_DE_time": (column.T, "double"),
        "X105_FE_time": (0 * column.T, "double"),
        "X105RPM": (torch.tensor([[1797.0]]).numpy(), "double"),
        "name": (torch.tensor([[73], [82]]).to(torch.int16).numpy().astype("uint16"), "char"),
    }
    write(tmp_path / "new" / "IR007_0.mat", variables)
    write(tmp_path / "bare" / "IR007_0.mat", variables, head=b"")  # by another program than MATLAB
    wanted = load_cwru(tmp_path / "old", length=100)
    for name in ("new", "bare"):
        found = load_cwru(tmp_path / name, length=100)
        assert torch.equal(found.train_x, wanted.train_x) and torch.equal(found.test_x, wanted.test_x)


@pytest.mark.parametrize("kind", ["single", "int16"])
def test_version_7_3_in_other_numbers_and_as_a_row(tmp_path, write, kind):
    values = (1000 * SIGNAL).round().reshape(-1, 1).numpy().astype({"single": "float32"}.get(kind, kind))
    write(tmp_path / "IR007_0.MAT", {"X105_DE_time": (values, kind)})
    first = load_cwru(tmp_path, length=100).train_x[0, 0]
    wanted = torch.from_numpy(values[:100, 0].astype("float32"))
    torch.testing.assert_close(first, (wanted - wanted.mean()) / wanted.std(correction=0))


def test_version_7_3_errors_name_the_file(tmp_path, write):
    numbers = SIGNAL.reshape(1, -1).numpy()
    for values, kind in (
        (numbers.astype("uint16"), "char"),
        (numbers, "cell"),
        (numbers, "struct"),
        (numbers.astype("complex128").view([("real", "f8"), ("imag", "f8")]), "double"),
        (numbers.reshape(2, -1), "double"),
    ):
        path = write(tmp_path / "IR007_0.mat", {"X105_DE_time": (values, kind)})
        message = "IR007_0.mat must hold real numbers in one row or column as its drive-end channel X105_DE_time, but"
        with pytest.raises(ValueError, match=message):
            load_cwru(tmp_path, length=100)
    write(path, {"X105_DE_time": (torch.tensor([0, 1]).numpy(), "empty double")})  # the dimensions stand for values
    with pytest.raises(ValueError, match=r"X105_DE_time, but holds float64 of shape \(0, 1\)$"):
        load_cwru(tmp_path, length=100)
    write(path, {"X105_FE_time": (numbers, "double"), "X105_BA_time": (numbers, "cell")})
    with pytest.raises(ValueError, match=r"one drive-end channel, \*_DE_time, but holds X105_BA_time, X105_FE_time$"):
        load_cwru(tmp_path, length=100)
    write(path, {"X105_DE_time": (numbers, "double")})
    whole = path.read_bytes()
    for size in (30, 512, 520, 600, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="IR007_0.mat cannot be read as a MATLAB file, so it may be truncated"):
            load_cwru(tmp_path, length=100)


def test_version_7_3_without_h5py_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "IR007_0.mat").write_bytes(HEAD.ljust(512) + b"\x89HDF\r\n\x1a\n" + bytes(1000))
    message = r'IR007_0.mat is a MATLAB file of version 7.3: h5py is needed .*: pip install h5py'
    with pytest.raises(ImportError, match=message) as refused:
        load_cwru(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["__MACOSX/._IR007_0.mat", "._IR007_0.mat", ".git/IR007_0.mat", "@eaDir/IR007_0.mat"])
def test_companion_and_hidden_files_are_passed_over(tmp_path, name):
    pytest.importorskip("scipy.io").savemat(tmp_path / "IR007_0.mat", {"X105_DE_time": SIGNAL.numpy()})
    alone = load_cwru(tmp_path, length=100)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0\5\26\7" * 40)
    beside = load_cwru(tmp_path, length=100)
    assert torch.equal(beside.train_x, alone.train_x) and beside.notes == alone.notes
