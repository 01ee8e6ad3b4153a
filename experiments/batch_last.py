"""The paper's network with the batch as the last dimension: 1.2 to 1.9 times as fast on a CPU, same parameters.

The network has 4 to 16 channels, too few for the vectors of a CPU's convolutions of (N, C, L). As (C, L, N) every loop
runs over the batch (batch_last.cpp). :func:`batch_last` walks through the modules of a network of drsn_kernels.models
and computes what they would in training: logits, gradients and running statistics are the modules' own up to rounding
(test_experiments.py). Gates and shrinkages are called, and so is the whole network for testing.
"""

import functools
import os
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from drsn_kernels.models import DRSN


@functools.cache
def compiled() -> ModuleType:
    """The C++ parts, compiled at the first call; ImportError or RuntimeError where there is no compiler."""
    from torch.utils.cpp_extension import load

    os.environ.setdefault("MAX_JOBS", "1")
    source = Path(__file__).with_suffix(".cpp")
    return load("drsn_batch_last", [str(source)], extra_cflags=["-O3", "-march=native", "-ffast-math"])


class _Stem(torch.autograd.Function):
    """A convolution whose input needs no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride):
        padded = F.pad(x, (0, 0, 1, 1))
        ctx.save_for_backward(padded)
        ctx.stride = stride
        return compiled().convolution(padded, weight, bias, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, *compiled().convolution_weight(grad.contiguous(), *ctx.saved_tensors, ctx.stride), None


class _NormReluConvolution(torch.autograd.Function):
    """The repeating part of a unit: batch norm, whose running statistics it moves, ReLU, convolution."""

    @staticmethod
    def forward(ctx, x, gamma, beta, norm, weight, bias, stride):
        padded, mean, rstd = compiled().norm_relu(
            x, gamma, beta, norm.eps, norm.running_mean, norm.running_var, norm.momentum
        )
        ctx.save_for_backward(x, padded, weight, gamma, mean, rstd)
        ctx.stride = stride
        return compiled().convolution(padded, weight, bias, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        weight, bias = compiled().convolution_weight(grad, ctx.saved_tensors[1], ctx.stride)
        x, gamma, beta = compiled().norm_relu_convolution_backward(grad, *ctx.saved_tensors, ctx.stride)
        return x, gamma, beta, None, weight, bias, None


def _norm_relu_convolution(x: torch.Tensor, norm: nn.Module, conv: nn.Module) -> torch.Tensor:
    y = _NormReluConvolution.apply(x, norm.weight, norm.bias, norm, conv.weight, conv.bias, conv.stride[0])
    norm.num_batches_tracked += 1
    return y


class BatchLast(nn.Module):
    """A network that trains by :func:`batch_last`, and is called as it is for testing and for a batch that is odd."""

    def __init__(self, network: DRSN) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return batch_last(self.network, x) if self.training and len(x) % 16 == 0 else self.network(x)


def batch_last(network: DRSN, x: torch.Tensor) -> torch.Tensor:
    """The logits (N, classes) of x (N, channels, length) in training mode; float32, N a multiple of 16.

    network: as ``models.network(name)`` builds it, 1-D: pre-activation, kernels of three taps, padded shortcuts or
    none, multiples of four channels.
    """
    x = _Stem.apply(x.permute(1, 2, 0).contiguous(), network.stem.weight, network.stem.bias, network.stem.stride[0])
    for unit in (unit for stage in network.stages for unit in stage):
        norm, _, conv, second_norm, _, second_conv = unit.residual_function
        y = _norm_relu_convolution(_norm_relu_convolution(x, norm, conv), second_norm, second_conv)
        if unit.shrinkage is not None:
            y = unit.shrinkage(y.permute(2, 0, 1)).permute(1, 2, 0).contiguous()
        if (shortcut := unit.shortcut) is not None:
            x = x[:, :: shortcut.stride] if shortcut.stride > 1 else x
            y = y + (F.pad(x, (0, 0, 0, 0, shortcut.front, shortcut.back)) if shortcut.front + shortcut.back else x)
        x = y
    x = F.relu(network.norm(x.permute(2, 0, 1)))
    return network.fc(x.mean(2))
