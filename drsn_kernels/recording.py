"""Who is told of every operator call (explain.py), or nobody. All that an eager call pays is `active is None`.

It is read once a call: another thread's explain may end at any moment.
"""

from collections.abc import Callable

import torch

active: Callable | None = None


def elsewhere(op: str, x: torch.Tensor, why: str | None, **about: object) -> None:
    """Tell of a call that no kernel takes eagerly. Nothing may be told from within a graph that torch.compile makes."""
    told = active
    if told is not None and not torch.compiler.is_dynamo_compiling():
        told(op, x, None, why=why, **about)
