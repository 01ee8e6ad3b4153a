"""experiments/: the noises, the rows, what is done next, repeatable runs, tables; and a command that is killed."""

import copy
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recorded_graph
import torch
from oracle import seeded

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind the installed package

import drsn_kernels as dk  # noqa: E402
from drsn_kernels.data import Dataset  # noqa: E402
from drsn_kernels.models import NAMES, network  # noqa: E402
from experiments import batch_last, noises, paired, pictures, report, results, run, tasks, timing  # noqa: E402
from experiments.results import Result, Run, Selection  # noqa: E402
from experiments.tasks import TASKS, Condition  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 8000.0


# ---- noises ----------------------------------------------------------------------------------------------------------


def power(noise: torch.Tensor, low: float, high: float) -> float:
    """Share of the power between two frequencies."""
    spectrum = torch.fft.rfft(noise).abs().square().mean(0)
    f = torch.fft.rfftfreq(noise.shape[1], 1 / RATE)
    return float(spectrum[(f >= low) & (f < high)].sum() / spectrum.sum())


def kurtosis(noise: torch.Tensor) -> float:
    """3 for Gaussian noise; more where rare events carry the power."""
    return float(noise.pow(4).mean() / noise.square().mean() ** 2)


def test_street_and_workshop():
    street = noises.street(12, 24_000, RATE, seeded())
    workshop = noises.workshop(12, 24_000, RATE, seeded())
    for noise in (street, workshop):
        assert noise.shape == (12, 24_000)
        torch.testing.assert_close(noise.square().mean(1), torch.ones(12))
    assert power(street, 125, 500) > 0.6 and power(street, 2000, 4000) < 0.05  # engines at 250 Hz
    level = street.unfold(1, 2400, 2400).square().mean(2)  # of 0.3 s each: vehicles come and go
    changes = level.amax(1) / level.amin(1)
    assert changes.median() > 5 and (changes > 1.5).all()
    assert kurtosis(workshop) > 6  # strokes
    hum = power(workshop, 44, 56) + power(workshop, 89, 111)
    assert 0.15 < hum < 0.35  # of 4 / 13 of the power in 12 harmonics, the first two have 0.31 * 1.25 / 1.56
    assert torch.equal(noises.street(2, 800, RATE, seeded(3)), noises.street(2, 800, RATE, seeded(3)))


def test_recorded_noise_has_the_snr_and_pieces_of_the_recordings():
    recordings = torch.randn(3, 300)
    x = torch.randn(50, 1, 64) * torch.linspace(0.1, 3, 50).view(-1, 1, 1)
    added = noises.Recorded(recordings, -7.0)(x, seeded()) - x
    snr = 10 * (x.square().mean((1, 2)) / added.square().mean((1, 2))).log10()
    torch.testing.assert_close(snr, torch.full((50,), -7.0), atol=1e-3, rtol=0)
    pieces = recordings.unfold(1, 64, 1).flatten(0, 1)
    alike = torch.nn.functional.normalize(added.squeeze(1)) @ torch.nn.functional.normalize(pieces).T
    found = alike.amax(1)
    torch.testing.assert_close(found, torch.ones(50), atol=1e-3, rtol=0)
    assert len(alike.argmax(1).unique()) > 40
    whole = noises.Recorded(recordings, 0.0)(torch.ones(2, 1, 300), seeded())  # no more samples than x has
    assert whole.shape == (2, 1, 300)


def test_training_and_testing_hear_other_recordings():
    train, test = tasks.noise(Condition("street", -5.0), 800.0)
    assert train.snr_db == test.snr_db == -5.0
    assert train.recordings.shape == test.recordings.shape == (tasks.RECORDINGS, 2400)
    alike = torch.nn.functional.normalize(train.recordings) @ torch.nn.functional.normalize(test.recordings).T
    assert alike.abs().max() < 0.9


def test_uniform_offset():
    x = torch.rand(20, 1, 28, 28)
    added = noises.uniform_offset(x, seeded()) - x
    assert added.min() > -1e-6 and added.max() < 0.5
    assert abs(float(added.mean()) - 0.25) < 0.01 and abs(float(added.std()) - 0.5 / math.sqrt(12)) < 0.01


