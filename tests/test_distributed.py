"""torch.distributed, checkpoints, accumulation and AMP around the operators: two gloo processes against one."""

import pytest
import torch
from rank_jobs import (
    Checkpointed,
    Network,
    batches,
    calls,
    data_parallel,
    distributed_tensors,
    fully_sharded,
    loss,
    share,
    state,
    trained,
    with_an_unused_module,
)
from ranks import WORLD
from torch import nn

import drsn_kernels as dk

pytestmark = pytest.mark.unpoisoned
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch"])
FUSES = {"cpu": True, "torch": False}


def assert_same(ours: dict, expected: dict, leave_out: tuple[str, ...] = ()) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        if not name.endswith(leave_out):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def ways(found: list[tuple[str, bool, str]]) -> list[tuple[str, bool]]:
    return [(backend, fused) for backend, fused, _ in found]


# ---- DistributedDataParallel -----------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("average", ["channel", "sample"])
def test_two_processes_equal_one_on_the_whole_batch(ranks, backend, average):
    expected = trained(Network(average=average))
    for found, how in ranks.run(data_parallel, backend, False, average):
        assert_same(found, expected)
        assert ways(how) == [(backend, FUSES[backend])] * 2


OPTIONS = [{"gradient_as_bucket_view": True}, {"static_graph": True}, {"bucket_cap_mb": 0.0001}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_ddp(ranks, options):
    expected = trained(Network())
    for found, _ in ranks.run(data_parallel, "cpu", False, "channel", "", 1, options):
        assert_same(found, expected)


@BACKENDS
def test_statistics_of_all_ranks(ranks, backend):
    """A norm that talks to the other ranks is called; then two processes equal one with BatchNorm1d."""
    expected = trained(Network(norm=True))
    for found, how in ranks.run(data_parallel, backend, True, "channel", "synced"):
        assert_same(found, expected)
        assert ways(how) == [(backend, False)] * 2


def halves(norm: bool, broadcast: bool = False, leave_out: bool = False) -> list[dict]:
    """What two ranks compute, in one process: each on its own half of the batch, then gradients are averaged."""
    models = [Network(norm) for _ in range(WORLD)]
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for x, target in batches():
        if broadcast:
            models[1].load_state_dict(models[0].state_dict())
        for rank, model in enumerate(models):
            optimisers[rank].zero_grad()
            loss(model, share(x, rank), share(target, rank), leave_out and rank == 1).backward()
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(p.grad for p in parameters if p.grad is not None) / WORLD
            for p in parameters:
                p.grad = mean.clone()
        for optimiser in optimisers:
            optimiser.step()
    return [state(model) for model in models]


@BACKENDS
@pytest.mark.parametrize("broadcast", [True, False])
def test_plain_batch_norm_is_each_ranks_own(ranks, backend, broadcast):
    """Each rank normalises its own half, and only gradients are averaged. Running statistics differ by rank; before
    each forward pass DDP copies rank 0's, which the fused gate wrote past autograd, over the others'."""
    found = ranks.run(data_parallel, backend, True, "channel", "", 1, {"broadcast_buffers": broadcast})
    for (ours, how), expected in zip(found, halves(True, broadcast), strict=True):
        assert_same(ours, expected)
        assert ways(how) == [(backend, FUSES[backend])] * 2
    (first, _), (second, _) = found
    assert_same(first, second, leave_out=("running_mean", "running_var"))
    assert not torch.equal(first["first.fc.1.running_mean"], second["first.fc.1.running_mean"])
    whole = trained(Network(norm=True))
    assert not torch.allclose(first["first.fc.0.weight"], whole["first.fc.0.weight"], rtol=1e-9)


@BACKENDS
def test_unused_parameters_are_found(ranks, backend):
    """DDP walks the graph from the loss to the parameters: through the nodes of the operators, fused or not."""
    expected, _ = halves(norm=False, leave_out=True)
    for found in ranks.run(with_an_unused_module, backend):
        assert_same(found, expected)


@BACKENDS
@pytest.mark.parametrize("kind", ["hooks", "reentrant"])
def test_checkpoints_inside(ranks, backend, kind):
    expected = trained(Network())
    for found, how in ranks.run(data_parallel, backend, False, "channel", kind):
        assert_same(found, expected)
        assert ways(how) == [(backend, FUSES[backend])] * 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_compiled_around_ddp(ranks, backend):
    expected = trained(Network())
    for found, how in ranks.run(data_parallel, backend, False, "channel", "compiled"):
        assert_same(found, expected)
        assert ways(how) == [("compiler", False)] * 2


@BACKENDS
def test_accumulated_without_sync(ranks, backend):
    expected = trained(Network())
    for found, _ in ranks.run(data_parallel, backend, False, "channel", "", 2):
        assert_same(found, expected)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("wrapped", ["root", "shrinkages", "gates"])
def test_fully_sharded(ranks, backend, wrapped):
    """While a module runs its parameters are whole and plain, so its gate may be fused, unless the hooks that make
    them so are the gate's own."""
    expected = trained(Network())
    for found, how in ranks.run(fully_sharded, backend, wrapped):
        assert_same(found, expected)
        assert ways(how) == [(backend, FUSES[backend] and wrapped != "gates")] * 2


@BACKENDS
def test_distributed_tensors(ranks, backend):
    """They take the reference, and stay sharded; a gate whose parameters are sharded is called."""
    x = batches()[0][0].requires_grad_()
    y, tau = dk.shrink(x, torch.sigmoid, residual=x, return_tau=True)
    expected = [y, tau, *torch.autograd.grad(y.square().sum(), x), dk.abs_mean(x), dk.soft_threshold(x, 0.3)]
    for found, why in ranks.run(distributed_tensors, backend):
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact)
        assert why == "a parameter of the gate is a tensor subclass"


