"""Training by several processes: the same as by one on the same batches, up to rounding."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from train_jobs import begun_together, new_run, trained_together

from drsn_kernels.train.ranks import SharedBatchNorm, share_statistics

pytestmark = pytest.mark.unpoisoned


def alone(out):
    whole = new_run(out, batch=7, dropout=0, dtype=torch.float64)
    whole.train()
    return whole


def assert_close_runs(network, history, whole):
    for name, tensor in whole.network.state_dict().items():
        torch.testing.assert_close(network[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for ours, wanted in zip(history, whole.history, strict=True):
        for name in ("epoch", "lr", "train_loss", "train_acc", "test_acc"):
            assert ours[name] == pytest.approx(wanted[name], rel=1e-9)


@pytest.mark.slow
def test_two_processes_train_as_one(ranks, tmp_path):
    """In float64, with batches that do not divide by two: weights, running statistics, losses and accuracies."""
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    whole = alone(tmp_path / "one")
    for network, history, ended in ranks.run(trained_together, tmp_path / "two"):
        assert ended == ""
        assert_close_runs(network, history, whole)
    saved = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert list(saved["network"]) == list(whole.network.state_dict())
    assert type(whole.network.get_submodule("0.norm")) is nn.BatchNorm1d  # and so the checkpoint fits both


def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_one_process_may_go_on(ranks, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    for _, history, ended in ranks.run(trained_together, tmp_path / "two", 9):  # epochs of six steps: in the second
        assert ended == "SIGTERM" and len(history) == 1
    state = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 4)
    continued = alone(tmp_path / "two")
    assert_close_runs(continued.network.state_dict(), continued.history, alone(tmp_path / "one"))


def test_a_folder_that_cannot_be_made_ends_both(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = ranks.run(begun_together, tmp_path / "file" / "run")
    assert "Not a directory" in first and "cannot be written by the first process" in second
    assert ranks.run(begun_together, tmp_path / "run") == ["", ""] and (tmp_path / "run" / "config.json").exists()


def test_shared_statistics_are_batch_norm_in_eval_and_keep_parameters():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4)
    ).eval()
    model[1].running_mean.uniform_()
    x, keys, parameters = torch.randn(5, 1, 3, 3), list(model.state_dict()), list(model.parameters())
    wanted = model(x)
    assert [type(m) for m in share_statistics(model)][1::3] == [SharedBatchNorm] * 2
    assert torch.equal(model(x), wanted) and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(ValueError, match="x must be"):
        model[1].train()(torch.randn(3))


@pytest.mark.slow
def test_command_under_torchrun(tmp_path):
    """The first epoch, at a small learning rate: float32 rounding grows from step to step."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    options = ["--task", "image", "--epochs", "1", "--lr", "0.001", "--batch", "256", "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    for out, before in (("two", launcher), ("one", [])):
        command = [sys.executable, *before, "-m", "drsn_kernels", "train", *options, "--out", str(tmp_path / out)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Test accuracy") == 1  # one of them prints
    two, one = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"] for name in ("two", "one"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    rows = [next(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("two", "one")]
    assert float(rows[0]["train_loss"]) == pytest.approx(float(rows[1]["train_loss"]), rel=1e-4)

    launched = [sys.executable, *launcher, "-m", "drsn_kernels", "train"]
    failed = subprocess.run([*launched, "--data", "none"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode != 0 and failed.stderr.count("error: folder does not exist: ") == 1
