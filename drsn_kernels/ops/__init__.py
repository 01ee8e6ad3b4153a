"""The operators, one file each: formula, autograd.Function with its hand-written backward, public function.

shrink has its two autograd forms in files of their own: gated_shrink.py, called_shrink.py.
"""

from . import library  # noqa: F401  registers torch.ops.drsn_kernels
from .abs_mean import abs_mean
from .batch_norm_relu import batch_norm_relu
from .shrink import shrink
from .soft_threshold import soft_threshold
from .squeeze_excite import squeeze_excite

__all__ = ["abs_mean", "batch_norm_relu", "shrink", "soft_threshold", "squeeze_excite"]
