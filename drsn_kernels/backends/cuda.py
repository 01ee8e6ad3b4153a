"""The `cuda` backend: kernels of csrc/cuda, compiled ahead of time, called with raw pointers and torch's stream.

Opt-in, by use_backend("cuda") or DRSN_BACKEND=cuda: these kernels have not run on a GPU yet, only compiled for it and
emulated on a CPU (docs/cuda.md).
"""

import functools
from collections.abc import Callable

import torch

from ..gates import Kept, StandardGate
from ..planes import Geometry
from ..reference import SOFT, Rule, accumulate_dtype
from . import cuda_budgets, cuda_plans
from .addresses import address, addresses, state_addresses
from .cuda_plans import Device

name = "cuda"
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/common/args.h
_OLDEST = 80  # compute capability times ten: asynchronous copies on chip
_ASSUMED = Device(90, 132, 227 << 10, 228 << 10)  # planned for where there is no GPU to ask
EMULATED: Device | None = None  # tests put an emulation in _cuda's place, which takes CPU tensors

try:
    from .. import _cuda

    MISSING = None
except ImportError as error:
    _cuda = None
    try:
        from .._build import CUDA_MISSING as MISSING
    except ImportError:
        MISSING = None
    if MISSING is None:
        MISSING = f"the compiled extension drsn_kernels._cuda does not load ({error})"


@functools.cache
def _device(index: int) -> Device:
    return Device(*_cuda.device_properties(index))


def _device_of(device: torch.device) -> Device:
    if device.type == "cuda" and _cuda is not None:
        return _device(device.index)
    return EMULATED or _ASSUMED


