"""A training run continues exactly wherever it was stopped; the command's files and sentences."""

import csv
import json
import math
import os
import signal
import struct
import subprocess
import sys

import pytest
import torch
from data_files import sound, write_wav
from train_jobs import new_run

from drsn_kernels.__main__ import main
from drsn_kernels.data import load_speech
from drsn_kernels.train import command, files, run
from drsn_kernels.train.arguments import decibels
from drsn_kernels.train.progress import Progress
from drsn_kernels.train.run import Stopped

pytestmark = pytest.mark.usefixtures("one_thread")  # and the same bits everywhere


# ---- a run, stopped and continued ------------------------------------------------------------------------------------


def after(steps, action, monkeypatch):
    """Do something after so many training steps from now."""
    real, count = run.train_step, iter(range(1, 10_000))

    def step(*arguments):
        result = real(*arguments)
        if next(count) == steps:
            action()
        return result

    monkeypatch.setattr(run, "train_step", step)


def assert_equal_runs(a, b):
    for ours, wanted in ((a.network, b.network), (a.optimizer, b.optimizer)):
        assert_equal_states(ours.state_dict(), wanted.state_dict())
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_s")} for row in r.history] for r in (a, b)
    ]
    assert timeless[0] == timeless[1] and len(a.history) == 3
    assert torch.equal(a.generator.get_state(), b.generator.get_state())


