"""Fused kernels for Deep Residual Shrinkage Networks in PyTorch.

import drsn_kernels as dk
y = dk.shrink(x, gate)              # any gate; abs, pooling, threshold and soft thresholding in two passes
module = dk.Shrinkage(64)           # drop-in for the ports' Shrinkage
"""

from . import models, noise
from ._version import __version__
from .backends import use_backend
from .convert import convert, revert
from .explain import explain
from .graphs import graphed
from .modules import Shrinkage, SoftThreshold, SqueezeExcite, record_tau
from .ops import abs_mean, shrink, soft_threshold, squeeze_excite

__all__ = [
    "Shrinkage",
    "SoftThreshold",
    "SqueezeExcite",
    "__version__",
    "abs_mean",
    "convert",
    "explain",
    "graphed",
    "models",
    "noise",
    "record_tau",
    "revert",
    "shrink",
    "soft_threshold",
    "squeeze_excite",
    "use_backend",
]
