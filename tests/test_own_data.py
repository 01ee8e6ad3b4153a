"""A person's own signals in folders and tables: windows that share nothing across the border; faults in a sentence."""

import sys

import pytest
import torch
from oracle import seeded

from drsn_kernels.data import load_own
from drsn_kernels.data._recordings import resampled, resampled_length

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.usefixtures("one_thread")
SIGNAL = np.round(100 * np.sin(np.arange(40))).astype("int16")


def save(path, array=None, **named):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **named) if array is None else np.save(path, array)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sentence(call, *arguments, **options):
    """What is raised, which must be one line."""
    with pytest.raises((ValueError, OSError)) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def lines(mark, *columns):
    return "\n".join(mark.join(str(value) for value in row) for row in zip(*columns, strict=True)) + "\n"


# ---- folders ---------------------------------------------------------------------------------------------------------


def places(samples, first=0):
    """A signal whose every sample differs from all others, and by which a window tells where it lay."""
    return (np.arange(first, first + samples) ** 2).astype("float32")


def where(windows, mean, std):
    """The numbers of the samples that windows (N, 1, length) hold, where they were normalised by mean and std."""
    return (windows[:, 0].double() * std + mean).clamp_min(0).sqrt().round().long()


@pytest.fixture
def folder(tmp_path):
    """Two classes, with a recording of 1000 samples each."""
    for number, name in enumerate("ab"):
        save(tmp_path / name / "one.npy", places(1000, 1000 * number))
    return tmp_path


