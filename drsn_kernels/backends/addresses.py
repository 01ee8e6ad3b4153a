"""Tensors as the cpu extension takes them: addresses, 0 where there is none."""

import torch

from ..gates import Kept


def address(t: torch.Tensor | None) -> int:
    """Of what a caller hands in: memory of another device would be read as this process's own."""
    if t is None:
        return 0
    if not t.is_cpu:
        raise ValueError(f"the cpu kernels take CPU tensors, got one of shape {tuple(t.shape)} on {t.device}")
    return t.data_ptr()


def addresses(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple([address(t) for t in tensors])


def state_addresses(kept: Kept, n: int, hidden: int, outputs: int) -> tuple[int, ...]:
    """A, u, alpha, mean and variance, of which u, alpha and the batch's statistics lie one after the other."""
    u, item = kept.hidden.data_ptr(), kept.hidden.element_size()
    alpha = u + n * hidden * item
    mean = alpha + n * outputs * item
    if kept.mean is not None:
        return kept.pooled.data_ptr(), u, alpha, kept.mean.data_ptr(), kept.var.data_ptr()
    return kept.pooled.data_ptr(), u, alpha, mean, mean + hidden * item
