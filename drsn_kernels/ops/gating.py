"""Calling a user's gate on averages (N, C)."""

from collections.abc import Callable

import torch
from torch import nn

from . import checks


def _first_float(module: nn.Module) -> torch.dtype | None:
    """dtype of the module's first floating-point parameter; a plain walk without module.parameters()'s generators."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter.dtype
    for child in module._modules.values():
        if child is not None:
            dtype = _first_float(child)
            if dtype is not None:
                return dtype
    return None


def _autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device that autocast does not know, such as meta
        return False


def call_gate(gate: Callable, pooled: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the gate returns for the averages (N, C), in the accumulate dtype.

    The gate sees them in its parameters' dtype; under autocast, torch decides.
    """
    dtype = _first_float(gate) if isinstance(gate, nn.Module) else None
    if dtype is not None and dtype != pooled.dtype and not _autocast(x.device.type):
        alpha = gate(pooled.to(dtype))
    else:
        alpha = gate(pooled)
    if alpha.__class__ is torch.Tensor and alpha.shape == pooled.shape and alpha.dtype is pooled.dtype:
        if alpha.device == pooled.device:
            return alpha
    checks.gate_output(alpha, x)
    return alpha if alpha.dtype == pooled.dtype else alpha.to(pooled.dtype)
