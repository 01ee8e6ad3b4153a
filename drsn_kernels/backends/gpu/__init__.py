"""The `triton` backend: whether there are kernels for a tensor here. Triton is imported at the first call, not before.

backend.py   the class `Gpu`, which the operators call
stream.py    the kernels that read x or g: reduce, map and grad. They know no gate
gate.py, gate_grad.py, linear_grad.py   the standard gate's own kernels, forward and backward, on product.py's tiles
whole_gate.py  its forward by one launch, where it is small and statistics are given
one_pass.py  step and standard gate in one launch
gate_passes.py   which launches the gate takes
sequence.py  which launches a step with the standard gate takes, in order
norm.py, norm_grad.py   batch normalisation and its activation, forward and backward
norm_passes.py   which launches a pass of it takes, in order

walk.py    how the operands of a call lie in memory     plans.py     tiles and programs, with reasons
tiles.py   what the kernels share: addresses, memory    tuned.py     the numbers that plans depend on, with their rows
bits.py    thresholds and planes by arithmetic on bits  launch.py    passes: arguments by name, compiled kernels
lowering.py  compiling for a GPU that is not there      native.py    a pass launched by one call of csrc/launch
"""

import functools
import importlib.util
import os
import sys

import torch

from ..._extras import installing

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
_OLDEST = 8  # compute capability: bfloat16 and 166 KB of shared memory; older GPUs run in pure PyTorch
_OLDEST_TRITON = (3, 5)  # of torch 2.9: the oldest that the kernels were compiled with; 3.2 launches in another way


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors, one program after another: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str | None:
    """Why there is no Triton to run with, or None. Imports it."""
    if not INSTALLED:
        return f"triton is not installed: {installing('triton')}"
    import triton

    found = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if found < _OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST_TRITON))}, the oldest tested"
    return None


@functools.cache  # asking costs 2 us
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < _OLDEST:
        return f"{torch.cuda.get_device_name(device)} has a compute capability below {_OLDEST}.0"
    return None


def _lowering() -> bool:
    """Whether a driver without a device is active, which compiles launches on CPU tensors and runs none."""
    module = sys.modules.get("triton.runtime.driver")
    return module is not None and getattr(module.driver._active, "lowers_only", False)


def unsupported(x: torch.Tensor) -> str | None:
    """Why there are no kernels for x; None where there are."""
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, the triton kernels take float32, float64, bfloat16 and float16"
    if x.is_cuda:
        return missing() or _too_old(x.device)
    if not INSTALLED:
        return missing()
    if x.is_cpu and (interpreting() or _lowering()):
        return missing()
    return f"x is on {x.device}, the triton kernels take CUDA tensors (CPU tensors under TRITON_INTERPRET=1)"


def describe() -> str:
    """One line for `python -m drsn_kernels info`."""
    reason = missing()
    if reason is not None:
        return f"not available: {reason}"
    import triton

    if torch.cuda.is_available():
        return f"available: Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    if interpreting():
        return f"available: Triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET=1)"
    return f"not available: Triton {triton.__version__} is installed, but there is no CUDA device"
