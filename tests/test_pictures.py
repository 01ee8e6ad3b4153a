"""experiments/pictures.py: every file is made, and what the pictures show is what the operators do."""

import json
import sys
from pathlib import Path

import pytest
import torch

import drsn_kernels as dk

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed package

from experiments import drawings, pictures  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # a training run of 15 seconds

FILES = {"thresholds.png", "signal.png", "zeroed.png", "derivative.png", "gradients.png", "numbers.json"}
UNITS = [f"stages.{stage}.{unit}.shrinkage" for stage in range(3) for unit in range(4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="draws")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    out, threads = tmp_path_factory.mktemp("pictures"), torch.get_num_threads()
    numbers = pictures.make(None, None, out, quick=True)
    torch.set_num_threads(threads)
    return out, numbers


def test_all_files_are_made(made):
    out, numbers = made
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000, path.name
    assert json.loads((out / "numbers.json").read_text()) == numbers


def test_correlations(made):
    units = made[1]["thresholds"]["units"]
    assert list(units) == UNITS and [len(u["channels"]) for u in units.values()] == [4] * 4 + [8] * 4 + [16] * 4
    for unit in units.values():
        for rho in (unit["tau"], unit["alpha"], unit["untrained"], *unit["channels"]):
            assert rho is None or -1 <= rho <= 1
        assert 0 <= unit["rises"] <= 1
    # after two epochs alpha is about 1/2 for every window, and tau = alpha * mean |x| can but follow the noise's power
    assert units[UNITS[0]]["tau"] > 0.5 and units[UNITS[0]]["rises"] > 0.9
    lines = pictures.table(units).splitlines()
    assert len(lines) == 2 + len(UNITS) and lines[2].startswith("| stage 1, unit 1 | +0.")


def test_shares_of_zeros(made):
    numbers = made[1]
    for unit in numbers["signal"]["units"].values():
        assert 0 < unit["zeroed_clean"] < 1 and 0 < unit["zeroed_noisy"] < 1
    assert list(numbers["zeroed"]["units"]) == [f"stages.{stage}.0.shrinkage" for stage in range(3)]
    for unit in numbers["zeroed"]["units"].values():
        assert all(0 <= unit[region] <= 1 for region in ("digit", "pasted", "background"))


def test_shares_of_zeros_by_region(monkeypatch, tmp_path):
    """Two images of 4 x 4, maps of 2 x 2: position (r, c) of a map covers the image's 2 x 2 pixels there."""
    x = torch.zeros(2, 1, 4, 4)
    x[0, 0, 0, :3] = 1  # the digit: two pixels of position (0, 0), one of (0, 1)
    x[1, 0, 3, 3] = 1  # one of (1, 1)
    x[1, 0, 0, 0] = 0.1  # too dark to count
    images = x.clone()
    images[0, 0, 2:, 0] = 0.5  # pasted: two pixels of (1, 0)
    images[1, 0, 3, 2:] = 1  # one of (1, 1), beside the digit
    zeros = torch.tensor([[[4, 1], [2, 0]], [[0, 3], [1, 2]]])  # of four channels
    y = (torch.arange(4).view(1, 4, 1, 1) >= zeros.unsqueeze(1)).float()
    seen = {"stages.0.0.shrinkage": pictures.Shrunk(y, torch.ones(2, 4), y, y)}
    drawn = []
    monkeypatch.setattr(pictures, "pasted", lambda x, generator: images)
    monkeypatch.setattr(pictures, "observe", lambda model, part: seen)
    monkeypatch.setattr(drawings, "zeroed", lambda path, images, small, maps, numbers: drawn.append((small, maps)))
    found = pictures.zeroed(None, x, 0, tmp_path)["units"]["stages.0.0.shrinkage"]
    assert found["digit"] == (4 + 4 + 1 + 2) / 4 / 4
    assert found["pasted"] == (2 + 2 + 2) / 4 / 3
    # everything else: 16 pixels of each image, four of a position
    assert found["background"] == (4 * (4 + 1 + 2 + 0 + 0 + 3 + 1 + 2) - 11 - 6) / 4 / (32 - 4 - 3)
    ((small, maps),) = drawn
    assert torch.equal(small, (images - x)[:, 0] > 0)
    enlarged = zeros.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    assert torch.equal(maps["stages.0.0.shrinkage"], enlarged)


@pytest.mark.parametrize("shape", [(5, 1, 64), (5, 1, 16, 16)])
def test_what_is_observed_is_what_the_shrinkages_do(shape):
    torch.manual_seed(0)
    model = dk.models.network(dims=len(shape) - 2, stages=((4, 2, 2), (8, 1, 2)), stem=(4, 1)).eval()
    x = torch.randn(shape)
    x[0] = 0
    seen = pictures.observe(model, x)
    assert list(seen) == ["stages.0.0.shrinkage", "stages.0.1.shrinkage", "stages.1.0.shrinkage"]
    for name, unit in seen.items():
        y, tau = dk.shrink(unit.x, model.get_submodule(name).fc, return_tau=True)
        torch.testing.assert_close((unit.y, unit.tau), (y.detach(), tau.detach()))
        zeros = (y == 0).sum(1) / y.shape[1]
        torch.testing.assert_close(unit.zeroed, zeros)
        assert unit.zeroed.shape == (5, *unit.x.shape[2:]) and 0 < float(unit.zeroed.mean()) <= 1
        torch.testing.assert_close(unit.alpha * dk.abs_mean(unit.x), unit.tau)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_unit_is_its_shrinkage_and_the_identity():
    torch.manual_seed(0)
    unit = dk.models.ResidualShrinkageUnit(4, 8, 2).eval()
    x = torch.randn(2, 4, 32)
    seen = pictures.observe(unit, x)["shrinkage"]
    assert torch.equal(seen.identity[:, 2:6], x[..., ::2]) and not seen.identity[:, [0, 1, 6, 7]].any()
    torch.testing.assert_close(unit(x), seen.y + seen.identity)


def test_the_signal_of_a_unit_is_in_a_channel_that_the_shortcut_carries(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = dk.models.network(stages=((2, 1, 1), (8, 1, 2)), stem=(2, 1))  # channels 3 and 4 of the second unit
    drawn = []
    monkeypatch.setattr(
        drawings, "signal", lambda path, windows, shown, numbers, snr_db: drawn.append((windows, shown))
    )
    found = pictures.signal(model, torch.randn(3, 1, 64), 0, tmp_path)["units"]
    assert found["stages.1.0.shrinkage"]["channel"] in (3, 4)
    ((windows, shown),) = drawn
    for name, unit in pictures.observe(model, windows.unsqueeze(1)).items():
        for part in ("x", "tau", "y", "identity"):
            assert torch.equal(getattr(shown[name], part), getattr(unit, part)[:, found[name]["channel"]])


def test_derivatives():
    values = pictures.curves(tau=1.0)
    x = values["x"].double().requires_grad_()
    for name, y in {"soft threshold": x.sign() * (x.abs() - 1).relu(), "ReLU": x.relu()}.items():
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(values[name].double(), y.detach(), atol=1e-6, rtol=0)
        assert torch.equal(values[f"{name}, derivative"].double(), slope)
        assert slope.unique().tolist() == [0, 1]


def test_gradient_norms():
    """A linear stack keeps the norm with variance 1 / fan-in, and ReLU with He's; a sigmoid loses it."""
    norms, kept = pictures.gradient_norms(lambda x: x, 1.0, 8, seed=0)
    assert kept == 1 and norms.shape == (8,) and norms[-1] == 1
    assert ((norms > 0.7) & (norms < 1.4)).all()
    norms, kept = pictures.gradient_norms(torch.relu, 2.0, 8, seed=0)
    assert abs(kept - 0.5) < 0.05 and ((norms > 0.7) & (norms < 1.4)).all()
    norms, _ = pictures.gradient_norms(torch.sigmoid, 2.0, 8, seed=0)
    assert norms[0] < 0.36**7  # each layer at most sqrt(2) / 4 on average
    norms, kept = pictures.gradient_norms(pictures.ACTIVATIONS["soft threshold"], 2.0, 8, seed=0)
    assert abs(kept - 0.69) < 0.02  # P(|z| > mean |z| / 2) of a normal z
    torch.testing.assert_close(float(norms[0]), (2 * kept) ** (7 / 2), rtol=0.15, atol=0)


def test_labels():
    assert drawings.label("stages.0.3.shrinkage") == "stage 1, unit 4"
    assert drawings.signed(None) == "undefined" and drawings.signed(-0.125) == "-0.12"


def test_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        pictures.main(["--epochs", "0"])
    assert stopped.value.code == 2 and "--epochs must be at least 1, got 0" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert pictures.main(["--quick", "--image", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: folder does not exist: {tmp_path / 'none'}\n"
    assert not (tmp_path / "out").exists()
