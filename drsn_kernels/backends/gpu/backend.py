"""The `triton` backend: the GPU kernels of drsn_kernels/triton. Triton is imported at the first call, not before."""

import functools
import importlib.util
import os
import sys

import torch

from ..reference import SOFT, accumulate_dtype

name = "triton"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
_OLDEST = 8  # compute capability: bfloat16 and 166 KB of shared memory; older GPUs run in pure PyTorch
_OLDEST_TRITON = (3, 5)  # of torch 2.9: the oldest that the kernels were compiled with; 3.2 launches in another way


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors, one program after another: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    """Why there is no Triton to run with, or None. Imports it."""
    if not INSTALLED:
        return "triton is not installed; `pip install 'drsn_kernels[triton]'`"
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
    """Whether a driver without a device is active, which compiles launches on CPU tensors and runs none (tests)."""
    module = sys.modules.get("triton.runtime.driver")
    return module is not None and getattr(module.driver._active, "lowers_only", False)


def unsupported(x: torch.Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, the triton kernels take float32, float64, bfloat16 and float16"
    if x.is_cuda:
        return _missing() or _too_old(x.device)
    if not INSTALLED:
        return _missing()
    if x.is_cpu and (interpreting() or _lowering()):
        return _missing()
    return f"x is on {x.device}, the triton kernels take CUDA tensors (CPU tensors under TRITON_INTERPRET=1)"


def reduce(x, geo, planes):
    from ..triton.reduce import reduce as run

    return run(x, geo, planes)


def apply(x, geo, tau, residual, out, planes, rule=SOFT):
    from ..triton.apply import apply as run

    return run(x, geo, tau, residual, out, planes, rule)


def grad(geo, dtype, g, kept, sign, nonzero=None, pooled_grad=None, want_dx=True, want_dtau=False, rule=SOFT):
    from ..triton.grad import grad as run

    return run(geo, dtype, g, kept, sign, nonzero, pooled_grad, want_dx, want_dtau, rule)


# ---- squeeze_excite ----


def mean(x, geo):
    from ..triton.reduce import mean as run

    return run(x, geo)


def scale(x, geo, s, residual):
    from ..triton.apply import scale as run

    return run(x, geo, s, residual)


def scale_sums(geo, g, x):
    from ..triton.reduce import scale_sums as run

    return run(geo, g, x)


def scale_grad(geo, dtype, g, s, mean_grad):
    from ..triton.apply import scale_grad as run

    return run(geo, dtype, g, s, mean_grad)


# ---- the standard gate, computed together with the step (gates.py) ----


def standard_unsupported(x, parts):
    from ..triton.standard import unsupported as run

    return run(x, parts)


def standard_forward(x, geo, parts, average, residual, out, keep, want_tau):
    from ..triton.standard import forward as run

    return run(x, geo, parts, average, residual, out, keep, want_tau)


def standard_backward(geo, dtype, parts, average, kept, g, tau_grad, want):
    from ..triton.standard import backward as run

    return run(geo, dtype, parts, average, kept, g, tau_grad, want[0])


# ---- budgets and plans (traffic.py, explain.py) ----


def reduce_budget(geo, strides, dtype, device, planes):
    from ..triton.reduce import budget

    return budget(geo, strides, dtype, device, planes)


def apply_budget(geo, strides, dtype, device, tau, residual, planes, rule=SOFT):
    from ..triton.apply import budget

    return budget(geo, dtype, tau[0] * tau[1] * accumulate_dtype(dtype).itemsize, residual, planes)


def grad_budget(geo, strides, dtype, device, masked, pooled, dx, dtau, rule=SOFT):
    from ..triton.grad import budget

    return budget(geo, strides, dtype, device, masked, pooled, dx, dtau)


def squeeze_excite_budgets(geo, strides, dtype, device, s, residual, pooled):
    from ..triton.apply import budget
    from ..triton.reduce import products_budget

    n, c = geo[0][:2]
    return (
        reduce_budget(geo, strides, dtype, device, False),
        apply_budget(geo, strides, dtype, device, s, residual, 0),
        products_budget(geo, (geo[1], strides), dtype, device),
        budget(geo, dtype, n * (s[1] + pooled * c) * accumulate_dtype(dtype).itemsize, False, 0),
    )


def standard_budgets(call):
    from ..triton.standard import budgets

    return budgets(call)


def plan(op, geo, strides, dtype, device, gate, planes):
    from ..triton.explained import plan as run

    return run(op, geo, strides, dtype, device, gate, planes)


def describe() -> str:
    """One line for `python -m drsn_kernels info`."""
    missing = _missing()
    if missing is not None:
        return f"not available: {missing}"
    import triton

    if torch.cuda.is_available():
        return f"available: Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    if interpreting():
        return f"available: Triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET=1)"
    return f"not available: Triton {triton.__version__} is installed, but there is no CUDA device"
