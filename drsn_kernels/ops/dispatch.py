"""Which way a call goes.

* The eager way: a backend's kernels behind an autograd.Function that keeps bit planes. For plain tensors when nothing
  watches or transforms the call. This is the fast path: no dispatcher round trip (benchmarks/overhead.py).
* The reference: ordinary aten operations, for everything else. It is right under torch.func, forward-mode AD, export,
  tensor subclasses (FakeTensor, DTensor) and dispatch modes, none of which can see into a raw pointer; under
  torch.compile it fuses with what surrounds it.
* The registered ops (`library.py`): under torch.compile where a backend is forced or IN_GRAPHS says so; opaque to the
  compiler, but they save bit planes instead of x.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from .. import backends

try:  # private names of torch; where one is gone, every call takes the reference, which is slower and always right
    _transforms_active = torch._C._are_functorch_transforms_active
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor  # autograd.grad(is_grads_batched=True)
    _jit_tracing = torch._C._get_tracing_state  # torch.jit.trace
    current_backward = torch._C._current_graph_task_id  # a number for each running backward pass
    will_run = torch._C._will_engine_execute_node  # whether this backward pass will come to a node
    _top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
    forward_ad._current_level  # noqa: B018
    _CAN_TELL = True
except AttributeError:
    _CAN_TELL = False
    current_backward = will_run = _top_hooks = None
    backends.log.warning("this torch does not tell whether a transform is active: running in pure PyTorch")

# Whether the backward pass that runs keeps its graph (retain_graph); where torch cannot tell, it may.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_CAN_TELL_EXPORT = hasattr(torch.compiler, "is_exporting")  # torch 2.7; before it a traced call is always the reference
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def not_eager(*tensors: torch.Tensor | None) -> str | None:
    """None if raw pointers of these tensors may be used: nothing traces, transforms or watches this call. Else why."""
    if torch.compiler.is_compiling():
        return _EXPORTED if _CAN_TELL_EXPORT and torch.compiler.is_exporting() else _COMPILED
    if not _CAN_TELL:
        return "this torch does not tell whether a transform is active"
    if _transforms_active():
        return "a torch.func transform (grad, vmap, jvp, ...) is active"
    if _dispatch_modes():
        return "a dispatch mode (FakeTensorMode, a FLOP counter, ...) watches every operation"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if _jit_tracing() is not None:
        return "torch.jit.trace records this call"
    for t in tensors:
        if t is not None:
            if type(t) not in _PLAIN:
                return f"a {type(t).__name__} is a tensor subclass"
            # x.imag of a conjugate carries a lazy minus that a raw pointer does not see
            if t.is_neg():
                return "a tensor carries a minus that is not yet computed (is_neg)"
    return None


_COMPILED = "torch.compile traces this call"
_EXPORTED = "torch.export records this call, and its graph holds aten operations only"


def is_eager_grad(*gradients: torch.Tensor | None) -> bool:
    """The same in a backward pass: not recorded for a higher derivative, not of the legacy vmap, and with memory."""
    if torch.is_grad_enabled() or not_eager(*gradients) is not None:
        return False
    for g in gradients:
        if g is not None and (_is_legacy_batched(g) or g._is_zerotensor()):
            return False
    return True


def is_plain_grad(g: torch.Tensor) -> bool:
    """The same of one more gradient, in a backward pass that has been found eager."""
    return type(g) in _PLAIN and not g.is_neg() and not _is_legacy_batched(g) and not g._is_zerotensor()


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """function.apply less the part in which torch looks for functorch transforms: not_eager has looked already."""
    return super(torch.autograd.Function, function).apply


def as_saved(*tensors: torch.Tensor | None) -> tuple | None:
    """What hooks are to give back for tensors that are now to be saved, for `restored`; None where there are no hooks:
    checkpointing, save_on_cpu, a user's."""
    if _top_hooks(False) is None:
        return None
    return tuple(None if t is None else (t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors)


def restored(ctx) -> tuple[torch.Tensor | None, ...]:
    """ctx.saved_tensors, of ctx.as_saved, typed as they were, and contiguous where they were.

    Kernels go by the dtype of the forward pass, and of all but x by its strides; a hook may give back what it likes.
    Not seen are hooks on one saved tensor of a node, registered through grad_fn._raw_saved_tensors.
    """
    if ctx.as_saved is None:
        return ctx.saved_tensors
    return tuple(_restored(t, how) for t, how in zip(ctx.saved_tensors, ctx.as_saved, strict=True))


def _restored(t: torch.Tensor | None, how: tuple | None) -> torch.Tensor | None:
    if t is None or how is None:
        return None
    shape, dtype, device, contiguous = how
    if t.shape != shape or (t.device.type, t.device.index or 0) != (device.type, device.index or 0):
        raise RuntimeError(
            f"a hook on saved tensors gave back {tuple(t.shape)} on {t.device} for {tuple(shape)} on {device}"
        )
    found = t.resolve_neg().to(dtype)
    if contiguous:
        found = found.contiguous()
    # Where nothing is recorded the copy has lost it, and whoever differentiates by ordinary PyTorch asks for it.
    return found if found.requires_grad == t.requires_grad else found.requires_grad_(t.requires_grad)


def overwritten(t: torch.Tensor) -> None:
    """Whoever saved it for a backward pass is told, as by any in-place operation.

    Of running statistics nobody is told, as by torch's batch_norm: a graph in which that was called too has saved them.
    """
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)