def assert_equal_states(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_equal_states(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps", [1, 5, 7, 15])
def test_a_signal_stops_after_the_step_and_the_run_continues_exactly(tmp_path, monkeypatch, number, steps):
    """Epochs of five steps: stopped in the first, at an epoch's end, in the second, and at the very end."""
    whole = new_run(tmp_path / "whole")
    whole.out.mkdir()
    whole.train()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        after(steps, lambda: os.kill(os.getpid(), number), patch)
        with pytest.raises(Stopped) as stopped:
            new_run(tmp_path).train()
    assert stopped.value.number == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    torch.manual_seed(99)  # whatever else the process draws
    continued = new_run(tmp_path)
    assert (len(continued.history), continued.step) == divmod(steps, 5)
    continued.train()
    assert_equal_runs(continued, whole)


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after(2, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        new_run(tmp_path).train()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_checkpoints_inside_an_epoch(tmp_path, monkeypatch):
    """With a save after every step, the process may end anywhere: here by an error after twelve steps."""

    class End(Exception):
        pass

    def end():
        raise End

    whole = new_run(tmp_path / "whole")
    whole.out.mkdir()
    whole.train()
    with monkeypatch.context() as patch:
        after(12, end, patch)
        with pytest.raises(End):
            new_run(tmp_path, save_seconds=0).train()
    continued = new_run(tmp_path)
    assert len(continued.history) == 2 and continued.step == 1
    continued.train()
    assert_equal_runs(continued, whole)


def test_checkpoints_hold_tensors_and_plain_values_only(tmp_path):
    finished = new_run(tmp_path)
    finished.train()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert_equal_states(state["network"], finished.network.state_dict())
    assert state["epoch"] == 3 and state["step"] == 0 and state["history"] == finished.history
    assert not list(tmp_path.glob(".*"))  # nothing half written


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = files.write_checkpoint(tmp_path / "checkpoint.pt", {"x": torch.ones(1000)})
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[:100], whole[:-50]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.pt cannot be read as a checkpoint"):
            new_run(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.replace(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        files.replace(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    with pytest.raises(ValueError, match="the loss became (nan|inf) in epoch 1: lr 1e[+]30 is too large"):
        new_run(tmp_path, lr=1e30).train()


def test_no_checkpoint_holds_a_run_that_has_diverged(tmp_path, monkeypatch):
    """Saved after every step: by a loss that is not finite, and by weights that were spoilt after one that was."""
    (tmp_path / "loss").mkdir()
    with pytest.raises(ValueError, match="the (loss became (nan|inf)|weights became NaN or Inf) in epoch 1"):
        new_run(tmp_path / "loss", lr=1e6, save_seconds=0).train()
    left = new_run(tmp_path / "loss")  # what there is to go on with
    assert left.sums.isfinite().all() and all(p.isfinite().all() for p in left.network.parameters())

    diverging = new_run(tmp_path, save_seconds=0)
    weight = next(diverging.network.parameters())
    with monkeypatch.context() as patch:
        after(7, lambda: weight.data.fill_(math.nan), patch)
        with pytest.raises(ValueError, match="the weights became NaN or Inf in epoch 2: lr 0.01 is too large"):
            diverging.train()
    continued = new_run(tmp_path)
    assert (len(continued.history), continued.step) == (1, 1)
    continued.train()


def test_progress_lines_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("drsn_kernels.train.progress.LINE_SECONDS", 0)
    for silent in (False, True):
        with Progress(2, 7, 100, 20, silent=silent) as progress:
            progress.step(30, lambda: (0.5, 0.25))
    printed = capsys.readouterr().out
    assert (
        printed.startswith("epoch 2/7: 50 of 100 samples, loss 0.5000, accuracy 25.0 %, ") and printed.count("\n") == 1
    )


def test_progress_bar(monkeypatch, capsys):
    tqdm = pytest.importorskip("tqdm").tqdm
    monkeypatch.setattr("drsn_kernels.train.progress.BAR_SECONDS", 0)
    monkeypatch.setattr("tqdm.tqdm", lambda **options: tqdm(**(options | {"disable": False, "mininterval": 0})))
    with Progress(2, 7, 100, 20, silent=False) as progress:
        progress.step(30, lambda: (0.5, 0.25))
    shown = capsys.readouterr().err
    assert "epoch 2/7:  50%" in shown and "50/100" in shown and "loss 0.5000, accuracy 25.0 %" in shown


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def speech(tmp_path):
    """Two words, four takes for training and two for testing."""
    pytest.importorskip("matplotlib", reason="the command draws its results")
    pytest.importorskip("scipy.io", reason="it reads .wav files")
    folder = tmp_path / "speech"
    for hertz, word in ((500, "low"), (1500, "high")):
        for take in range(12):
            write_wav(folder / f"{word}_ann_{take}.wav", sound(hertz + take, 2000))
    return folder


def train(*arguments):
    return main(["train", *map(str, arguments)])


def test_command_writes_its_files(tmp_path, speech, capsys):
    out = tmp_path / "a" / "run"
    options = ("--task", "speech", "--data", speech, "--model", "resnet", "--snr", "-5:5", "--epochs", 2, "--batch", 8)
    assert train(*options, "--noise", "pink", "--lr", 0.02, "--seed", 7, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "noise: pink at -5 to 5 dB" in printed and "epoch 2/2  lr 0.002  loss" in printed
    config = json.loads((out / "config.json").read_text())
    wanted = {"task": "speech", "data": str(speech), "model": "resnet", "noise": "pink", "snr": [-5, 5], "epochs": 2}
    assert config["settings"].items() >= (wanted | {"batch": 8, "lr": 0.02, "seed": 7}).items()
    assert config["environment"]["torch"].startswith(torch.__version__) and config["data"]["classes"] == ["high", "low"]
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "train_acc", "test_acc", "seconds", "samples_per_s"]
    assert [(row["epoch"], row["lr"]) for row in rows] == [("1", "0.02"), ("2", "0.002")]
    results = json.loads((out / "results.json").read_text())
    confusion = torch.tensor(results["confusion"])
    assert confusion.sum(1).tolist() == [5, 5]
    assert results["test_accuracy"] == int(confusion.trace()) / 10 == pytest.approx(float(rows[-1]["test_acc"]))
    assert results["recall"] == {"high": int(confusion[0, 0]) / 5, "low": int(confusion[1, 1]) / 5}
    for name in ("curves.png", "confusion.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (
        sum(state["network"][n].numel() for n in state["network"] if n.endswith(("weight", "bias")))
        == results["parameters"]
    )

    assert train(*options, "--out", out) == 1  # not over a run that is there
    assert f"--out {out} already holds a run: continue it with --resume" in capsys.readouterr().err


def test_noise_that_is_added_once(tmp_path, speech, monkeypatch, capsys):
    """Every epoch trains on the same noisy samples, and so does a run that is stopped and continued."""
    pytest.importorskip("scipy")
    seen, real = [], run.epoch_batches

    def batches(x, y, batch, **options):
        seen.append((x.clone(), options["noise"]))
        return real(x, y, batch, **options)

    monkeypatch.setattr(run, "epoch_batches", batches)
    options = ("--task", "speech", "--data", speech, "--model", "resnet", "--snr", "-3", "--epochs", 3, "--batch", 4)
    options += ("--noise-protocol", "fixed")
    assert train(*options, "--out", tmp_path / "whole") == 0
    assert "noise: gaussian at -3 dB, the same in every epoch" in capsys.readouterr().out
    assert [noise for _, noise in seen] == [None] * 3
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][0], seen[2][0])
    clean = load_speech(speech).train_x
    snr = 10 * (clean.square().mean((1, 2)) / (seen[0][0] - clean).square().mean((1, 2))).log10()
    torch.testing.assert_close(snr, torch.full_like(snr, -3.0), atol=1e-3, rtol=0)

    with monkeypatch.context() as patch:
        after(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert train(*options, "--out", tmp_path / "parts") == 128 + signal.SIGTERM
    assert train("--resume", "--out", tmp_path / "parts") == 0
    whole, parts = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "parts"))
    assert_equal_states(parts["network"], whole["network"])


def test_a_run_from_before_there_were_protocols_is_one_of_fresh_noise(tmp_path, speech):
    out = tmp_path / "out"
    options = ("--task", "speech", "--data", speech, "--model", "resnet", "--epochs", 1, "--batch", 4, "--out", out)
    assert train(*options) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["settings"].pop("noise_protocol") == "fresh"
    (out / "config.json").write_text(json.dumps(config))
    assert train("--resume", "--noise-protocol", "fresh", "--out", out) == 0
    assert train("--resume", "--noise-protocol", "fixed", "--out", out) == 1


def test_windows_of_cwru_recordings(tmp_path, monkeypatch):
    """--length and --stride reach load_cwru where they are given."""
    asked = []

    def load(folder, **options):
        asked.append(options)
        raise ValueError("no need to read them")

    monkeypatch.setattr(command, "load_cwru", load)
    assert train("--data", tmp_path, "--length", 512, "--stride", 96, "--out", tmp_path / "out") == 1
    assert train("--data", tmp_path, "--out", tmp_path / "out") == 1
    assert asked == [{"normal": True, "length": 512, "stride": 96}, {"normal": True}]


@pytest.mark.parametrize("picture", ["curves", "confusion"])
def test_results_are_there_whatever_comes_of_a_picture(tmp_path, speech, monkeypatch, capsys, caplog, picture):
    out = tmp_path / "out"

    def fail(path, *content):
        assert json.loads((out / "results.json").read_text())["epochs"] == 1
        raise MemoryError("so many pixels")

    monkeypatch.setattr(files, f"draw_{picture}", fail)
    assert train("--task", "speech", "--data", speech, "--epochs", 1, "--batch", 4, "--out", out) == 0
    assert caplog.messages == [f"{out / picture}.png could not be drawn: MemoryError: so many pixels"]
    drawn = {"curves": "confusion.png", "confusion": "curves.png"}[picture]
    assert capsys.readouterr().out.endswith(f"config.json, log.csv, results.json, {drawn}, checkpoint.pt\n")
    assert (out / drawn).exists() and not (out / f"{picture}.png").exists() and not list(out.glob(".*"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("classes, named", [(1, 1), (10, 10), (30, 30), (31, 16), (62, 21), (256, 29), (900, 30)])
def test_the_confusion_matrix_stays_a_picture_of_a_page(tmp_path, monkeypatch, classes, named):
    """At 150 dots an inch, whatever the classes are many or called; counts only where there is room for them."""
    pytest.importorskip("matplotlib")
    real, made = files._figure, []
    monkeypatch.setattr(files, "_figure", lambda **options: made.append(real(**options)) or made[-1])
    counts = torch.eye(classes, dtype=torch.int64) * 7
    names = [f"{i} $of {2**i:d}" if i % 2 else f"{i} \\frac{{$" for i in range(classes)]  # no formulas, some long
    path = files.draw_confusion(tmp_path / "confusion.png", counts, names)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width <= 1950 and height <= 1800
    axes = made[0].axes[0]
    assert [text.get_text() for text in axes.texts] == (["7"] * classes if classes <= 30 else [])
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        texts = [label.get_text() for label in labels]
        assert len(texts) == named and all(len(text) <= 27 for text in texts)
        for text, name in zip(texts, names[:: math.ceil(classes / 30)], strict=True):
            assert name.startswith(text.removesuffix("..."))


KILLED = """
import os, signal, sys
from drsn_kernels.__main__ import main
from drsn_kernels.train import run
real, count = run.train_step, iter(range(1, 1000))
def step(*arguments):
    result = real(*arguments)
    if next(count) == {steps}:
        os.kill(os.getpid(), signal.{name})
    return result
run.train_step = step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_command_killed_inside_an_epoch_and_resumed(tmp_path, speech):
    """In processes of their own: what other tests set in this one (threads) may decide the last bit of a product."""

    def process(*arguments, steps=0):  # killed after so many steps
        program = KILLED.format(steps=steps, name="SIGKILL")
        command = [sys.executable, "-c", program, "train", *map(str, arguments)]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)

    options = ["--task", "speech", "--data", speech, "--epochs", 3, "--batch", 4, "--device", "cpu"]
    assert process(*options, "--out", tmp_path / "whole").returncode == 0
    killed = process(*options, "--out", tmp_path / "killed", "--save-minutes", 0, steps=6)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "results.json").exists()
    left = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert (left["epoch"], left["step"]) == (1, 1)  # epochs of four steps; the sixth was not saved yet
    moved = tmp_path / "moved"
    speech.rename(moved)
    resumed = process("--resume", "--data", moved, "--out", tmp_path / "killed")
    assert resumed.returncode == 0 and "continuing in epoch 2 after 1 steps" in resumed.stdout
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("killed", "whole")]
    for key in ("network", "optimizer", "transform", "generator"):
        assert_equal_states(*(state[key] for state in states))
    logs = [[row[:5] for row in csv.reader((tmp_path / name / "log.csv").open())] for name in ("killed", "whole")]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_command_stopped_by_ctrl_c_says_how_to_go_on(tmp_path, speech, monkeypatch, capsys):
    out = tmp_path / "my run"
    with monkeypatch.context() as patch:
        after(3, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        assert train("--task", "speech", "--data", speech, "--epochs", 1, "--batch", 4, "--out", out) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"to continue exactly from here: python -m drsn_kernels train --resume --out '{out}'")
    assert train("--resume", "--out", out) == 0
    capsys.readouterr()
    assert train("--resume", "--out", out) == 0  # finished: the results again
    shown = capsys.readouterr().out
    assert "after 1 epochs" in shown.splitlines()[-1] and "continuing" not in shown


def test_command_refuses_to_resume_something_else(tmp_path, speech, capsys):
    out = tmp_path / "out"

    def refused(*options):
        assert train("--resume", "--out", out, *options) == 1
        return capsys.readouterr().err

    assert f"--resume needs a run in --out, but {out} has no config.json" in refused()
    assert train("--task", "speech", "--data", speech, "--epochs", 1, "--batch", 4, "--out", out) == 0
    capsys.readouterr()
    assert "continues a run with --epochs 1, got 2" in refused("--epochs", 2)
    assert "continues a run with --snr [-5.0, 5.0], got [0.0, 0.0]" in refused("--snr", "0")
    (speech / "low_ann_0.wav").unlink()
    assert f"--data {speech} does not give the data that the run in {out} was started with" in refused()
    (out / "config.json").write_text("{")
    assert "config.json is damaged" in refused()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--task", "speech"], "--task speech needs --data FOLDER with recordings named LABEL_SPEAKER_TAKE.wav"),
        (["--task", "image", "--test-speakers", "ann"], "--test-speakers belongs to --task speech, got --task image"),
        (["--task", "speech", "--data", "x", "--without-normal"], "--without-normal belongs to --task vibration"),
        (["--data", "nowhere"], "folder does not exist: "),
        (["--stride", "96"], "--task own or, with --data, --task vibration, got --task vibration without --data"),
        (["--data", "nowhere", "--rate", "9"], "--rate belongs to --task own, got --task vibration"),
        (["--noise", "none", "--noise-protocol", "fixed"], "--noise-protocol fixed needs noise, got --noise none"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, got 0"),
        (["--batch", "1"], "batch must be a whole number of at least 2, got 1"),
        (["--lr", "nan"], "lr must be a number of at least 0, got nan"),
        (["--save-minutes", "-1"], "--save-minutes must be at least 0, got -1.0"),
        (["--device", "gpu"], "--device must be cpu, cuda or cuda:INDEX, got 'gpu'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:INDEX, got 'meta'"),
        (["--device", "cpu", "--graph"], "--graph needs a CUDA device, got --device cpu"),
    ],
)
def test_command_errors_are_one_sentence(tmp_path, capsys, options, message):
    pytest.importorskip("matplotlib", reason="asked for before any data are read")
    assert train(*options, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--task", "music"], ["--snr", "loud"], ["--snr", "5:-5"], ["--model", "vgg"]])
def test_command_usage_errors(options, capsys):
    with pytest.raises(SystemExit) as ended:
        train(*options)
    assert ended.value.code == 2 and f"argument {options[0]}: " in capsys.readouterr().err


def test_command_without_matplotlib_names_what_to_install(tmp_path, monkeypatch, capsys):
    pytest.importorskip("numpy")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train("--out", tmp_path / "out") == 1
    assert "matplotlib is needed here" in (error := capsys.readouterr().err) and "pip install matplotlib" in error


def test_decibels():
    assert decibels("-5:5") == (-5.0, 5.0) and decibels("3") == (3.0, 3.0) and decibels("-2.5") == (-2.5, -2.5)