# ---- SyncBatchNorm ---------------------------------------------------------------------------------------------------


@BACKENDS
def test_sync_batch_norm_reaches_the_gate(backend):
    """On a CPU torch runs it in eval, and in training where there is no process group; then it is BatchNorm."""
    expected = trained(Network(norm=True))
    model = Network(norm=True)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model.first.fc[1]) is type(model.second.fc[1]) is nn.SyncBatchNorm
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with dk.use_backend(backend, strict=True):
        assert_same(trained(model), expected)
        for found, fused, why in calls(model):
            assert (found, fused) == (backend, False)
            assert "SyncBatchNorm" in why or backend == "torch"


@pytest.mark.gpu
def test_sync_batch_norm_over_two_ranks(ranks):
    """Both ranks share one device: gloo, because nccl wants a device for each."""
    expected = trained(Network(norm=True))
    for found, how in ranks.run(data_parallel, "triton", True, "channel", "SyncBatchNorm"):
        assert_same(found, expected)
        assert ways(how) == [("triton", False)] * 2 and all("SyncBatchNorm" in why for _, _, why in how)


# ---- one process -----------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("pieces", [2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(backend, pieces):
    with dk.use_backend(backend, strict=True):
        assert_same(trained(Network(), pieces=pieces), trained(Network()))


@BACKENDS
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointed_batch_norm_counts_twice(backend, reentrant):
    """As with torch's BatchNorm: the forward pass runs twice, gradients are the same, statistics move on twice."""
    expected = trained(Network(norm=True))
    model = Checkpointed(norm=True)
    model.reentrant = reentrant
    with dk.use_backend(backend, strict=True):
        found = trained(model)
        assert ways(calls(model)) == [(backend, FUSES[backend])] * 2
    assert_same(found, expected, leave_out=("running_mean", "running_var", "num_batches_tracked"))
    assert found["second.fc.1.num_batches_tracked"] == len(batches())
    assert found["first.fc.1.num_batches_tracked"] == 2 * len(batches())
    with dk.use_backend("torch"):  # calls the BatchNorm
        called = Checkpointed(norm=True)
        called.reentrant = reentrant
        assert_same(found, trained(called))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_gradient_scaler(backend, dtype):
    model = Network(norm=True).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = (t.float() for t in batches()[0])

    def gradients(scale: float) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            value = loss(model, x, target)
        return torch.autograd.grad(value * scale, list(model.parameters()))

    with dk.use_backend(backend, strict=True), torch.autocast("cpu", dtype=dtype):
        assert ways(calls(model)) == [(backend, FUSES[backend])] * 2
    with dk.use_backend(backend, strict=True):
        plain = gradients(1.0)
        with torch.autocast("cpu", dtype=dtype):
            value = loss(model, x, target)
        scaler.scale(value).backward()
        scaler.unscale_(optimiser)
        for p, expected in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=2e-2, atol=1e-4)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == 2.0**11
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

        optimiser.zero_grad()  # a batch that overflows: the step is left out, and the scale goes down
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss(model, x, target) * float("inf")).backward()
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == 2.0**10
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
