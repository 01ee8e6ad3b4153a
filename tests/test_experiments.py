"""experiments/: the rows, what is done next, repeatable runs, gates; and a command that is killed."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recorded_graph
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind the installed package

import drsn_kernels as dk  # noqa: E402
from drsn_kernels.data import Dataset  # noqa: E402
from drsn_kernels.models import NAMES, network  # noqa: E402
from experiments import batch_last, gates, results, run, tasks  # noqa: E402
from experiments.results import Result, Run, Selection  # noqa: E402
from experiments.tasks import TASKS, Condition  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- rows and what is missing ----------------------------------------------------------------------------------------

A = Run("vibration", "resnet", Condition("pink", -5.0), 0, 40)
B = Run("image", "drsn-cw", Condition("pasted"), 1, 40)
C = Run("cwru", "drsn-cw", Condition("gaussian", -5.0), 2, 12, "fixed", -2.0, "warm-up")


def test_rows(tmp_path):
    path = tmp_path / "new" / "results.csv"
    assert results.read(path) == {}
    results.append(path, A, Result(0.123456, 7.04))
    results.append(path, B, Result(1.0, 12.0))
    results.append(path, C, Result(0.5, 3.0, 0.75, (0.25, 0.5)))
    assert path.read_text().splitlines() == [
        "task,model,noise,snr_db,seed,epochs,test_acc,seconds,protocol,gate_bias,gate,train_acc,curve",
        "vibration,resnet,pink,-5,0,40,0.12346,7.0,fresh,,,,",
        "image,drsn-cw,pasted,,1,40,1.00000,12.0,fresh,,,,",
        "cwru,drsn-cw,gaussian,-5,2,12,0.50000,3.0,fixed,-2,warm-up,0.75000,0.2500 0.5000",
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
    for other in ({"epochs": 20}, {"gate_bias": -2.0}, {"gate": "zero"}):  # are other runs
        assert len(results.missing(done, Selection(("image",), **other), 1)) == (10 if "epochs" in other else 4)


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


def last_biases(net):
    return torch.cat([unit.shrinkage.fc[-2].bias.detach() for stage in net.stages for unit in stage])


@pytest.mark.filterwarnings("ignore:Detected call of")  # no step is taken
@pytest.mark.parametrize("name", gates.GATES)
def test_a_run_with_other_gates(monkeypatch, name):
    """execute() does with the gates what the name says, and nothing else is other than in a run without."""
    few(monkeypatch)
    made, optimizers, biases = [], [], []

    def build(*args, **options):
        made.append(network(*args, **options))
        return made[-1]

    def step(model, optimizer, x, y):
        optimizers.append(optimizer)
        biases.append(last_biases(made[-1])[0].item())
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(run, "network", build)
    monkeypatch.setattr(run, "train_step", step)
    for gate in (None, name):
        run.execute(Run("cwru", "drsn-cw", Condition("gaussian", 0.0), 0, 12, "fixed", None, gate), None, True)
    assert [b - a for a, b in zip(biases[:12], biases[12:], strict=True)] == pytest.approx(
        [-2.0 if name == "warm-up" else 0.0, *[0.0] * 11], abs=1e-5
    )
    plain, ours = made
    free = [p for unit in ours.stages.modules() if isinstance(unit, dk.Shrinkage) for p in unit.fc.parameters()]
    decayed = {id(p) for p in optimizers[-1].param_groups[0]["params"]}
    assert sum(map(len, (group["params"] for group in optimizers[-1].param_groups))) == len(list(ours.parameters()))
    for (key, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if name == "zero" and key.endswith("shrinkage.fc.3.weight"):
            assert not a.any() and b.any()
        else:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # a warm-up is over before the last step
    assert any(id(p) in decayed for p in free) == (name != "no-decay")


def test_the_warm_up_ends_at_what_was_learned():
    net = network("drsn-cw", classes=3)
    warm_up = gates.WarmUp(net, 30)
    assert (last_biases(net) == -4).all()
    seen = []
    for _ in range(8):
        warm_up()
        seen.append(last_biases(net)[0].item())
        with torch.no_grad():
            net.stages[0][0].shrinkage.fc[-2].bias += 0.5
    assert seen == pytest.approx([-3.2, -1.9, -0.6, 0.7, 2.0, 2.5, 3.0, 3.5])


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
@pytest.mark.rotated(2)
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
