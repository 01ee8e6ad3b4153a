"""Which way a call goes.

* The eager way: a backend's kernels behind an autograd.Function that keeps bit planes. For plain tensors when nothing
  watches or transforms the call. This is the fast path: no dispatcher round trip (benchmarks/overhead.py).
* The reference: ordinary aten operations, for everything else. It is right under torch.func, forward-mode AD, export,
  tensor subclasses (FakeTensor, DTensor) and dispatch modes, none of which can see into a raw pointer; under
  torch.compile it fuses with what surrounds it (not timed against the registered ops yet).
* The registered ops (`library.py`): under torch.compile where a backend is forced; opaque to the compiler, but they
  save bit planes instead of x.
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
    forward_ad._current_level  # noqa: B018
    _CAN_TELL = True
except AttributeError:
    _CAN_TELL = False
    current_backward = will_run = None
    backends.log.warning("this torch does not tell whether a transform is active: running in pure PyTorch")

_CAN_TELL_EXPORT = hasattr(torch.compiler, "is_exporting")  # torch 2.7; before it a traced call is always the reference
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """True if raw pointers of these tensors may be used: nothing traces, transforms or watches this call."""
    if torch.compiler.is_compiling() or not _CAN_TELL:
        return False
    if _transforms_active() or _dispatch_modes() or forward_ad._current_level >= 0 or _jit_tracing() is not None:
        return False
    for t in tensors:
        # x.imag of a conjugate carries a lazy minus that a raw pointer does not see
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return True


def is_eager_grad(*gradients: torch.Tensor | None) -> bool:
    """The same in a backward pass: not recorded for a higher derivative, and not of the legacy vmap."""
    if torch.is_grad_enabled() or not is_eager(*gradients):
        return False
    return not any(g is not None and _is_legacy_batched(g) for g in gradients)


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """function.apply less the part in which torch looks for functorch transforms: is_eager has looked already."""
    return super(torch.autograd.Function, function).apply


def use_registered_ops(x: torch.Tensor) -> bool:
    """Under torch.compile with a forced backend: call the opaque ops. Never in an exported graph."""
    if not torch.compiler.is_compiling() or not (
        (backends.choice.backend == "cpu" and x.is_cpu) or (backends.choice.backend == "triton" and not x.is_meta)
    ):
        return False
    if not _CAN_TELL or _transforms_active() or forward_ad._current_level >= 0:
        return False
    return _CAN_TELL_EXPORT and not torch.compiler.is_exporting()
