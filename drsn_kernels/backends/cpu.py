"""The `cpu` backend: the C++ kernels of csrc/cpu through raw pointers, any strides, torch's own thread pool."""

import ctypes
import math
import os
import sys

import torch

from .. import traffic
from ..gates import Kept, StandardGate
from ..planes import Geometry, order
from ..reference import SOFT, Rule
from ..traffic import Budget, Plan, StandardCall
from .addresses import address, addresses, state_addresses
from .cpu_plan import standard_plan

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


def _cache_limit() -> int:
    """Bytes of freed outputs to keep: DRSN_CACHE_MIB, or 512 MiB, at most a sixteenth of the memory."""
    given = os.environ.get("DRSN_CACHE_MIB")
    if given is not None:
        if not given.isdecimal():
            raise ValueError(f"the environment variable DRSN_CACHE_MIB takes a whole number of MiB, got {given!r}")
        return min(int(given) << 20, sys.maxsize)
    if _cpu is None:
        return 0
    return min(512 << 20, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16)


_CACHE_BYTES = _cache_limit()
if _cpu is not None:
    _cpu.set_parallel_for(_torch_parallel_for())
    _cpu.set_cache_limit(_CACHE_BYTES)


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


# From these sizes to _CACHE_BYTES tensors take memory that is kept when they are freed (arena.h): outputs, and planes,
# averages and the gate's gradients. malloc may map blocks from 128 KiB on anew each time.
_OUTPUT_BYTES, _INNER_BYTES = 2 << 20, 128 << 10
_ARENA_DTYPES = _DTYPES | {torch.int32: 4}


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, kept_from: int) -> torch.Tensor:
    if kept_from <= math.prod(shape) * dtype.itemsize <= _CACHE_BYTES:
        return torch.from_dlpack(_cpu.empty(_ARENA_DTYPES[dtype], shape, strides))
    return torch.empty_strided(shape, strides, dtype=dtype, device=_CPU)


