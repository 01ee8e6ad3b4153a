"""Calling a user's gate on averages (N, C), and saying what does not fit where it fails on their shape."""

import itertools
import re
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


_SHAPES = re.compile(  # of torch's messages
    r"shapes cannot be multiplied|must match the size|size mismatch|[Ee]xpected .*input|number of "
    r"channels|should contain \d+ elements|is invalid for input of size|Expected more than 1 value per channel"
)


# of two layers' dtypes; of two devices it says torch.FloatTensor and torch.cuda.FloatTensor
_DTYPES = re.compile(r"must have the same dtype|type \((?!torch\.)[\w:]+\) should be the same|to have the same dtype")


def _fault(gate: Callable, x: torch.Tensor, given: torch.dtype, error: Exception) -> str:
    """One sentence where torch refuses the shape or dtype of what the gate was given or made of it; or ""."""
    said = str(error).strip().partition("\n")[0]
    if type(error) not in (RuntimeError, ValueError):
        return ""
    if _DTYPES.search(said):
        return f"gate got averages A in {given}; where its layers have another dtype, call them on A.to(dtype): {said}"
    if not _SHAPES.search(said):
        return ""
    shape = tuple(x.shape)
    if said.startswith("Expected more than 1 value per channel"):
        return f"{_one_sample(x)}: {said}"
    channels = _in_channels(gate)
    if channels is not None and channels != shape[1]:
        return f"x must have {channels} channels, as many as the gate takes, got shape {shape}: {said}"
    return f"gate must take averages {shape[:2]} of x {shape}, and return {shape[:2]} or {(shape[0], 1)}: {said}"


def _one_sample(x: torch.Tensor) -> str:
    return (
        "one sample has no batch statistics for the gate's batch normalisation, got x of shape "
        f"{tuple(x.shape)} in training; give it 2 samples or more (drop_last=True drops a trailing batch of one), call "
        "eval(), or build the gate with norm=False"
    )


def _needs_two_samples(gate: Callable) -> bool:
    """A batch normalisation in training behind a Linear. It would count the batch before it refuses it."""
    return isinstance(gate, nn.Sequential) and any(
        isinstance(one, nn.Linear) and isinstance(behind, nn.BatchNorm1d) and behind.training
        for one, behind in itertools.pairwise(gate)
    )


def _in_channels(gate: Callable) -> int | None:
    """Of what is certain to come first in the gate."""
    while isinstance(gate, nn.Sequential) and len(gate):
        gate = gate[0]
    return getattr(gate, "in_features", None) or getattr(gate, "in_channels", None)


def call_gate(gate: Callable, pooled: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the gate returns for the averages (N, C), in the accumulate dtype.

    The gate sees them in its parameters' dtype, if it is a module or, eagerly, a method of one; under autocast, torch
    decides.
    """
    compiling = torch.compiler.is_compiling()
    module = gate if compiling or isinstance(gate, nn.Module) else getattr(gate, "__self__", None)
    dtype, given = _first_float(module) if isinstance(module, nn.Module) else None, pooled
    if dtype is not None and dtype != pooled.dtype and not _autocast(x.device.type):
        given = pooled.to(dtype)
    if compiling:  # a graph break would not be resumed within a try
        alpha = gate(given)
    else:
        tracing = torch.jit.is_tracing()  # by torch.jit.trace, which warns of each comparison of sizes
        if not tracing and pooled.shape[0] == 1 and _needs_two_samples(gate):
            raise ValueError(_one_sample(x))
        try:
            alpha = gate(given)
        except (RuntimeError, ValueError) as error:
            if said := _fault(gate, x, given.dtype, error):
                raise ValueError(said) from error
            raise
        if tracing:
            return alpha.to(pooled.dtype)
    if alpha.__class__ is torch.Tensor and alpha.shape == pooled.shape and alpha.dtype is pooled.dtype:
        if alpha.device == pooled.device:
            return alpha
    checks.gate_output(alpha, x)
    return alpha if alpha.dtype == pooled.dtype else alpha.to(pooled.dtype)
