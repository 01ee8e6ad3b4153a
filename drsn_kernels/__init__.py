"""Fused kernels for Deep Residual Shrinkage Networks in PyTorch.

import drsn_kernels as dk
y = dk.shrink(x, gate)              # any gate; abs, pooling, threshold and soft thresholding in two passes
module = dk.Shrinkage(64)           # drop-in for the ports' Shrinkage
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ._version import __version__
from .backends import use_backend
from .batch_norm import BatchNormReLU, FusedSequential
from .convert import convert, revert
from .explain import explain
from .graphs import graphed
from .modules import Shrinkage, SoftThreshold, SqueezeExcite, record_tau

# From the operators' own files: a type checker takes `from .ops import shrink` for the file and not for the function.
from .ops.abs_mean import abs_mean
from .ops.batch_norm_relu import batch_norm_relu
from .ops.shrink import shrink
from .ops.soft_threshold import soft_threshold
from .ops.squeeze_excite import squeeze_excite

if TYPE_CHECKING:
    from . import data, models, noise, train

__all__ = [
    "BatchNormReLU",
    "FusedSequential",
    "Shrinkage",
    "SoftThreshold",
    "SqueezeExcite",
    "__version__",
    "abs_mean",
    "batch_norm_relu",
    "convert",
    "data",
    "explain",
    "graphed",
    "models",
    "noise",
    "record_tau",
    "revert",
    "shrink",
    "soft_threshold",
    "squeeze_excite",
    "train",
    "use_backend",
]

_LAZY = ("data", "models", "noise", "train")  # imported by their first use


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
