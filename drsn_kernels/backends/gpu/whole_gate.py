"""A small standard gate by one launch, where its statistics are given: in eval, and without a norm.

    whole_gate_kernel   A to u, alpha and tau: both products of gate.py, for the samples of a program

Nothing then couples the samples, and up to tuned.WHOLE_GATE channels and units a program has both weights in registers.
"""

import triton.language as tl

from ..step import Cost, Step
from .gate import Sizes, alphas_of, center_and_scale, relu, scaled, standardised, weight_and_bias
from .launch import await_previous, kernel
from .product import across, added_up, held, nothing, product, store_rows, transposed


@kernel(pointers=12, aligned=("partial", "pooled", "state", "tau", "w1", "w2"))
def whole_gate_kernel(
    partial, pooled, state, tau, w1, b1, mean, var, gamma, beta, w2, b2, N, CA, HA, parts,
    AVERAGE: tl.constexpr, ONE: tl.constexpr, EPS: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """tau (N, C), or (N, 1) where one alpha meets a shared average (or none). Where they are kept, the state, and A
    (N, C) of its parts (SPLIT).

    A program takes BN samples through the gate: C is at most BC, H at most BH.
    """
    await_previous(DEPENDENT)
    C = CA * ALIGN
    H = HA * ALIGN
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    # all loads come before the first product, so that they are waited for once
    a = added_up(partial, n, N, c, C, parts, SPLIT)
    first = transposed(w1, h, H, c, C)
    first_bias = tl.load(b1 + h, h < H, 0.0)
    if ONE:
        second, bias = tl.load(w2 + h, h < H, 0.0), tl.load(b2)
    else:
        second, bias = transposed(w2, c, C, h, H), tl.load(b2 + c, c < C, 0.0)
    if mean is not None:
        center, scale = center_and_scale(mean, var, h, h < H, EPS)
        weight, shift = weight_and_bias(gamma, beta, h, h < H)
    v = product(held(a, HELD), held(first, HELD), nothing(1, BN, BH, a.dtype), PRECISION) + across(first_bias)
    if state is not None:
        store_rows(state, v, n, N, h, H)
    if SPLIT and pooled is not None:
        store_rows(pooled, a, n, N, c, C)
    if mean is not None:
        v, _ = scaled(standardised(v, center, scale), scale, weight, shift)
    if ONE:
        alpha = tl.sigmoid(tl.sum(relu(v) * across(second), 1) + bias)[:, None]
    else:
        alpha = tl.sigmoid(product(relu(v), held(second, HELD), nothing(1, BN, BC, a.dtype), PRECISION) + across(bias))
    o = tl.arange(0, 1) if ONE else c
    outputs = 1 if ONE else C
    if state is not None:
        store_rows(alphas_of(state, N, H), alpha, n, N, o, outputs)
    if AVERAGE == "channel":
        store_rows(tau, alpha * held(a, HELD), n, N, c, C)
    elif AVERAGE == "sample":
        store_rows(tau, alpha * (tl.sum(held(a, HELD), 1) / C.to(a.dtype))[:, None], n, N, o, outputs)
    else:
        store_rows(tau, alpha, n, N, o, outputs)


def whole_gate_cost(step: Step, parts: int) -> Cost:
    s = Sizes.of(step)
    read = parts * s.pooled + s.w1 + s.b1 + s.norm + s.w2 + s.b2
    kept = s.hidden + s.alpha + (s.pooled if parts > 1 else 0)
    return Cost(read, s.tau + step.keep * kept, ("whole_gate_kernel",))