def test_pasted_content():
    x = torch.rand(60, 1, 8, 8)
    y = noises.pasted(x, seeded())
    assert (y >= x).all()
    small = torch.nn.functional.avg_pool2d(x, 2)
    corners = set()
    for sample, before in zip(y, x, strict=True):
        matches = []
        for row, column in ((0, 0), (0, 4), (4, 0), (4, 4)):
            inside = torch.zeros(8, 8, dtype=torch.bool)
            inside[row : row + 4, column : column + 4] = True
            candidates = torch.maximum(before[0, row : row + 4, column : column + 4], small[:, 0])
            same = (candidates == sample[0, row : row + 4, column : column + 4]).flatten(1).all(1)
            if same.any() and torch.equal(sample[0][~inside], before[0][~inside]):
                matches.append((row, column))
        assert matches
        corners.update(matches)
    assert len(corners) == 4


# ---- rows and what is missing ----------------------------------------------------------------------------------------

A = Run("vibration", "resnet", Condition("pink", -5.0), 0, 40)
B = Run("image", "drsn-cw", Condition("pasted"), 1, 40)
C = Run("cwru", "drsn-cw", Condition("gaussian", -5.0), 2, 12, "fixed", -2.0)


def test_rows(tmp_path):
    path = tmp_path / "new" / "results.csv"
    assert results.read(path) == {}
    results.append(path, A, Result(0.123456, 7.04))
    results.append(path, B, Result(1.0, 12.0))
    results.append(path, C, Result(0.5, 3.0, 0.75, (0.25, 0.5)))
    assert path.read_text().splitlines() == [
        "task,model,noise,snr_db,seed,epochs,test_acc,seconds,protocol,gate_bias,train_acc,curve",
        "vibration,resnet,pink,-5,0,40,0.12346,7.0,fresh,,,",
        "image,drsn-cw,pasted,,1,40,1.00000,12.0,fresh,,,",
        "cwru,drsn-cw,gaussian,-5,2,12,0.50000,3.0,fixed,-2,0.75000,0.2500 0.5000",
    ]
    assert results.read(path) == {
        A: Result(0.12346, 7.0), B: Result(1.0, 12.0), C: Result(0.5, 3.0, 0.75, (0.25, 0.5))
    }  # fmt: skip


@pytest.mark.parametrize("cut", range(1, 42))
def test_a_row_that_was_cut_off_is_done_again(tmp_path, cut):
    path = tmp_path / "results.csv"
    results.append(path, B, Result(0.5, 1.0))
    results.append(path, A, Result(0.25, 2.0))
    path.write_bytes(path.read_bytes()[:-cut])
    assert results.read(path) == {B: Result(0.5, 1.0)}
    results.append(path, A, Result(0.25, 2.0))
    assert results.read(path) == {B: Result(0.5, 1.0), A: Result(0.25, 2.0)}


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="results.csv must have the columns task,model,noise"):
        results.read(path)


def test_all_models_of_a_condition_come_together():
    runs = results.missing({}, Selection(("vibration", "image")), None)
    models = ("convnet", "resnet", "senet", "drsn-cs", "drsn-cw")
    assert [r.model for r in runs] == list(models) * 17
    assert all(len({(r.task, r.condition) for r in runs[i : i + 5]}) == 1 for i in range(0, 85, 5))
    assert {r.seed for r in runs} == {0} and len(set(runs)) == 85
    assert {(c.noise, c.snr_db) for c in TASKS["vibration"].conditions} == {
        (noise, snr) for noise in ("gaussian", "laplace", "pink") for snr in (-5, -3, 0, 3, 5)
    }


