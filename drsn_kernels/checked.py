"""Calls that have been checked: one like them needs no checks, no choice of a backend and no plan.

All that checks look at is looked at again at every call: shapes, numbers and flags are in the caller's key, and tensors
are compared, in C++, with those that were checked: type, dtype, device, sizes, strides, requires_grad.
"""

from collections.abc import Hashable
from typing import Any

import torch

try:  # private: torch.compile's guard on its inputs. Without it, every call is checked
    from torch._C._dynamo.guards import TensorGuards

    TensorGuards(torch.empty(1), dynamic_dims_sizes=None, dynamic_dims_strides=None)
except (ImportError, TypeError):
    TensorGuards = None

_LIMIT = 4096
calls: dict[Hashable, tuple[Any, "TensorGuards | None"]] = {}


def find(key: Hashable, *tensors: torch.Tensor | None) -> Any:
    """What is known of calls with this key and tensors like these; None if nothing is."""
    entry = calls.get(key)
    if entry is None:
        return None
    known, guard = entry
    return known if guard is None or guard.check(*tensors) else None


def keep(key: Hashable, known: Any, *tensors: torch.Tensor) -> None:
    """For calls with this key and tensors like these, or, without tensors, with this key."""
    guard = None
    if tensors:
        if TensorGuards is None or len({id(t) for t in tensors}) < len(tensors):  # a guard refuses a tensor twice
            return
        guard = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    if len(calls) >= _LIMIT:
        calls.clear()
    calls[key] = known, guard
