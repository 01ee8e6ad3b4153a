"""What tests/test_distributed.py runs in each of two processes, and in one for comparison."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from ranks import WORLD
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import drsn_kernels as dk
from drsn_kernels.gates import standard_gate


class AcrossRanks(nn.BatchNorm1d):
    """What SyncBatchNorm computes, where it refuses to: on a CPU."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        n = len(x) * WORLD
        mean = all_reduce(x.sum(0)) / n
        var = all_reduce((x - mean).square().sum(0)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class Network(nn.Module):
    """Two shrinkages; the second one is left out where the caller says so."""

    def __init__(self, norm: bool = False, average: str = "channel"):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv1d(2, 6, 3)
        self.first = dk.Shrinkage(6, average=average, norm=norm)
        self.between = nn.Conv1d(6, 6, 3)
        self.second = dk.Shrinkage(6, average=average, norm=norm)
        self.head = nn.Linear(6, 3)
        self.double()

    def features(self, x):
        return self.between(self.first(self.conv(x)))

    def forward(self, x, leave_out: bool = False):
        x = self.features(x)
        x = x if leave_out else self.second(x, residual=x)
        return self.head(x.mean(2))


class Normed(nn.Module):
    """Normalisation and an activation after a convolution. kind: "FusedSequential", "BatchNormReLU" or, of PyTorch's
    own modules, "Sequential"."""

    def __init__(self, kind: str = "Sequential"):
        super().__init__()
        torch.manual_seed(3)
        conv, norm = nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6)
        if kind == "BatchNormReLU":
            self.layers = nn.Sequential(conv, dk.BatchNormReLU(6, activation="leaky", slope=0.2, sync=True))
        else:
            kinds = {"FusedSequential": dk.FusedSequential, "Sequential": nn.Sequential}
            self.layers = kinds[kind](conv, norm, nn.LeakyReLU(0.2))
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x, leave_out: bool = False):
        return self.head(self.layers(x).mean(2))


class Checkpointed(Network):
    """The same, recomputing the part before the second shrinkage in the backward pass."""

    reentrant = False

    def features(self, x):
        # a reentrant checkpoint gives its parameters no gradient unless an input asks for one
        return checkpoint(super().features, x.requires_grad_(), use_reentrant=self.reentrant)


def batches(steps: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(8, 2, 30), draw(8, 3)) for _ in range(steps)]


def share(tensor: torch.Tensor, rank: int | None) -> torch.Tensor:
    """This rank's half of a batch; of one process (None) all of it."""
    return tensor if rank is None else tensor.chunk(WORLD)[rank]


def loss(forward: Callable, x, target, *arguments) -> torch.Tensor:
    return (forward(x, *arguments) - target).square().mean()


def trained(
    model: nn.Module, rank: int | None = None, forward: nn.Module | None = None, pieces: int = 1,
    leave_out: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The state after a few steps of SGD, each of them accumulated over so many pieces of the batch."""
    forward = model if forward is None else forward
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in batches():
        optimiser.zero_grad()
        x, target = (share(t.to(model.head.weight.device), rank) for t in (x, target))
        parts = list(zip(x.chunk(pieces), target.chunk(pieces), strict=True))
        for i, (a, b) in enumerate(parts):
            waits = i < pieces - 1 and isinstance(forward, DistributedDataParallel)
            with forward.no_sync() if waits else contextlib.nullcontext():
                (loss(forward, a, b, leave_out) / pieces).backward()
        optimiser.step()
    return state(model)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and gradients; of shards the whole."""
    tensors = dict(model.state_dict())
    tensors |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    return {name: t.detach().cpu().clone() for name, t in whole.items()}


def calls(model: nn.Module) -> list[tuple[str, bool, str]]:
    x = batches()[0][0].to(next(model.parameters()))
    return [(call.backend, call.fused, call.gate) for call in dk.explain(model, x)]


# ---- the jobs --------------------------------------------------------------------------------------------------------


def data_parallel(
    rank: int, backend: str, norm: bool = False, average: str = "channel", kind: str = "", pieces: int = 1,
    options: dict | None = None,
) -> tuple[dict, list]:  # fmt: skip
    """DistributedDataParallel; `kind`: "synced" statistics, "hooks" or "reentrant" checkpoints, "SyncBatchNorm", or
    "compiled"."""
    model = (Checkpointed if kind in ("hooks", "reentrant") else Network)(norm, average)
    if kind == "synced":
        for shrinkage in (model.first, model.second):
            shrinkage.fc[1].__class__ = AcrossRanks  # with its parameters and buffers as they are
    if kind == "SyncBatchNorm":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model.cuda())
    model.reentrant = kind == "reentrant"
    with dk.use_backend(backend, strict=True):
        wrapped = DistributedDataParallel(model, **(options or {}))
        forward = torch.compile(wrapped, backend="aot_eager") if kind == "compiled" else wrapped
        return trained(model, rank, forward, pieces), calls(forward)