@functools.cache
def _unsupported_device(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "this is a ROCm build of torch"
    if _cuda.device_count() == 0:
        return f"no CUDA device that its runtime can use: it needs a driver for CUDA {_cuda.runtime} or later"
    name, found = torch.cuda.get_device_name(device), _device_of(device).capability
    if found < _OLDEST:
        return f"{name} has a compute capability below {_OLDEST / 10}"
    with torch.cuda.device(device):
        missing = _cuda.no_code_for_this_device()
    if missing:
        return f"it was compiled for {_cuda.architectures}, and {name} is {found / 10} ({missing}); reinstall it there"
    return None


def unsupported(x: torch.Tensor) -> str | None:
    if _cuda is None:
        return MISSING
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, the cuda kernels take float32, float64, bfloat16 and float16"
    if x.dim() > 8:
        return f"x has {x.dim()} dimensions, the cuda kernels take at most 8"
    if EMULATED and x.is_cpu:
        return None
    if not x.is_cuda:
        return f"x is on {x.device}, the cuda kernels take CUDA tensors"
    return _unsupported_device(x.device)


def _launch(function: Callable, device: torch.device, *arguments) -> None:
    """Calls a function of the extension on torch's current stream, x's device being the current one."""
    if device.type != "cuda":
        function(0, *arguments)
        return
    stream = torch._C._cuda_getCurrentRawStream(device.index)  # torch.cuda.current_stream() takes 2 us more
    if device.index == torch._C._cuda_getDevice():
        function(stream, *arguments)
        return
    with torch.cuda.device(device):
        function(stream, *arguments)


def _sums(n: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_strided((n, columns), (columns, 1), dtype=accumulate_dtype(dtype), device=device)


def _planes(planes: int, words: int, device: torch.device) -> torch.Tensor:
    return torch.empty_strided((planes, words), (words, 1), dtype=torch.int32, device=device)


def _partial(geo: Geometry, dtype: torch.dtype, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """Blocks that share a row, and memory for their sums if there are several."""
    parts = _row_parts(geo, _device_of(device))
    return parts, _sums(parts * geo[0][0], geo[0][1], dtype, device) if parts > 1 else None


_row_parts = functools.lru_cache(maxsize=4096)(cuda_plans.row_parts)


def reduce(x: torch.Tensor, geo: Geometry, planes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape, dense = geo
    device = x.device
    out = _sums(shape[0], shape[1], x.dtype, device)
    bits, sign, nonzero = None, 0, 0
    if planes:
        words = _cuda.plane_words(shape, dense)
        bits = _planes(2, words, device)
        sign = bits.data_ptr()
        nonzero = sign + 4 * words
    parts, partial = _partial(geo, x.dtype, device)
    _launch(
        _cuda.reduce, device, _DTYPES[x.dtype], shape, dense, x.data_ptr(), x.stride(), out.data_ptr(), sign,
        nonzero, parts,
        address(partial),
    )  # fmt: skip
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
    device = x.device
    y = torch.empty_strided(shape, dense, dtype=x.dtype, device=device) if out is None else out
    bits, kept, sign = None, 0, 0
    if planes:
        words = _cuda.plane_words(shape, dense)
        bits = _planes(planes, words, device)
        kept = bits.data_ptr()
        sign = kept + 4 * words if planes == 2 else 0
    added, added_strides = (0, dense) if residual is None else (residual.data_ptr(), residual.stride())
    _launch(
        _cuda.apply, device, _DTYPES[x.dtype], shape, dense, x.data_ptr(), x.stride(), y.data_ptr(), y.stride(),
        tau.data_ptr(), tau.shape, tau.stride(), added, added_strides, kept, sign,
        *rule,
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
    device = next(t for t in (g, pooled_grad) if t is not None).device
    dx = torch.empty_strided(shape, dense, dtype=dtype, device=device) if want_dx else None
    dtau, parts, partial = None, 1, None
    if want_dtau:
        dtau = _sums(shape[0], shape[1], dtype, device)
        parts, partial = _partial(geo, dtype, device)
    if pooled_grad is not None:
        pooled_grad = pooled_grad.contiguous()  # (N, C)-sized
    _launch(
        _cuda.grad, device, _DTYPES[dtype], shape, dense, address(g), dense if g is None else g.stride(),
        address(pooled_grad), address(dx), address(dtau), address(kept), address(sign), address(nonzero), parts,
        address(partial), *rule,
    )  # fmt: skip
    return dx, dtau


# ---- squeeze_excite --------------------------------------------------------------------------------------------------


def mean(x: torch.Tensor, geo: Geometry) -> torch.Tensor:
    return _summed(geo, x, None)


def scale_sums(geo: Geometry, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _summed(geo, g, x)


def _summed(geo: Geometry, x: torch.Tensor, times: torch.Tensor | None) -> torch.Tensor:
    """mean x, or sum x * times, (N, C)."""
    (n, c, *_), device = geo[0], x.device
    out = _sums(n, c, x.dtype, device)
    parts, partial = _partial(geo, x.dtype, device)
    _launch(
        _cuda.sum, device, _DTYPES[x.dtype], *geo, x.data_ptr(), x.stride(), address(times),
        geo[1] if times is None else times.stride(), out.data_ptr(), parts, address(partial),
    )  # fmt: skip
    return out


def scale(x: torch.Tensor, geo: Geometry, s: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return _scaled(x, geo, x.dtype, s, residual, None)


def scale_grad(
    geo: Geometry, dtype: torch.dtype, g: torch.Tensor, s: torch.Tensor, mean_grad: torch.Tensor | None
) -> torch.Tensor:
    return _scaled(g, geo, dtype, s, None, None if mean_grad is None else mean_grad.contiguous())


def _scaled(x, geo, dtype, s, residual, shift) -> torch.Tensor:
    """x * s + residual, or x * s + shift / L."""
    y = torch.empty_strided(*geo, dtype=dtype, device=x.device)
    strides = tuple([0 if size == 1 else stride for size, stride in zip(s.shape, s.stride(), strict=True)])
    added, added_strides = (0, geo[1]) if residual is None else (residual.data_ptr(), residual.stride())
    _launch(
        _cuda.scale, x.device, _DTYPES[dtype], *geo, x.data_ptr(), x.stride(), y.data_ptr(), s.data_ptr(), strides,
        added, added_strides, address(shift),
    )  # fmt: skip
    return y


# ---- the standard gate, computed together with the step (gates.py) ---------------------------------------------------

_AVERAGES = {"channel": 0, "sample": 1, None: 2}  # Average in csrc/common/args.h


def standard_unsupported(x: torch.Tensor, parts: StandardGate) -> str | None:
    return None if x.numel() else "x has no elements"


def _workspace(size: int, device: torch.device) -> torch.Tensor | None:
    return torch.empty_strided((size,), (1,), dtype=torch.int8, device=device) if size else None


@functools.lru_cache(maxsize=4096)
def _planned(
    geo: Geometry, strides: tuple, dtype: torch.dtype, hidden: int, outputs: int, coupled: bool, device: Device
) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """The plan as the extension takes it, and bytes of workspace: forward, with tau wanted, backward."""
    whole = cuda_plans.is_one_run(geo, *strides) if strides else False
    plan = cuda_plans.standard(geo, dtype, hidden, outputs, coupled, whole, device)
    about = geo, accumulate_dtype(dtype).itemsize, hidden, outputs
    (ahead, back), (less, _) = (cuda_plans.workspace(*about, want_tau, plan) for want_tau in (False, True))
    return plan.numbers, (ahead, less, back)


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
    device, dtype = x.device, x.dtype
    n, c = shape[0], shape[1]
    outputs, hidden = parts.w2.shape
    y = torch.empty_strided(shape, dense, dtype=dtype, device=device) if out is None else out
    strides = (x.stride(), y.stride()) if residual is None else (x.stride(), y.stride(), residual.stride())
    plan, sizes = _planned(geo, strides, dtype, hidden, outputs, parts.batch_stats, _device_of(device))
    bits = _planes(3, _cuda.plane_words(shape, dense), device) if keep else None
    pooled = _sums(n, c, dtype, device)
    tau = _sums(n, 1 if outputs == 1 and average != "channel" else c, dtype, device) if want_tau else None
    # u, alpha and the statistics in one tensor: three allocations less
    size = n * (hidden + outputs) + (2 * hidden if parts.batch_stats else 0)
    state = torch.empty_strided((size,), (1,), dtype=accumulate_dtype(dtype), device=device)
    mean, var = (None, None) if parts.batch_stats else (parts.mean, parts.var)
    kept = Kept(bits, pooled, state, None, mean, var)
    need = sizes[want_tau]
    workspace = _workspace(need, device)
    added, added_strides = (0, dense) if residual is None else (residual.data_ptr(), residual.stride())
    _launch(
        _cuda.standard_forward, device, _DTYPES[dtype], shape, dense, x.data_ptr(), x.stride(), y.data_ptr(),
        y.stride(), added,
        added_strides, address(bits), address(tau), _AVERAGES[average], hidden, outputs, parts.batch_stats, parts.eps,
        parts.momentum, addresses(*parts[:9]), state_addresses(kept, n, hidden, outputs), plan,
        address(workspace), need,
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
    device = g.device
    outputs, hidden = parts.w2.shape
    strides = (g.stride(),) if want[0] else ()  # without dx there is nothing to keep g on chip for
    plan, (*_, need) = _planned(geo, strides, dtype, hidden, outputs, parts.batch_stats, _device_of(device))
    dx = torch.empty_strided(shape, dense, dtype=dtype, device=device) if want[0] else None
    grads = [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=device)
             if p is not None and wanted else None
             for p, wanted in zip(parts[:6], want[1:], strict=True)]  # fmt: skip
    if tau_grad is not None:
        tau_grad = tau_grad.contiguous()
    workspace = _workspace(need, device)
    _launch(
        _cuda.standard_backward, device, _DTYPES[dtype], shape, dense, g.data_ptr(), g.stride(),
        address(dx), kept.bits.data_ptr(),
        address(tau_grad), _AVERAGES[average], hidden, outputs, parts.batch_stats, parts.eps, addresses(*parts[:9]),
        state_addresses(kept, shape[0], hidden, outputs), addresses(*grads), plan,
        address(workspace), need,
    )  # fmt: skip
    return dx, *grads


def describe() -> str:
    """One line for `python -m drsn_kernels info`."""
    if _cuda is None:
        return f"not available: {MISSING}"
    if EMULATED:
        return "available: emulated on the CPU"
    if not torch.cuda.is_available():
        return "not available: no CUDA device"
    reason = _unsupported_device(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        return f"not available: {reason}"
    return f'opt-in by use_backend("cuda"): compiled for {_cuda.architectures}, {torch.cuda.get_device_name()}'


# ---- budgets and plans (traffic.py, explain.py) ----------------------------------------------------------------------


def reduce_budget(geo, strides, dtype, device, planes):
    return cuda_budgets.reduce(geo, dtype, planes, _device_of(device))


def apply_budget(geo, strides, dtype, device, tau, residual, planes, rule=SOFT):
    return cuda_budgets.apply(geo, dtype, tau, residual, planes)


def grad_budget(geo, strides, dtype, device, masked, pooled, dx, dtau, rule=SOFT):
    return cuda_budgets.grad(geo, dtype, masked, pooled, dx, dtau, _device_of(device))


def squeeze_excite_budgets(geo, strides, dtype, device, s, residual, pooled):
    return cuda_budgets.squeeze_excite(geo, dtype, s, residual, pooled, _device_of(device))


def standard_budgets(call):
    return cuda_budgets.standard(call, _device_of(call.device))


def plan(op, geo, strides, dtype, device, gate, planes):
    return cuda_budgets.plan(op, geo, strides, dtype, gate, _device_of(device))
