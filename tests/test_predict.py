"""From a checkpoint to predictions: a model is loaded from the file alone, and recordings are told by it."""

import contextlib
import csv
import io
import json
import os

import pytest
import torch
from data_files import sound, write_wav
from oracle import seeded
from torch import nn

from drsn_kernels.__main__ import main
from drsn_kernels.data import Dataset, Windows, load_own, load_speech
from drsn_kernels.models import network
from drsn_kernels.modules import record_tau
from drsn_kernels.train import Recipe, RunInfo, accuracy, load, predict
from drsn_kernels.train.predictions import file_windows, probabilities
from drsn_kernels.train.ranks import Ranks
from drsn_kernels.train.run import Run
from drsn_kernels.train.saved import Normalise, describe

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"stages": ((4, 1, 2),), "stem": (4, 2)}
RATE = 100.0


def tone(hertz, samples, rate=RATE, phase=0.0):
    return np.sin(2 * np.pi * hertz * np.arange(samples) / rate + phase)


def recordings(folder, **named):
    """Two classes, a low and a high tone, of three recordings each."""
    for name, hertz in (("low", 3), ("high", 20)):
        for take in range(3):
            path = folder / name / f"{take}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, x=tone(hertz, 700, phase=take) + 5, fs=RATE, **named)
    return folder


def spoken(folder):
    """Two words, seven takes of each."""
    for hertz, word in ((500, "low"), (1500, "high")):
        for take in range(7):
            write_wav(folder / f"{word}_ann_{take}.wav", sound(hertz + take, 2000))
    return folder


