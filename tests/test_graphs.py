"""A training step as a CUDA graph gives the weights of the step itself. On a GPU, and with a graph that records."""

import copy
import logging

import pytest
import recorded_graph
import torch
import torch.nn.functional as F
from processes import python
from torch import nn
from train_jobs import new_run

import drsn_kernels as dk
from drsn_kernels import graphs
from drsn_kernels.train import command
from drsn_kernels.train.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
RECORDED = pytest.param("cpu", id="recorded")
CUDA = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[RECORDED, CUDA])
def device(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if request.param == "cuda":
        yield "cuda"
        return
    recorded_graph.install(monkeypatch)
    with dk.use_backend("torch"):  # whose operators can be recorded
        yield "cpu"


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def network(dims: int = 1) -> nn.Module:
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
    return nn.Sequential(
        conv(1, 8, 3, bias=False), norm(8), dk.Shrinkage(8), nn.Dropout(0.2), nn.Flatten(2), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def batches(epochs: int = 1, device: str = "cpu", dims: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Five of 6 samples an epoch, and one of 4."""
    sizes = [6, 6, 6, 6, 6, 4] * epochs
    return [(torch.randn(n, 1, *[16] * dims).to(device), torch.randint(3, (n,)).to(device)) for n in sizes]


def sgd(parameters, lr=0.02, **options) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-3, **options)


def trained(model, optimizer, given, graph, *, dtype=None, scaler=None, clip=False, after=lambda number: None):
    """Train on the batches; what the steps returned, and how often the step's Python ran."""
    device, runs = next(model.parameters()).device, []

    def step(x, y):
        runs.append(len(x))
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        return loss, (logits.argmax(1) == y).sum()

    torch.manual_seed(1)  # of dropout
    call = dk.graphed(step, optimizer) if graph else step
    results = []
    for number, batch in enumerate(given):
        results.append(call(*batch))
        after(number)
    return [tuple(float(t.detach()) for t in result) for result in results], len(runs)


def compare(model, make, given, *, tolerance=1e-4, schedule=None, scaled=False, change=lambda *_: None, **options):
    """The same with and without a graph: weights, statistics, optimizer, results. Returns how often Python ran."""
    found = []
    for graph in (True, False):
        own = copy.deepcopy(model)
        optimizer = make(own.parameters())
        scheduled = schedule(optimizer) if schedule else None

        def after(number, own=own, optimizer=optimizer, scheduled=scheduled):
            change(number, own, optimizer)
            if scheduled is not None:
                scheduled.step()

        quick = {"init_scale": 2.0**10, "growth_factor": 64.0, "backoff_factor": 1 / 64, "growth_interval": 2}
        scaler = torch.amp.GradScaler("cuda", **quick) if scaled else None
        results, runs = trained(own, optimizer, given, graph, scaler=scaler, after=after, **options)
        moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        scale = [] if scaler is None else [scaler.get_scale()]
        found.append((own.state_dict(), moments, results, scale, runs))
    ours, plain = found
    for a, b in zip(ours[:4], plain[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert plain[-1] == len(given)
    assert not scaled or ours[3][0] < 2.0**40  # without an overflow it would be 2 ** 64
    return ours[-1]


@pytest.mark.parametrize("kind", ["cpu batches", "device batches", "bfloat16", "channels_last", "fused"])
def test_the_same_weights(device, kind):
    """Three epochs; the learning rate falls after the second, and the step is captured again."""
    dims = 2 if kind == "channels_last" else 1
    model = network(dims).to(device)
    given = batches(3, "cpu" if kind == "cpu batches" else device, dims)
    if dims == 2:
        model = model.to(memory_format=torch.channels_last)
        given = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in given]
    half = kind == "bfloat16"
    runs = compare(
        model, lambda p: sgd(p, fused=kind == "fused"), given, dtype=torch.bfloat16 if half else None,
        tolerance=1e-2 if half else 1e-4, schedule=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [12]),
    )  # fmt: skip
    assert runs == (3 + 1 + 1) + 1 + (3 + 1 + 1)  # before a capture, the capture, the last batch


def test_a_schedule_of_every_step(device, monkeypatch, caplog):
    """The learning rate lies in a tensor: replayed as ever, so that there is nothing to say."""
    monkeypatch.setattr(graphs, "PATIENCE", 4)
    make = lambda p: sgd(p, lr=torch.tensor(0.1, device=device), fused=True)  # noqa: E731
    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8)  # noqa: E731
    with caplog.at_level(logging.WARNING, "drsn_kernels"):
        assert compare(network().to(device), make, batches(2), schedule=schedule) == 3 + 1 + 1 + 1
    assert not caplog.records


@pytest.mark.gpu
def test_adamw_with_clipped_gradients_and_a_schedule_of_every_step(cuda):
    make = lambda p: torch.optim.AdamW(  # noqa: E731
        p, lr=torch.tensor(1e-2, device="cuda"), eps=1e-3, capturable=True
    )
    schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12)  # noqa: E731
    assert compare(network().cuda(), make, batches(2), schedule=schedule, clip=True) == 3 + 1 + 1 + 1


@pytest.mark.gpu
def test_float16_with_a_scaler(cuda):
    """Its scale grows until gradients overflow: on the device, within the graph, such steps are left out."""
    model, make = network().cuda(), lambda p: sgd(p, lr=0.01, fused=True)
    assert compare(model, make, batches(3), dtype=torch.float16, scaled=True, tolerance=1e-2) == 3 + 1 + 1 + 2


def test_a_number_that_changes_at_every_step_is_said_once(device, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "PATIENCE", 4)
    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    with caplog.at_level(logging.WARNING, "drsn_kernels"):
        assert compare(network().to(device), sgd, batches(2), schedule=schedule) == 12
    (said,) = [record.message for record in caplog.records]
    assert "4 steps in a row ran without a CUDA graph" in said and "belongs in a tensor on the device" in said


@pytest.mark.parametrize("what", ["state", "momentum", "frozen", "moved"])
def test_what_makes_another_capture(device, what):
    """After eight full batches, in the middle of replays; the last batch of the epoch is left out."""

    def change(number, model, optimizer):
        if number != 7:
            return
        if what == "state":  # other momentum buffers
            state = copy.deepcopy(optimizer.state_dict())
            for own in state["state"].values():
                own["momentum_buffer"] *= 0.5
            optimizer.load_state_dict(state)
        elif what == "momentum":
            optimizer.param_groups[0]["momentum"] = 0.5
        elif what == "frozen":
            model[0].requires_grad_(False)
        else:
            model[0].weight.data = model[0].weight.data * 0.5

    given = [batch for batch in batches(3) if len(batch[0]) == 6]
    assert compare(network().to(device), sgd, given, change=change) == 2 * (3 + 1)


def test_results_and_gradients(device):
    """Results are the caller's to keep; gradients are those of the last call, whether it was replayed or not."""
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(x, factor):
        optimizer.zero_grad()
        loss = (weight * x).sum() * factor
        loss.backward()
        return loss

    call = dk.graphed(step, optimizer)
    kept = []
    for number in (1, 2, 3, 4, 5):
        kept.append(call(torch.full((3,), float(number)), 2))
        assert torch.equal(weight.grad, torch.full((3,), 2.0 * number, device=device))
    call(torch.full((1,), 7.0), 2)  # another shape
    assert torch.equal(weight.grad, torch.full((3,), 14.0, device=device))
    kept.append(call(torch.full((3,), 6.0), 2))
    assert torch.equal(weight.grad, torch.full((3,), 12.0, device=device))
    assert [float(loss) for loss in kept] == [6.0 * n for n in (1, 2, 3, 4, 5, 6)]
    assert not any(loss.requires_grad for loss in kept)
    assert float(call(torch.ones(3), 3)) == 9.0  # a plain value is part of the graph


def test_a_step_that_returns_nothing_or_something_else(device):
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    total = torch.zeros((), device=device)
    nothing = dk.graphed(lambda x: [total.add_(x.sum())] and None, optimizer)
    assert [nothing(torch.ones(3)) for _ in range(6)] == [None] * 6 and float(total) == 18.0
    with pytest.raises(TypeError, match="must return a tensor, a tuple of tensors or None, got dict"):
        dk.graphed(lambda x: {"loss": x}, optimizer)(torch.ones(3))
    with pytest.raises(TypeError, match="takes tensors and plain values, got list as argument 2"):
        nothing(torch.ones(3), [torch.ones(3)])
    with pytest.raises(ValueError, match="autocast must be entered inside the graphed step"):
        with torch.autocast(device, torch.bfloat16):
            nothing(torch.ones(3))


def test_a_step_that_cannot_be_captured(monkeypatch):
    recorded_graph.install(monkeypatch)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(x):
        optimizer.zero_grad()
        (weight * x).sum().backward()
        optimizer.step()
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        calls.append(weight.detach().clone())

    calls = []
    call = dk.graphed(step, optimizer)
    for _ in range(3):
        call(torch.ones(3))
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph and has not been made; .*capturing$"):
        call(torch.ones(3))
    assert torch.equal(weight, calls[-1]) and weight.grad is None


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device():
    """In a process of its own: torch does not draw random numbers on the device any more after a failed capture."""
    code = (
        "import torch, drsn_kernels as dk\n"
        "weight = torch.nn.Parameter(torch.ones(3, device='cuda'))\n"
        "optimizer = torch.optim.SGD([weight], lr=1.0)\n"
        "step = dk.graphed(lambda x: x * (weight * x).sum().item(), optimizer)\n"
        "for _ in range(4): step(torch.ones(3))\n"
    )
    said = python(code).stderr
    assert "RuntimeError: the step cannot be captured as a CUDA graph and has not been made; nothing in it" in said


@pytest.mark.gpu
def test_replays_do_not_wait_for_the_device(cuda):
    model = network().cuda()
    optimizer = sgd(model.parameters())
    batch = batches()[0]

    def step(x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    call = dk.graphed(step, optimizer)
    for _ in range(4):
        call(*batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            call(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_parameters_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="must have its parameters on one CUDA device for a graph, got them on cpu"):
        dk.graphed(lambda: None, torch.optim.SGD([nn.Parameter(torch.ones(3))]))
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got NoneType"):
        dk.graphed(lambda: None, None)


@pytest.mark.parametrize(
    "make, message",
    [
        (torch.optim.Adam, "^Adam must be made with capturable=True: else it counts steps on the host$"),
        (torch.optim.Adagrad, "^optimizer must be SGD, or take capturable=True, got Adagrad: it counts steps on"),
        (lambda p: sgd(p, lr=torch.tensor(0.1)), "^SGD must be made with fused=True for a graph that reads lr"),
    ],
)
def test_optimizers_that_a_graph_would_get_wrong(monkeypatch, make, message):
    recorded_graph.install(monkeypatch)
    with pytest.raises(ValueError, match=message):
        dk.graphed(lambda: None, make([nn.Parameter(torch.ones(3))]))


def test_several_processes_are_refused(monkeypatch):
    recorded_graph.install(monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="takes a step of one process, got a process group of 2"):
        dk.graphed(lambda: None, torch.optim.SGD([nn.Parameter(torch.ones(3))]))


# ---- the training command --------------------------------------------------------------------------------------------


def test_a_run_with_a_graph(device, tmp_path):
    """Three epochs of six steps, the last of which are smaller; weights, history, and what is saved."""
    runs = []
    for graph in (True, False):
        out = tmp_path / str(graph)
        out.mkdir()
        ours = new_run(out, batch=7, lr=0.01, ranks=Ranks(0, 1, torch.device(device)), graph=graph)
        ours.train()
        runs.append(ours)
    ours, plain = runs
    torch.testing.assert_close(ours.network.state_dict(), plain.network.state_dict(), rtol=1e-3, atol=1e-4)
    for row, wanted in zip(ours.history, plain.history, strict=True):
        for name in ("epoch", "lr", "train_loss", "train_acc"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3), name
    saved = torch.load(tmp_path / "True" / "checkpoint.pt", weights_only=True, map_location=device)["network"]
    torch.testing.assert_close(saved, dict(ours.network.state_dict()))


def test_where_the_command_takes_a_graph():
    on = lambda kind, world=1: Ranks(0, world, torch.device(kind))  # noqa: E731
    assert command._graph(None, on("cuda")) and command._graph(True, on("cuda", 1))
    assert not command._graph(None, on("cuda", 2)) and not command._graph(None, on("cpu"))
    assert not command._graph(False, on("cuda")) and not command._graph(False, on("cpu"))
    with pytest.raises(ValueError, match="^--graph needs a CUDA device, got --device cpu$"):
        command._graph(True, on("cpu"))
    with pytest.raises(ValueError, match="^--graph takes one process, got 2: leave it out under torchrun$"):
        command._graph(True, on("cuda", 2))