def with_an_unused_module(rank: int, backend: str) -> dict:
    """Rank 1 leaves the second shrinkage out."""
    model = Network()
    with dk.use_backend(backend, strict=True):
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        return trained(model, rank, wrapped, leave_out=rank == 1)


def fully_sharded(rank: int, backend: str, wrapped: str) -> tuple[dict, list]:
    """FSDP2: the root is sharded, and apart from it the shrinkages, their gates or nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Network()
    mesh = init_device_mesh("cpu", (WORLD,))
    for shrinkage in (model.first, model.second):
        if wrapped == "shrinkages":
            fully_shard(shrinkage, mesh=mesh)
        elif wrapped == "gates":
            fully_shard(shrinkage.fc, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with dk.use_backend(backend, strict=True):
        return trained(model, rank), calls(model)


def distributed_tensors(rank: int, backend: str) -> tuple[list, str]:
    """The operators on a DTensor sharded over the batch; and why the gate of a sharded module is not fused when it is
    called past the module whose hooks gather its parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    plain = batches()[0][0]
    x = distribute_tensor(plain, mesh, [Shard(0)]).requires_grad_()
    with dk.use_backend(backend, strict=True):
        y, tau = dk.shrink(x, torch.sigmoid, residual=x, return_tau=True)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        found = [t.full_tensor().detach() for t in (y, tau, dx, dk.abs_mean(x), dk.soft_threshold(x, 0.3))]
    module = dk.Shrinkage(2).double()
    fully_shard(module, mesh=mesh)
    return found, standard_gate(module.fc, plain)


def normed(rank: int, backend: str, kind: str) -> tuple[dict, list[str]]:
    """DistributedDataParallel around Normed with the statistics of both ranks."""
    model = Normed(kind)
    wrapped = DistributedDataParallel(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # DDP on a CPU refuses a model that has some, and looks once
    with dk.use_backend(backend, strict=True):
        found = trained(model, rank, wrapped)
        model.eval()  # where there is nothing to wait for
        return found, [call.op for call in dk.explain(model, batches()[0][0])]


def unequal_shares(rank: int, backend: str, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """y, dx, the sums of dweight and dbias over the ranks, and the running statistics, of this rank's samples."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, g, weight, bias = draw(sum(sizes), 5, 7) + 3, draw(sum(sizes), 5, 7), draw(5), draw(5)
    x, g = (t.split(sizes)[rank] if rank >= 0 else t for t in (x, g))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    mean, var, batches = torch.zeros(5).double(), torch.ones(5).double(), torch.tensor(0)
    with dk.use_backend(backend, strict=rank >= 0):
        group = torch.distributed.group.WORLD if rank >= 0 else None
        y = dk.batch_norm_relu(
            leaves[0], mean, var, *leaves[1:], True, 0.3, num_batches_tracked=batches, process_group=group
        )
        dx, dweight, dbias = torch.autograd.grad(y, leaves, g)
    for t in (dweight, dbias):
        if rank >= 0:
            torch.distributed.all_reduce(t)
    return [y.detach(), dx, dweight, dbias, mean, var, batches]


def group_of_one(rank: int, backend: str) -> list[torch.Tensor]:
    """y, dx and running statistics in a group of this rank alone, behind those without a group."""
    groups = [torch.distributed.new_group([r]) for r in range(torch.distributed.get_world_size())]
    x, found = torch.randn(4, 6, 9, requires_grad=True), []
    with dk.use_backend(backend, strict=True):
        for group in (None, groups[rank]):
            mean, var = torch.zeros(6), torch.ones(6)
            y = dk.batch_norm_relu(x, mean, var, training=True, process_group=group)
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), x), mean, var]
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            dk.batch_norm_relu(torch.randn(1, 6), training=True, process_group=groups[rank])
    return found


def refused(rank: int) -> list[str]:
    """What synchronised statistics do not do."""
    x = torch.randn(4, 6, 9, requires_grad=True)
    module = dk.BatchNormReLU(6, sync=True)
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, retain_graph=True)
    y, found = module(x), []
    for attempt in (
        lambda: torch.autograd.grad(y.square().sum(), x, create_graph=True),
        lambda: torch.func.vmap(module)(x[None]),
    ):
        try:
            attempt()
        except RuntimeError as error:
            found.append(str(error))
    return found