def train(data, out, *, model="drsn-cw", epochs=4, task="own", dims=1, lr=0.05):
    """A finished run of a tiny network on the data."""
    out.mkdir(parents=True)
    torch.manual_seed(0)
    channels = data.transform(data.train_x[:1]).shape[1]
    options = {"dims": dims, "in_channels": channels, "classes": len(data.class_names), **TINY}
    recipe = Recipe(epochs, 8, lr)
    run = Run(
        network(model, **options), data, recipe, noise=None, test_x=data.test_x, seed=0, out=out,
        ranks=Ranks(0, 1, torch.device("cpu")), save_seconds=1e9, about=describe(task, model, options, data, epochs),
    )  # fmt: skip
    with contextlib.redirect_stdout(None):
        run.train()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on recordings at 100 Hz, windows of 64 samples, and the run."""
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = train(load_own(recordings(folder / "data"), length=64, stride=16), folder / "run")
    torch.set_num_threads(threads)
    return folder / "run", run


@pytest.fixture
def command(capsys):
    """Run a command; what it printed, or with `refused` the one sentence it ended with."""

    def command(*arguments, refused=False):
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == refused, printed.err
        if refused:
            assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err if refused else printed.out

    return command


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


# ---- load ------------------------------------------------------------------------------------------------------------


def test_the_checkpoint_alone_is_enough(trained, tmp_path):
    folder, run = trained
    (tmp_path / "my model.bin").write_bytes((folder / "checkpoint.pt").read_bytes())
    for path in (folder, str(folder), folder / "checkpoint.pt", tmp_path / "my model.bin"):
        model, info = load(path)
        assert not any(module.training for module in model.modules())
        for name, value in run.network.state_dict().items():
            assert torch.equal(model.network.state_dict()[name], value)
    assert info == RunInfo(
        "own", "drsn-cw", {"dims": 1, "in_channels": 1, "classes": 2, **TINY}, ("high", "low"), (1, 64), RATE,
        Windows(64, 16, names=("x",)), 4, 4,
    )  # fmt: skip


def test_the_model_takes_windows_as_they_are_in_the_files(trained):
    """Scaled and shifted, they give what the normalised ones of training gave."""
    folder, run = trained
    model, info = load(folder)
    data = run.data
    exact = run.network.eval()(data.test_x)
    torch.testing.assert_close(model(300 * data.test_x + 70), exact, atol=1e-4, rtol=1e-4)
    assert accuracy(model, 3 * data.test_x.numpy().astype("float64"), data.test_y.numpy().astype("int32")) == 1.0
    assert torch.equal(predict(model, data.test_x), exact.argmax(1))


def test_a_run_that_keeps_levels_normalises_by_the_training_data(tmp_path):
    for level, name in ((1, "soft"), (4, "loud")):
        (tmp_path / "data" / name).mkdir(parents=True)
        np.save(tmp_path / "data" / name / "r.npy", 9 + level * tone(10, 900))
    data = load_own(tmp_path / "data", length=32, normalise="training")
    run = train(data, tmp_path / "run")
    model, info = load(tmp_path / "run")
    assert info.windows.std == data.windows.std and info.sampling_rate is None
    x, starts = file_windows(tmp_path / "data" / "loud" / "r.npy", info)
    assert starts == [32.0 * i for i in range(28)] and x.mean() > 8
    with torch.no_grad():
        torch.testing.assert_close(model(x[20:]), run.network.eval()(data.test_x[:8]), atol=1e-4, rtol=1e-4)


def test_speech_and_images_load_as_well(tmp_path):
    pytest.importorskip("scipy.io")
    data = load_speech(spoken(tmp_path / "data"), frames=16, mels=16)
    run = train(data, tmp_path / "speech", task="speech", dims=2, epochs=1)
    model, info = load(tmp_path / "speech")
    x, starts = file_windows(tmp_path / "data" / "low_ann_0.wav", info)
    assert starts == [0.0] and x.shape == (1, 1, 2048)
    with torch.no_grad():
        exact = run.model.eval()(data.test_x[data.test_y == 1][:1])
        torch.testing.assert_close(model(x), exact, atol=1e-4, rtol=1e-4)

    images = Dataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 2, torch.rand(4, 1, 8, 8), torch.arange(4) % 2,
                     ("a", "b"), None, "Noise.")  # fmt: skip
    run = train(images, tmp_path / "image", task="image", dims=2, epochs=1)
    model, info = load(tmp_path / "image")
    assert info.windows is None and info.shape == (1, 8, 8)
    with pytest.raises(ValueError, match="x.npy cannot be cut into windows: the run was trained on images"):
        file_windows("x.npy", info)
    with torch.no_grad():
        assert torch.equal(model(images.test_x), run.network.eval()(images.test_x))


def test_runs_that_do_not_load_are_said(trained, tmp_path):
    folder, _ = trained
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    path = tmp_path / "checkpoint.pt"
    for content, message in (
        ({"a": 1}, "is no checkpoint of python -m drsn_kernels train"),
        ([1], "is no checkpoint of python -m drsn_kernels train"),
        ({"network": {}}, "of a version that did not write into it what its network is: train it again, or build"),
        (state | {"about": state["about"] | {"model": "resnet"}}, "does not hold what a run of this version writes"),
        (state | {"about": {"windows": None}}, "does not hold what a run of this version writes: KeyError"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError) as raised:
            load(path)
        assert str(raised.value).startswith(str(path)) and message in str(raised.value)
        assert "\n" not in str(raised.value)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read as a checkpoint"):
        load(path)
    with pytest.raises(FileNotFoundError, match="run must be a folder with checkpoint.pt, or .* got .*nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_normalise_is_what_training_did(scale):
    x = torch.randn(5, 2, 300, generator=seeded()) * scale
    x[3, 1] = scale / 3
    found = Normalise()(x)
    torch.testing.assert_close(found.mean(2), torch.zeros(5, 2), atol=1e-5, rtol=0)
    wanted = torch.ones(5, 2)
    wanted[3, 1] = 0
    torch.testing.assert_close(found.square().mean(2), wanted, atol=1e-4, rtol=0)


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_every_window_and_the_file_have_a_line(trained, tmp_path, command):
    folder, run = trained
    for hertz, name in ((3, "new low.npy"), (20, "new high.npy")):
        np.save(tmp_path / name, tone(hertz, 64 * 3 + 20, phase=1.5))
    files = [tmp_path / "new low.npy", tmp_path / "new high.npy"]
    rows = table(command("predict", "--run", folder, *files))
    assert list(rows[0]) == ["file", "start", "class", "probability"]
    assert [row["file"] for row in rows] == [str(path) for path in files for _ in range(4)]
    assert [row["start"] for row in rows] == ["0", "0.64", "1.28", ""] * 2
    assert [row["class"] for row in rows] == ["low"] * 4 + ["high"] * 4
    model, info = load(folder)
    x, _ = file_windows(files[0], info)
    with torch.no_grad():
        exact = model(x).softmax(1)
    wanted = [*exact.amax(1).tolist(), float(exact.mean(0).max())]
    assert [float(row["probability"]) for row in rows[:4]] == pytest.approx(wanted, rel=1e-5)


def test_thresholds_are_means_over_channels_and_over_windows(trained, tmp_path, command):
    folder, _ = trained
    np.save(tmp_path / "r.npy", tone(3, 64 * 3))
    rows = table(command("predict", "--run", folder, "--thresholds", "--stride", 32, tmp_path / "r.npy"))
    assert list(rows[0])[4:] == ["stages.0.0.shrinkage"] and len(rows) == 6
    model, info = load(folder)
    x, starts = file_windows(tmp_path / "r.npy", info, stride=32)
    assert starts == pytest.approx([0.32 * i for i in range(5)])
    with torch.no_grad(), record_tau(model.network) as taus:
        model(x)
    exact = taus["stages.0.0.shrinkage"].mean(1)
    found = [float(row["stages.0.0.shrinkage"]) for row in rows]
    assert found == pytest.approx([*exact.tolist(), float(exact.mean())], rel=1e-4)


def test_channels_are_where_they_were_in_training(tmp_path, command):
    """By their names; a file that names none of them alike is taken as it is."""

    def recording(path, head, *columns):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, np.stack(columns, 1), delimiter=",", header=head, comments="")
        return path

    for name, hertz in (("low", 3), ("high", 20)):
        for take in range(3):
            recording(tmp_path / "data" / name / f"{take}.csv", "x,y", tone(hertz, 300, phase=take), tone(9, 300))
    run = train(load_own(tmp_path / "data", length=64, stride=16, rate=RATE), tmp_path / "run", epochs=1)
    assert run.data.windows.names == ("x", "y")
    given = tone(3, 128), tone(9, 128)
    right, swapped = recording(tmp_path / "a.csv", "x,y", *given), recording(tmp_path / "b.csv", "y,x", *given[::-1])
    other = recording(tmp_path / "c.csv", "u,v", *given)
    said = command("predict", "--run", tmp_path / "run", swapped, refused=True)
    assert f"{swapped} must have its channels in the order in which the run was trained, x, y, but has y, x: " in said
    found = [table(command("predict", "--run", tmp_path / "run", *more, path))
             for path, more in ((right, ()), (other, ()), (swapped, ("--channels", "x,y")))]  # fmt: skip
    for rows in found[1:]:
        assert [row["probability"] for row in rows] == [row["probability"] for row in found[0]]


@pytest.mark.gpu
def test_a_gpu_predicts_what_the_cpu_does(trained, tmp_path, command):
    folder, _ = trained
    np.save(tmp_path / "r.npy", tone(3, 64 * 5))
    given = ("predict", "--run", folder, "--thresholds", tmp_path / "r.npy", "--device")
    ours, wanted = (table(command(*given, device)) for device in ("cuda", "cpu"))
    for row, exact in zip(ours, wanted, strict=True):
        assert row["class"] == exact["class"] and row["start"] == exact["start"]
        for name in ("probability", "stages.0.0.shrinkage"):
            assert float(row[name]) == pytest.approx(float(exact[name]), rel=1e-3)


def test_another_rate_is_resampled_and_said(trained, tmp_path, command, caplog):
    pytest.importorskip("scipy.signal")
    folder, _ = trained
    np.savez(tmp_path / "fast.npz", x=tone(20, 64 * 8, rate=2 * RATE), fs=2 * RATE)
    np.savez(tmp_path / "same.npz", x=tone(20, 64 * 4), fs=RATE)
    np.save(tmp_path / "unsaid.npy", tone(3, 64 * 8, rate=2 * RATE))
    rows = table(command("predict", "--run", folder, tmp_path / "fast.npz", tmp_path / "same.npz"))
    assert caplog.messages == [f"{tmp_path / 'fast.npz'} is resampled from 200 to 100 Hz."]
    assert [row["start"] for row in rows] == ["0", "0.64", "1.28", "1.92", ""] * 2
    assert {row["class"] for row in rows} == {"high"}
    rows = table(command("predict", "--run", folder, "--rate", 2 * RATE, tmp_path / "unsaid.npy"))
    assert len(rows) == 5 and {row["class"] for row in rows} == {"low"}


def test_a_rate_means_nothing_to_a_run_that_knows_none(trained, tmp_path):
    info = load(trained[0])[1]
    np.savez(tmp_path / "fast.npz", x=tone(20, 64 * 8, rate=2 * RATE), fs=2 * RATE)
    with pytest.raises(ValueError, match="fast.npz is at 200 Hz, but the run does not know at which rate"):
        file_windows(tmp_path / "fast.npz", info._replace(sampling_rate=None))


def test_a_table_file_and_a_line_for_each_recording(trained, tmp_path, command):
    folder, _ = trained
    out = tmp_path / "predictions.csv"
    printed = command("predict", "--run", folder, "--out", out, recordings(tmp_path / "more"))
    rows = table(out.read_text())
    assert len(rows) == 6 * 11
    assert all(row["class"] == row["file"].split("/")[-2] for row in rows if not row["start"])
    *lines, last = printed.splitlines()
    assert len(lines) == 6 and last == f"Written to {out}"
    assert lines[0].startswith(f"{tmp_path / 'more' / 'high' / '0.npz'}: high, probability ")
    assert lines[0].endswith(", 10 windows") and not list(tmp_path.glob(".*"))


def test_faults_of_files_are_one_sentence_and_nothing_is_written(trained, tmp_path, command):
    folder, _ = trained
    good = tmp_path / "good.npy"
    np.save(good, tone(3, 200))
    np.save(tmp_path / "short.npy", tone(3, 50))
    np.save(tmp_path / "two.npy", np.stack([tone(3, 200)] * 2))
    np.save(tmp_path / "nan.npy", np.full(200, np.nan))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("short.npy", "is too short: it has 50 samples at 100 Hz, a window 64"),
        ("two.npy", "has 2 channels, but the run was trained on 1: choose with --channels"),
        ("nan.npy", "holds NaN or Inf"),
        ("nowhere.npy", "file does not exist: "),
        ("empty", "must hold recordings (.npy, .npz, .csv, .txt, .mat, .wav), but has none"),
    ):
        said = command("predict", "--run", folder, "--out", tmp_path / "p.csv", good, tmp_path / name, refused=True)
        assert str(tmp_path / name) in said and message in said
        assert not (tmp_path / "p.csv").exists()
    said = command("predict", "--run", folder, "--rate", 1e9, good, refused=True)
    assert f"{good} is at 1e+09 Hz, which cannot be brought to 100 Hz" in said
    assert table(command("predict", "--run", folder, "--channels", "1", tmp_path / "two.npy"))[-1]["class"] == "low"


def test_options_that_do_not_go_together(trained, tmp_path, command):
    folder, run = trained
    path = tmp_path / "r.npy"
    np.save(path, tone(3, 200))
    assert "run must be a folder with checkpoint.pt" in command("predict", "--run", tmp_path, path, refused=True)
    for options, message in (
        (("--stride", 0), "stride must be a whole number of at least 1, got 0"),
        (("--rate", 0), "--rate must be a positive number of Hz, got 0"),
        (("--device", "gpu"), "--device must be cpu, cuda or cuda:INDEX, got 'gpu'"),
    ):
        assert message in command("predict", "--run", folder, *options, path, refused=True)
    for command_, option in (("predict", "--out"), ("export", "--onnx")):
        given = (command_, "--run", folder, *((path,) if command_ == "predict" else ()), option)
        assert f"{option} must be a file, got the folder {tmp_path}" in command(*given, tmp_path, refused=True)
        said = command(*given, tmp_path / "no" / "file", refused=True)
        assert f"lies in a folder that does not exist: {tmp_path / 'no'}" in said
    link = tmp_path / "link"
    link.symlink_to(os.devnull)
    said = command("predict", "--run", folder, "--out", link, path, refused=True)
    assert f"--out must be a file, got the device {link}" in said and link.is_symlink()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    about = state["about"]
    changes = {"sampling_rate": None}, {"windows": None}, {"windows": about["windows"] | {"table": True}}
    for changed, options, message in (
        (changes[0], ("--rate", 9), "--rate has no effect: the run in"),
        (changes[1], (), "predict takes runs on signals, but"),
        (changes[2], ("--stride", 9), "belong to recordings, but the run was trained on a table"),
    ):
        torch.save(state | {"about": about | changed}, tmp_path / "checkpoint.pt")
        assert message in command("predict", "--run", tmp_path, *options, path, refused=True)


def test_a_network_without_thresholds_and_one_that_is_not_finished(tmp_path, command, caplog):
    data = load_own(recordings(tmp_path / "data"), length=64)
    train(data, tmp_path / "run", model="resnet", epochs=1)
    path = tmp_path / "data" / "low" / "0.npz"
    said = command("predict", "--run", tmp_path / "run", "--thresholds", path, refused=True)
    assert "--thresholds needs thresholds, those of drsn-cw or drsn-cs, but the run is of resnet" in said
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["about"]["epochs"] = 40
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    command("predict", "--run", tmp_path / "run", path)
    assert caplog.messages == [f"The run in {tmp_path / 'run'} has trained 1 of its 40 epochs."]


def test_a_run_on_a_table_takes_tables(tmp_path, command):
    x = np.stack([tone(3 if i % 2 else 20, 32, phase=i) for i in range(40)])
    np.savez(tmp_path / "t.npz", x=x, y=np.where(np.arange(40) % 2, "low", "high"))
    train(load_own(tmp_path / "t.npz"), tmp_path / "run", epochs=6)
    head = ",".join(map(str, range(32)))
    lines = [",".join(f"{value:.6f}" for value in row) for row in x]
    (tmp_path / "bare.csv").write_text("\n".join(lines))
    (tmp_path / "named.csv").write_text("\n".join([f"{head},label", *(f"{line},?" for line in lines)]))
    (tmp_path / "last.csv").write_text("\n".join(f"{line},?" for line in lines))
    np.save(tmp_path / "x.npy", x)
    for name in ("t.npz", "bare.csv", "named.csv", "last.csv", "x.npy"):
        rows = table(command("predict", "--run", tmp_path / "run", tmp_path / name))
        assert [row["start"] for row in rows] == [*map(str, range(40)), ""]
        assert [row["class"] for row in rows[:40]] == ["high", "low"] * 20
    np.save(tmp_path / "other.npy", x[:, :30])
    said = command("predict", "--run", tmp_path / "run", tmp_path / "other.npy", refused=True)
    assert f"{tmp_path / 'other.npy'} must hold windows of 1 x 32 (channels x samples)" in said


def test_constant_windows_are_said(trained, tmp_path, command, caplog):
    np.save(tmp_path / "r.npy", np.r_[tone(3, 64), np.ones(128)])
    command("predict", "--run", trained[0], tmp_path / "r.npy")
    assert caplog.messages == [f"{tmp_path / 'r.npy'} has 2 windows without any change: no class can be told by them."]


def test_probabilities_leave_the_mode_as_it_was():
    model = nn.Sequential(network("drsn-cw", **TINY), nn.Identity())
    model[1].eval()
    x = torch.randn(300, 1, 40, generator=seeded())  # more than one batch
    found, taus = probabilities(model, x.double().numpy(), thresholds=True)
    assert model.training and model[0].training and not model[1].training
    assert found.shape == (300, 8) and taus["0.stages.0.0.shrinkage"].shape == (300,)
    torch.testing.assert_close(found.sum(1), torch.ones(300))
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(x).softmax(1))


# ---- the commands together -------------------------------------------------------------------------------------------


def test_from_a_folder_to_predictions(tmp_path, command, capsys):
    """train, predict and what they print, with the paper's own network."""
    pytest.importorskip("matplotlib")
    recordings(tmp_path / "data")
    options = ("--task", "own", "--data", tmp_path / "data", "--length", 64, "--epochs", 1, "--model", "resnet")
    printed = command("train", *options, "--batch", 16, "--out", tmp_path / "run").splitlines()
    assert printed[0].startswith(f"Recordings in {tmp_path / 'data'}: 6 of 2 classes, 1 channel; windows of 64 samples")
    assert printed[1].split() == "class recordings seconds training windows test windows".split()
    assert any(line.endswith("; noise: none") for line in printed)  # unless it is asked for
    assert printed[2].split() == ["high", "3", "21.0", "42", "9"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"].items() >= {"task": "own", "length": 64, "rate": None, "normalise": "window"}.items()
    rows = table(command("predict", "--run", tmp_path / "run", tmp_path / "data" / "low"))
    assert len(rows) == 33 and {row["class"] for row in rows} <= {"low", "high"}
    assert load(tmp_path / "run")[1].options == {"dims": 1, "in_channels": 1, "classes": 2}
    command("train", "--resume", "--out", tmp_path / "run")  # finished: the results again
    assert "continues a run with --length 64, got 32" in command(
        "train", "--resume", "--length", 32, "--out", tmp_path / "run", refused=True
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (("--task", "own"), "--task own needs --data, a folder with a subfolder for each class, or a table"),
        (("--length", 64), "--length belongs to --task own or, with --data, --task vibration, got --task"),
        (("--channels", "0,x"), "--channels belongs to --task own, got --task vibration"),
        (("--task", "own", "--data", "nowhere"), "folder does not exist: "),
    ],
)
def test_options_of_own_data(tmp_path, command, options, message):
    pytest.importorskip("matplotlib")
    assert message in command("train", *options, "--out", tmp_path / "out", refused=True)
    assert not (tmp_path / "out").exists()