@pytest.mark.parametrize("length, stride", [(64, None), (100, 10), (300, 7), (17, 100)])
def test_no_window_crosses_the_border_and_none_shares_a_sample_with_the_other_side(folder, length, stride):
    data = load_own(folder, length=length, stride=stride, normalise="training")
    mean, std = data.windows.mean[0], data.windows.std[0]
    train, test = where(data.train_x, mean, std), where(data.test_x, mean, std)
    for x in (train, test):
        assert (x.diff(dim=1) == 1).all()  # in one piece, as they were
    assert not set(train.flatten().tolist()) & set(test.flatten().tolist())
    step = stride or length // 2
    starts = [i for first in (0, 1000) for i in range(first, first + 700 - length + 1, step)]
    assert train[:, 0].tolist() == starts
    assert test[:, 0].tolist() == [i for first in (700, 1700) for i in range(first, first + 300 - length + 1, length)]
    assert data.train_y.tolist() == [start // 1000 for start in starts] and data.class_names == ("a", "b")


def test_the_sides_are_resampled_apart(folder):
    """A step in the test side leaves the training side as it was."""
    pytest.importorskip("scipy.signal")
    before = load_own(folder, rate=100, length=50)
    for name in "ab":
        values = np.load(folder / name / "one.npy")
        values[700:] += 1e9
        save(folder / name / "one.npz", x=values, fs=200)
        save(folder / name / "two.npz", x=np.load(folder / name / "one.npy"), fs=200)
        (folder / name / "one.npy").unlink()
    after = load_own(folder, rate=100, length=50)
    half = len(after.train_x) // 4  # of each class, the windows of either recording
    assert torch.equal(after.train_x[:half], after.train_x[half : 2 * half])
    assert len(after.train_x) < 2 * len(before.train_x) and after.sampling_rate == 100


def test_windows_are_normalised_each_by_itself_or_all_by_the_training_data(tmp_path):
    draw = np.random.default_rng(0)
    for level, name in ((1, "soft"), (5, "loud")):
        save(tmp_path / name / "r.npy", 7 + level * draw.standard_normal((2, 1000)))
    alone = load_own(tmp_path, length=100)
    for x in (alone.train_x, alone.test_x):
        torch.testing.assert_close(x.mean(2), torch.zeros(x.shape[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.square().mean(2), torch.ones(x.shape[:2]), atol=1e-4, rtol=0)
    levels = load_own(tmp_path, length=100, stride=100, normalise="training")
    torch.testing.assert_close(levels.train_x.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(levels.train_x.square().mean((0, 2)), torch.ones(2), atol=1e-4, rtol=0)
    loud, soft = (levels.test_x[levels.test_y == label].std() for label in (0, 1))
    assert 4 < loud / soft < 6 and levels.class_names == ("loud", "soft")
    assert levels.windows.mean[0] == pytest.approx(7, abs=0.3)


def test_short_recordings_are_not_split_and_the_last_of_each_class_are_for_testing(tmp_path):
    for number, name in enumerate("ab"):
        for take in range(10):
            save(tmp_path / name / f"{take}.npy", places(100, 1000 * number + 100 * take))
    data = load_own(tmp_path, normalise="training")  # the length is theirs
    assert data.windows.length == 100 and len(data.train_x) == 14 and len(data.test_x) == 6
    found = where(data.test_x, data.windows.mean[0], data.windows.std[0])[:, 0].tolist()
    assert found == [700, 800, 900, 1700, 1800, 1900]
    assert "from the rest; 20 too short for both are in one part as a whole. " in data.description


def test_the_length_is_what_every_class_has_room_for(folder):
    assert load_own(folder).windows.length == 300  # each class has one recording, and needs both of its sides
    for name in "ab":
        save(folder / name / "two.npy", places(3000))
        save(folder / name / "three.npy", places(1200))
    assert load_own(folder).windows.length == 1000
    for name in "ab":
        save(folder / name / "one.npy", places(9000))
        save(folder / name / "three.npy", places(9000))
    assert load_own(folder).windows.length == 2048


def test_the_preview_and_the_description(folder):
    save(folder / "b" / "two.npz", x=places(2000), fs=500)
    data = load_own(folder, rate=500, length=64)
    assert data.preview.splitlines() == [
        "class  recordings  seconds  training windows  test windows",
        "a               1      2.0                20             4",
        "b               2      6.0                62            13",
    ]
    assert "windows of 64 samples (0.128 s)" in data.description and data.sampling_rate == 500
    assert "Sampling rates: 2 files that do not say one, taken to be at 500 Hz; 1 at 500 Hz." in data.description


def test_what_is_no_recording_is_passed_over(folder):
    before = load_own(folder, length=64)
    write(folder / "readme.txt", "not in a class's folder")
    write(folder / "a" / "._one.npy", b"\0\5")
    write(folder / "a" / "photo.png", b"PNG")
    write(folder / ".cache" / "x.npy", b"")
    write(folder / "__MACOSX" / "x.npy", b"")
    after = load_own(folder, length=64)
    assert torch.equal(after.train_x, before.train_x) and after.class_names == before.class_names


def test_names_of_any_alphabet_and_files_in_subfolders(tmp_path):
    for name in ("Stoß", "故障", "two words"):
        save(tmp_path / name / "Mai" / "é 1.npy", places(400))
    assert load_own(tmp_path, length=64).class_names == ("Stoß", "two words", "故障")


def test_windows_without_any_change_are_left_out(folder):
    values = places(1000)
    values[100:400] = 3
    path = save(folder / "a" / "one.npy", values)
    data = load_own(folder, length=100, stride=100)
    assert data.notes == (f"Left 3 windows without any change out of {path}.",) and len(data.train_x) == 4 + 7
    save(path, np.ones(1000))
    said = sentence(load_own, folder, length=100)
    assert f"{folder / 'a'} must hold recordings of a to train on, but all windows are constant" in said
    assert load_own(folder, length=100, normalise="training").train_x.shape == (26, 1, 100)


# Each takes the folder, spoils it, and returns the options, and what the sentence must hold.
def _one_class(folder):
    for path in (folder / "b").iterdir():
        path.unlink()
    (folder / "b").rmdir()
    return {}, f"subfolder for each of at least two classes, but {folder} has only a"


def _empty_class(folder):
    (folder / "c").mkdir()
    return {}, f"{folder / 'c'} must hold recordings"


def _no_folders(folder):
    return {"source": folder / "a"}, f"at least two classes, but {folder / 'a'} has none"


def _nowhere(folder):
    return {"source": folder / "x"}, f"folder does not exist: {folder / 'x'}"


def _mixed_rates(folder):
    save(folder / "a" / "two.npz", x=places(900), fs=10)
    save(folder / "b" / "two.npz", x=places(900), fs=20)
    for name in "ab":
        (folder / name / "one.npy").unlink()
    return {}, f"{folder / 'a' / 'two.npz'} has 10 Hz and {folder / 'b' / 'two.npz'} has 20 Hz: give --rate HZ"


def _far_rates(folder):
    path = save(folder / "b" / "two.npz", x=places(900), fs=2e5)
    return {"rate": 1.0}, f"{path} is at 200000 Hz, which cannot be brought to 1 Hz"


def _half_the_rates(folder):
    save(folder / "b" / "two.npz", x=places(900), fs=20)
    return {}, f"{folder / 'a' / 'one.npy'} does not say its own and {folder / 'b' / 'two.npz'} has 20 Hz: give --rate"


def _channels(folder):
    save(folder / "b" / "two.npy", np.stack([places(900)] * 2))
    return {}, f"{folder / 'a' / 'one.npy'} has 1 and {folder / 'b' / 'two.npy'} has 2: choose with --channels"


def _channel_order(folder):
    for name, head in (("a", "x,y"), ("b", "y,x")):
        (folder / name / "one.npy").unlink()
        write(folder / name / "r.csv", f"{head}\n" + lines(",", SIGNAL, SIGNAL))
    return {"length": 16}, f"x, y in {folder / 'a' / 'r.csv'} and y, x in {folder / 'b' / 'r.csv'}: choose by name"


def _channel_elsewhere(folder):
    """z is the third channel of one, and the second of another."""
    for name, head in (("a", "x,y,z"), ("b", "x,z,w")):
        (folder / name / "one.npy").unlink()
        write(folder / name / "r.csv", f"{head}\n" + lines(",", SIGNAL, SIGNAL, SIGNAL))
    a, b = folder / "a" / "r.csv", folder / "b" / "r.csv"
    return {"length": 16}, f"x, y, z in {a} and x, z, w in {b}: choose by name"


def _too_short(folder):
    path = save(folder / "b" / "two.npy", places(50))
    return {"length": 64}, f"{path} is too short: it has 50 samples, and --length is 64"


def _tiny(folder):
    path = save(folder / "b" / "two.npy", places(9))
    return {}, f"{path} is too short: it has 9 samples, and windows need at least 16"


def _alone(folder):
    said = "it has 700 samples for training and 300 for testing, as its class's only recording, and --length is 301"
    return {"length": 301}, f"{folder / 'a' / 'one.npy'} is too short: {said}"


def _not_a_number(folder):
    path = save(folder / "b" / "two.npy", np.r_[places(900), np.nan])
    return {}, f"{path} holds NaN or Inf"


def _unreadable(folder):
    return {}, f"{write(folder / 'b' / 'notes.txt', 'made in May')} holds no numbers"


def _table_without_labels(folder):
    return {"source": folder / "a" / "one.npy"}, f"{folder / 'a' / 'one.npy'} must be a table with labels"


@pytest.mark.parametrize(
    "spoil",
    [
        _one_class, _empty_class, _no_folders, _nowhere, _mixed_rates, _far_rates, _half_the_rates, _channels,
        _channel_order, _channel_elsewhere, _too_short, _tiny, _alone, _not_a_number, _unreadable,
        _table_without_labels,
    ],
)  # fmt: skip
def test_faults_of_a_folder_are_one_sentence_that_names_the_file(folder, spoil):
    options, wanted = spoil(folder)
    assert wanted in sentence(load_own, options.pop("source", folder), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 5}, "length must be a whole number of at least 16, got 5"),
        ({"stride": 0}, "stride must be a whole number of at least 1, got 0"),
        ({"rate": -1.0}, "rate must be a positive number of Hz, got -1.0"),
        ({"train_fraction": 1.0}, "train_fraction must lie between 0 and 1, got 1.0"),
        ({"normalise": "all"}, "normalise must be one of window, training, got 'all'"),
    ],
)
def test_options_out_of_range(folder, options, message):
    assert sentence(load_own, folder, **options) == message


def test_without_scipy_what_needs_none_is_read(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    assert len(load_own(folder, length=64).train_x)
    save(folder / "b" / "two.npz", x=places(900), fs=20)
    with pytest.raises(ImportError, match="scipy.signal is needed here"):
        load_own(folder, length=64, rate=40)


# ---- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, wanted", [(1000, 500), (500, 1000), (44100, 16000), (8000, 11025.5), (100, 100), (None, 3)]
)
def test_resampling_keeps_a_tone_where_it_is(rate, wanted):
    pytest.importorskip("scipy.signal")
    time = torch.arange(4000) / (rate or 1)
    hertz = 0.01 * (rate or 1)
    found = resampled(torch.sin(2 * torch.pi * hertz * time)[None], rate, wanted)
    assert found.shape == (1, resampled_length(4000, rate, wanted)) and found.dtype == torch.float32
    at = wanted if rate else 1
    exact = torch.sin(2 * torch.pi * hertz * torch.arange(found.shape[1], dtype=torch.float64) / at).float()
    middle = slice(found.shape[1] // 10, -found.shape[1] // 10)
    torch.testing.assert_close(found[0, middle], exact[middle], atol=5e-3, rtol=0)


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(tmp_path, **changed):
    x = torch.randn(20, 32, generator=seeded()).numpy()
    return save(tmp_path / "t.npz", **{"x": x, "y": np.arange(20) % 2} | changed)


def test_a_table_of_windows(tmp_path):
    x = np.load(table(tmp_path))["x"]
    data = load_own(table(tmp_path), train_fraction=0.75, normalise="training")
    std, mean = data.windows.std[0], data.windows.mean[0]
    rows = [i for label in (0, 1) for i in range(label, 20, 2)]
    train, test = rows[:8] + rows[10:18], rows[8:10] + rows[18:]  # round(10 * 0.25) is 2
    torch.testing.assert_close(data.train_x[:, 0] * std + mean, torch.from_numpy(x[train]))
    torch.testing.assert_close(data.test_x[:, 0] * std + mean, torch.from_numpy(x[test]))
    assert data.class_names == ("0", "1") and data.windows.table and data.train_y.tolist() == [0] * 8 + [1] * 8
    assert data.preview.splitlines()[1].split() == ["0", "10", "320", "8", "2"]


@pytest.mark.parametrize(
    "y, names",
    [
        (np.array(["on", "off"] * 10), ("off", "on")),
        (np.array([2.0, 10.0] * 10), ("2", "10")),
        (np.array([1, 3] * 10, "uint8"), ("1", "3")),
    ],
)
def test_labels_of_every_kind(tmp_path, y, names):
    assert load_own(table(tmp_path, y=y, fs=50)).class_names == names


def test_a_table_of_several_channels(tmp_path):
    data = load_own(table(tmp_path, x=np.random.default_rng(0).standard_normal((20, 3, 32)), fs=50))
    assert data.train_x.shape == (14, 3, 32) and data.sampling_rate == 50


ROWS = torch.randn(12, 20, generator=seeded()).numpy().round(3)
NAMES = [("idle", "run")[i % 2] for i in range(12)]
HEAD = ",".join(f"s{i}" for i in range(20))
TABLES = {
    "texts at the end": lines(",", *ROWS.T, NAMES),
    "a line of names": f"{HEAD},state\n" + lines(",", *ROWS.T, NAMES),
    "label in front": f"Label,{HEAD}\n" + lines(",", NAMES, *ROWS.T),
    "numbers for names": ",".join(map(str, range(20))) + ",label\n" + lines(",", *ROWS.T, NAMES),
    "an index": f",{HEAD},label\n" + lines(",", range(12), *ROWS.T, NAMES),
    "semicolons": lines(";", *ROWS.T, NAMES),
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
def test_text_tables(tmp_path, content):
    data = load_own(write(tmp_path / "t.csv", content), normalise="training")
    assert data.class_names == ("idle", "run") and data.train_x.shape == (8, 1, 20)
    found = data.train_x[:4, 0] * data.windows.std[0] + data.windows.mean[0]
    torch.testing.assert_close(found, torch.from_numpy(ROWS[:8:2]), atol=1e-5, rtol=0)


def test_faults_of_a_table_are_one_sentence_that_names_it(tmp_path):
    x = np.load(table(tmp_path))["x"]
    bad = x.copy()
    bad[13, 5] = np.nan
    for changed, reason in (
        ({"y": np.arange(19) % 2}, "must hold a label for each window, but has 19 for 20"),
        ({"y": np.zeros(20, int)}, "must hold at least two classes, but every label is '0'"),
        ({"y": np.arange(20) // 19}, "two rows of each class, to train on and to test, but 1 has 1"),
        ({"y": np.arange(20) / 2}, "must hold whole numbers or texts as labels y, but holds 0.5"),
        ({"y": np.eye(20)}, "must hold numbers or texts as labels y (N,), but holds float64 of shape (20, 20)"),
        ({"x": bad}, "holds NaN or Inf: the first in row 13"),
        ({"x": x * 1j}, "must hold real numbers, but x holds complex numbers"),
        ({"x": x[:, :9]}, "must hold windows of at least 16 samples, but its rows have 9"),
        ({"x": x[0]}, "must hold x of shape (N, length) or (N, channels, length), got (32,)"),
    ):
        path = table(tmp_path, **changed)
        said = sentence(load_own, path)
        assert str(path) in said and reason in said
    assert "must hold x (N, length)" in sentence(load_own, save(tmp_path / "t.npz", a=x))
    assert "belong to recordings, but" in sentence(load_own, table(tmp_path), length=16)
    assert "at 50 Hz, which are not resampled" in sentence(load_own, table(tmp_path, fs=50.0), rate=9)
    path = write(tmp_path / "t.csv", lines(",", *ROWS.T, NAMES[:-1] + [""]))
    assert str(path) in sentence(load_own, path)
