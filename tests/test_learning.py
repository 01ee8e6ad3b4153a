"""The demo's learning part: the statistics it reports, and a run small enough for every test machine."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from oracle import seeded

from drsn_kernels.data import simulate_bearing
from drsn_kernels.demo import learning
from drsn_kernels.models import paper_network, resnet
from drsn_kernels.train import accuracy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_spearman():
    stats = pytest.importorskip("scipy.stats")
    for a, b in (
        (torch.randn(50, generator=seeded()), torch.randn(50, generator=seeded(1))),
        (torch.randint(4, (60,), generator=seeded()), torch.randint(6, (60,), generator=seeded(1))),
    ):
        assert math.isclose(learning.spearman(a, b), stats.spearmanr(a.numpy(), b.numpy()).statistic, abs_tol=1e-12)
        assert learning.ranks(a).tolist() == stats.rankdata(a.numpy()).tolist()
    x = torch.randn(20, generator=seeded())
    assert math.isclose(learning.spearman(x, x.exp()), 1) and math.isclose(learning.spearman(x, -(x**3)), -1)
    assert learning.spearman(x, torch.ones(20)) is None


def test_thresholds_are_the_gates_average_of_every_window():
    model = paper_network("drsn-cw").eval()
    x = torch.randn(300, 1, 256, generator=seeded())  # more than one batch
    taus = learning.thresholds(model, x)
    assert len(taus) == 12 and all(tau.shape == (300,) for tau in taus.values())
    unit = model.stages[0][0]
    with torch.no_grad():
        pooled = unit.residual_function(model.stem(x)).abs().mean(2)
        torch.testing.assert_close(taus["stages.0.0.shrinkage"], (unit.shrinkage.fc(pooled) * pooled).mean(1))


def test_training_learns_a_separable_task(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # then progress is printed
    time = torch.arange(256) / 256
    y = torch.arange(128) % 2
    x = math.sqrt(2) * torch.sin(
        2 * math.pi * (torch.where(y == 0, 5, 60)[:, None] * time + torch.rand(128, 1, generator=seeded()))
    ).unsqueeze(1)
    torch.manual_seed(0)
    model = resnet(1, 2, stages=((4, 1, 2),))
    loss = learning.train(model, x, y, epochs=25, snr_db=(10.0,), label="it")
    assert loss < 0.3
    assert accuracy(model, learning.noisy(x, 10.0, seeded(1)), y) > 0.95
    assert "training it: epoch 1 of 25\n" in capsys.readouterr().out


def test_run_reports_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data = simulate_bearing(2, 1, 4, length=256, generator=seeded())
    report = learning.run(data, tmp_path / "new", quick=True, seed=0, epochs=1)
    assert json.loads((tmp_path / "new" / "learning.json").read_text()) == report
    assert set(report["models"]) == {"drsn-cw", "resnet"}
    for result in report["models"].values():
        assert list(result["accuracy"]) == ["-5", "-3", "0", "3", "5"]
        # 16 test windows of four classes: every accuracy is a multiple of 1 / 16.
        assert all(0 <= value <= 1 and (16 * value).is_integer() for value in result["accuracy"].values())
    correlations = report["thresholds"]["spearman_by_layer"].values()
    assert len(correlations) == 12 and all(rho is None or -1 <= rho <= 1 for rho in correlations)
    for name in ("accuracy.png", "thresholds.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert report["classes"] == ["healthy", "inner 1.5 mm", "outer 1.5 mm", "ball 1.5 mm"]
    assert "Quick: 4 of 8 classes, healthy, " in printed and "far above 25 %, which guessing gives" in printed
    assert "Test accuracy in %" in printed and "Spearman's rank correlation" in printed

    again = learning.run(data, tmp_path, quick=True, seed=0, epochs=1)
    for name, result in report["models"].items():
        assert again["models"][name]["accuracy"] == result["accuracy"]


def test_a_quick_run_keeps_the_windows_of_its_classes():
    data = simulate_bearing(2, 1, 4, length=64, generator=seeded())
    few = learning._few_classes(data, 4)
    for x, y, all_x, all_y in (
        (few.train_x, few.train_y, data.train_x, data.train_y), (few.test_x, few.test_y, data.test_x, data.test_y)
    ):  # fmt: skip
        for label, was in enumerate((0, 2, 4, 6)):
            assert torch.equal(x[y == label], all_x[all_y == was])
    two = learning._few_classes(replace(few, class_names=few.class_names[:2]), 4)
    assert two.class_names == ("healthy", "inner 1.5 mm")


@pytest.mark.slow
def test_a_quick_run_ends_far_above_guessing(tmp_path):
    pytest.importorskip("matplotlib")
    report = learning.run(simulate_bearing(generator=seeded()), tmp_path, quick=True, seed=0)
    assert all(result["mean_accuracy"] > 0.6 for result in report["models"].values())


def test_run_errors_come_before_training(tmp_path, monkeypatch):
    data = simulate_bearing(1, 1, 2, length=64, generator=seeded())
    monkeypatch.setattr(learning, "train", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        learning.run(data, tmp_path, quick=True, seed=0, epochs=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib is needed .*: pip install matplotlib"):
        learning.run(data, tmp_path, quick=True, seed=0)