def test_a_run_of_before_there_were_own_data_is_continued(tmp_path, command):
    pytest.importorskip("matplotlib")
    recordings(tmp_path / "data")
    options = ("--task", "own", "--data", tmp_path / "data", "--length", 64, "--epochs", 1, "--model", "convnet")
    assert "; noise: gaussian at 3 dB" in command("train", *options, "--snr", 3, "--out", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["settings"]["normalise"], config["settings"]["rate"]
    path.write_text(json.dumps(config))
    command("train", "--resume", "--out", tmp_path / "run")


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_as_an_onnx_file(trained, tmp_path, command):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, run = trained
    printed = command("export", "--run", folder, "--onnx", tmp_path / "m.onnx")
    shapes = "x (batch, 1, 64) -> logits (batch, 2) of high, low"
    assert printed == f"drsn-cw as {tmp_path / 'm.onnx'}: {shapes}; checked with onnxruntime\n"
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["class_names"]) == ["high", "low"] and json.loads(known["sampling_rate"]) == RATE
    for count in (1, 9):
        x = run.data.test_x[:count]
        (logits,) = session.run(["logits"], {"x": (100 * x + 3).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), run.network.eval()(x), atol=1e-3, rtol=1e-3)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_on_speech_as_an_onnx_file(tmp_path, command):
    """The spectrogram is part of the file."""
    for module in ("scipy.io", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    train(load_speech(spoken(tmp_path / "data"), frames=16, mels=16), tmp_path / "run", task="speech", dims=2, epochs=1)
    printed = command("export", "--run", tmp_path / "run", "--onnx", tmp_path / "m.onnx")
    assert "x (batch, 1, 2048) -> logits (batch, 2) of high, low; checked with onnxruntime" in printed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_export_that_fails_is_one_sentence(trained, tmp_path, command, monkeypatch):
    for module in ("onnxruntime", "onnxscript", "onnx"):
        pytest.importorskip(module)

    def fail(*arguments, **options):
        raise TypeError("no such operation\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    said = command("export", "--run", trained[0], "--onnx", tmp_path / "m.onnx", refused=True)
    assert said == "error: drsn-cw was not exported: TypeError: no such operation\n"
    assert not list(tmp_path.iterdir())