def _output(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return _empty(shape, strides, dtype, _OUTPUT_BYTES)


def _inner(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return _empty(shape, strides, dtype, _INNER_BYTES)


def empty_cache() -> None:
    """Give the memory of freed outputs back to the system (the environment variable DRSN_CACHE_MIB limits it)."""
    _cpu.set_cache_limit(0)
    _cpu.set_cache_limit(_CACHE_BYTES)


# torch.empty_strided parses its arguments in 0.8 us, torch.empty in 1.3 us (2.1 us with a torch.Size)
def _pooled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    n, c = shape[0], shape[1]
    return _inner((n, c), (c, 1), torch.float64 if dtype == torch.float64 else torch.float32)


def _planes(planes: int, words: int) -> torch.Tensor:
    return _inner((planes, words), (words, 1), torch.int32)


def reduce(x: torch.Tensor, geo: Geometry, planes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, dense = geo
    out = _pooled(shape, x.dtype)
    bits, sign, nonzero = None, 0, 0
    if planes:
        count = _cpu.plane_words(shape, dense)
        bits = _planes(2, count)
        sign = bits.data_ptr()
        nonzero = sign + 4 * count
    _cpu.reduce(_DTYPES[x.dtype], shape, dense, address(x), x.stride(), out.data_ptr(), sign, nonzero)
    return out, bits


def apply(
    x: torch.Tensor,
    geo: Geometry,
    tau: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    planes: int,
    rule: Rule = SOFT,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, dense = geo
    strides = x.stride()
    if out is None:
        # not empty_like(x): x may be a view whose dimensions of size 1 have other strides than geo's
        y, y_strides = _output(shape, dense, x.dtype), dense
    else:
        y, y_strides = out, out.stride()
    bits, kept, sign = None, 0, 0
    if planes:
        count = _cpu.plane_words(shape, dense)
        bits = _planes(planes, count)
        kept = bits.data_ptr()
        sign = kept + 4 * count if planes == 2 else 0
    added, added_strides = (0, dense) if residual is None else (address(residual), residual.stride())
    _cpu.apply(
        _DTYPES[x.dtype], shape, dense, address(x), strides, y.data_ptr(), y_strides,
        address(tau), tau.shape, tau.stride(), added, added_strides, kept, sign, *rule,
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
    rule: Rule = SOFT,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    shape, dense = geo
    dx = _output(shape, dense, dtype) if want_dx else None
    dtau = _pooled(shape, dtype) if want_dtau else None
    if pooled_grad is not None:
        pooled_grad = pooled_grad.contiguous()  # (N, C)-sized
    _cpu.grad(
        _DTYPES[dtype], shape, dense,
        address(g), dense if g is None else g.stride(), address(pooled_grad),
        0 if dx is None else dx.data_ptr(), 0 if dtau is None else dtau.data_ptr(),
        address(kept), address(sign), address(nonzero), *rule,
    )  # fmt: skip
    return dx, dtau


# ---- squeeze_excite --------------------------------------------------------------------------------------------------


def mean(x: torch.Tensor, geo: Geometry) -> torch.Tensor:
    out = _pooled(geo[0], x.dtype)
    _cpu.mean(_DTYPES[x.dtype], *geo, address(x), x.stride(), out.data_ptr())
    return out


def scale(x: torch.Tensor, geo: Geometry, s: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return _scaled(x, geo, x.dtype, s, residual, None)


def scale_sums(geo: Geometry, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    ds = _pooled(geo[0], x.dtype)
    _cpu.scale_sums(_DTYPES[x.dtype], *geo, address(g), g.stride(), address(x), x.stride(), ds.data_ptr())
    return ds


def scale_grad(
    geo: Geometry, dtype: torch.dtype, g: torch.Tensor, s: torch.Tensor, mean_grad: torch.Tensor | None
) -> torch.Tensor:
    return _scaled(g, geo, dtype, s, None, None if mean_grad is None else mean_grad.contiguous())


def _scaled(x, geo, dtype, s, residual, shift) -> torch.Tensor:
    """x * s + residual, or x * s + shift / L."""
    y = _output(*geo, dtype)
    strides = tuple([0 if size == 1 else stride for size, stride in zip(s.shape, s.stride(), strict=True)])
    added, added_strides = (0, geo[1]) if residual is None else (address(residual), residual.stride())
    _cpu.scale(
        _DTYPES[dtype], *geo, address(x), x.stride(), y.data_ptr(), address(s), strides, added, added_strides,
        address(shift),
    )  # fmt: skip
    return y


# ---- the standard gate, computed together with the step (gates.py) ---------------------------------------------------

_AVERAGES = {"channel": 0, "sample": 1, None: 2}  # Average in csrc/cpu/api.h


# Beyond this many products torch's own matrix products win back what fusing saves. Time of the called gate over that of
# the fused one, a training step. AVX-512: (128, 512, 16) 1.14, (128, 1024, 16) 1.05, (512, 1024, 4) 0.91,
# (128, 2048, 4) 0.85. AVX2: (128, 256, 16) 1.04, (512, 256, 16) 0.94, (128, 512, 16) 0.86.
# Portable: (128, 64, 32) 1.01, (128, 128, 16) 0.91, (128, 512, 16) 0.70.
_MOST_PRODUCTS = {"avx512": 1 << 29, "avx2": 1 << 24, "portable": 1 << 20}


def standard_unsupported(x: torch.Tensor, parts: StandardGate) -> str | None:
    outputs, hidden = parts.w2.shape
    products, most = x.shape[0] * hidden * (x.shape[1] + outputs), _MOST_PRODUCTS[_cpu.isa()]
    if products > most:
        return f"{products} products in the gate: beyond {most} torch's matrix products are faster"
    return None


def standard_forward(
    x: torch.Tensor,
    geo: Geometry,
    parts: StandardGate,
    average: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    keep: bool,
    want_tau: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Kept]:
    shape, dense = geo
    dtype = x.dtype
    n, c = shape[0], shape[1]
    outputs, hidden = parts.w2.shape
    if out is None:
        y, y_strides = _output(shape, dense, dtype), dense
    else:
        y, y_strides = out, out.stride()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    bits = _planes(3, _cpu.plane_words(shape, dense)) if keep else None
    pooled, tau = _pooled(shape, dtype), None
    if want_tau:
        columns = 1 if outputs == 1 and average != "channel" else c
        tau = torch.empty_strided((n, columns), (columns, 1), dtype=acc, device=_CPU)
    # u, alpha and the statistics in one tensor: three allocations and a split less, 5 us of a call
    size = n * (hidden + outputs) + (2 * hidden if parts.batch_stats else 0)
    state = _inner((size,), (1,), acc)
    mean, var = (None, None) if parts.batch_stats else (parts.mean, parts.var)
    kept = Kept(bits, pooled, state, None, mean, var)
    added, added_strides = (0, dense) if residual is None else (address(residual), residual.stride())
    _cpu.standard_forward(
        _DTYPES[dtype], shape, dense, address(x), x.stride(), y.data_ptr(), y_strides, added, added_strides,
        0 if bits is None else bits.data_ptr(), 0 if tau is None else tau.data_ptr(), _AVERAGES[average],
        hidden, outputs, parts.batch_stats, parts.eps, parts.momentum, addresses(*parts[:9]),
        state_addresses(kept, n, hidden, outputs), standard_plan(geo, dtype, hidden, outputs, parts.batch_stats).block,
    )  # fmt: skip
    return y, tau, kept


def standard_backward(
    geo: Geometry,
    dtype: torch.dtype,
    parts: StandardGate,
    average: str | None,
    kept: Kept,
    g: torch.Tensor,
    tau_grad: torch.Tensor | None,
    want: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """dx, and the gradients of w1, b1, gamma, beta, w2, b2; those that are wanted."""
    shape, dense = geo
    outputs, hidden = parts.w2.shape
    dx = _output(shape, dense, dtype) if want[0] else None
    grads = [_inner(p.shape, p.stride(), p.dtype) if p is not None and wanted else None
             for p, wanted in zip(parts[:6], want[1:], strict=True)]  # fmt: skip
    if tau_grad is not None:
        tau_grad = tau_grad.contiguous()
    _cpu.standard_backward(
        _DTYPES[dtype], shape, dense, address(g), g.stride(), 0 if dx is None else dx.data_ptr(),
        kept.bits.data_ptr(), address(tau_grad), _AVERAGES[average], hidden, outputs,
        parts.batch_stats, parts.eps, addresses(*parts[:9]),
        state_addresses(kept, shape[0], hidden, outputs), addresses(*grads),
    )  # fmt: skip
    return dx, *grads


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


# ---- budgets and plans (traffic.py, explain.py): bytes of tensors; what the extension allocates for the gate is not in


def reduce_budget(geo, strides, dtype, device, planes):
    return traffic.reduce(geo, dtype, planes, "reduce")


def apply_budget(geo, strides, dtype, device, tau, residual, planes, rule=SOFT):
    size = tau[0] * tau[1] * traffic.accumulate_dtype(dtype).itemsize
    return traffic.apply(geo, dtype, size, residual, planes, "apply")


def grad_budget(geo, strides, dtype, device, masked, pooled, dx, dtau, rule=SOFT):
    return traffic.grad(geo, dtype, masked, pooled, dx, dtau, "grad")


def squeeze_excite_budgets(geo, strides, dtype, device, s, residual, pooled):
    factors, sums = traffic.sums_bytes(geo, dtype, s[1]), traffic.sums_bytes(geo, dtype)
    return (
        traffic.reduce(geo, dtype, False, "mean"),
        traffic.apply(geo, dtype, factors, residual, 0, "scale"),
        traffic.products(geo, dtype, "scale_sums"),
        traffic.apply(geo, dtype, factors + pooled * sums, False, 0, "scale"),
    )


def standard_budgets(call: StandardCall) -> tuple[Budget, Budget]:
    """Forward and backward. A block of samples that has been pooled is shrunk from cache."""
    block = standard_plan(call.geometry, call.dtype, call.hidden, call.outputs, call.coupled).block
    reads = 1 if block else 2
    gate = call.sums() + call.sums(call.hidden) + call.sums(call.outputs)
    statistics = call.statistics if call.coupled else 0
    made = gate + (call.tau if call.want_tau else 0) + statistics
    forward = Budget(
        (reads + call.residual) * call.full + call.first_layer + call.second_layer + call.norm_read,
        call.full + (3 * call.plane if call.keep else 0) + made + statistics,
        ("standard_forward",),
        0 if call.keep else gate + statistics,
        call.saved,
    )
    if not call.keep:
        return forward, Budget()
    back = traffic.grad(call.geometry, call.dtype, True, False, False, True, "standard_backward")
    if call.want_dx:
        back += traffic.grad(call.geometry, call.dtype, True, True, True, False, "")
    weights = gate + call.first_layer + call.second_layer + call.norm_read
    read, written = back.read + weights, back.written + call.parameter_grads
    return forward, Budget(read, written, ("standard_backward",))


def plan(op, geo, strides, dtype, device, gate, planes):
    where = "C is innermost" if order(geo).channels_last else "the spatial dimensions are innermost"
    not_taken = () if traffic.is_dense(geo, strides[0]) else (("contiguous runs", _STAGED),)
    if isinstance(gate, StandardCall):
        taken = standard_plan(geo, dtype, gate.hidden, gate.outputs, gate.coupled)
        if taken.block:
            return Plan(taken.name, taken.why, not_taken)
        return Plan(taken.name, "each stage takes the whole batch", (*not_taken, ("blocks", taken.why)))
    if gate is not None:
        not_taken += (("gate fused", gate),)
    return Plan("passes over x", where, not_taken)


_STAGED = "x is not dense: its elements are gathered, 512 at a time, into a buffer"