def test_what_is_missing_comes_first_and_then_another_seed():
    image = Selection(("image",))
    first = results.missing({}, image, None)
    done = {r: Result(0.5, 1.0) for r in first if r != first[3]}
    assert results.missing(done, image, None) == [first[3]]
    assert results.missing(done, image, 2)[0] == first[3]
    assert len(results.missing(done, image, 2)) == 1 + len(first)
    done[first[3]] = Result(0.5, 1.0)
    assert {r.seed for r in results.missing(done, image, None)} == {1}
    assert results.missing(done, image, 1) == []
    for other in ({"epochs": 20}, {"gate_bias": -2.0}):  # are other runs
        assert len(results.missing(done, Selection(("image",), **other), 1)) == (4 if "gate_bias" in other else 10)


def test_a_part_of_the_grid():
    chosen = Selection(("cwru", "image"), ("resnet", "drsn-cw"), noises=("gaussian",), snr_db=(-5.0, 5.0))
    runs = list(chosen.runs([3]))
    assert [(r.condition.snr_db, r.model) for r in runs] == [
        (-5.0, "resnet"), (-5.0, "drsn-cw"), (5.0, "resnet"), (5.0, "drsn-cw")
    ]  # fmt: skip
    assert {(r.task, r.seed, r.epochs, r.protocol, r.gate_bias) for r in runs} == {
        ("cwru", 3, TASKS["cwru"].epochs, "fixed", None)
    }
    with_bias = list(Selection(("vibration",), snr_db=(-5.0,), gate_bias=-2.0).runs([0]))
    assert {(r.model, r.network, r.protocol) for r in with_bias} == {
        ("drsn-cs", "drsn-cs -2", "fresh"), ("drsn-cw", "drsn-cw -2", "fresh")
    }  # fmt: skip
    options = run.parse(["--vibration", ".", "--task", "cwru", "image", "--snr", "-5", "--gate-bias", "-2"])
    assert options.chosen == Selection(("cwru",), snr_db=(-5.0,), gate_bias=-2.0)


# ---- runs ------------------------------------------------------------------------------------------------------------


def few(monkeypatch, train=64, test=64):
    """A few simulated windows in the place of every task's data."""
    data = tasks._part(tasks.data("simulated", None, True), train, test)
    monkeypatch.setattr(run, "data", lambda *_: data)
    return data


def test_a_run_can_be_repeated_from_its_seed(monkeypatch):
    few(monkeypatch)
    real, losses = run.train_step, []

    def step(*arguments):
        loss, right = real(*arguments)
        losses.append(float(loss))
        return loss, right

    monkeypatch.setattr(run, "train_step", step)

    def once(model, seed):
        losses.clear()
        result = run.execute(Run("simulated", model, Condition("laplace", 5.0), seed, 2), None, True)
        assert 0 <= result.test_acc <= 1 and 0 <= result.train_acc <= 1 and result.seconds > 0
        assert result.curve[-1] == result.test_acc and len(result.curve) == len(losses) == 2
        return list(losses), result.test_acc, result.train_acc

    for model in ("senet", "drsn-cs"):
        assert once(model, 3) == once(model, 3)
        assert once(model, 3)[0] != once(model, 4)[0]


@pytest.mark.parametrize("protocol", ["fresh", "fixed"])
def test_fixed_noise_is_drawn_once_and_is_that_of_every_network(monkeypatch, protocol):
    clean = few(monkeypatch).train_x
    real, seen = run.epoch_batches, []

    def batches(x, y, batch, *, generator, noise):
        state = generator.get_state()
        seen.append((x, generator.get_state(), noise))
        generator.set_state(state)
        return real(x, y, batch, generator=generator, noise=noise)

    monkeypatch.setattr(run, "epoch_batches", batches)
    for model in ("resnet", "drsn-cw"):
        run.execute(Run("cwru", model, Condition("gaussian", -5.0), 1, 3, protocol), None, True)
    xs, states, noise = zip(*seen, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(states[:3], states[3:], strict=True)), "another order or noise"
    assert all(torch.equal(x, xs[0]) for x in xs)
    if protocol == "fresh":
        assert torch.equal(xs[0], clean) and None not in noise
    else:
        snr = 10 * (clean.square().mean(2) / (xs[0] - clean).square().mean(2)).log10()
        torch.testing.assert_close(snr, torch.full_like(snr, -5.0), atol=1e-3, rtol=0)
        assert set(noise) == {None}


