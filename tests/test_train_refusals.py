"""What `python -m drsn_kernels train` refuses: folders, files and options, in one sentence, before any training."""

import json
from dataclasses import replace

import pytest
import torch
from data_files import idx
from oracle import seeded
from torch import nn
from train_jobs import tones

from drsn_kernels.__main__ import main
from drsn_kernels.train import Recipe, command
from drsn_kernels.train.arguments import DEFAULTS


@pytest.fixture(autouse=True)
def drawing(one_thread):
    pytest.importorskip("matplotlib", reason="the command draws its results")


@pytest.fixture
def images(tmp_path):
    """Seven images of 8 x 8 for training and three for testing, of two classes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for part, count in (("train", 7), ("t10k", 3)):
        pixels = torch.randint(1, 256, (count, 8, 8), generator=seeded(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(torch.arange(count) % 2))
    return folder


@pytest.fixture
def train(tmp_path, capsys):
    """Run the command on --out; what it printed, or with `refused` the one sentence it ended with."""

    def train(*options, refused=False):
        status = main(["train", "--out", str(tmp_path / "out"), "--device", "cpu", *map(str, options)])
        printed = capsys.readouterr()
        assert status == refused, printed.err
        if refused:
            assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err if refused else printed.out

    return train


def small(folder):
    return ("--task", "image", "--data", folder, "--model", "resnet", "--epochs", 1)


def test_a_new_run_takes_up_no_checkpoint(tmp_path, images, train):
    train(*small(images))
    (tmp_path / "out" / "config.json").unlink()
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    error = train(*small(images), "--seed", 5, refused=True)
    assert f"--out {tmp_path / 'out'} already holds a checkpoint.pt without its config.json" in error
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before


def test_batches_of_three(tmp_path, images, train):
    """Seven images: the last batch would be one image, of which no statistics can be taken."""
    train(*small(images), "--model", "drsn-cw", "--batch", 3)


@pytest.mark.parametrize(
    "config",
    [[], 7, {}, {"settings": {"task": "image"}, "data": {"crc32": 0}}, {"settings": DEFAULTS}, {"settings": None}],
)
def test_a_damaged_config_is_named(tmp_path, train, config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert f"{tmp_path / 'out' / 'config.json'} is damaged: " in train("--resume", refused=True)


def test_a_checkpoint_of_something_else_is_named(tmp_path, images, train):
    train(*small(images))
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    other = nn.Conv2d(1, 4, 3).state_dict()
    for damaged in (
        {"a": 1},
        [state],
        state | {"network": other},
        state | {"network": None},
        state | {"sums": torch.zeros(3)},
        state | {"generator": torch.zeros(3)},
        state | {"optimizer": {"state": {}, "param_groups": []}},
    ):
        torch.save(damaged, path)
        assert f"{path} does not fit this run: " in train("--resume", refused=True)


def test_data_that_need_no_folder_are_compared_too(tmp_path, train, monkeypatch):
    data = replace(tones(torch.float32), train_x=torch.rand(40, 1, 8, 8), test_x=torch.rand(10, 1, 8, 8))
    monkeypatch.setattr(command, "load_digits", lambda: data)
    train("--task", "image", "--epochs", 1, "--batch", 8)
    train("--resume")
    data.train_x[3, 0, 2, 1] += 1e-6
    error = train("--resume", refused=True)
    assert f"--task image does not give the data that the run in {tmp_path / 'out'} was started with" in error


def test_data_are_simulated_by_one_thread(monkeypatch):
    """Their last bits, and so the checksum that --resume compares, depend on the number of threads."""
    monkeypatch.setattr(command, "simulate_bearing", lambda generator: torch.get_num_threads())
    torch.set_num_threads(2)
    assert command._load(dict(DEFAULTS)) == 1 and torch.get_num_threads() == 2


@pytest.mark.parametrize("part, name, index", [("train", "training", 5), ("t10k", "test", 2)])
def test_a_black_image_has_no_snr(tmp_path, images, train, part, name, index):
    path = images / f"{part}-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[16 + 64 * index : 16 + 64 * (index + 1)] = bytes(64)
    path.write_bytes(content)
    error = train(*small(images), refused=True)
    assert f"but {name} sample {index} of --data {images} is: leave it out, or train with --noise none" in error
    assert not (tmp_path / "out").exists()
    train(*small(images), "--noise", "none")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--seed", 99999999999999999999999), "--seed must be a whole number from 0 to 2^63 - 1, got 9999999999"),
        (("--seed", -1), "--seed must be a whole number from 0 to 2^63 - 1, got -1"),
        (("--snr", "-1000"), "snr_db must give noise of finite power"),
    ],
)
def test_options_that_leave_no_folder_behind(tmp_path, images, train, options, message):
    assert message in train(*small(images), *options, refused=True)
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_said_before_data_are_read(tmp_path, train):
    (tmp_path / "out").write_text("")
    error = train("--data", tmp_path / "nowhere", refused=True)
    assert f"--out must be a folder, got the file {tmp_path / 'out'}" in error


@pytest.mark.parametrize(
    "samples, epochs, batch, said",
    [
        (156, 10, 128, "Only 10 steps in all: more --epochs or --batch 16 would learn more"),
        (20, 1, 128, "Only 1 step in all: more --epochs or --batch 8 would learn more"),
        (64, 12, 8, "Only 96 steps in all: more --epochs would learn more"),
        (156, 100, 128, ""),
        (2000, 10, 128, ""),
    ],
)
def test_few_steps_are_said(samples, epochs, batch, said):
    assert command._few_steps(samples, Recipe(epochs, batch)) == said
