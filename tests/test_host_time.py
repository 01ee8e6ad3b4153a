"""What a call costs the host, in counts that do not depend on the machine: benchmarks/launches.py has the times.

Counted are what Python's profiler sees from within drsn_kernels: calls of functions written in Python, fresh tensors,
and calls of the extension. Upper bounds: who adds a call to the way that every call takes, sees it here.
"""

import collections
import os
import sys

import pytest
import torch

import drsn_kernels as dk
from drsn_kernels.backends import cpu

PACKAGE = os.path.dirname(dk.__file__)
FRESH = ("empty", "empty_strided", "empty_like", "new_empty", "zeros", "clone", "detach")
EXTENSION = ("Walk.reduce", "Walk.map", "Walk.grad", "Walk.norm", "Walk.norm_grad", "Gate.forward", "Gate.backward")


def counts(step) -> dict[str, int]:
    """Of one warm call."""
    found = collections.Counter()

    def watch(frame, event, argument):
        if frame.f_code.co_filename.startswith(PACKAGE):
            if event == "call":
                found["python"] += 1
            elif event == "c_call":
                name = argument.__name__
                found["fresh"] += name in FRESH
                found["extension"] += argument.__qualname__ in EXTENSION

    for _ in range(3):
        step()
    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return dict(found)


X, TAU, G = torch.randn(4, 8, 16), torch.rand(4, 8), torch.randn(4, 8, 16)
LEAF = X.clone().requires_grad_()
EVALUATED, TRAINED, IDENTITY = dk.Shrinkage(8).eval(), dk.Shrinkage(8), torch.nn.Identity()
INPUTS = (LEAF, *TRAINED.parameters())
NORM = dk.BatchNormReLU(8)
NORMED = (LEAF, *NORM.parameters())
# Python calls, fresh tensors and extension calls of a warm call, as on Python 3.11; later ones inline some.
STEPS = {
    "abs_mean": (lambda: dk.abs_mean(X), 9, 1, 1),
    "soft_threshold": (lambda: dk.soft_threshold(X, TAU), 14, 1, 1),
    "soft_threshold, step": (lambda: torch.autograd.grad(dk.soft_threshold(LEAF, TAU), LEAF, G), 27, 3, 2),
    "Shrinkage, eval": (torch.no_grad()(lambda: EVALUATED(X)), 10, 1, 1),
    "Shrinkage, step": (lambda: torch.autograd.grad(TRAINED(LEAF), INPUTS, G), 21, 10, 2),
    "BatchNormReLU, step": (lambda: torch.autograd.grad(NORM(LEAF), NORMED, G), 27, 4, 2),
    "shrink with a called gate, step": (lambda: torch.autograd.grad(dk.shrink(LEAF, IDENTITY), LEAF, G), 28, 5, 4),
}


@pytest.mark.skipif(cpu._cpu is None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("name", STEPS)
def test_a_warm_call_takes_no_more_than(name):
    step, python, fresh, extension = STEPS[name]
    with dk.use_backend("cpu", strict=True):
        found = counts(step)
    assert found["extension"] == extension
    assert found["fresh"] <= fresh and found["python"] <= python, found
