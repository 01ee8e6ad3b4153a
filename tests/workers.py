"""What tests/test_deploy.py runs in other processes. They import this file, and not the tests."""

import torch
from torch.utils.data import Dataset, get_worker_info

import drsn_kernels as dk


class Shrunk(Dataset):
    """Noise, denoised in the worker that loads it: (index, y, whether a worker's kernels of this backend ran)."""

    def __init__(self, backend: str):
        self.backend = backend
        torch.manual_seed(1)
        self.module = dk.Shrinkage(6).eval()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, bool]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(3, 6, 500, generator=generator)
        with dk.use_backend(self.backend, strict=True), torch.no_grad():
            (call,) = dk.explain(self.module, x)
            return index, self.module(x), get_worker_info() is not None and call.backend == self.backend


def step(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Forward and backward: y, dx and the gate's gradients."""
    x = x.detach().requires_grad_()
    y = module(x, residual=x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def step_of_a_fork(results, module: torch.nn.Module, x: torch.Tensor) -> None:
    torch.set_num_threads(1)  # as DataLoader does: OpenMP's threads do not outlive a fork, for all of torch alike
    results.put([t.numpy() for t in step(module, x)])