def test_the_gates_of_a_run_begin_at_its_bias(monkeypatch):
    few(monkeypatch)
    made = []
    monkeypatch.setattr(run, "network", lambda name, **options: made.append(options) or network(name, **options))
    for bias in (None, -2.0):
        run.execute(Run("cwru", "drsn-cw", Condition("gaussian", 0.0), 0, 1, "fixed", bias), None, True)
    assert [options.get("gate_bias") for options in made] == [None, -2.0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("protocol", ["fresh", "fixed"])
def test_a_run_whose_steps_are_a_graph(monkeypatch, device, protocol):
    """The same training accuracy and curve; on the CPU by a graph that records."""
    few(monkeypatch, 256)
    if device == "cpu":
        recorded_graph.install(monkeypatch)
    chosen, found = Run("cwru", "drsn-cw", Condition("gaussian", 5.0), 0, 4, protocol), []
    with dk.use_backend("torch" if device == "cpu" else "auto"):
        for graph in (False, True):
            found.append(run.execute(chosen, None, True, run.How(device=device, graph=graph)))
    plain, replayed = found
    assert replayed.train_acc == pytest.approx(plain.train_acc, abs=0.03)
    assert replayed.curve == pytest.approx(plain.curve, abs=0.05)


def test_windows_of_the_papers_protocol_stay_on_their_side(tmp_path, monkeypatch):
    """Their starts are DENSE apart; for another load, no training window is of the tested one."""
    asked = []

    def load(folder, **options):
        asked.append(options)
        x, y = torch.ones(len(asked), 1, 512), torch.zeros(len(asked), dtype=torch.long)
        return Dataset(x, y, x, y, ("one",), 12e3, "Windows.")

    monkeypatch.setattr(tasks, "load_cwru", load)
    TASKS["cwru"].load(tmp_path)
    found = TASKS["cwru-load"].load(tmp_path)
    assert asked[0] == {"length": 512, "stride": tasks.DENSE} and asked[1] == asked[0] | {"loads": (0, 1)}
    assert asked[2].items() >= {"length": 512, "loads": (2,)}.items()
    assert len(found.train_x) == 2 and len(found.test_x) == 3


# ---- the network with the batch last ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_batch_last_is_the_network(name):
    """Logits, gradients and running statistics of a training step, up to rounding in float32."""
    pytest.importorskip("ninja", reason="compiles batch_last.cpp")
    torch.manual_seed(0)
    ours = network(name, classes=9).train()
    with torch.no_grad():  # biases and norms that are not 0 and 1
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    wanted = copy.deepcopy(ours).double()
    x, y = torch.randn(32, 1, 128), torch.randint(9, (32,))
    logits = batch_last.batch_last(ours, x)
    reference = wanted(x.double())
    for found in (logits, reference):
        torch.nn.functional.cross_entropy(found, y).backward()
    torch.testing.assert_close(logits.double(), reference, rtol=1e-3, atol=1e-3)
    for key, parameter in wanted.named_parameters():
        grad = dict(ours.named_parameters())[key].grad.double()
        assert (grad - parameter.grad).norm() <= 2e-3 * parameter.grad.norm() + 1e-4, key  # a norm takes biases away
    for key, value in wanted.state_dict().items():
        if "running" in key or "batches" in key:
            torch.testing.assert_close(ours.state_dict()[key].to(value), value, rtol=1e-4, atol=1e-5)


def test_batches_that_batch_last_leaves_to_the_network(monkeypatch):
    """Those of testing, and of a number that is no multiple of its vectors."""
    called = []
    monkeypatch.setattr(batch_last, "batch_last", lambda net, x: called.append(len(x)) or net(x))
    model = batch_last.BatchLast(network("resnet", stages=((4, 1, 2),)))
    for training, count in ((True, 32), (True, 33), (False, 32)):
        model.train(training)(torch.randn(count, 1, 64))
    assert called == [32]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name what to do: --vibration, --speech or --image with a folder, or --simulated"),
        (["--simulated", "--batch-last", "--device", "cuda"], "--batch-last is for --device cpu"),
        (["--simulated", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--simulated", "--model", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_said_at_once(tmp_path, capsys):
    assert run.main(["--image", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: folder does not exist: {tmp_path / 'none'}\n"
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_a_killed_command_loses_the_run_under_way_only(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "experiments.run", "--simulated", "--quick", "--model", "resnet"]
    command += ["--task", "simulated", "--epochs", "1", "--out", str(tmp_path)]
    path = tmp_path / "results.csv"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 600
        while len(results.read(path)) < 2 and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    before = results.read(path)
    assert 2 <= len(before) < 15
    until = time.monotonic() + 600
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{child}") for child in children), "a worker outlived the command"
    again = subprocess.run([*command, "--seeds", "1"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{15 - len(before)} runs are missing" in again.stdout
    after = results.read(path)
    assert len(after) == 15 and list(after.items())[: len(before)] == list(before.items())
    assert (tmp_path / "simulated.png").exists()


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_tables():
    done = {}
    for snr, values in ((-5.0, (0.5, 0.6, 0.7)), (-3.0, (0.8,)), (0.0, (0.9,)), (3.0, (1.0,)), (5.0, (1.0,))):
        for seed, value in enumerate(values):
            done[Run("vibration", "drsn-cw", Condition("pink", snr), seed, 40)] = Result(value, 1.0)
    done[Run("vibration", "resnet", Condition("pink", 0.0), 0, 40)] = Result(0.25, 1.0)
    done[Run("vibration", "resnet", Condition("pink", 3.0), 0, 2)] = Result(0.99, 1.0)  # other epochs stay out
    text = report.tables(report.cells(done), "vibration")
    pink = text[text.index("| pink |") :].splitlines()
    assert pink[0] == "| pink | -5 dB | -3 dB | 0 dB | 3 dB | 5 dB | mean |"
    mean = statistics.mean((60.0, 80.0, 90.0, 100.0, 100.0))
    assert pink[6] == f"| DRSN-CW | 60.0 ± 10.0 (3) | 80.0 (1) | 90.0 (1) | 100.0 (1) | 100.0 (1) | {mean:.1f} |"
    assert pink[3] == "| ResNet |  |  | 25.0 (1) |  |  |  |"
    assert "99.0" not in text

    image = report.tables(report.cells({B: Result(0.75, 1.0)}), "image").splitlines()
    assert image[0] == "| noise | uniform | pasted | mean |" and image[6] == "| DRSN-CW |  | 75.0 (1) |  |"


def fixed_runs() -> dict[Run, Result]:
    """Three seeds of the ResNet and of the DRSN-CW, two of it with another bias of its gates."""
    done, condition = {}, Condition("gaussian", -5.0)
    for model, bias, accuracies in (
        ("drsn-cw", -2.0, (0.52, 0.60)), ("drsn-cw", None, (0.53, 0.63, 0.70)), ("resnet", None, (0.50, 0.61, 0.69))
    ):  # fmt: skip
        for seed, value in enumerate(accuracies):
            run_ = Run("cwru", model, condition, seed, TASKS["cwru"].epochs, "fixed", bias)
            done[run_] = Result(value, 1.0, value + 0.1, (value / 2, value))
    return done


def test_networks_are_compared_within_a_seed():
    scipy_stats = pytest.importorskip("scipy.stats")
    done = fixed_runs()
    lines = paired.table(report.cells(done), "cwru").splitlines()
    middle = scipy_stats.ttest_rel((53, 63, 70), (50, 61, 69)).confidence_interval(0.95)
    assert lines[2:] == [
        "| gaussian -5 dB | ResNet | 3 | 60.0 ± 9.5 | 70.0 ± 9.5 |  |  |",
        f"|  | DRSN-CW | 3 | 62.0 ± 8.5 | 72.0 ± 8.5 | +2.0 ({middle.low:+.1f} to {middle.high:+.1f}) | 3 of 3 |",
        "|  | DRSN-CW, gate bias -2 | 2 | 56.0 ± 5.7 | 66.0 ± 5.7 | +0.5 (-18.6 to +19.6) | 1 of 2 |",
    ]
    with_bias = paired.gate_bias(report.cells(done)).splitlines()
    assert with_bias[2:] == [
        "| cwru | gaussian -5 dB | DRSN-CW, gate bias -2 | 2 | 58.0 ± 7.1 | 56.0 ± 5.7 | -2.0 (-14.7 to +10.7) |"
    ]
    one = {key: value for key, value in done.items() if key.seed == 0}  # no interval, and no error
    assert paired.table(report.cells(one), "cwru").splitlines()[3].endswith("| 53.0 | 63.0 | +3.0 | 1 of 1 |")


def test_pictures_of_seeds(tmp_path, monkeypatch):
    """What is drawn: the means of the curves, and the differences with their intervals."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: saved.append((path.name, self)))
    cells = report.cells(fixed_runs())
    paired.curves(tmp_path / "curves.png", cells, "cwru")
    paired.gains(tmp_path / "gains.png", cells)
    (_, curves), (_, gains) = saved
    (axis,) = curves.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert drawn == {
        "ResNet": pytest.approx([30, 60]), "DRSN-CW": pytest.approx([31, 62]),
        "DRSN-CW, gate bias -2": pytest.approx([28, 56]),
    }  # fmt: skip
    (axis,) = gains.axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["cwru, gaussian -5 dB: DRSN-CW", "cwru, gaussian -5 dB: DRSN-CW, gate bias -2"]
    assert [float(x) for line in axis.get_lines() for x in line.get_xdata() if line.get_marker() == "o"] == (
        pytest.approx([2.0, 0.5])
    )
    assert list(axis.get_lines()[0].get_xdata()) == pytest.approx(paired.interval([3.0, 2.0, 1.0]))


def test_report_fills_the_page_between_its_markers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    results.append(tmp_path / "results.csv", A, Result(0.875, 1.0))
    results.append(tmp_path / "results.csv", B, Result(0.75, 1.0))
    for run_, result in fixed_runs().items():
        results.append(tmp_path / "results.csv", run_, result)
    page = tmp_path / "README.md"
    names = ("vibration", "cwru", "gate_bias")
    page.write_text("before\n" + "".join(f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in names) + "after\n")
    paper = tmp_path / "paper.csv"
    paper.write_text("panel,noise,snr_db,method,accuracy_pct\ntest,pink,-5,ResNet,60.5\ntrain,pink,-5,ResNet,99\n")
    assert report.read_paper(paper) == {("resnet", "pink"): {-5.0: 60.5}}
    for _ in range(2):
        assert report.main(["--out", str(tmp_path), "--paper", str(paper)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- vibration -->\n| gaussian |") and "old" not in text
    assert text.endswith("<!-- end gate_bias -->\nafter\n") and text.count("| ResNet | 87.5 (1) |") == 1
    assert "| gaussian -5 dB | ResNet | 3 | 60.0 ± 9.5 |" in text and text.count("| cwru | gaussian -5 dB |") == 1
    assert "| DRSN-CW |  | 75.0 (1) |  |" in capsys.readouterr().out
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {"vibration.png", "cwru-curves.png", "gains.png"}


def test_runs_of_other_epochs_leave_the_page_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, page = tmp_path / "results.csv", tmp_path / "README.md"
    page.write_text("".join(f"<!-- {task} -->\nold\n<!-- end {task} -->\n" for task in ("vibration", "image")))
    results.append(path, A, Result(0.875, 1.0))
    results.append(path, Run("vibration", "resnet", Condition("gaussian", 0.0), 0, 100), Result(0.95, 1.0))
    assert report.main(["--out", str(tmp_path)]) == 0
    text = page.read_text()
    assert "| ResNet | 87.5 (1) |" in text and "95.0" not in text
    assert "<!-- image -->\nNo runs yet.\n" in text and "old" not in text
    assert report.main(["--out", str(tmp_path), "--epochs", "100"]) == 0
    assert "95.0 (1)" in page.read_text() and "87.5" not in page.read_text()
    assert "<!-- image -->\nNo runs of 100 epochs yet.\n" in page.read_text()
    before = page.read_text()
    assert report.main(["--out", str(tmp_path), "--epochs", "7"]) == 1
    assert "results.csv has no runs of 7 epochs yet" in capsys.readouterr().err and page.read_text() == before


def test_a_command_reports_the_runs_of_its_epochs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for epochs, accuracy in ((3, 0.25), (40, 0.5)):
        simulated = Run("simulated", "resnet", Condition("pink", 0.0), 0, epochs)
        results.append(tmp_path / "results.csv", simulated, Result(accuracy, 1.0))
    command = ["--simulated", "--task", "simulated", "--out", str(tmp_path), "--epochs", "3", "--minutes", "0"]
    assert run.main(command) == 0
    printed = capsys.readouterr().out
    assert "25.0 (1)" in printed and "50.0" not in printed
    assert run.main([*command, "--paper", str(tmp_path / "none.csv")]) == 1  # before anything is trained
    assert "none.csv" in capsys.readouterr().err


def test_the_page_holds_what_the_stored_runs_give():
    pytest.importorskip("scipy")
    page = (ROOT / "docs" / "experiments" / "README.md").read_text(encoding="utf-8")
    found = report.blocks(report.cells(results.read(ROOT / "docs" / "experiments" / "results.csv")))
    numbers = json.loads((ROOT / "docs" / "pictures" / "numbers.json").read_text(encoding="utf-8"))
    assert found.keys() >= {"vibration", "speech", "image"}
    for name, text in (found | pictures.tables(numbers)).items():
        assert f"<!-- {name} -->\n{text}\n<!-- end {name} -->" in page, name


def test_the_papers_values_are_in_every_plot(tmp_path, monkeypatch):
    """docs/experiments/paper.csv: four networks, three noises, -5 to 5 dB; the means of the 33 settings."""
    paper = report.read_paper(report.PAPER)
    assert all(sorted(values) == list(range(-5, 6)) for values in paper.values())
    means = {"convnet": 77.6, "resnet": 86.3, "drsn-cs": 88.6, "drsn-cw": 89.6}
    for model, mean in means.items():
        values = [v for noise in ("gaussian", "laplace", "pink") for v in paper[model, noise].values()]
        assert abs(statistics.mean(values) - mean) < 0.15
    assert len(paper) == 12
    results.append(tmp_path / "results.csv", A, Result(0.875, 1.0))
    drawn = []
    monkeypatch.setattr(report, "plot", lambda path, cells, task, paper: drawn.append((task, paper)))
    assert report.main(["--out", str(tmp_path)]) == 0 and run.parse(["--simulated"]).paper == report.PAPER
    assert drawn == [("vibration", paper)]


def test_report_errors(tmp_path, capsys):
    assert report.main(["--out", str(tmp_path)]) == 1
    assert "has no runs yet" in capsys.readouterr().err
    paper = tmp_path / "paper.csv"
    paper.write_text("panel,noise\ntest,pink\n")
    with pytest.raises(ValueError, match="paper.csv must have the columns panel,noise,snr_db,method,accuracy_pct"):
        report.read_paper(paper)
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="must have <!-- vibration --> and <!-- end vibration --> once"):
        report.insert(tmp_path / "page.md", "vibration", "text")


def test_timing_table():
    rows = [line.split(" | ") for line in timing.measure(rounds=1, batch=4, length=64).splitlines()[2:]]
    names = [(paired.LABELS[m], form if len(forms) > 1 else "") for m, forms in timing.FORMS.items() for form in forms]
    assert [(row[0].strip("| "), row[1].strip()) for row in rows] == names
    assert rows[0][3] == "1.00 (1.00 to 1.00)" and all(float(row[2]) > 0 for row in rows)
