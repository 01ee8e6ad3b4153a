"""The `cpu` backend: the C++ kernels of csrc/cpu through raw pointers, any strides, torch's own thread pool."""

import ctypes
import os

import torch

from ..planes import Geometry

name = "cpu"
_CPU = torch.device("cpu")  # outputs go there whatever torch.set_default_device says
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
        if os.path.exists(os.path.join(os.path.dirname(__file__), "..", "..", "setup.py")):
            MISSING = (
                "this is the source tree, where nothing is compiled; run from another folder, or `pip install -e .`"
            )
    if MISSING is None:
        MISSING = f"the compiled extension drsn_kernels._cpu does not load ({error}); install with `pip install .`"


def _torch_parallel_for() -> int:
    """Address of torch_parallel_for in libtorch_cpu, in its stable C ABI since torch 2.10; 0 where it is absent."""
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


if _cpu is not None:
    _cpu.set_parallel_for(_torch_parallel_for())
    _cpu.set_huge_pages(os.environ.get("DRSN_HUGE_PAGES", "1") != "0")


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


# torch.empty_strided parses its arguments in 0.8 us, torch.empty in 1.3 us (2.1 us with a torch.Size)
def _pooled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    n, c = shape[0], shape[1]
    return torch.empty_strided(
        (n, c), (c, 1), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=_CPU
    )


def _planes(planes: int, words: int) -> torch.Tensor:
    return torch.empty_strided((planes, words), (words, 1), dtype=torch.int32, device=_CPU)


def reduce(x: torch.Tensor, geo: Geometry, planes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, dense = geo
    out = _pooled(shape, x.dtype)
    bits, sign, nonzero = None, 0, 0
    if planes:
        count = _cpu.plane_words(shape, dense)
        bits = _planes(2, count)
        sign = bits.data_ptr()
        nonzero = sign + 4 * count
    _cpu.reduce(_DTYPES[x.dtype], shape, dense, x.data_ptr(), x.stride(), out.data_ptr(), sign, nonzero)
    return out, bits


def apply(
    x: torch.Tensor,
    geo: Geometry,
    tau: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    planes: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, dense = geo
    strides = x.stride()
    if out is None:
        # not empty_like(x): x may be a view whose dimensions of size 1 have other strides than geo's
        y, y_strides = torch.empty_strided(shape, dense, dtype=x.dtype, device=_CPU), dense
    else:
        y, y_strides = out, out.stride()
    bits, kept, sign = None, 0, 0
    if planes:
        count = _cpu.plane_words(shape, dense)
        bits = _planes(planes, count)
        kept = bits.data_ptr()
        sign = kept + 4 * count if planes == 2 else 0
    added, added_strides = (0, dense) if residual is None else (residual.data_ptr(), residual.stride())
    _cpu.apply(
        _DTYPES[x.dtype], shape, dense, x.data_ptr(), strides, y.data_ptr(), y_strides,
        tau.data_ptr(), tau.shape, tau.stride(), added, added_strides, kept, sign,
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
    dx = torch.empty_strided(shape, dense, dtype=dtype, device=_CPU) if want_dx else None
    dtau = _pooled(shape, dtype) if want_dtau else None
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


def describe() -> str:
    """One line for `python -m drsn_kernels info`."""
    if _cpu is None:
        return f"not available: {MISSING}"
    threads = (
        "torch's thread pool"
        if _cpu.has_parallel_for()
        else "one thread, because torch before 2.10 does not offer its thread pool; a newer torch does"
    )
    return f"available: {_cpu.isa()} (of {', '.join(_cpu.available_isas())}), {threads}"
