"""The `cpu` backend: the C++ kernels of csrc/cpu through raw pointers, any strides, torch's own thread pool."""

import ctypes
import os

import torch

from ..planes import Geometry
from ..reference import accumulate_dtype

name = "cpu"
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/cpu/api.h

try:
    from .. import _cpu

    MISSING: str | None = None
except ImportError as error:  # pure-Python install, or an extension that does not load here
    _cpu = None
    try:
        from .._build import MISSING
    except ImportError:
        MISSING = None
    if MISSING is None:
        MISSING = f"the compiled extension drsn_kernels._cpu does not load ({error}); install with `pip install .`"


def _torch_parallel_for() -> int:
    """Address of torch_parallel_for in libtorch_cpu, part of its stable C ABI since torch 2.10; 0 where it is absent."""
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


if _cpu is not None:
    _cpu.set_parallel_for(_torch_parallel_for())


def unsupported(x: torch.Tensor) -> str | None:
    if x.is_cpu and _cpu is not None and x.dtype in _DTYPES and x.dim() <= 8:
        return None
    if _cpu is None:
        return MISSING
    if not x.is_cpu:
        return f"x is on {x.device}, the cpu kernels take CPU tensors"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, the cpu kernels take float32, float64, bfloat16 and float16"
    return f"x has {x.dim()} dimensions, the cpu kernels take at most 8"


def _dense_strides(x: torch.Tensor) -> tuple[int, ...]:
    return x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


def reduce(x: torch.Tensor, planes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, strides, dense = x.shape, x.stride(), _dense_strides(x)
    out = torch.empty((shape[0], shape[1]), dtype=accumulate_dtype(x.dtype))
    if not planes:
        _cpu.reduce(_DTYPES[x.dtype], shape, dense, x.data_ptr(), strides, out.data_ptr(), 0, 0)
        return out, None
    count = _cpu.plane_words(shape, dense)
    bits = torch.empty((2, count), dtype=torch.int32)
    at = bits.data_ptr()
    _cpu.reduce(_DTYPES[x.dtype], shape, dense, x.data_ptr(), strides, out.data_ptr(), at, at + 4 * count)
    return out, bits


def apply(
    x: torch.Tensor, tau: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor | None, planes: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, strides, dense = x.shape, x.stride(), _dense_strides(x)
    y = torch.empty_like(x) if out is None else out
    rows, columns = tau.shape
    tau_n, tau_c = tau.stride()
    bits, kept, sign = None, 0, 0
    if planes:
        count = _cpu.plane_words(shape, dense)
        bits = torch.empty((planes, count), dtype=torch.int32)
        kept = bits.data_ptr()
        sign = kept + 4 * count if planes == 2 else 0
    added, added_strides = (0, dense) if residual is None else (residual.data_ptr(), residual.stride())
    _cpu.apply(
        _DTYPES[x.dtype], shape, dense, x.data_ptr(), strides, y.data_ptr(), y.stride(),
        tau.data_ptr(), tau_n if rows > 1 else 0, tau_c if columns > 1 else 0, added, added_strides, kept, sign,
    )  # fmt: skip
    return y, bits


def grad(
    geo: Geometry,
    dtype: torch.dtype,
    g: torch.Tensor | None,
    kept: torch.Tensor | None,
    sign: torch.Tensor | None,
    nonzero: torch.Tensor | None = None,
    pooled_grad: torch.Tensor | None = None,
    want_dx: bool = True,
    want_dtau: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    shape, dense = geo
    dx = torch.empty_strided(shape, dense, dtype=dtype) if want_dx else None
    dtau = torch.empty((shape[0], shape[1]), dtype=accumulate_dtype(dtype)) if want_dtau else None
    if pooled_grad is not None:
        pooled_grad = pooled_grad.contiguous()  # (N, C)-sized
    _cpu.grad(
        _DTYPES[dtype], shape, dense,
        0 if g is None else g.data_ptr(), dense if g is None else g.stride(),
        0 if pooled_grad is None else pooled_grad.data_ptr(),
        0 if dx is None else dx.data_ptr(), 0 if dtau is None else dtau.data_ptr(),
        0 if kept is None else kept.data_ptr(), 0 if sign is None else sign.data_ptr(),
        0 if nonzero is None else nonzero.data_ptr(),
    )  # fmt: skip
    return dx, dtau
