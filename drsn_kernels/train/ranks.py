"""One process or several: torchrun's environment, and batch statistics over all of them."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank, world: its number, and how many there are.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch; sizes differ by one at most."""
        return tensor.tensor_split(self.world)[self.rank]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def highest(self, numbers: list[int]) -> list[int]:
        """The largest of each over all processes."""
        if self.world == 1:
            return numbers
        tensor = torch.tensor(numbers, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """For all processes to come here."""
        if self.world > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model to train: it averages gradients and shares batch statistics with the others."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(share_statistics(model), device_ids=ids)


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient is their gradients' sum."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(grad)


class SharedBatchNorm(_BatchNorm):
    """What torch.nn.SyncBatchNorm computes, on a CPU, where that refuses: statistics of the batch of all processes.

    Mean and variance of each share are combined in float64, so the variance does not cancel.
    """

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"x must be (N, C, *spatial), got shape {tuple(x.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        spatial = [d for d in range(x.dim()) if d != 1]
        var, mean = (t.double() for t in torch.var_mean(x, spatial, correction=0))
        count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64)
        sums = _Sum.apply(torch.cat([count * mean, count * (var + mean.square()), count]))
        channels, total = x.shape[1], sums[-1].detach()
        mean = sums[:channels] / total
        var = sums[channels:-1] / total - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(x.dtype), self.momentum)
            self.running_var.lerp_((var * total / (total - 1)).to(x.dtype), self.momentum)
        along = (1, channels) + (1,) * (x.dim() - 2)
        scale = (self.weight * (var + self.eps).rsqrt()).to(x.dtype)
        return (x - mean.to(x.dtype).view(along)) * scale.view(along) + self.bias.view(along)


def share_statistics(model: nn.Module) -> nn.Module:
    """Every BatchNorm of the model over the batch of all processes; parameters, buffers and names stay as they are."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SharedBatchNorm
    return model


def join(device: str | None) -> Ranks:
    """Join torchrun's process group (nccl on GPUs, gloo on CPUs); alone without one. End with :func:`leave`.

    Raises:
        ValueError: an unknown or missing device.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:INDEX, got {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device must be one that is there, got {device!r} and torch sees no CUDA device")
    if found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise ValueError(f"--device must be cpu, cuda or cuda:INDEX, got {device!r}")
    if found.type == "cuda" and (found.index or 0) >= (there := torch.cuda.device_count()):
        raise ValueError(f"--device must be one that is there, got {device!r} and torch sees {there} CUDA devices")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and found.index is not None:
        raise ValueError(f"--device must be {found.type} for {world} processes, each takes its own, got {device!r}")
    if world == 1:
        return Ranks(0, 1, found)
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), world, found)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