# ---- inside torch.compile --------------------------------------------------------------------------------------------

DECOMPOSED, OPAQUE = "decomposed", "opaque ops"
_NOT_TIMED = "opaque was not timed"
_ON_CUDA = f"{_NOT_TIMED}; compiled, a unit took 0.64 and 0.75 of our eager one's time on an H200"

# What a compiled call becomes, by device, dtype (None: any other) and mode, and why; docs/inside/architecture.md
# has the stored rows. The compiler's own code stays until a row shows that the ops are faster; a line is switched by
# its first word.
IN_GRAPHS: dict[tuple[str, torch.dtype | None, str], tuple[str, str]] = {
    ("cpu", torch.float32, "training"): (DECOMPOSED, "opaque took 1.5 of its time on 1 MiB, 1.0 to 1.6 on 8 to 25"),
    ("cpu", torch.float32, "inference"): (DECOMPOSED, _NOT_TIMED),
    ("cpu", None, "training"): (DECOMPOSED, _NOT_TIMED),
    ("cpu", None, "inference"): (DECOMPOSED, _NOT_TIMED),
    ("cuda", None, "training"): (DECOMPOSED, _ON_CUDA),
    ("cuda", None, "inference"): (DECOMPOSED, _NOT_TIMED),
}


def in_graph(x: torch.Tensor, rows: bool = True) -> tuple[str, str]:
    """DECOMPOSED or OPAQUE, for a call on x that torch.compile traces, and why. rows: thresholds are (N | 1, C | 1)."""
    form, why = _preferred(x)
    if form == OPAQUE and (obstacle := _no_ops(x, rows)):
        return DECOMPOSED, obstacle
    return form, why


def _preferred(x: torch.Tensor) -> tuple[str, str]:
    forced, device = backends.choice.backend, x.device.type
    if forced == "auto":
        mode = "training" if torch.is_grad_enabled() else "inference"
        row = IN_GRAPHS.get((device, x.dtype, mode)) or IN_GRAPHS.get((device, None, mode))
        return row or (DECOMPOSED, "no kernels for this device")
    if (forced == "cpu" and x.is_cpu) or (forced == "triton" and not x.is_meta):
        return OPAQUE, "a backend is forced"
    return DECOMPOSED, "the backend that is forced has no kernels for it"


def _no_ops(x: torch.Tensor, rows: bool) -> str:
    """Why the ops cannot take a call, or ""."""
    if not _CAN_TELL_EXPORT:
        return "before torch 2.7 a compiled call is not told from an exported one"
    if type(x) not in _PLAIN:
        return "x is a tensor subclass"
    if not rows:
        return "they take one threshold for each plane of x (N, C, *spatial)"
    if not _CAN_TELL or _transforms_active() or forward_ad._current_level >= 0:
        return "they cannot see into a tensor under torch.func or forward-mode AD"
    return ""


def use_registered_ops(x: torch.Tensor, rows: bool = True) -> bool:
    """Under torch.compile, call the opaque ops. Never in an exported graph."""
    if not torch.compiler.is_compiling() or in_graph(x, rows)[0] != OPAQUE:
        return False
    return not torch.compiler.is_exporting()
